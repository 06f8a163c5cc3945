"""Training data from nothing: prompts, pictures, masks, references and correspondences, stage by stage (paper, Section 3)."""
