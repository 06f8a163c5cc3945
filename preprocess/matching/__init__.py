"""From pictures to correspondences."""
