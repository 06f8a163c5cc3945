"""The data reader on a small data set written here, batches, and the sampler."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from mosaic.config.sections import DataConfig
from mosaic.data import BucketBatchSampler, MultiReferenceDataset, Sample, collate, open_dataset
from mosaic.data.samples import left_to_right
from mosaic.method.correspondence import validate_points
from mosaic.method.grids import Grid

NUM_REFERENCES = [1, 2, 2, 3, 2]
OPTIONS: dict[str, Any] = {
    "image_size": (16, 32),
    "reference_size": 16,
    "target_token_grid": (2, 4),
    "reference_token_grid": (2, 2),
}


class Writer:
    """A data set of five training samples and one held-out one; stored at twice the training size, points on grids of 8 px of that size."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.description: Any = {"format": "mosaic-multi-reference", "version": 1}
        self.rows = [self._sample(index, num_references) for index, num_references in enumerate([*NUM_REFERENCES, 1])]
        self.rows[5]["split"] = "heldout"

    def _sample(self, index: int, num_references: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        (self.root / "images").mkdir(exist_ok=True)
        (self.root / "points").mkdir(exist_ok=True)
        references = []
        for name, shape in [(f"{index}", (32, 64, 3))] + [(f"{index}_{k}", (32, 32, 3)) for k in range(num_references)]:
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(self.root / f"images/{name}.png")
            if "_" in name:
                references.append({"image": f"images/{name}.png", "phrase": "a cat", "mask": None})
        # Reference k owns column k of the fine target grid (4 x 8), so its token column is k // 2.
        points = {str(k): torch.tensor([[5, k], [6, 8 + k], [15, 24 + k]], dtype=torch.int32) for k in range(num_references)}
        save_file(points, self.root / f"points/{index}.safetensors")
        return {
            "id": f"s{index}",
            "split": "train",
            "prompt": f"prompt {index}",
            "target": f"images/{index}.png",
            "references": references,
            "points": f"points/{index}.safetensors",
            "reference_grid": [4, 4],
            "target_grid": [4, 8],
            "metadata": "{}",
        }

    def write(self) -> Path:
        (self.root / "dataset.json").write_text(json.dumps(self.description))
        fields = [(name, pa.string()) for name in ("id", "split", "prompt", "target", "points", "metadata")]
        reference = pa.struct([(name, pa.string()) for name in ("image", "phrase", "mask")])
        fields += [("references", pa.list_(reference)), ("reference_grid", pa.list_(pa.int32())), ("target_grid", pa.list_(pa.int32()))]
        pq.write_table(pa.Table.from_pylist(self.rows, schema=pa.schema(fields)), self.root / "manifest.parquet")
        return self.root


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path)


def test_sample(writer: Writer) -> None:
    dataset = MultiReferenceDataset(writer.write(), **OPTIONS)
    assert len(dataset) == 5
    assert dataset.num_references.tolist() == NUM_REFERENCES
    sample = dataset[3]
    assert (sample.id, sample.prompt) == ("s3", "prompt 3")
    assert (sample.target.shape, sample.references.shape) == ((3, 16, 32), (3, 3, 16, 16))
    assert sample.target.dtype == sample.references.dtype == torch.float32
    stored = Image.open(writer.root / "images/3_1.png").resize((16, 16), Image.Resampling.LANCZOS)
    expected = torch.from_numpy(np.array(stored)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(sample.references[1], expected)
    assert MultiReferenceDataset(writer.root, "heldout", **OPTIONS)[0].id == "s5"


def test_points_are_reduced_to_the_token_grids_and_disjoint(writer: Writer) -> None:
    dataset = MultiReferenceDataset(writer.write(), **OPTIONS)
    # Fine u 5, 6, 15 lie in cells (1, 1), (1, 2), (3, 3) of 4 x 4, so in tokens 0, 1, 3 of 2 x 2; fine v = k, 8 + k, 24 + k lie in rows
    # 0, 1, 3 and column k of 4 x 8, so v is token (0, k // 2) for the first two points, whose vote the lower u wins, and (1, k // 2).
    points = dataset[3].points
    validate_points(points, 4, 8)
    assert points[0].dtype == torch.int64
    assert points[0].tolist() == [[0, 0], [3, 4]]
    assert points[1].tolist() == []  # column 1 shares token column 0 with reference 0, which keeps it
    assert points[2].tolist() == [[0, 1], [3, 5]]


def test_references_from_left_to_right(writer: Writer) -> None:
    """Of four references the first stands in token column 3, the second has no points, the third and the fourth stand in columns 1 and 2."""
    data = DataConfig(root=str(writer.root), image_size=(16, 32), reference_size=16)
    writer.rows[3] = writer._sample(3, 4)
    points = [[[5, 6]], [], [[5, 2]], [[5, 3], [9, 12]]]  # of the fine columns 3 and 4 the third owns the first's token
    arrays = {str(k): torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2) for k, pairs in enumerate(points)}
    save_file(arrays, writer.write() / "points/3.safetensors")
    stored = open_dataset(data, "train", Grid(2, 4), Grid(2, 2))[3]
    assert [sorted(pairs[:, 1].remainder(4).tolist()) for pairs in stored.points] == [[3], [], [1], [2]]
    ordered = open_dataset(data.replace(reference_order="left_to_right"), "train", Grid(2, 4), Grid(2, 2)).of_split("train")[3]
    for k, old in enumerate((2, 3, 0, 1)):
        assert torch.equal(ordered.references[k], stored.references[old])
        assert torch.equal(ordered.points[k], stored.points[old])
    assert torch.equal(ordered.target, stored.target)
    masks = torch.arange(4.0)[:, None].expand(4, 8)
    assert left_to_right(replace(stored, masks=masks), 4).masks[:, 0].tolist() == [2, 3, 0, 1]
    turned = replace(stored, points=[torch.tensor([[0, v]]) for v in (4, 3, 1, 1)])  # the first token of the second row is the leftmost
    assert [pairs[0, 1] for pairs in left_to_right(turned, 4).points] == [4, 1, 1, 3]


def test_points_follow_the_frame_of_their_own_picture(writer: Writer) -> None:
    """A wide target loses columns 0, 1, 6 and 7 of its 8 to a square; a reference half as wide as high stands in the middle of its own."""
    Image.fromarray(np.zeros((32, 16, 3), np.uint8)).save(writer.root / "images/0_0.png")
    points = [
        [4, 2],
        [7, 5],
        [11, 7],
        [15, 0],
    ]  # u in rows 1, 1, 2, 3 and columns 0, 3, 3, 3 of 4 x 4; v in row 0; the last two are cut off
    save_file({"0": torch.tensor(points, dtype=torch.int32)}, writer.root / "points/0.safetensors")
    dataset = MultiReferenceDataset(writer.write(), **OPTIONS | {"image_size": (16, 16), "target_token_grid": (2, 2)})
    assert dataset[0].points[0].tolist() == [[0, 0], [1, 1]]


def test_full_resolution_is_not_resized(writer: Writer) -> None:
    dataset = MultiReferenceDataset(writer.write(), **OPTIONS | {"image_size": (32, 64), "reference_size": 32})
    stored = torch.from_numpy(np.array(Image.open(writer.root / "images/0.png"))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(dataset[0].target, stored)
    assert (dataset[0].target.min(), dataset[0].target.max()) == (-1, 1)


def change(row: int = 1, **values: Any) -> Any:
    """An edit of one row."""
    return lambda writer: writer.rows[row].update(values)


def reference(**values: Any) -> Any:
    """An edit of the last reference of row 1."""
    return lambda writer: writer.rows[1]["references"][1].update(values)


def describe(value: Any) -> Any:
    """Another dataset.json."""
    return lambda writer: setattr(writer, "description", value)


ROW = 'ROOT/manifest.parquet[1] (id "s1")'
PATH_RULE = 'must be relative to the data set\'s folder, with "/" and without "..", got'


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (describe([]), 'ROOT/dataset.json: must hold {"format": "mosaic-multi-reference", ...}, got [].'),
        (describe({"format": "mosaic-multi-reference", "version": 2}), "ROOT/dataset.json: version must be 1, got 2."),
        (describe({"format": "mosaic-multi-reference"}), "ROOT/dataset.json: version must be 1, got null."),
        (change(id="s0"), 'ROOT/manifest.parquet: ids must be unique, but "s0" is the id of 2 rows.'),
        (change(prompt=None), "ROOT/manifest.parquet[1].prompt: must not be null."),
        (change(prompt=" "), f'{ROW}.prompt: must not be empty, got " ".'),
        (change(target="/etc/passwd"), f'{ROW}.target: {PATH_RULE} "/etc/passwd".'),
        (change(target="images/../../x.png"), f'{ROW}.target: {PATH_RULE} "images/../../x.png".'),
        (change(target="images\\x.png"), f"{ROW}.target: {PATH_RULE} "),
        (
            change(id="a/b"),
            'ROOT/manifest.parquet[1] (id "a/b").id: must be of letters a to z, digits, "-" and "_", for files are named by it',
        ),
        (reference(mask="/m.png"), f'{ROW}.references[1].mask: {PATH_RULE} "/m.png".'),
        (change(target="C:/x.png"), f'{ROW}.target: {PATH_RULE} "C:/x.png".'),
        (change(points="../0.safetensors"), f'{ROW}.points: {PATH_RULE} "../0.safetensors".'),
        (change(points=""), f'{ROW}.points: must be a path, got "".'),
        (reference(image="../x.png"), f'{ROW}.references[1].image: {PATH_RULE} "../x.png".'),
        (reference(image=None), f"{ROW}.references[1].image: must be a path, got null."),
        (change(references=[]), f"{ROW}.references: must hold at least one reference, got an empty list."),
        (change(target_grid=[4]), f"{ROW}.target_grid: must be two positive integers, rows and columns, got [4]."),
        (change(target_grid=[4, 0]), f"{ROW}.target_grid: must be two positive integers, rows and columns, got [4, 0]."),
        (
            change(reference_grid=[1, 1]),
            f"{ROW}.reference_grid: must be about as fine as the token grid 2 x 2 or finer, got 1 x 1; so 1 of 5 samples.",
        ),
        (
            change(target_grid=[2, 3]),
            f"{ROW}.target_grid: must be about as fine as the token grid 2 x 4 or finer, got 2 x 3; so 1 of 5 samples.",
        ),
    ],
)
def test_a_bad_manifest_is_refused_at_the_start(writer: Writer, edit: Any, message: str) -> None:
    edit(writer)
    root = writer.write()
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('ROOT', str(root)))}"):
        MultiReferenceDataset(root, **OPTIONS)


def test_other_refusals_at_the_start(writer: Writer, tmp_path: Path) -> None:
    root = writer.write()
    manifest = tmp_path / "manifest.parquet"
    message = f'{manifest}[3] (id "s3").references: must be at most 2 (data.max_references), got 3; so 1 of 5 samples.'
    with pytest.raises(ValueError, match=re.escape(message)):
        MultiReferenceDataset(root, **OPTIONS, max_references=2)
    with pytest.raises(ValueError, match=re.escape(f'{manifest}: has no sample of the split "test". Splits found: heldout, train.')):
        MultiReferenceDataset(root, "test", **OPTIONS)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'no'}: there is no such folder")):
        MultiReferenceDataset(tmp_path / "no", **OPTIONS)
    table = pq.read_table(manifest)
    pq.write_table(table.drop_columns(["points"]), manifest)
    with pytest.raises(
        ValueError, match=re.escape(f"{manifest}: the column points is missing. Found: id, split, prompt, target, metadata")
    ):
        MultiReferenceDataset(root, **OPTIONS)
    pq.write_table(table.set_column(0, "id", pa.array(range(6))), manifest)
    with pytest.raises(ValueError, match=re.escape(f"{manifest}: the column id must be a string, got int64.")):
        MultiReferenceDataset(root, **OPTIONS)
    manifest.write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=re.escape(f"{manifest}: cannot be read as Parquet: ")):
        MultiReferenceDataset(root, **OPTIONS)
    manifest.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{manifest}: file not found.")):
        MultiReferenceDataset(root, **OPTIONS)


def points_file(tensors: dict[str, list[list[int]]], dtype: torch.dtype = torch.int32) -> Any:
    """An edit that stores other points for row 1 (K = 2)."""
    stored = {name: torch.tensor(values, dtype=dtype) for name, values in tensors.items()}
    return lambda writer: save_file(stored, writer.root / "points/1.safetensors")


def picture(name: str, height: int, width: int) -> Any:
    """An edit that stores another picture."""
    return lambda writer: Image.new("RGB", (width, height)).save(writer.root / "images" / name)


STORED = f"{ROW}.points: points/1.safetensors"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            picture("1.png", 32, 176),
            f"{ROW}.target_grid: must be about as fine as the tokens (2 x 4 over 16 x 32 px) or finer, got 4 x 8, whose cells are 0.50 x "
            "1.38 tokens large.",
        ),
        (lambda writer: (writer.root / "images/1_1.png").unlink(), f"{ROW}.references[1].image: file not found: ROOT/images/1_1.png."),
        (lambda writer: (writer.root / "images/1.png").write_bytes(b""), f"{ROW}.target: the picture file is empty (0 bytes)"),
        (lambda writer: (writer.root / "points/1.safetensors").write_bytes(b"x"), f"{STORED} is not a readable safetensors file"),
        (points_file({"0": [[0, 0]]}), f"{STORED} must hold one tensor per reference, ['0', '1'], got ['0']."),
        (
            points_file({"0": [[0, 0]], "1": [[0, 1], [16, 2]]}),
            f'{STORED}: tensor "1", point 1: u must lie in [0, 16) (grid 4 x 4), got 16.',
        ),
        (points_file({"0": [[0, -1]], "1": [[0, 1]]}), f'{STORED}: tensor "0", point 0: v must lie in [0, 32) (grid 4 x 8), got -1.'),
        (points_file({"0": [[0, 7]], "1": [[0, 7]]}), f"{STORED}: v = 7 belongs to references 0 and 1; points must be disjoint (Eq. 2)."),
        (points_file({"0": [[0]], "1": [[0]]}), f'{STORED}: tensor "0" must be int32 of shape [P, 2], got torch.int32 [1, 1].'),
        (
            points_file({"0": [[0, 7]], "1": [[0, 8]]}, torch.float32),
            f'{STORED}: tensor "0" must be int32 of shape [P, 2], got torch.float32',
        ),
    ],
)
def test_a_bad_sample_is_refused_and_named(writer: Writer, edit: Any, message: str) -> None:
    edit(writer)
    dataset = MultiReferenceDataset(writer.write(), **OPTIONS)
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{re.escape(message.replace('ROOT', str(writer.root)))}"):
        dataset[1]


def test_a_link_out_of_the_folder_is_refused(writer: Writer, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "x.png"
    (writer.root / "images/1.png").rename(outside)
    (writer.root / "images/1.png").symlink_to(outside)
    message = f"target: must stay in the data set's folder, but images/1.png leads to {outside}."
    with pytest.raises(ValueError, match=re.escape(message)):
        MultiReferenceDataset(writer.write(), **OPTIONS)[1]


def test_reference_without_points_is_kept(writer: Writer) -> None:
    save_file(
        {"0": torch.zeros(0, 2, dtype=torch.int32), "1": torch.tensor([[0, 3]], dtype=torch.int32)}, writer.root / "points/1.safetensors"
    )
    points = MultiReferenceDataset(writer.write(), **OPTIONS)[1].points
    assert [list(pairs.shape) for pairs in points] == [[0, 2], [1, 2]]


def test_collate(writer: Writer) -> None:
    dataset = MultiReferenceDataset(writer.write(), **OPTIONS)
    batch = collate([dataset[1], dataset[4]])
    assert (batch.ids, batch.prompts, batch.num_references) == (["s1", "s4"], ["prompt 1", "prompt 4"], 2)
    assert (batch.targets.shape, batch.references.shape) == ((2, 3, 16, 32), (2, 2, 3, 16, 16))
    assert torch.equal(batch.references[1, 0], dataset[4].references[0])
    assert [[len(pairs) for pairs in sample] for sample in batch.points] == [[2, 0], [2, 0]]
    with pytest.raises(ValueError, match="must share the number and size of references"):
        collate([dataset[0], dataset[1]])
    other = Sample("x", "y", torch.zeros(3, 8, 8), dataset[1].references, [])
    with pytest.raises(ValueError, match="must share the target size"):
        collate([dataset[1], other])
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])


def test_workers_and_pickle(writer: Writer) -> None:
    dataset = MultiReferenceDataset(writer.write(), **OPTIONS)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[2].target, dataset[2].target)
    sampler = BucketBatchSampler(dataset.num_references, batch_size=2, seed=0)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=1)
    batches = list(loader)
    assert [batch.ids for batch in batches] == [[f"s{index}" for index in indices] for indices in sampler]


COUNTS = np.array([1] * 11 + [2] * 9 + [3] * 1 + [4] * 3)


def epoch(number: int = 0, batch_size: int = 2, rank: int = 0, world_size: int = 1, seed: int = 5, first_step: int = 0) -> list[list[int]]:
    """The batches of one epoch and rank."""
    sampler = BucketBatchSampler(COUNTS, batch_size, seed, rank, world_size)
    sampler.set_epoch(number, first_step)
    batches = list(sampler)
    assert len(batches) == len(sampler) - first_step
    return batches


def test_batches_have_one_k_and_cover_all_but_the_remainders() -> None:
    batches = epoch()
    assert all(len(set(COUNTS[batch])) == 1 for batch in batches)
    assert all(len(batch) == 2 for batch in batches)
    used = [index for batch in batches for index in batch]
    assert len(set(used)) == 10 + 8 + 1 + 2
    assert [batch for batch in batches if len(set(batch)) < 2] == [[20, 20]]  # the only sample of its K
    order = [COUNTS[batch[0]] for batch in batches]
    assert order != sorted(order)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert epoch(3) == epoch(3)
    assert len({str(epoch(0)), str(epoch(1)), str(epoch(0, seed=6))}) == 3
    assert {index for number in range(20) for batch in epoch(number) for index in batch} == set(range(len(COUNTS)))
    assert epoch(2, first_step=4) == epoch(2)[4:]


@pytest.mark.parametrize(("batch_size", "world_size", "accumulation"), [(2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 1, 4), (1, 2, 2)])
def test_ranks_and_micro_batches_share_the_global_batches(batch_size: int, world_size: int, accumulation: int) -> None:
    """Slice m * world_size + r of a global batch is micro-batch m of rank r; also for a K with fewer samples than a global batch."""
    shares = []
    for rank in range(world_size):
        sampler = BucketBatchSampler(COUNTS, batch_size, 5, rank, world_size, accumulation)
        sampler.set_epoch(1, first_step=1)
        shares.append(list(sampler))
        assert (sampler.global_batch, len(sampler)) == (4, sampler.steps_per_epoch * accumulation)
        assert sampler.num_repeated == 1 + 3
    joined = [index for row in zip(*shares, strict=True) for batch in row for index in batch]
    assert joined == [index for batch in epoch(1, batch_size=4, first_step=1) for index in batch]


@pytest.mark.parametrize("batch_size", [2, 4, 8, 16])
def test_no_sample_counts_more_than_another(batch_size: int) -> None:
    """A group too small for a global batch fills one, at its share of it; full groups leave their remainders out in turns."""
    ks, counted = COUNTS.copy(), np.zeros(len(COUNTS))
    sampler = BucketBatchSampler(COUNTS, batch_size, seed=5)
    epochs = 60
    for number in range(epochs):
        sampler.set_epoch(number)
        batches, shares = list(sampler), sampler.shares()
        assert len(shares) == len(batches) == sampler.steps_per_epoch
        for batch, share in zip(batches, shares, strict=True):
            assert share == min((ks == ks[batch[0]]).sum() / batch_size, 1)
            np.add.at(counted, batch, share / epochs)
    for k in (1, 2, 3, 4):
        size = (ks == k).sum()
        expected = 1.0 if size < batch_size else size // batch_size * batch_size / size  # less what is left out
        assert counted[ks == k].mean() == pytest.approx(expected)
        assert counted[ks == k] == pytest.approx(np.full(size, expected), abs=0.25)


def test_shares_go_on_where_an_epoch_is_resumed() -> None:
    sampler = BucketBatchSampler(COUNTS, 2, 5, accumulation=2)
    sampler.set_epoch(1)
    whole = sampler.shares()
    assert sorted(whole) == [0.25, 0.75, 1.0, 1.0, 1.0, 1.0]
    sampler.set_epoch(1, first_step=2)
    assert sampler.shares() == whole[2:]


@pytest.mark.parametrize("arguments", [([1], 0, 0), ([1], 1, 0, 2, 2), ([], 1, 0), ([1], 1, 0, 0, 1, 0)])
def test_sampler_refuses(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="batch_size, world_size and accumulation must be at least 1"):
        BucketBatchSampler(*arguments)
