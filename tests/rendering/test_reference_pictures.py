"""Reference pictures of a run: each is decoded and prepared once, however many cases, pages and settings use it; memory is bounded."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inference
from mosaic import images
from mosaic.images import PreparedReference, load_image
from mosaic.rendering.cases import pictures as case_pictures
from mosaic.rendering.cases.pictures import ReferencePictures
from mosaic.rendering.cases.reading import load_cases, read_cases
from mosaic.reports.figures import case_panel, reference_side
from tests.icc import rgb_profile

ROOT = Path(__file__).resolve().parents[2]
SIZE, SCALE = 16, 0.9


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often what was decoded and prepared."""
    counts: Counter = Counter()
    decode, make = case_pictures.decode_image, PreparedReference.make.__func__

    def counting_make(cls: type, image: Image.Image, size: int, scale: float = 0.9) -> PreparedReference:
        counts["prepared", image.tobytes(), size, scale] += 1
        return make(cls, image, size, scale)

    for module in (case_pictures, images):
        monkeypatch.setattr(
            module, "decode_image", lambda data, name, *rest: counts.update([("decoded", name)]) or decode(data, name, *rest)
        )
    monkeypatch.setattr(PreparedReference, "make", classmethod(counting_make))
    return counts


def test_a_reference_is_decoded_and_prepared_once(counted: Counter, tmp_path: Path) -> None:
    examples = json.loads((ROOT / "example_cases.json").read_text())
    for case in examples:
        case["image_paths"] = [str(ROOT / path) for path in case["image_paths"]]
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps([*examples[:3], examples[0] | {"index": 99}]))
    paths = {str(path) for case in load_cases(cases, SIZE) for path in case.image_paths}
    counted.clear()
    assert inference.main(["--cases", str(cases), "--steps", "1", "--report", "--output-dir", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("case_*_report.html"))) == 4
    prepared = {key: count for key, count in counted.items() if key[0] == "prepared"}
    decoded = {key[1]: count for key, count in counted.items() if key[0] == "decoded" and key[1].endswith(".png")}
    decoded = {name: count for name, count in decoded.items() if Path(name).parent != tmp_path}  # panels, for the contact sheets
    assert {Path(name).resolve() for name in decoded} == {Path(path).resolve() for path in paths}
    assert set(decoded.values()) == set(prepared.values()) == {1}
    assert len(prepared) == len(paths)


def picture(path: Path, colour: int) -> Path:
    Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(path)
    return path


BYTES = 3 * (SIZE**2 + 256**2 + 128**2)  # of one that is kept


@pytest.mark.parametrize(("room", "decodings"), [(4, 4), (3, 5), (1, 7), (0, 12)])
def test_memory_is_bounded(room: int, decodings: int, counted: Counter, tmp_path: Path) -> None:
    """Four pictures are checked, then each is rendered from twice in a row: the first ones, which are kept, make room for the others."""
    pictures, paths = ReferencePictures(SIZE, SCALE, room * BYTES), [picture(tmp_path / f"{number}.png", number) for number in range(4)]
    for path in paths:
        pictures.load(path)
    for path in paths:
        for _ in range(2):
            assert pictures.use(path, pictures.digests[path]).tiles[256].getpixel((0, 0)) == (int(path.stem),) * 3
    assert sum(count for key, count in counted.items() if key[0] == "decoded") == decodings


def test_only_small_copies_of_large_pictures_are_kept(tmp_path: Path) -> None:
    """And the panels drawn from them are those of the whole pictures."""
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (700 + 90 * number, 500, 3), np.uint8)).save(path)
    pictures = ReferencePictures(SIZE, SCALE)
    kept = [pictures.load(path) for path in paths]
    assert max(max(one.size) for picture in kept for one in (picture.prepared.picture, *picture.tiles.values())) == 256
    for count in (1, 2):
        small, whole = [picture.tiles[reference_side(count)] for picture in kept[:count]], [load_image(path) for path in paths[:count]]
        assert case_panel(small, whole[0], "a").tobytes() == case_panel(whole, whole[0], "a").tobytes()


def test_what_was_done_to_read_a_picture_is_noted(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((8, 8, 3), 90, np.uint8))
    image.save(tmp_path / "wide.png", icc_profile=rgb_profile("Wide"))
    image.save(tmp_path / "plain.png")
    references = [{"path": "wide.png", "points": [[1, 1]]}, "plain.png", "wide.png"]
    (tmp_path / "cases.json").write_text(json.dumps(2 * [{"prompt": "a", "references": references}]))
    notes = read_cases(tmp_path / "cases.json", SIZE, SCALE).notes
    assert notes == [f"{tmp_path / 'wide.png'}: its colours are converted to sRGB from Wide."]


def test_points_need_no_second_decoding(counted: Counter, tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 9)
    references = [{"path": "a.png", "points": [[1, 1], [2, 2]]}]
    (tmp_path / "cases.json").write_text(json.dumps([{"prompt": "a", "references": references}]))
    load_cases(tmp_path / "cases.json", SIZE, SCALE)
    assert [count for key, count in counted.items() if key[0] == "decoded"] == [1]
