"""Stage 5: correspondences of the picture with each reference, disjoint over the references (Eq. 2)."""
