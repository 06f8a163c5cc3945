"""Several processes: replicated, sharded, DeepSpeed."""
