"""Stage 4: each cut-out becomes a reference, a picture of the same subject from another view on white."""
