"""Stage 2: a picture of each prompt, and what speaks against it."""
