"""The tests, room by room as in mosaic/."""

import gc

import mosaic  # noqa: F401  # before torch: it sets how threads wait

gc.disable()  # while everything is imported, which makes no garbage; until the tests are collected
