"""The page in the browser; the command is scripts/app.py."""
