"""The cases file: what to draw, in many shapes."""
