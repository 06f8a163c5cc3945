"""Permissions and content of tensor files."""

import os
from pathlib import Path
from stat import S_IMODE

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mosaic.files import save_tensors
from mosaic.lora.files import write_tensors


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, mask: int) -> None:
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2)}
    before = os.umask(mask)
    try:
        save_tensors(tensors, tmp_path / "plain.safetensors")
        write_tensors(tensors, tmp_path / "lora.safetensors", {"key": "text"})
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name
        assert all(torch.equal(found, tensors[name]) for name, found in load_file(path).items())
        assert load_file(path).keys() == tensors.keys()
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "key": "text"}
    with safe_open(tmp_path / "plain.safetensors", framework="pt") as file:
        assert file.metadata() is None
