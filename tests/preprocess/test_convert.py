"""Converters: sources written here, converted, read back."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mosaic.data import Manifest, MultiReferenceDataset, sample_id
from preprocess import convert
from tests.runs import files_below

ROOT = Path(__file__).resolve().parents[2]
POCKET = {"pretrained": str(ROOT / "assets/pocket/flux")}
PROMPTS = ("a cat and a mug", "a fish on the beach", "three things")
COUNTS = (2, 1, 3)


def noise(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def target(index: int) -> Image.Image:
    return noise(32, 32 + 16 * index, index)


def reference(index: int, k: int) -> Image.Image:
    return noise(40, 20 if k == 1 else 40, 100 * index + k + 10)


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def write_folder(root: Path) -> Path:
    for index, (prompt, num_references) in enumerate(zip(PROMPTS, COUNTS, strict=True)):
        folder = root / f"sample_{index}"
        folder.mkdir(parents=True)
        target(index).save(folder / "target.png")
        (folder / "prompt.txt").write_text(prompt + "\n")
        for k in range(num_references):
            reference(index, k).save(folder / f"ref_{(2, 10, 33)[k]}.png")  # in the order of numbers, not of letters
    mask = np.zeros((32, 32), np.uint8)
    mask[3:9, 4:7] = 255
    Image.fromarray(mask).save(root / "sample_0/mask_10.png")
    (root / ".cache").mkdir()
    return root


def write_uno(root: Path) -> Path:
    (root / "images").mkdir(parents=True)
    entries = []
    for index, (prompt, num_references) in enumerate(zip(PROMPTS, COUNTS, strict=True)):
        target(index).save(root / f"images/{index}.png")
        names = [f"images/{index}_{k}.png" for k in range(num_references)]
        for k, name in enumerate(names):
            reference(index, k).save(root / name)
        paths = {"image_path": names[0]} if num_references == 1 else {"image_paths": names}
        entries.append({"prompt": prompt, "image_tgt_path": f"images/{index}.png", **paths})
    (root / "list.json").write_text(json.dumps(entries))
    return root / "list.json"


def write_musar(root: Path, structs: bool = True) -> Path:
    """Rows of two references, one file of two rows and one of one."""
    (root / "data").mkdir(parents=True)

    def cell(picture: Image.Image) -> Any:
        return {"bytes": encoded(picture), "path": "x.png"} if structs else encoded(picture)

    rows = [
        {
            "cond_img_0": cell(reference(index, 0)),
            "cond_img_1": cell(reference(index, 1)),
            "tgt_img": cell(target(index)),
            "cond_prompt_0": "a cat",
            "cond_prompt_1": "something else",
            "prompt": prompt,
        }
        for index, prompt in enumerate(PROMPTS)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:2]), root / "data/train-00000.parquet")
    pq.write_table(pa.Table.from_pylist(rows[2:]), root / "data/train-00001.parquet")
    return root


WRITERS = {"folder": write_folder, "uno": write_uno, "musar": write_musar}


@pytest.mark.parametrize("source", WRITERS)
def test_round_trip(tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = WRITERS[source](tmp_path / "in")
    counts = (2, 2, 2) if source == "musar" else COUNTS
    assert convert.main([source, str(given), str(tmp_path / "out"), "--grid", "16"]) == 0
    assert "wrote 3 samples" in capsys.readouterr().out
    manifest = Manifest(tmp_path / "out", "train")
    assert len(manifest) == 3
    assert manifest.num_references.tolist() == list(counts)
    for index in range(3):
        row = manifest.row(index)
        pictures = [target(index), *(reference(index, k) for k in range(counts[index]))]
        assert row.id == sample_id(pictures, PROMPTS[index])
        assert row.prompt == PROMPTS[index]
        for path, picture in zip([row.target, *(entry.image for entry in row.references)], pictures, strict=True):
            assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / path)), np.asarray(picture))
        assert [tuple(entry.grid) for entry in row.references] == [(16, 8) if k == 1 else (16, 16) for k in range(counts[index])]
        assert row.target_size == (32, 32 + 16 * index)
        assert json.loads(row.metadata)["source"] == source
    options: dict[str, Any] = {"image_size": (32, 32), "reference_size": 32, "target_token_grid": (4, 4), "reference_token_grid": (4, 4)}
    dataset = MultiReferenceDataset(tmp_path / "out", **options)
    assert dataset.report()["missing_points"] == 3
    row = manifest.row(0)  # a matcher's turn: the file that the manifest names
    u = row.references[1].grid.num_tokens - 1
    save_file({"0": torch.zeros(0, 2, dtype=torch.int32), "1": torch.tensor([[u, 0]], dtype=torch.int32)}, tmp_path / "out" / row.points)
    assert dataset[0].missing == ()
    assert dataset[0].points[1].tolist() == [[14, 0]]  # the narrow reference's last cell: row 3, column 2 of 4 x 4


def test_masks_and_phrases(tmp_path: Path) -> None:
    assert convert.main(["folder", str(write_folder(tmp_path / "f")), str(tmp_path / "out")]) == 0
    masks = [entry.mask for entry in Manifest(tmp_path / "out", "train").row(0).references]
    assert masks[0] is None
    drawn = np.asarray(Image.open(tmp_path / "out" / masks[1]))
    assert drawn.shape == (32, 32)
    assert (drawn > 0).sum() == 18
    assert convert.main(["musar", str(write_musar(tmp_path / "m")), str(tmp_path / "out2")]) == 0
    rows = [Manifest(tmp_path / "out2", "train").row(index) for index in range(2)]
    assert [[entry.phrase for entry in row.references] for row in rows] == [["a cat", ""], ["", ""]]


def test_output_is_deterministic_and_files_are_copied(tmp_path: Path) -> None:
    given = write_folder(tmp_path / "in")
    for name in ("a", "b"):
        assert convert.main(["folder", str(given), str(tmp_path / name)]) == 0
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")
    stored = files_below(tmp_path / "a").values()
    assert (given / "sample_0/target.png").read_bytes() in stored


def test_musar_binary_cells_equal_structs(tmp_path: Path) -> None:
    for name, structs in (("a", True), ("b", False)):
        assert convert.main(["musar", str(write_musar(tmp_path / f"in_{name}", structs)), str(tmp_path / name)]) == 0
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")


def test_split_and_limit(tmp_path: Path) -> None:
    given = write_folder(tmp_path / "in")
    assert convert.main(["folder", str(given), str(tmp_path / "a"), "--split", "mine", "--limit", "2"]) == 0
    assert len(Manifest(tmp_path / "a", "mine")) == 2
    assert convert.main(["folder", str(given), str(tmp_path / "b"), "--heldout-share", "0.999999"]) == 0
    assert len(Manifest(tmp_path / "b", "heldout")) == 3


def spoil_folder(root: Path) -> str:
    (root / "sample_1/ref_2.png").write_bytes(b"no picture")
    return f"{root}/sample_1: the file cannot be decoded as a picture: {root}/sample_1/ref_2.png"


def spoil_uno(path: Path) -> str:
    entries = json.loads(path.read_text())
    entries[1]["image_path"] = "../outside.png"
    path.write_text(json.dumps(entries))
    return f"{path}[1].image_path[0]: must be relative to the data set's folder"


def spoil_musar(root: Path) -> str:
    path = root / "data/train-00000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[1]["cond_img_0"] = None
    pq.write_table(pa.Table.from_pylist(rows), path)
    return f"{path}[1].cond_img_0: must hold an encoded picture or the path of one, got null."


SPOILERS = {"folder": spoil_folder, "uno": spoil_uno, "musar": spoil_musar}


@pytest.mark.parametrize("source", WRITERS)
def test_a_bad_sample_ends_or_is_listed(tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = WRITERS[source](tmp_path / "in")
    message = SPOILERS[source](given)
    assert convert.main([source, str(given), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert convert.main([source, str(given), str(tmp_path / "out"), "--skip-invalid"]) == 0
    assert "wrote 2 samples" in capsys.readouterr().out
    listed = (tmp_path / "out.invalid.txt").read_text().splitlines()
    assert len(listed) == 1
    assert listed[0].startswith(message)
    assert len(Manifest(tmp_path / "out", "train")) == 2


def test_equal_samples_are_invalid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_uno(tmp_path / "in")
    path.write_text(json.dumps(json.loads(path.read_text())[:1] * 2))
    assert convert.main(["uno", str(path), str(tmp_path / "out"), "--skip-invalid"]) == 0
    assert "must be unique" in (tmp_path / "out.invalid.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder", "none", "out"], "none: there is no such folder"),
        (["folder", "empty", "out"], "empty: must hold one folder per sample"),
        (["uno", "none.json", "out"], "none.json: file not found."),
        (["uno", "bad.json", "out"], "bad.json: not valid JSON"),
        (["uno", "object.json", "out"], "object.json: must be a list of"),
        (["musar", "empty", "out"], "empty: must be a list (JSON, JSON Lines, Parquet) or a folder that holds Parquet files or JSON Lines"),
        (["musar", "bad.parquet", "out"], "bad.parquet: cannot be read as Parquet"),
        (["folder", "none", "empty"], "empty: exists already"),
    ],
)
def test_user_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("bad.json", "bad.parquet"):
        (tmp_path / name).write_text("{")
    (tmp_path / "object.json").write_text("{}")
    before = sorted(tmp_path.iterdir())
    assert convert.main(arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("error: ")
    assert message in errors[-1]
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_column_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_musar(tmp_path / "in")
    path = root / "data/train-00001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["cond_img_0"]), path)
    assert convert.main(["musar", str(root), str(tmp_path / "out")]) == 2
    assert f"{path}: the column cond_img_0 is missing." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "grid"),
    [
        ({"extends": str(ROOT / "configs/pocket.json")}, 16),  # tokens of 8 px: 8 x 8, and two cells per token
        ({"model": POCKET, "data": {"image_size": [320, 320], "reference_size": 8}}, 64),  # 40 x 40 tokens
        ({"model": POCKET, "data": {"image_size": [64, 64], "reference_size": 1024}}, 128),  # the references need more
        ({"model": POCKET, "data": {"reference_size": 8, "buckets": [[16, 144], [32, 32]]}}, 12),  # 2 x 18 tokens, about as many as 6 x 6
    ],
)
def test_a_config_decides_how_fine_the_grids_are(tmp_path: Path, overrides: dict[str, Any], grid: int) -> None:
    given, config = write_uno(tmp_path / "in"), tmp_path / "config.json"
    config.write_text(json.dumps(overrides))
    assert convert.main(["uno", str(given), str(tmp_path / "out"), "--config", str(config), "--limit", "1"]) == 0
    row = Manifest(tmp_path / "out", "train").row(0)
    assert tuple(row.target_grid) == tuple(row.reference_grid) == (grid, grid)


def test_a_grid_is_given_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convert.main(["uno", "list.json", str(tmp_path / "out"), "--config", "x.json", "--grid", "16"])
    assert "--config and --grid must not be given both" in capsys.readouterr().err
    assert convert.main(["uno", str(write_uno(tmp_path / "in")), str(tmp_path / "out"), "--config", str(tmp_path / "none.json")]) == 2
    assert "none.json: file not found" in capsys.readouterr().err


def test_references_of_columns_with_a_gap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those behind the gap would be left out; so would one of two columns of one name."""
    root = write_musar(tmp_path / "in")
    path = root / "data/train-00001.parquet"
    table = pq.read_table(path)
    for changed, message in (
        (table.append_column("cond_img_3", table["cond_img_1"]), "the column cond_img_3 would be left out: references are cond_img_0, "),
        (table.append_column("Cond_Img_2", table["cond_img_1"]), "the column Cond_Img_2 would be left out"),
        (table.append_column("prompt", table["prompt"]), "the column prompt must be there once, but is there 2 times."),
    ):
        pq.write_table(changed, path)
        assert convert.main(["musar", str(root), str(tmp_path / "out")]) == 2
        assert f"{path}: {message}" in capsys.readouterr().err
    path.rename(path.with_suffix(".PARQUET"))
    pq.write_table(table, path.with_suffix(".PARQUET"))
    assert convert.main(["musar", str(root), str(tmp_path / "out")]) == 0
    assert len(Manifest(tmp_path / "out", "train")) == 3


def test_a_text_that_is_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["uno", str(write_uno(tmp_path / "in")), str(tmp_path / "set")]) == 0
    table = pq.read_table(tmp_path / "set/manifest.parquet")
    for text, message in (("[" * 100_000, "not valid JSON"), ("[]", "must be a JSON object, got [].")):
        rows = [row | {"metadata": text} for row in table.to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "set/manifest.parquet")
        assert convert.main(["repository", str(tmp_path / "set"), str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert ".metadata: " in line
        assert message in line
