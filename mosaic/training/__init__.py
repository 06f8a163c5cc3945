"""Training of the reference LoRA: the loop, and what makes a run exact, resumable and watched."""

from mosaic.training.trainer import Trainer, train

__all__ = ["Trainer", "train"]
