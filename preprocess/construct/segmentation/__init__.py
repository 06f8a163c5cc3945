"""Stage 3: where the subjects stand in the picture."""
