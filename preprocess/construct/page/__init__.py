"""The page of a construction: what each stage cost, what its scores are, and pictures of what was kept and dropped."""
