"""The repository form: what `push.py` writes gives the samples of the folder, bit for bit, in training too; and what is refused."""

import dataclasses
import io
import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from mosaic.data import BucketBatchSampler, DatasetWriter, Manifest, MultiReferenceDataset, ReferenceRecord, Sample, SampleRecord, collate
from mosaic.data.multi_reference.repository import HubId, hub_id
from mosaic.training import train
from preprocess import convert, match, publishing, push
from scripts.doctor import command as doctor
from tests import forks, runs

OPTIONS: dict[str, Any] = {"image_size": (16, 24), "reference_size": 12, "target_token_grid": (4, 6), "reference_token_grid": (3, 3)}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """As with HF_HUB_OFFLINE=1, and a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        yield cache
        datasets.enable_progress_bars()


def picture(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def record(index: int, split: str, num_references: int, **changes: Any) -> SampleRecord:
    """Targets as JPEG; grids, masks, scores and kinds on some references only; every third sample has no points."""
    references = []
    for k in range(num_references):
        points = np.array([[k, 12 * k], [k + 7, 12 * k + 3]]) if index % 3 else None
        mask = (np.arange(16 * 24).reshape(16, 24) % (k + 2)) == 0 if k else None
        grid = (6, 12) if k == 1 else None
        references.append(
            ReferenceRecord(picture(10 * index + k, 20, 20 + 4 * k), f"thing {k}", points, mask, grid, {"clip": 0.5} if k else {}, "object")
        )
    buffer = io.BytesIO()
    picture(900 + index, 16, 24).save(buffer, "JPEG")
    values = {"metadata": {"source": "test", "number": index}, "scores": {"q": 1.0} if index else {}} | changes
    return SampleRecord(f"{split}-{index}", split, f"prompt ü {index}", buffer.getvalue(), references, (6, 6), (8, 12), **values)


def write(root: Path, *samples: SampleRecord) -> Path:
    with DatasetWriter(root) as writer:
        for sample in samples:
            writer.add(sample)
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, the folder form, and `repository`, of several shards; not to be changed."""
    place = tmp_path_factory.mktemp("made")
    kinds = [("train", 1), ("train", 2), ("heldout", 3), ("train", 2), ("train", 1), ("heldout", 1), ("train", 6), ("train", 2)]
    data = write(place / "data", *(record(index, *kind) for index, kind in enumerate(kinds)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "GROUP_ROWS", 2)
        publishing.write_repository(data, place / "repository", "cc-by-4.0", "repository", shard_bytes=12_000)
    return place


def both(made: Path, split: str) -> tuple[MultiReferenceDataset, MultiReferenceDataset]:
    first, second = (MultiReferenceDataset(made / name, split, **OPTIONS) for name in ("data", "repository"))
    return first, second


def assert_equal(first: Sample, second: Sample) -> None:
    assert (first.id, first.prompt, first.missing) == (second.id, second.prompt, second.missing)
    assert torch.equal(first.target, second.target)
    assert torch.equal(first.references, second.references)
    assert [points.tolist() for points in first.points] == [points.tolist() for points in second.points]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_samples_are_those_of_the_folder(made: Path, split: str) -> None:
    folder, repository = both(made, split)
    assert repository.sample_ids() == folder.sample_ids()
    assert repository.prompts() == folder.prompts()
    assert np.array_equal(repository.batch_keys, folder.batch_keys)
    assert repository.report() == folder.report()
    assert folder.report()["missing_points"] == {"train": 3, "heldout": 0}[split]
    for index in range(len(folder)):
        assert_equal(folder[index], repository[index])
        ours, theirs = folder.inspect(index), repository.inspect(index)
        assert (ours.reference_grids, ours.target_grid, ours.missing) == (theirs.reference_grids, theirs.target_grid, theirs.missing)
        for mine, other in zip(ours.masks, theirs.masks, strict=True):
            assert (mine is None) == (other is None)
            assert mine is None or torch.equal(mine, other)
        assert [points.tolist() for points in ours.points] == [points.tolist() for points in theirs.points]


def test_every_file_and_value_is_kept(made: Path) -> None:
    assert len(list((made / "repository/data").glob("train-*-of-*.parquet"))) > 2
    folder, repository = (Manifest(made / name, None) for name in ("data", "repository"))
    order = {name: index for index, name in enumerate(repository.column("id"))}
    for index in range(len(folder)):
        stored, row, other = folder.values(index), folder.row(index), order[folder.row(index).id]
        values, found = repository.values(other), repository.row(other)
        for name in ("id", "split", "prompt", "reference_grid", "target_grid", "target_size", "scores", "metadata"):
            assert values[name] == stored[name], name
        pairs = [(row.target, found.target)]
        for mine, theirs, ours, their in zip(row.references, found.references, stored["references"], values["references"], strict=True):
            assert {**ours, "image": "", "mask": ""} == {**their, "image": "", "mask": ""}
            pairs += [(mine.image, theirs.image)] + ([] if mine.mask is None else [(mine.mask, theirs.mask)])
        if (made / "data" / row.points).exists():
            pairs.append((row.points, found.points))
        for mine, theirs in pairs:
            assert repository.folder.read(theirs) == (made / "data" / mine).read_bytes()


def test_a_file_that_no_row_holds(made: Path) -> None:
    manifest = Manifest(made / "repository", "train")
    with pytest.raises(FileNotFoundError, match=r"repository: points/0 is not held by its row"):
        manifest.folder.read("points/0")
    with pytest.raises(ValueError, match=r"here: must be a file in a local folder, but .*repository holds its files in its rows"):
        manifest.file("points/0", "here")


def test_datasets_itself_reads_it(made: Path) -> None:
    found = datasets.load_dataset(str(made / "repository"))
    assert {name: len(split) for name, split in found.items()} == {"train": 6, "heldout": 2}
    row = found["train"][1]
    assert row["target"].size == (24, 16)
    assert row["references"][1]["mask"].size == (24, 16)
    assert found["train"].features == publishing.features()
    streamed = datasets.load_dataset(str(made / "repository"), split="train", streaming=True)
    assert [one["id"] for one in streamed] == found["train"]["id"]


def test_the_card(made: Path) -> None:
    text = (made / "repository/README.md").read_text()
    card = huggingface_hub.DatasetCard(text)
    assert card.data.license == "cc-by-4.0"
    assert [(one["name"], one["num_examples"]) for one in card.data.dataset_info["splits"]] == [("train", 6), ("heldout", 2)]
    assert "| train | 6 | 3 | 2 | 3 | 0 | 0 | 0 | 1 |" in text
    assert "| heldout | 2 | 2 | 1 | 0 | 1 | 0 | 0 | 0 |" in text
    assert "* target 8 x 12, references 6 x 12 or 6 x 6: 5 samples" in text
    assert "--set data.root=repository" in text
    assert str(made) not in text


def test_the_card_says_how_it_was_matched(tmp_path: Path) -> None:
    data = write(tmp_path / "data", record(1, "train", 1))
    settings = {"order": ["dift", "vae"], "matching": {"consensus": 1}, "extractors": {"vae": {"weights": "/home/me/vae"}}}
    (data / "matching.json").write_text(json.dumps(settings))
    assert push.main([str(data), "--to", f"file://{tmp_path}/out", "--license", "mit"]) == 0
    text = (tmp_path / "out/README.md").read_text()
    assert '* extractors: `["dift", "vae"]`\n* consensus: `1`' in text
    assert "/home/me" not in text


def test_the_card_of_constructed_data_names_their_models_and_licence(tmp_path: Path) -> None:
    data = write(tmp_path / "data", record(1, "train", 1))
    flux = {"model": "black-forest-labs/FLUX.1-dev", "revision": "0123456789abcdef"}
    construction = {
        "synthesis": {"settings": {"model": "black-forest-labs/FLUX.1-dev"}, "models": {"pipeline": "FluxPipeline", **flux}},
        "points": {"models": {"own": {"model": "a|b", "revision": None}}},
    }
    described = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**described, "construction": construction, "license": "apache-2.0"}))
    assert push.main([str(data), "--to", f"file://{tmp_path}/out"]) == 0
    text = (tmp_path / "out/README.md").read_text()
    assert huggingface_hub.DatasetCard(text).data.license == "apache-2.0"
    (rows,) = re.findall(r"\| stage .*\n\|---.*\n((?:\|.*\n)+)", text)
    assert rows.splitlines() == [
        "| synthesis | `black-forest-labs/FLUX.1-dev` | 0123456789ab | FLUX.1 [dev] Non-Commercial License |",
        "| points | `a/b` | - | see its card |",
    ]
    assert push.main([str(data), "--to", f"file://{tmp_path}/other", "--license", "mit"]) == 0
    assert huggingface_hub.DatasetCard((tmp_path / "other/README.md").read_text()).data.license == "mit"


def test_the_same_data_give_the_same_files(made: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert push.main([str(made / "repository"), "--to", str(tmp_path / name), "--license", "mit"]) == 0
    first, second = (runs.files_below(tmp_path / name) for name in ("a", "b"))
    second["README.md"] = second["README.md"].replace(b"# b\n", b"# a\n").replace(b"root=b\n", b"root=a\n").replace(b'("b"', b'("a"')
    assert first == second
    again = MultiReferenceDataset(tmp_path / "a", "train", **OPTIONS)  # a repository of a repository
    for index in range(len(again)):
        assert_equal(again[index], both(made, "train")[0][index])


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_and_resuming(made: Path, method: str) -> None:
    folder, repository = both(made, "train")
    if method == "forkserver":
        forks.start_server()
    sampler = BucketBatchSampler(repository.batch_keys, 2, seed=3)
    sampler.set_epoch(1, first_step=1)  # a run that goes on within an epoch
    options = {"num_workers": 2, "multiprocessing_context": multiprocessing.get_context(method)}
    found = list(DataLoader(repository, batch_sampler=sampler, collate_fn=collate, **options))
    expected = [collate([folder[index] for index in indices]) for indices in sampler]
    assert [batch.ids for batch in found] == [batch.ids for batch in expected]
    assert len(found) == 2
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.references, other.references)


@pytest.mark.usefixtures("fresh_accelerator")
def test_training_is_equal_bit_for_bit_and_resumes_on_the_other_form(world: Path, tmp_path: Path) -> None:
    publishing.write_repository(world / "data", tmp_path / "repository", "mit", "repository")
    for name, root in (("folder", world / "data"), ("repository", tmp_path / "repository")):
        options = {"data__root": str(root), "training__max_steps": 4, "training__checkpoint_every": 2}
        train(runs.make_config(world, tmp_path / name, **options))
    files = sorted(path.relative_to(tmp_path / "folder") for path in (tmp_path / "folder").rglob("*.safetensors"))
    assert len(files) >= 4
    for file in files:  # adapters, optimizer states
        runs.assert_same_tensors(load_file(tmp_path / "folder" / file), load_file(tmp_path / "repository" / file))
    config = runs.make_config(world, tmp_path / "folder", data__root=str(tmp_path / "repository"), training__max_steps=5)
    train(config, resume="auto")
    assert any((tmp_path / "folder/checkpoints").glob("step_*5"))


def test_back_into_a_folder(made: Path, tmp_path: Path) -> None:
    """All that the folder had, but for the names of its files and their order."""
    assert convert.main(["repository", str(made / "repository"), str(tmp_path / "again")]) == 0
    first, second = (Manifest(place, None) for place in (made / "data", tmp_path / "again"))
    order = {name: index for index, name in enumerate(second.column("id"))}
    for index in range(len(first)):
        assert second.values(order[first.row(index).id]) == first.values(index)
    before, after = runs.files_below(made / "data"), runs.files_below(tmp_path / "again")
    assert before.pop("manifest.parquet") != after.pop("manifest.parquet")  # splits follow each other now
    assert before == after


def test_the_doctor_and_matching(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--image-size", "16", "--reference-size", "16", "--token-size", "4", "--workers", "0", "--json"]
    found = []
    for name in ("data", "repository"):
        doctor.main([str(made / name), *sizes, str(tmp_path / f"{name}.json")])
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert found[0] == found[1]
    capsys.readouterr()
    assert match.main(["--data", str(made / "repository"), "--extractors", "pixels"]) == 2
    assert "repository: is in the repository form, and matching writes files into a folder." in capsys.readouterr().err
    assert sorted(path.name for path in (made / "repository").iterdir()) == ["README.md", "data"]


def test_a_folder_does_not_import_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # now an import fails
    assert len(Manifest(made / "data", "train")) > 0
    with pytest.raises(ImportError, match="datasets"):
        Manifest(made / "repository", "train")


# ---- what is refused


def spoilt(made: Path, tmp_path: Path, change: Callable[[list[dict[str, Any]]], None], schema: pa.Schema | None = None) -> Path:
    """A repository of one Parquet file whose rows were changed."""
    (tmp_path / "set").mkdir()
    rows = [row for path in sorted((made / "repository/data").glob("train-*")) for row in pq.read_table(path).to_pylist()]
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema or publishing.features().arrow_schema), tmp_path / "set/part.parquet")
    return tmp_path / "set"


def edit(row: int, **values: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[row].update(values)


def edit_reference(k: int, **values: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[4]["references"][k].update(values)


ROW = 'set[train][4] (id "train-6")'
NO_PATHS = "must hold the encoded picture itself, got none; pictures that are named by a path or an address are not read."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(4, target={"bytes": None, "path": "/etc/passwd"}), f"set[train][4].target: {NO_PATHS}"),
        (edit(4, target=None), f"set[train][4].target: {NO_PATHS}"),
        (edit_reference(2, image={"bytes": None, "path": "https://example.org/a.png"}), f"set[train][4].references[2].image: {NO_PATHS}"),
        (edit(4, references=[]), f"{ROW}.references: must hold at least one reference"),
        (edit(4, references=None), "set[train][4].references: must not be null."),
        (edit(4, prompt=" "), f"{ROW}.prompt: must not be empty"),
        (edit(4, id="../x"), 'set[train][4] (id "../x").id: must be of letters'),
        (edit(4, id="train-0"), 'set: ids must be unique, but "train-0" is the id of 2 rows.'),
        (edit(4, target_grid=[8, 70_000]), f"{ROW}.target_grid: must be at most 4096"),
        (edit_reference(0, grid=[1, 0]), f"{ROW}.references[0].grid: must be two positive integers"),
        (edit(4, target={"bytes": b"no picture", "path": None}), f"{ROW}.target: the file cannot be decoded as a picture"),
        (edit(4, points=b"damaged"), f"{ROW}.points: points/4 is not a readable safetensors file"),
    ],
)  # fmt: skip
def test_rows_are_checked_as_a_manifests(made: Path, tmp_path: Path, change: Any, message: str) -> None:
    root = spoilt(made, tmp_path, change)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/{message}")):
        MultiReferenceDataset(root, "train", **OPTIONS)[4]


def test_columns_are_looked_at_before_anything_is_copied(made: Path, tmp_path: Path, offline: Path) -> None:
    before = set(offline.rglob("*.arrow"))
    whole = publishing.features().arrow_schema
    paths = whole.set(whole.get_field_index("target"), pa.field("target", pa.string())).remove_metadata()
    for number, (schema, message) in enumerate(
        [
            (whole.remove(whole.get_field_index("points")).remove_metadata(), "the column points is missing. Found: id, prompt"),
            (paths, "the column target must hold pictures, as structs with a field bytes (Image), got string."),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        root = spoilt(made, tmp_path / str(number), lambda rows: [row.update(target="a.png") for row in rows], schema) if number else None
        root = root or spoilt(made, tmp_path / str(number), lambda _: None, schema)
        with pytest.raises(ValueError, match=re.escape(f"{root}: {message}")):
            Manifest(root, "train")
    assert set(offline.rglob("*.arrow")) == before


def test_damaged_shards_and_unknown_splits(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape('repository: has no sample of the split "test". Splits found: heldout, train.')):
        Manifest(made / "repository", "test")
    root = spoilt(made, tmp_path, lambda _: None)
    content = bytearray((root / "part.parquet").read_bytes())
    content[200:4000] = bytes(3800)
    (root / "part.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{root}: cannot be read as a data set of the Hugging Face hub (")):
        Manifest(root, "train")


def test_ids_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_id("user/name") == hub_id("hf://datasets/user/name/") == HubId("user/name", None)
    assert hub_id("user/name@v1.0") == HubId("user/name", "v1.0")
    assert [hub_id(name) for name in ("name", "/user/name", "./name", "a/b/c", "../a", "a b/c", "s3://a/b", "a/..")] == [None] * 8
    monkeypatch.chdir(tmp_path)
    for name in ("user/name", "hf://datasets/user/name", "user/name@main"):
        with pytest.raises(ValueError, match=rf"{name}: the Hugging Face hub cannot be reached, and the cache does not hold this data set"):
            Manifest(name, "train")
    Path("user").mkdir()
    with pytest.raises(FileNotFoundError, match="user/name: there is no such folder; .* is written hf://datasets/user/name here"):
        Manifest("user/name", "train")


def test_what_the_hub_is_asked_for(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, opened = [], datasets.load_dataset_builder
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda path, **options: asked.append((path, options)) or opened(str(made / "repository"))
    )
    manifest = Manifest("user/name@v1.0", "train")
    assert asked == [("hf://datasets/user/name", {"revision": "v1.0"})]
    assert manifest.place(0) == 'user/name@v1.0[train][0] (id "train-0")'


# ---- the command


class FakeHub:
    """Takes what `HfApi` is called with."""

    def __init__(self, files: tuple[str, ...] = (".gitattributes",), private: bool = False) -> None:
        self.files, self.private, self.calls, self.uploaded = files, private, [], {}

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append((repo_id, options))

    def dataset_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private, siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(options)
        self.uploaded = runs.files_below(Path(options["folder_path"]))


def test_pushing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hub = FakeHub(private=True)
    monkeypatch.setattr(push, "HfApi", lambda: hub)
    monkeypatch.chdir(tmp_path)
    given = [str(made / "data"), "--to", "user/name", "--license", "mit"]
    assert push.main([*given, "--private"]) == 0
    assert hub.calls[0] == ("user/name", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert (hub.calls[1]["repo_id"], hub.calls[1]["delete_patterns"]) == ("user/name", ["data/*.parquet"])
    assert sorted(hub.uploaded) == ["README.md", "data/heldout-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"]
    assert b"--set data.root=hf://datasets/user/name\n" in hub.uploaded["README.md"]
    assert not Path(hub.calls[1]["folder_path"]).exists()
    for hub, options, message in (
        (FakeHub(("README.md", "x")), [], "--to: user/name has files already (README.md, x)."),
        (FakeHub(), ["--private"], "--private: user/name is there already, and public."),
    ):
        assert push.main([*given, *options]) == 2
        assert message in capsys.readouterr().err
        assert not hub.uploaded
    hub = FakeHub(("README.md", "x"))
    assert push.main([*given, "--replace"]) == 0
    assert hub.uploaded


def test_what_the_command_refuses(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    data = str(made / "data")
    for place, message in (
        ("outputs/set", "--to: must be user/name or hf://datasets/user/name for the hub, and ./name"),
        ("set", "--to: must be user/name"),
        ("user/name@v1", "--to: must be user/name"),
        ("./outputs", "outputs: exists already"),
        ("user/name", "--to: the Hugging Face hub does not take user/name ("),
    ):
        assert push.main([data, "--to", place, "--license", "mit"]) == 2
        assert message in capsys.readouterr().err
    assert push.main([data, "--to", "user/name"]) == 2
    assert "--license must be given, for" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        push.main([data, "--to", "./a", "--license", "My own"])
    data = write(tmp_path / "data", dataclasses.replace(record(1, "train", 1), split="a-b"))
    assert push.main([str(data), "--to", "./a", "--license", "mit"]) == 2
    assert 'the hub takes splits of letters, digits, "_" and inner dots only, got "a-b"' in capsys.readouterr().err
    data = write(tmp_path / "other", record(1, "train", 1))
    next((data / "images").glob("*ref0*")).unlink()
    assert push.main([str(data), "--to", "./a", "--license", "mit"]) == 2
    assert '(id "train-1").references[0].image: file not found: ' in capsys.readouterr().err
    assert not Path("a").exists()
