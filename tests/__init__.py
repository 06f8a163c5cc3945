"""The tests, room by room as in mosaic/."""

import mosaic  # noqa: F401  # before torch: it sets how threads wait
