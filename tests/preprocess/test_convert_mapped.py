"""Lists of any columns by a mapping: each form of a list, each ready mapping, placeholders, scores, and mappings that are wrong."""

import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mosaic.data import Manifest, MultiReferenceDataset, sample_id
from preprocess import convert
from preprocess.sources import rows as lists
from preprocess.sources.mapping import FOLDER, load_mapping, ready
from preprocess.sources.placeholders import resolve
from scripts.schemas import config as make_config_schema
from tests.preprocess.test_convert import encoded, reference, target
from tests.runs import files_below

MAPPING = {"name": "mine", "prompt": "text", "target": "made", "references": "given"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with pictures t0 to t2 and, of two references each, r0_0 to r2_1."""
    for index in range(3):
        target(index).save(tmp_path / f"t{index}.png")
        for k in range(2):
            reference(index, k).save(tmp_path / f"r{index}_{k}.png")
    return tmp_path


def entry(index: int = 0, **changes: Any) -> dict[str, Any]:
    return {"text": "a cat and a mug", "made": f"t{index}.png", "given": [f"r{index}_0.png", f"r{index}_1.png"]} | changes


def write(path: Path, entries: list[Any], form: str = "json") -> Path:
    path = path.with_suffix(f".{form}")
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(entries), path)
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, entries)) + "\n")
    else:
        path.write_text(json.dumps(entries))
    return path


OUTPUTS = itertools.count()


def convert_list(root: Path, given: Path, mapping: Any, *flags: str) -> tuple[int, Path]:
    """Convert by a mapping, a name or the settings; returns the exit code and the folder."""
    if not isinstance(mapping, str):
        (root / "mapping.json").write_text(json.dumps(mapping))
        mapping = str(root / "mapping.json")
    dest = root / f"out{next(OUTPUTS)}"
    return convert.main(["mapped", str(given), str(dest), "--mapping", mapping, "--grid", "16", *flags]), dest


def converted(root: Path, entries: list[Any], mapping: Any, form: str = "json", *flags: str) -> Manifest:
    code, dest = convert_list(root, write(root / "list", entries, form), mapping, *flags)
    assert code == 0
    return Manifest(dest, "train")


def refused(root: Path, entries: list[Any], mapping: Any, capsys: pytest.CaptureFixture[str], form: str = "json") -> str:
    """The message; nothing is written."""
    code, dest = convert_list(root, write(root / "list", entries, form), mapping)
    assert code == 2
    assert not dest.exists()
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("error: ").replace(f"{root}/", "")


def stored(manifest: Manifest, index: int) -> list[np.ndarray]:
    row = manifest.row(index)
    return [np.asarray(Image.open(manifest.folder.path(path))) for path in (row.target, *(entry.image for entry in row.references))]


# ---- forms of lists


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_every_form_of_a_list(root: Path, form: str) -> None:
    manifest = converted(root, [entry(index) for index in range(3)], MAPPING, form)
    for index in range(3):
        pictures = [target(index), reference(index, 0), reference(index, 1)]
        row = manifest.row(index)
        assert row.id == sample_id(pictures, "a cat and a mug")
        assert all(np.array_equal(found, np.asarray(wanted)) for found, wanted in zip(stored(manifest, index), pictures, strict=True))
        number = "row" if form == "parquet" else "entry"
        assert json.loads(row.metadata) == {"source": "mine", "file": f"list.{form}", number: index}
    options: dict[str, Any] = {"image_size": (32, 32), "reference_size": 32, "target_token_grid": (4, 4), "reference_token_grid": (4, 4)}
    dataset = MultiReferenceDataset(Path(manifest.folder.root), **options)
    assert dataset[0].prompt == "a cat and a mug"
    assert dataset.report()["missing_points"] == 3


def test_pictures_in_parquet_as_bytes_structs_and_lists_of_structs(root: Path) -> None:
    rows = []
    for index in range(2):
        pictures = [{"bytes": encoded(reference(index, k)), "path": f"{k}.png"} for k in range(2)]
        rows.append({"text": "a cat and a mug", "made": encoded(target(index)), "given": pictures, "unused": b"x"})
    wanted = [entry(index) for index in range(2)]
    first = converted(root, rows, MAPPING, "parquet")
    assert [first.row(index).id for index in range(2)] == [converted(root, wanted, MAPPING).row(index).id for index in range(2)]
    rows = [{**entry(0), "made": {"bytes": None, "path": "t0.png"}}]
    assert converted(root, rows, MAPPING, "parquet").row(0).id == first.row(0).id


def test_a_folder_of_lists_and_a_folder_of_pictures(root: Path) -> None:
    (root / "lists/more").mkdir(parents=True)
    write(root / "lists/b", [entry(1)], "jsonl")
    write(root / "lists/more/c", [entry(2)], "jsonl")
    code, dest = convert_list(root, root / "lists", MAPPING | {"folder": "pictures"}, "--image-root", str(root.parent))
    assert code == 2
    (root / "pictures").symlink_to(root)
    code, dest = convert_list(root, root / "lists", MAPPING | {"folder": "pictures"}, "--image-root", str(root))
    assert code == 0
    assert [json.loads(Manifest(dest, "train").row(index).metadata)["file"] for index in range(2)] == ["b.jsonl", "c.jsonl"]


def test_a_list_is_read_piece_by_piece(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries come before the end of the list is read; all of them do, wherever the pieces are cut."""
    entries = [entry(index % 3, text=f'{index} "]}} ä, [', number=index - 0.5) for index in range(9)]
    for chunk in (1, 2, 7, 50, 2**20):
        monkeypatch.setattr(lists, "CHUNK", chunk)
        for form in ("json", "jsonl"):
            path = write(root / "list", entries, form)
            assert [row.values() for row in lists.rows(path, lambda names, place: names)] == entries
            assert lists.count(path) == 9
    monkeypatch.setattr(lists, "CHUNK", 64)
    path = root / "cut.json"
    path.write_text(json.dumps(entries)[:-5])
    rows = lists.rows(path, lambda names, place: names)
    assert [next(rows).values() for _ in range(8)] == entries[:8]
    with pytest.raises(ValueError, match=r"cut.json: not valid JSON: entry 8: "):
        next(rows)
    path.write_text(" [ 1 , 22,3]\n ")
    assert [row.content for row in lists.rows(path, lambda names, place: names)] == ["1", "22", "3"]
    path.write_text("[ ]")
    assert lists.count(path) == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "a.json: not valid JSON: line 1"),
        ("a.json", "{}", "a.json: must be a list of objects, as JSON ([{...}, {...}]) or JSON Lines"),
        ("a.json", '{"data": [\n{"text": 1}]}', "a.json: must be a list of objects"),
        ("a.json", "[1] 2", "a.json: not valid JSON: nothing must follow the list"),
        ("a.json", "[1 2]", 'a.json: not valid JSON: entry 0: "," or "]" must follow it, got "2".'),
        ("a.json", "[1,]", "a.json: not valid JSON: entry 1: "),
        ("a.json", "[" * 100_000, "a.json: not valid JSON: entry 0: "),
        ("a.json", "[7]", "a.json[0]: must be an object, got 7."),
        ("a.json", "[]", "a.json: no sample could be converted (0 are invalid)."),
        ("a.json", '[{"text": 1, "text": 2}]', "a.json[0]: not valid JSON: the key 'text' is given twice"),
        ("a.jsonl", "{\n", "a.jsonl[0]: not valid JSON"),
        ("a.parquet", "PAR1", "a.parquet: cannot be read as Parquet"),
        ("a.json", "PAR1 and more", "a.json: cannot be read as Parquet"),
        ("a.json", None, "a.json: file not found."),
    ],
)
def test_damaged_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    code, dest = convert_list(tmp_path, tmp_path / name, MAPPING)
    assert code == 2
    assert not dest.exists()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.removeprefix("error: ").replace(f"{tmp_path}/", "").startswith(message)


def test_damaged_rows_are_named_or_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [
        (entry(given=["r0_0.png", "../x.png"]), '.given[1]: must be relative to the data set\'s folder, with "/" and without "..", got'),
        (entry(made="/etc/passwd"), ".made: must be relative to "),
        (entry(made="none.png"), ".made: file not found: "),
        (entry(made={"bytes": None, "path": "../t0.png"}), ".made.path: must be relative to "),
        (entry(made=None), ".made: must hold an encoded picture or the path of one, got null."),
        (entry(given=[]), ": must have at least one reference, got none."),
        (entry(given=["r0_0.png", None]), ".given[1]: must hold an encoded picture"),
        (entry(text=["a"]), '.text: must be a string, got ["a"].'),
        (entry(text=" "), ": the prompt must not be empty."),
        (entry(text="a <image_1>"), ": must hold no placeholder, got <image_1>. Say in the mapping what takes its place"),
    ]
    for values, message in bad:
        assert refused(root, [values], MAPPING, capsys).startswith(f"list.json[0]{message}")
    entries = [values for values, _ in bad] + [entry(1)]
    code, dest = convert_list(root, write(root / "list", entries, "jsonl"), MAPPING, "--skip-invalid")
    assert code == 0
    assert json.loads(Manifest(dest, "train").row(0).metadata)["entry"] == len(bad)
    listed = dest.with_name(dest.name + ".invalid.txt").read_text().splitlines()
    assert all(f"list.jsonl[{k}]{message}" in line for k, (line, (_, message)) in enumerate(zip(listed, bad, strict=True)))


# ---- what a mapping can say


def test_parts_of_objects_and_all_that_a_reference_has(root: Path) -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[3:9, 4:7] = 255
    Image.fromarray(mask).save(root / "mask.png")
    subjects = [
        {"image": "r0_0.png", "name": " mug", "mask": None, "kind": "object"},
        {"image": "r0_1.png", "name": "cat", "mask": "mask.png", "kind": "animal"},
    ]
    values = {
        "id": 7,
        "texts": {"short": ["x", "a cat and a mug"]},
        "made": "t0.png",
        "subjects": subjects,
        "part": "train",
        "q": {"s": 3.5},
    }
    mapping = {
        "name": "mine",
        "id": "id",
        "split": "part",
        "prompt": "texts.short.1",
        "target": "made",
        "references": "subjects.*.image",
        "phrases": "subjects.*.name",
        "masks": "subjects.*.mask",
        "kinds": "subjects.*.kind",
        "scores": [{"field": "q.s", "least": 3.5}],
        "metadata": {"names": "subjects.*.name", "score": "q.s"},
    }
    for form in ("json", "parquet"):
        manifest = converted(root, [values], mapping, form, "--split", "other")
        row = manifest.row(0)
        assert (row.id, row.split, row.prompt) == ("7", "train", "a cat and a mug")
        assert [entry.phrase for entry in row.references] == ["mug", "cat"]
        assert [entry["kind"] for entry in manifest.values(0)["references"]] == ["object", "animal"]
        assert row.references[0].mask is None
        assert (np.asarray(Image.open(manifest.folder.path(row.references[1].mask))) > 0).sum() == 18
        assert json.loads(manifest.values(0)["scores"]) == {"q.s": 3.5}
        assert json.loads(row.metadata)["names"] == [" mug", "cat"]
        assert json.loads(row.metadata)["score"] == 3.5


def test_numbered_columns_several_fields_and_alternatives(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {"text": "a cat and a mug", "made": "t0.png", "ref_1": "r0_0.png", "ref_2": "r0_1.png", "name_2": "mug"}
    mapping = MAPPING | {"references": "ref_{1}", "phrases": "name_{1}"}
    row = converted(root, [wide], mapping).row(0)
    assert [entry.phrase for entry in row.references] == ["", "mug"]
    assert converted(root, [wide], MAPPING | {"references": ["ref_1", "ref_2"]}).row(0).id == row.id
    assert converted(root, [wide], MAPPING | {"references": "given|refs|ref_{1}"}, "parquet").row(0).id == row.id
    for changed, message in (
        ({"ref_4": "r1_0.png"}, "the column ref_4 would be left out: references are ref_1, ref_2, ... without a gap, and ref_3 is missing"),
        ({"REF_3": "r1_0.png"}, "the column REF_3 would be left out"),
    ):
        assert f"list.json[0]: {message}" in refused(root, [wide | changed], mapping, capsys)
        assert f"list.parquet: {message}" in refused(root, [wide | changed], mapping, capsys, "parquet")
    both = MAPPING | {"references": "given|ref_1"}
    assert "list.json[0]: must have given or ref_1, got both" in refused(root, [entry() | wide], both, capsys)
    assert "list.parquet: the column nothing or more is missing. Found: " in refused(
        root, [wide], MAPPING | {"references": "nothing|more"}, capsys, "parquet"
    )
    assert "list.json[0].name: must be 2 values, one for each reference, got 1." in refused(
        root, [entry(name="cat")], MAPPING | {"phrases": "name"}, capsys
    )


def test_missing_references_are_refused_or_skipped(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "a mug", "made": "t0.png", "ref_0": "r0_0.png", "ref_1": None}]
    rows += [{"text": "a mug", "made": "t1.png", "ref_0": None, "ref_1": "r1_1.png"}]
    mapping = MAPPING | {"references": "ref_{0}", "placeholder_words": "image {number}"}
    assert "ref_1: must hold an encoded picture" in refused(root, rows, mapping, capsys, "parquet")
    manifest = converted(root, rows, mapping | {"missing_references": "skip"}, "parquet")
    assert [manifest.row(index).id for index in range(2)] == [
        sample_id([target(0), reference(0, 0)], "a mug"),
        sample_id([target(1), reference(1, 1)], "a mug"),
    ]
    rows = [{"text": "a <image_2>", "made": "t0.png", "ref_0": "r0_0.png", "ref_1": None}]
    assert "the placeholder <image_2> names no reference; there are 1." in refused(
        root, rows, mapping | {"missing_references": "skip"}, capsys
    )


def test_scores_leave_rows_out(root: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    scores = [4, 3.99, 131184.67, None, "4", True, 4.5]
    mapping = MAPPING | {"scores": [{"field": "score", "least": 4, "most": 5}]}
    manifest = converted(root, [entry(k % 3, score=score, text=f"a cat {k}") for k, score in enumerate(scores)], mapping)
    assert [json.loads(manifest.row(index).metadata)["entry"] for index in range(2)] == [0, 6]
    assert len(manifest) == 2
    assert "1 rows left out, for score is less than 4" in caplog.text
    assert "4 rows left out, for score is no number of at most 5" in caplog.text
    assert "no sample could be converted" in refused(root, [entry(score=1)], mapping, capsys)


# ---- placeholders


@pytest.mark.parametrize(
    ("prompt", "words", "wanted", "phrases"),
    [
        ("put <image_2> by <image_1>.", "image {number}", "put image 2 by image 1.", ["image 1", "image 2"]),
        ("put <img><|image_2|></img> by <img><|image_1|><img> here", "{phrase}", "put mug by cat here", ["cat", "mug"]),
        ("the cat <image_1> , the mug <|image_2|> !", "", "the cat, the mug!", [None, None]),
        ("<image>\n<image> a photo", "the {phrase} of image {number}", "the cat of image 1\nthe mug of image 2 a photo", ["the cat of image 1", "the mug of image 2"]),
        ("the <image1> thing, <image1>", "{phrase}", "the cat thing, cat", ["cat", None]),
        ("1 < 2 > 1, <b>", "{phrase}", "1 < 2 > 1, <b>", [None, None]),
    ],
)  # fmt: skip
def test_placeholders(prompt: str, words: str, wanted: str, phrases: list[str | None]) -> None:
    assert resolve(prompt, ["cat", "mug"], words) == (wanted, phrases)


def test_placeholders_of_another_form() -> None:
    assert resolve("a [IMG0] and [IMG1]", ["", ""], "image {number}", "[IMG{number}]", 0) == (
        "a image 1 and image 2",
        ["image 1", "image 2"],
    )
    assert resolve("a <image_0>", ["cat"], "{phrase}", start=0)[0] == "a cat"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a <image_3>", {"template": ""}, "the placeholder <image_3> names no reference; there are 1, 2."),
        ("a <image_0>", {"template": ""}, "the placeholder <image_0> names no reference"),
        ("<image> <image> <image>", {"template": ""}, "names no reference"),
        ("a <image_2>", {"template": "{phrase}"}, "the placeholder <image_2> needs a phrase of its reference, which has none."),
        ("<image> by <image_1>", {"template": ""}, "must number all placeholders or none, got <image> and <image_1>."),
        ("a <image_1>", {"template": "x", "form": "[IMG{number}]"}, "<image_1> would be left. Say its form in the mapping"),
        ("a [IMG1] by <img src='x'>", {"template": "x", "form": "[IMG{number}]"}, "<img src='x'> would be left"),
        ("a <IMAGE_1>", {"template": None}, "must hold no placeholder, got <IMAGE_1>"),
        ("a </img>", {"template": None}, "must hold no placeholder, but </img> would be left"),
    ],
)
def test_placeholders_that_cannot_go(prompt: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=".*") as caught:
        resolve(prompt, ["cat", ""], **options)
    assert message in str(caught.value)


def test_phrases_follow_the_prompt(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those that it holds stay; else the words in a placeholder's place; else none."""
    mapping = MAPPING | {"phrases": "names", "placeholder_words": "image {number}"}
    values = [entry(names=["cat", "dog"], text="a cat and <image_2>"), entry(1, names=["dog", None]), entry(2)]
    manifest = converted(root, values, mapping)
    assert [[part.phrase for part in manifest.row(index).references] for index in range(3)] == [["cat", "image 2"], ["", ""], ["", ""]]
    assert manifest.row(0).prompt == "a cat and image 2"
    assert "2 phrases not used, for their prompts do not hold them" in caplog.text


def test_a_mapping_says_how_placeholders_are_written(root: Path) -> None:
    mapping = MAPPING | {"placeholder_words": "image {number}", "placeholder_form": "[IMG{number}]", "placeholder_start": 0}
    assert converted(root, [entry(text="a [IMG1] by [IMG0]")], mapping).row(0).prompt == "a image 2 by image 1"


def test_an_interleaved_conversation(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = [{"type": "text", "text": "Put"}, {"type": "image", "image": "r0_0.png"}, {"type": "text", "text": "beside"}]
    content += [{"type": "image", "image": "r0_1.png"}, {"type": "text", "text": "on a beach."}]
    answer = {"role": "assistant", "content": [{"type": "image", "image": "t0.png"}]}
    mapping = {
        "name": "chat",
        "interleaved": {"field": "messages.0.content"},
        "target": "messages.1.content.0.image",
        "placeholder_words": "image {number}",
    }
    for form in ("json", "parquet"):
        row = converted(root, [{"messages": [{"role": "user", "content": content}, answer]}], mapping, form).row(0)
        assert row.prompt == "Put image 1 beside image 2 on a beach."
        assert [part.phrase for part in row.references] == ["image 1", "image 2"]
        assert row.id == sample_id([target(0), reference(0, 0), reference(0, 1)], row.prompt)
    for part, message in (
        ({"type": "text", "text": "a <image_1>"}, "list.json[0]: must hold no placeholder, got <image_1>"),
        ({"type": "video", "video": "x"}, "list.json[0].messages[0].content[5]: must have a text or a picture, got"),
    ):
        changed = [{"messages": [{"role": "user", "content": [*content, part]}, answer]}]
        assert refused(root, changed, mapping, capsys).startswith(message)
    mapping |= {"interleaved": {"field": "turn", "image": "picture.url"}, "target": "made", "placeholder_words": ""}
    turn = ["A cat", {"picture": {"url": "r0_0.png"}}, ", and a mug", {"picture": {"url": "r0_1.png"}}, "."]
    assert converted(root, [{"turn": turn, "made": "t0.png"}], mapping).row(0).prompt == "A cat, and a mug."


# ---- ready mappings

READY: dict[str, list[dict[str, Any]]] = {
    "x2i": [
        {
            "task_type": "subject_driven",
            "instruction": "The cat in <img><|image_1|></img> by the mug of <img><|image_2|></img>.",
            "input_images": ["r0_0.png", "r0_1.png"],
            "output_image": "t0.png",
        }
    ],
    "mico": [
        {"prompt": "The cat in <image_1> by the mug of <image_2>.", "images": ["r0_0.png", "r0_1.png"], "image": "t0.png"},
        {
            "instruction": "The cat in image 1 by the mug of image 2.",
            "image_1": "r0_0.png",
            "image_2": "r0_1.png",
            "image_3": None,
            "target_image": "t0.png",
        },
    ],
    "kontext": [
        {"instruction": "The cat in image 1 by the mug of image 2.", "control_images": ["r0_0.png", "r0_1.png"], "edited_image": "t0.png"},
        {
            "prompt": "The cat in image 1 by the mug of image 2.",
            "control_image_1": "r0_0.png",
            "control_image_2": "r0_1.png",
            "target": "t0.png",
        },
    ],
}


@pytest.mark.parametrize("name", READY)
def test_ready_mappings(root: Path, name: str) -> None:
    for values in READY[name]:
        for form in ("jsonl", "parquet"):
            row = converted(root, [values], name, form).row(0)
            assert row.prompt == "The cat in image 1 by the mug of image 2."
            assert row.id == sample_id([target(0), reference(0, 0), reference(0, 1)], row.prompt)
            assert json.loads(row.metadata)["source"] == name


def test_kontext_with_one_control_picture_as_datasets_writes_it(root: Path) -> None:
    cells = [{"bytes": encoded(picture), "path": None} for picture in (reference(0, 0), target(0))]
    row = converted(root, [{"original_image": cells[0], "edited_image": cells[1], "edit_prompt": "make it red"}], "kontext", "parquet").row(
        0
    )
    assert row.id == sample_id([target(0), reference(0, 0)], "make it red")


def test_the_labels_of_uno_1m(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reference is the first picture, the target the second, whose caption is the prompt."""
    (root / "images").mkdir()
    for name in ("t0", "t1", "t2", "r0_0"):
        (root / f"{name}.png").rename(root / f"images/{name}.png")

    def label(index: int, score: float) -> dict[str, Any]:
        captions = {"img_path1": "a cat", "img_path2": "a cat on a beach"}
        return {"img_path1": "r0_0.png", "img_path2": f"t{index}.png", "caption": captions, "vlm_filter_cot": {"score_final": score}}

    manifest = converted(root, [label(0, 4), label(1, 3.5), label(2, 131184.67)], "uno-1m")
    assert len(manifest) == 1
    assert manifest.row(0).id == sample_id([target(0), reference(0, 0)], "a cat on a beach")


def test_ready_mappings_fit_the_schema() -> None:
    text = (FOLDER / "schema.json").read_text()
    assert text == make_config_schema.mapping_schema_text(), "run python scripts/make_config_schema.py"
    schema = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert set(READY) < set(ready())
    for name in ready():
        jsonschema.validate(json.loads((FOLDER / f"{name}.json").read_text()), schema)
        assert load_mapping(name).name == name


# ---- mappings that are wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promt": "x"}, "promt is not a known setting. Did you mean prompt?"),
        ({"prompt": None}, "prompt must name a field, unless interleaved does"),
        ({"references": None}, "references must be a string that is not empty or a list of one or more values, each a string"),
        ({"references": []}, "references must be "),
        ({"references": "a..b"}, 'references must be names joined by "." or "|", none of them empty, got "a..b"'),
        ({"references": "ref_{k}"}, 'references must hold "{0}" or "{1}", from which its columns are numbered'),
        ({"target": "a.*"}, 'target must name one value, without "*" and "{0}", got "a.*"'),
        ({"metadata": {"x": ""}}, "metadata must be names joined by"),
        ({"metadata": []}, "metadata must be an object, got []"),
        ({"folder": "../x"}, "folder must be relative to --image-root"),
        ({"missing_references": "drop"}, "missing_references must be one of "),
        ({"placeholder_words": "{name}"}, 'placeholder_words must hold no braces but those of "{number}" and "{phrase}", got "{name}"'),
        ({"placeholder_words": "<image_{number}>"}, "placeholder_words must not be a placeholder itself, got"),
        ({"placeholder_form": "[IMG]"}, 'placeholder_form must hold "{number}" once, and more, got "[IMG]"'),
        ({"placeholder_start": 2}, "placeholder_start must be one of 0, 1, got 2"),
        ({"scores": [{"field": "s"}]}, "scores.least must be a number, got null"),
        ({"scores": [{"field": "s", "least": 4, "most": 3}]}, "scores.most must be at least scores.least, 4, got 3"),
        ({"scores": {"field": "s"}}, "scores must be a list of values, each an object of settings, got"),
        ({"interleaved": {"field": "x"}}, "interleaved must not be given with prompt or references"),
        ({"interleaved": {"field": "x"}, "prompt": None, "references": None}, "references must be"),
    ],
)
def test_wrong_mappings(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str) -> None:
    (tmp_path / "list.json").write_text("[]")
    before = set(files_below(tmp_path))
    code, _ = convert_list(tmp_path, tmp_path / "list.json", MAPPING | changes)
    assert code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"error: {message}")
    assert "mapping.json" in line
    assert set(files_below(tmp_path)) - before == {"mapping.json"}


def test_mappings_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.json").write_text("[]")
    assert convert_list(tmp_path, tmp_path / "list.json", "kontex")[0] == 2
    assert "there is no file kontex. Did you mean kontext?" in capsys.readouterr().err
    assert convert_list(tmp_path, tmp_path / "list.json", [1])[0] == 2
    assert "mapping.json: must be a JSON object of settings, got [1]." in capsys.readouterr().err
