"""What the constructed data of the pocket world are worth; the command is scripts/construction_worth.py."""
