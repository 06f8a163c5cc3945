"""From pictures to training data."""

import mosaic  # noqa: F401  # before torch: it sets how threads wait
