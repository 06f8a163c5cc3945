"""The paper: tokens, correspondences, losses, flow matching, measures. Needs torch only; read this first."""
