"""The JSON Schemas of configs and cases files."""
