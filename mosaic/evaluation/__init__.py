"""Benchmarks of multi-subject generation, for pictures of any generator: what is measured, and how it is averaged."""
