"""Cases files: what they give, and one message per kind of mistake."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mosaic.config.schema import FieldError
from mosaic.config.sections import InferenceConfig
from mosaic.rendering.cases.reading import load_cases


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures, an empty one, a text posing as one, and a folder posing as one."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "pictures/a.png")
    Image.new("RGBA", (8, 8), (0, 200, 0, 128)).save(tmp_path / "pictures/b.png")
    Image.new("RGB", (3000, 1), (0, 0, 0)).save(tmp_path / "pictures/line.png")
    (tmp_path / "pictures/empty.png").touch()
    (tmp_path / "pictures/text.png").write_text("hello")
    (tmp_path / "pictures/folder.png").mkdir()
    return tmp_path


def case(**changes: Any) -> dict[str, Any]:
    """A good case, changed; None removes a key."""
    values = {"index": 0, "prompt": "a cat", "image_paths": ["pictures/a.png"]} | changes
    return {key: value for key, value in values.items() if value is not ...}


def write(folder: Path, values: Any) -> Path:
    path = folder / "cases.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def test_reads_cases_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, [case(index=7, prompt="a cat and a mug", image_paths=["pictures/a.png", "pictures/b.png"]), case(index=2)])
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    cases = load_cases("../cases.json")
    assert (cases[0].index, cases[0].prompt) == (7, "a cat and a mug")
    assert cases[0].image_paths == (Path("../pictures/a.png"), Path("../pictures/b.png"))
    assert [item.index for item in cases] == [7, 2]
    absolute = str(folder / "pictures/a.png")
    assert load_cases(write(folder, [case(image_paths=[absolute])]))[0].image_paths == (Path(absolute),)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("[{]", "FILE: not valid JSON: line 1, column 3: "),
        ("", "FILE: not valid JSON: line 1, column 1: Expecting value."),
        ({"index": 0}, 'FILE: must be a list of cases, got an object: expected [{"index": 0, "prompt": "...", "image_paths": ["..."]}].'),
        ([], "FILE: must hold at least one case, got an empty list"),
        (["a cat"], "FILE[0]: must be an object with the keys index, prompt, image_paths, got a string."),
        ([case(), None], "FILE[1]: must be an object with the keys index, prompt, image_paths, got null."),
        ([case(), case(prompt=..., promt="a cat")], 'FILE[1]: the key "prompt" is missing. Found instead: promt.'),
        ([case(image_paths=...)], 'FILE[0]: the key "image_paths" is missing.'),
        ([case(sead=3)], "FILE[0].sead: is not a known key. Did you mean seed? Known here: index, prompt, references, image_paths, seed,"),
        ([case(index="0")], 'FILE[0].index: must be an integer from 0 to 999999999 (it names the output files), got "0".'),
        ([case(index="../x")], 'FILE[0].index: must be an integer from 0 to 999999999 (it names the output files), got "../x".'),
        ([case(index=1.0)], "FILE[0].index: must be an integer from 0 to 999999999 (it names the output files), got 1.0."),
        ([case(index=True)], "FILE[0].index: must be an integer from 0 to 999999999 (it names the output files), got true."),
        ([case(index=-1)], "FILE[0].index: must be an integer from 0 to 999999999 (it names the output files), got -1."),
        ([case(index=10**12)], "FILE[0].index: must be an integer from 0 to 999999999 (it names the output files), got 1000000000000."),
        (
            [case(index=3), case(index=4), case(index=3)],
            "FILE[2].index: must be unique, since it names the output files, but 3 is also the index of FILE[0].",
        ),
        ([case(prompt="")], "FILE[0].prompt: must not be empty."),
        ([case(prompt=" \n")], 'FILE[0].prompt: must not be empty, got " \\n".'),
        ([case(prompt=["a cat"])], 'FILE[0].prompt: must be a string, got ["a cat"].'),
        ([case(prompt="a \ud83d cat")], "FILE[0].prompt: must be plain text, but it holds a NUL or half of a surrogate pair"),
        ([case(image_paths="pictures/a.png")], 'FILE[0].image_paths: must be a list of paths of reference pictures, got "pictures/a.png".'),
        ([case(image_paths=[])], "FILE[0].image_paths: must name at least one reference picture, got an empty list."),
        ([case(image_paths=["pictures/a.png", 3])], "FILE[0].image_paths[1]: must be a string, got 3."),
        ([case(image_paths=[""])], "FILE[0].image_paths[0]: must not be empty."),
        ([case(image_paths=["a\x00.png"])], "FILE[0].image_paths[0]: must be plain text, but it holds a NUL"),
        (
            [case(image_paths=["pictures/empty.png"])],
            "FILE[0].image_paths[0]: the picture file is empty (0 bytes): DIR/pictures/empty.png. Save or download it again.",
        ),
        (
            [case(image_paths=["pictures/folder.png"])],
            "FILE[0].image_paths[0]: must be a picture file, but it is a folder: DIR/pictures/folder.png. Name a picture in it.",
        ),
        (
            [case(image_paths=["pictures/text.png"])],
            "FILE[0].image_paths[0]: the file cannot be decoded as a picture: DIR/pictures/text.png (no known picture format). "
            "Save it in a format that can be read: PNG, JPEG, WEBP,",
        ),
        (
            [case(image_paths=["pictures/line.png"])],
            "FILE[0].image_paths[0]: DIR/pictures/line.png: the subject is too narrow: its 3000 x 1 pixels",
        ),
    ],
)
def test_messages(folder: Path, values: Any, message: str) -> None:
    path = write(folder, values)
    expected = message.replace("FILE", str(path)).replace("DIR", str(folder))
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        load_cases(path)


@pytest.mark.parametrize(
    "setting", ["guidance_scale=101", "image_guidance_scale=1e40", "height=1000000000000", "width=8193", "num_threads=4097"]
)
def test_the_config_has_the_same_limits(setting: str) -> None:
    name, value = setting.split("=")
    with pytest.raises(FieldError, match=rf"^inference\.{name} must be an? \w+ of at least \d and at most \d+, got"):
        InferenceConfig(**{name: json.loads(value)})
    with pytest.raises(FieldError, match="style_lora_scale must be a number of at least -100 and at most 100, got 1"):
        InferenceConfig(style_lora_scale=1e9)


def test_a_picture_that_is_cut_short(folder: Path) -> None:
    Image.effect_noise((64, 64), 50).save(folder / "pictures/cut.png")
    data = (folder / "pictures/cut.png").read_bytes()
    (folder / "pictures/cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"It is damaged or cut short\. Save or download it again\.$"):
        load_cases(write(folder, [case(image_paths=["pictures/cut.png"])]))


def test_missing_pictures_and_files(folder: Path) -> None:
    path = write(folder, [case(), case(index=1, image_paths=["pictures/a.png", "pictures/no.png"])])
    message = f"{path}[1].image_paths[1]: file not found: {folder}/pictures/no.png. Paths are relative to the JSON file."
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        load_cases(path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{folder / 'no.json'}: file not found.")):
        load_cases(folder / "no.json")
    with pytest.raises(ValueError, match=re.escape(f"{folder}: must be a JSON file, but it is a folder.")):
        load_cases(folder)
