"""The commands, and what they stand on."""

import mosaic  # noqa: F401  # before torch: it sets how threads wait
