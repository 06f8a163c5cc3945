"""FLUX with a reference branch: where the LoRA acts, attention and its rows, blocks, transformer, and what they cost."""
