"""What a run keeps, so that it can go on as if nothing had happened."""
