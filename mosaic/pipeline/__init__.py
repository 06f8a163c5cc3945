"""The diffusers pipeline: prompt and reference pictures to a picture."""
