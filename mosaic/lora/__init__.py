"""The reference LoRA on a transformer, and LoRA files of any kind."""
