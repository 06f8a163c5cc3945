"""What tells the weights of a component apart, without loading them."""

import hashlib
import json
from pathlib import Path

import pytest

from mosaic.weights.components import component_folder, component_revision


def write_component(folder: Path, config: dict, weights: bytes, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / name).write_bytes(weights)
    return folder


def test_revision_is_of_config_and_weights(tmp_path: Path) -> None:
    first = component_revision(write_component(tmp_path / "a", {"width": 8, "_diffusers_version": "1"}, b"weights"))
    assert first == component_revision(write_component(tmp_path / "b", {"_diffusers_version": "2", "width": 8}, b"weights"))
    others = [
        write_component(tmp_path / "c", {"width": 9}, b"weights"),
        write_component(tmp_path / "d", {"width": 8}, b"weightz"),
        write_component(tmp_path / "e", {"width": 8}, b"weights", "other.safetensors"),
    ]
    assert len({first, *(component_revision(folder) for folder in others)}) == 4
    (tmp_path / "a/README.md").write_text("no part of the model")
    assert component_revision(tmp_path / "a") == first


def test_all_files_of_a_tokenizer_count(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "merges.txt"):
        (tmp_path / name).write_text(name)
    before = component_revision(tmp_path)
    (tmp_path / "merges.txt").write_text("other")
    assert component_revision(tmp_path) != before


def test_files_of_the_hubs_store_are_known_by_their_names(tmp_path: Path) -> None:
    """The same revision as of a plain copy, and the content is not read."""
    plain = component_revision(write_component(tmp_path / "plain", {}, b"weights"))
    blob = tmp_path / "blobs" / hashlib.sha256(b"weights").hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(b"")
    folder = tmp_path / "snapshots/1/vae"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").symlink_to(blob)
    assert component_revision(folder) == plain


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder, and not a hub id"):
        component_folder(str(tmp_path / "no"), "vae")
    with pytest.raises(FileNotFoundError, match="has no folder vae"):
        component_folder(str(tmp_path), "vae")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        component_revision(tmp_path)
