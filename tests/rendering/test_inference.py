"""inference.py on a tiny model folder: what it writes, and one error line instead of a traceback for every mistake."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

import inference
from mosaic.config.loading import load_config
from mosaic.images import load_image
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.rendering.cases.reading import load_cases
from mosaic.rendering.runner import RunResult
from mosaic.weights import hub, quantization
from tests import runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def config_file(world: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(runs.settings(world, tmp_path / "pictures")))
    return path


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No path may lean on the repository as the current directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(load_image(path))


def assert_error(arguments: list[str], capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """Exit code 2, one line that says everything, no traceback, no output folder."""
    assert_error_line(2, arguments, capsys, *parts)
    assert not list(Path().iterdir())
    assert not Path("../pictures").exists()


def assert_error_line(code: int, arguments: list[str], capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    assert inference.main(arguments) == code
    stderr = capsys.readouterr().err
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    for part in parts:
        assert part in errors[0]
    assert "Traceback" not in stderr


# ---- what it writes


def test_files_are_named_by_index(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main(["--config", str(config_file)]) == 0
    folder = tmp_path / "pictures"
    assert names(folder) == ["case_002.png", "case_002_panel.png", "case_007.png", "case_007_panel.png", "manifest.jsonl", "overview.png"]
    assert capsys.readouterr().out == f"2 pictures in {folder}\n"
    assert load_image(folder / "case_002.png").size == (24, 16)


def test_pictures_are_those_of_the_pipeline_with_the_references(config_file: Path, world: Path, tmp_path: Path) -> None:
    assert inference.main(["--config", str(config_file), "--seed", "9", "--steps", "3"]) == 0
    pipeline = MosaicFluxPipeline.from_pretrained(world / "model")
    pipeline.load_reference_lora(world / "lora.safetensors")
    for case in load_cases(world / "cases.json", runs.REFERENCE_SIZE):
        pictures = [load_image(path) for path in case.image_paths]
        options = {"height": 16, "width": 24, "reference_size": runs.REFERENCE_SIZE, "num_inference_steps": 3, "max_sequence_length": 8}
        expected = pipeline(case.prompt, pictures, generator=torch.Generator().manual_seed(9 + case.index), **options).images[0]
        found = pixels(tmp_path / f"pictures/case_{case.index:03d}.png")
        assert np.array_equal(found, np.asarray(expected))
        bare = pipeline(case.prompt, generator=torch.Generator().manual_seed(9 + case.index), **options).images[0]
        assert not np.array_equal(found, np.asarray(bare))


def test_same_seed_same_picture(config_file: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert inference.main(["--config", str(config_file), "--output-dir", str(tmp_path / name), "--seed", str(seed)]) == 0
    first, second = (runs.files_below(tmp_path / name) for name in "ab")
    assert first.pop("manifest.jsonl").count(b"\n") == second.pop("manifest.jsonl").count(b"\n") == 2  # their seconds differ
    assert first == second
    assert not np.array_equal(pixels(tmp_path / "a/case_002.png"), pixels(tmp_path / "c/case_002.png"))


def test_report(config_file: Path, tmp_path: Path) -> None:
    assert inference.main(["--config", str(config_file), "--report"]) == 0
    folder = tmp_path / "pictures"
    stems = ["case_002", "case_007"]
    endings = (".png", "_attention.png", "_panel.png", "_report.html")
    assert names(folder) == sorted(
        [f"{stem}{ending}" for stem in stems for ending in endings] + ["manifest.jsonl", "overview.png", "report.html"]
    )
    one, two = (load_image(folder / f"{stem}_attention.png").size for stem in reversed(stems))
    assert (two[0], two[1] > one[1]) == (one[0], True)  # a row per reference


def test_without_a_lora_the_bare_model_renders(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main(["--config", str(config_file), "--set", "inference.lora=null", "--report"]) == 0
    assert not [name for name in names(tmp_path / "pictures") if "attention" in name or "report" in name]
    assert "note: inference.report: has no effect without a reference LoRA" in capsys.readouterr().err


def test_flags_win_over_set(config_file: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(config_file), "--output-dir", str(tmp_path / "flag"), "--set", f"inference.output_dir={tmp_path}/set"]
    assert inference.main(arguments) == 0
    assert (tmp_path / "flag").is_dir()
    assert not (tmp_path / "set").exists()


def test_the_default_finds_the_repository_from_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(inference, "run", lambda config, file: found.append((config, file.cases)) or RunResult(len(file.cases), 0, []))
    assert inference.main([]) == 0
    config, cases = found[0]
    assert Path(config.model.pretrained).resolve() == ROOT / "assets/pocket/flux"
    assert Path(config.inference.lora).resolve() == ROOT / "assets/pocket/lora.safetensors"
    assert config.inference.output_dir == "outputs/examples"  # in the current directory
    assert len(cases) >= 8
    assert inference.main(["--lora", "mine.safetensors", "--set", "model.pretrained=my/folder"]) == 0
    assert (found[1][0].inference.lora, found[1][0].model.pretrained) == ("mine.safetensors", "my/folder")
    monkeypatch.chdir(ROOT)
    assert inference.main([]) == 0
    assert found[2][0].model.pretrained == os.path.join("assets", "pocket", "flux")


# ---- mistakes


GOOD = {"index": 0, "prompt": "a cat", "image_paths": ["picture.png"]}
NO_CASES = ("not JSON", "not a list", "empty")
BAD_CASES: dict[str, tuple[Any, str]] = {
    "not JSON": ("[{", "cases.json: not valid JSON: line 1, column 3"),
    "not a list": ({"index": 0}, "cases.json: must be a list of cases, got an object"),
    "empty": ([], "cases.json: must hold at least one case"),
    "no prompt": ([GOOD, {"index": 1, "image_paths": ["picture.png"]}], 'cases.json[1]: the key "prompt" is missing'),
    "prompt of another type": ([GOOD, {**GOOD, "prompt": 5}], "cases.json[1].prompt: must be a string, got 5"),
    "paths of another type": ([{**GOOD, "image_paths": "picture.png"}], "cases.json[0].image_paths: must be a list of paths"),
    "path of another type": ([{**GOOD, "image_paths": ["picture.png", 3]}], "cases.json[0].image_paths[1]: must be a string, got 3"),
    "empty prompt": ([{**GOOD, "prompt": "  "}], 'cases.json[0].prompt: must not be empty, got "  "'),
    "no references": ([{**GOOD, "image_paths": []}], "cases.json[0].image_paths: must name at least one reference picture"),
    "missing picture": ([{**GOOD, "image_paths": ["picture.png", "none.png"]}], "cases.json[0].image_paths[1]: file not found: "),
    "unreadable picture": (
        [{**GOOD, "image_paths": ["text.png"]}],
        "cases.json[0].image_paths[0]: the file cannot be decoded as a picture: ",
    ),
    "empty picture": ([{**GOOD, "image_paths": ["zero.png"]}], "cases.json[0].image_paths[0]: the picture file is empty (0 bytes): "),
    "folder": ([{**GOOD, "image_paths": ["folder"]}], "cases.json[0].image_paths[0]: must be a picture file, but it is a folder: "),
    "duplicate index": ([GOOD, GOOD], "cases.json[1].index: must be unique, since it names the output files, but 0 is also the index of "),
    "index of another type": (
        [{**GOOD, "index": "1"}],
        'cases.json[0].index: must be an integer from 0 to 999999999 (it names the output files), got "1"',
    ),
    "fractional index": ([{**GOOD, "index": 1.5}], "cases.json[0].index: must be an integer"),
    "index that leaves the folder": ([{**GOOD, "index": "../x"}], "cases.json[0].index: must be an integer"),
}


@pytest.mark.parametrize("kind", BAD_CASES)
def test_bad_cases(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = []
    monkeypatch.setattr(inference, "run", lambda _, file: finished.extend(file.cases) or RunResult(len(file.cases), 0, []))
    content, message = BAD_CASES[kind]
    folder = tmp_path / "cases"
    (folder / "folder").mkdir(parents=True)
    Image.new("RGB", (20, 20), "red").save(folder / "picture.png")
    (folder / "text.png").write_text("no picture")
    (folder / "zero.png").touch()
    (folder / "cases.json").write_text(content if isinstance(content, str) else json.dumps(content))
    arguments = ["--config", str(config_file), "--cases", str(folder / "cases.json")]
    if kind in NO_CASES:
        assert_error(arguments, capsys, message, str(folder))
        return
    assert_error_line(1, arguments, capsys, message, str(folder))
    assert [case.prompt for case in finished] == [entry["prompt"] for entry in content[:-1]], "the other cases finish"
    finished.clear()
    assert_error_line(1, [*arguments, "--check"], capsys, message)
    assert not finished


BAD_SETTINGS: dict[str, tuple[list[str], str]] = {
    "unknown key": (
        ["--set", "inference.heigth=16"],
        "inference.heigth is not a known setting. Did you mean height? (--set inference.heigth=16).",
    ),
    "wrong type": (
        ["--set", "inference.height=tall"],
        'inference.height must be an integer of at least 1 and at most 8192, got "tall" (--set inference.height=tall).',
    ),
    "out of range": (["--steps", "0"], "inference.num_inference_steps must be an integer of at least 1 and at most 1000, got 0"),
    "missing cases": (["--cases", "none.json"], "none.json: file not found. Relative paths start at the current directory"),
    "height": (
        ["--set", "inference.height=18"],
        "inference.height, inference.width: height and width must be positive multiples of the token size 4 px, got 18 x 24",
    ),
    "reference size": (
        ["--set", "data.reference_size=30"],
        "data.reference_size: height and width must be positive multiples of the token size 4 px, got 30 x 30",
    ),
    "missing adapter": (
        ["--lora", "none.safetensors"],
        "reference LoRA not found: none.safetensors. Give a .safetensors file, a folder, or a hub",
    ),
    "missing model": (["--model", "no/such/folder"], "model 'no/such/folder': no such folder, and not a hub id of the form user/name."),
    "file as model": (["--model", __file__], "no such folder, and not a hub id"),
    "file as output": (["--output-dir", __file__], f"inference.output_dir: must be a folder, but {__file__} is a file."),
}


@pytest.mark.parametrize("kind", BAD_SETTINGS)
def test_bad_settings(config_file: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    arguments, message = BAD_SETTINGS[kind]
    assert_error(["--config", str(config_file), *arguments], capsys, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"inferense": {}}, "config.json)"),
        ({"inferense": {}}, "inferense is not a known setting. Did you mean inference?"),
        ({"inference": {"seed": "x"}}, "inference.seed must be an integer of at least 0"),
        ({"inference": {"reference_scale": 1.5}}, "inference.reference_scale must be a number of more than 0 and at most 1, got 1.5"),
        ([], "config.json: must be a JSON object of sections, got []."),
    ],
)
def test_bad_config_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert_error(["--config", str(tmp_path / "config.json")], capsys, message)


def test_a_missing_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert_error(["--config", "none.json"], capsys, "none.json: file not found.")


def bad_lora(path: Path, kind: str) -> None:
    tensors = runs.lora_tensors()
    key = next(iter(tensors))
    if kind == "not safetensors":
        path.write_bytes(b"\x80\x02}q\x00.")
        return
    if kind == "other keys":
        tensors = {name.replace("transformer_blocks.0", "transformer_blocks.1"): tensor for name, tensor in tensors.items()}
    elif kind == "other shape":
        tensors[key] = torch.zeros(tensors[key].shape[0], tensors[key].shape[1] + 1)
    elif kind == "two ranks":
        module = key.removesuffix(".lora_A.weight")
        tensors[f"{module}.lora_A.weight"] = tensors[f"{module}.lora_A.weight"][:1].clone()
        tensors[f"{module}.lora_B.weight"] = tensors[f"{module}.lora_B.weight"][:, :1].clone()
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("not safetensors", "lora.safetensors: not a safetensors file"),
        ("other keys", "Unexpected 24: transformer.single_transformer_blocks.1.attn.to_k.lora_A.weight"),
        ("other shape", "lora_A.weight must have shape (3, 16), got (3, 17)."),
        ("two ranks", "lora.safetensors: all modules must have one rank, got ranks [1, 3]."),
    ],
)
def test_bad_adapters(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, message: str) -> None:
    bad_lora(tmp_path / "lora.safetensors", kind)
    assert_error(["--config", str(config_file), "--lora", str(tmp_path / "lora.safetensors")], capsys, message, str(tmp_path))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with HF_HUB_OFFLINE=1, which is read at import, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


POCKET = ("configs/pocket.json", "assets/pocket/flux", "assets/pocket/lora.safetensors")


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore")
def test_an_unreachable_model(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "black-forest-labs/FLUX.1-dev"
    assert_error(
        ["--config", str(config_file), "--model", name], capsys, f"model '{name}' cannot be loaded", "HF_HUB_OFFLINE is set", *POCKET
    )


@pytest.mark.usefixtures("offline")
def test_an_unreachable_adapter(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "ByteDance-FanQie/MOSAIC"
    arguments = ["--config", str(config_file), "--lora", name]
    assert_error(arguments, capsys, f"reference LoRA '{name}' cannot be loaded", "HF_HUB_OFFLINE is set", *POCKET)


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        (
            "403: Access to model a/b is restricted; it is a gated repo",
            "accept its licence at https://huggingface.co/a/b, then log in with `hf auth login`",
        ),
        ("a/b is not a local folder and is not a valid model identifier listed on the Hub", "check the spelling, or log in"),
        ("Connection refused", "the Hub cannot be reached: check the path and the network"),
    ],
)
def test_why_a_model_cannot_be_had(monkeypatch: pytest.MonkeyPatch, text: str, cure: str) -> None:
    from diffusers import FluxPipeline

    def fail(*_: object, **__: object) -> None:
        raise OSError(text)

    monkeypatch.setattr(FluxPipeline, "from_pretrained", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match="model 'a/b' cannot be loaded") as caught:
        MosaicFluxPipeline.from_pretrained("a/b")
    assert all(part in str(caught.value) for part in (cure, text, *POCKET))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/diffusion_pytorch_model.safetensors", "vae/config.json"])
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_damaged_model_folder(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, how: str) -> None:
    model = runs.write_model(tmp_path / "model")
    (model / file).unlink()
    if how == "damaged":
        (model / file).write_text("{")
    assert_error(["--config", str(config_file), "--model", str(model)], capsys, str(model))


# ---- what is told before a download


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Hub that cannot be reached; gives the questions that it was asked."""
    asked: list[str] = []

    def unreachable(url: str, **_: Any) -> None:
        asked.append(url)
        raise RuntimeError("Name or service not known")  # stands for an error of the client's transport, which is no OSError

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: pytest.fail("the client would ask five more times"))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)
    return asked


@pytest.mark.parametrize("memory", ["none", "auto"])
def test_a_wrong_model_is_told_before_the_adapter_is_fetched(
    config_file: Path, capsys: pytest.CaptureFixture[str], no_download: list[str], memory: str
) -> None:
    arguments = ["--config", str(config_file), "--lora", "some/lora", "--memory", memory]
    assert_error([*arguments, "--model", "./misspelt"], capsys, "model './misspelt': no such folder")
    assert no_download == []
    assert_error([*arguments, "--model", "some/FLUX"], capsys, "model 'some/FLUX' cannot be loaded", "the Hub cannot be reached")
    assert [url.split("/resolve/")[0].removeprefix("https://huggingface.co/") for url in no_download] == ["some/FLUX"]


def test_the_hub_is_asked_once(config_file: Path, capsys: pytest.CaptureFixture[str], no_download: list[str]) -> None:
    assert_error(
        ["--config", str(config_file), "--lora", "some/lora"], capsys, "reference LoRA 'some/lora' cannot be loaded", "cannot be reached"
    )
    assert len(no_download) == 1


def test_a_repository_that_answers_is_left_to_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gated, private, missing: the client's own errors say which."""
    from huggingface_hub.errors import HfHubHTTPError

    def answers(url: str, **_: Any) -> None:
        raise HfHubHTTPError("401", response=SimpleNamespace(headers={}, status_code=401, request=None))

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_hf_file_metadata", answers)
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file, revision: f"/cache/{name}/{file}/{revision}")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)
    assert hub.download("some/lora", "lora.safetensors", "main") == Path("/cache/some/lora/lora.safetensors/main")


def test_packages_are_checked_before_a_download(
    config_file: Path, capsys: pytest.CaptureFixture[str], no_download: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda _: None)
    hub_ids = ["--config", str(config_file), "--lora", "some/lora", "--model", "some/FLUX"]
    for more, package in ((["--memory", "24gb"], "torchao"), (["--set", "inference.quantization=nf4"], "bitsandbytes")):
        for arguments in ([*hub_ids, *more], [*hub_ids, *more, "--check"]):
            assert_error(arguments, capsys, f"needs the package {package}", "pip install -r requirements-quantization.txt")
    assert no_download == []
    note = (
        'note: inference.memory "auto" cannot choose 24gb, 16gb, 12gb, for bitsandbytes and torchao are not installed: pip install -r req'
    )
    for more in ([], ["--model", "some/FLUX"]):  # whether the model is at hand or not
        assert inference.main(["--config", str(config_file), "--memory", "auto", "--check", *more]) == 0
        assert note in capsys.readouterr().err


def test_the_install_file_has_what_the_presets_need() -> None:
    lines = (ROOT / "requirements-quantization.txt").read_text().splitlines()
    assert {*quantization.PACKAGES.values()} - {"torch"} <= {line.split(">")[0] for line in lines}
    assert load_config(ROOT / "configs/flux_dev.json").inference.memory == "auto"
