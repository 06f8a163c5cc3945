"""The pocket world: a procedural, seeded source of multi-subject pictures, and what is trained on it."""
