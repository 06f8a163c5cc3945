"""Tiny numbers are 0 within the context, and come back behind it, also after an error."""

import pytest
import torch
from torch import Tensor

from mosaic.weights.numbers import without_tiny_numbers


def tiny() -> Tensor:
    return torch.full((64,), 1e-30) * 1e-10


def fail() -> None:
    with without_tiny_numbers():
        assert not tiny().any()
        raise KeyError


def test_tiny_numbers_are_zero_within_alone() -> None:
    assert tiny().all()
    with pytest.raises(KeyError):
        fail()
    assert tiny().all()
