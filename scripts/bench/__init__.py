"""What scripts/bench.py stands on."""
