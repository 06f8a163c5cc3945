"""Where weights come from, what tells them apart, and how they are stored."""
