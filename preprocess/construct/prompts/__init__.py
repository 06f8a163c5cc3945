"""Stage 1: what shall be in each picture, in words."""
