"""What scripts/lora_tools.py stands on."""
