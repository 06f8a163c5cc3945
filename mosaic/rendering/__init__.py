"""Cases to files: what to draw, recipes, the runner, and what it leaves."""
