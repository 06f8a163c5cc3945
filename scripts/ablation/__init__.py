"""The ablation in the pocket world; the command is scripts/ablation.py."""
