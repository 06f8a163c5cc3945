"""The cases file and its rendering: what to draw, in many shapes; recipes; the runner."""
