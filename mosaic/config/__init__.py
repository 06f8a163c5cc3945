"""The settings of training and inference."""
