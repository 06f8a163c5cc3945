"""A style LoRA beside the reference LoRA, from a file of any key style: where it acts, what undoes it, and in the case runner."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import inference
from mosaic.images import load_image
from mosaic.lora.adapter import reference_lora_modules, save_reference_lora
from mosaic.model import blocks
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.rendering.recipe import read_recipe
from mosaic.weights.digests import weights_digest
from tests import naive, runs, tiny
from tests.lora.foreign import in_style
from tests.pipeline.test_style_lora import STYLE_MODULES, close, lora_layers, run, style_pipeline

CASES: list[dict[str, Any]] = [
    {"index": 0, "prompt": "a cat on the beach", "image_paths": ["reference_0.png"]},
    {"index": 1, "prompt": "a cat and a mug", "image_paths": ["reference_1.png", "reference_2.png"]},
]


def style_tensors(rank: int = 2, seed: int = 5) -> dict[str, Tensor]:
    return tiny.random_lora_file(tiny.linear_shapes(tiny.build_transformer(stock=True), STYLE_MODULES), rank, seed)


def attach_frozen_lora(pipeline: MosaicFluxPipeline) -> dict[str, Tensor]:
    """A reference LoRA as a file gives it: PyTorch may take another kernel for weights that require a gradient."""
    parameters = tiny.attach_random_lora(pipeline.transformer)
    pipeline.transformer.requires_grad_(False)
    return parameters


# ---- where it acts


@pytest.mark.parametrize("style", ["diffusers", "kohya", "comfyui", "fal"])
def test_it_acts_on_text_and_target_only(style: str, batch: tiny.Batch, tmp_path: Path) -> None:
    tensors = style_tensors()
    save_file(in_style(tensors, style), tmp_path / "pytorch_lora_weights.safetensors")
    pipeline, stock = style_pipeline(), tiny.build_transformer(stock=True)
    reference = naive.lora_matrices(attach_frozen_lora(pipeline))
    before = run(pipeline.transformer, batch)
    pipeline.load_style_lora(tmp_path, scale=0.75)
    with torch.no_grad():
        want = naive.NaiveFlux(stock, reference, [(naive.lora_matrices(tensors), 0.75)])(**batch.inputs).velocity
    assert close(run(pipeline.transformer, batch), want)
    assert not close(want, before)
    pipeline.unload_lora_weights()
    assert torch.equal(run(pipeline.transformer, batch), before)  # to the bit


def test_the_reference_slice_does_not_see_it(batch: tiny.Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In block 0 nothing has been mixed yet: what its layers make of the reference tokens is bit-equal with any style.
    pipeline = style_pipeline()
    attach_frozen_lora(pipeline)
    query, plain = pipeline.transformer.transformer_blocks[0].attn.to_q, blocks.branch_linear
    target, reference = [], []

    def spy(layer: nn.Module, hidden_states: Tensor, start: int, *rest: Tensor | None) -> Tensor:
        output = plain(layer, hidden_states, start, *rest)
        if layer is query:
            target.append(output[:, :start].clone())
            reference.append(output[:, start:].clone())
        return output

    monkeypatch.setattr(blocks, "branch_linear", spy)
    run(pipeline.transformer, batch)
    save_file(style_tensors(), tmp_path / "style.safetensors")
    pipeline.load_style_lora(tmp_path / "style.safetensors")
    run(pipeline.transformer, batch)
    assert len(reference) == 2
    assert reference[0].shape[1] == 2 * batch.num_reference_tokens
    assert torch.equal(reference[0], reference[1])
    assert not close(target[0], target[1])


def test_two_at_once_by_their_names(batch: tiny.Batch, tmp_path: Path) -> None:
    pipeline, stock = style_pipeline(), tiny.build_transformer(stock=True)
    first, second = style_tensors(seed=5), style_tensors(rank=3, seed=6)
    for name, tensors in (("first", first), ("second", second)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        pipeline.load_style_lora(tmp_path, f"{name}.safetensors", adapter_name=name)

    def twin(*styles: tuple[dict[str, Tensor], float]) -> Tensor:
        with torch.no_grad():
            return naive.NaiveFlux(stock, {}, [(naive.lora_matrices(tensors), w) for tensors, w in styles])(**batch.inputs).velocity

    assert close(run(pipeline.transformer, batch), twin((second, 1.0)))
    pipeline.set_adapters(["first", "second"], [0.5, -1.0])
    assert close(run(pipeline.transformer, batch), twin((first, 0.5), (second, -1.0)))


# ---- what is refused


def refused_files() -> dict[str, tuple[dict[str, Tensor], str]]:
    good = style_tensors()
    query = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    stock = tiny.build_transformer(stock=True)
    reference = tiny.random_lora_file(tiny.linear_shapes(stock, reference_lora_modules(stock)), 3, 1)
    return {
        "missing": ({key: value for key, value in good.items() if key != query}, r"Missing 1: down matrix of .*to_q\. Unexpected 0: none"),
        "unexpected": (
            good | {"transformer.middle.lora_A.weight": torch.ones(1, 1)},
            r"Missing 0: none\. Unexpected 1: transformer\.middle",
        ),
        "shape": (good | {query: torch.ones(2, 33)}, r"attn\.to_q must have 32 inputs and 32 outputs, got 33 and 32"),
        "other model": (
            good | {f"transformer.transformer_blocks.7.attn.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"},
            r"1 of its 22 modules are not in this transformer: transformer_blocks\.7\.attn\.to_q\. Is it for another base model\?",
        ),
        "text encoder": (good | {"text_encoder.text_model.x.lora_A.weight": torch.ones(1, 1)}, "import --transformer-only"),
        "reference": (reference, "is a reference LoRA, not a style LoRA: load it with load_reference_lora"),
        "reference for kohya": (in_style(reference, "kohya"), "is a reference LoRA, not a style LoRA"),
        "not finite": (good | {query: torch.full((2, 32), torch.nan)}, "holds values that are not finite"),
    }


@pytest.mark.parametrize("case", list(refused_files()))
def test_files_that_do_not_fit_are_refused_and_nothing_changes(case: str, tmp_path: Path) -> None:
    tensors, message = refused_files()[case]
    save_file(tensors, tmp_path / "x.safetensors")
    pipeline = style_pipeline()
    with pytest.raises(ValueError, match=message):
        pipeline.load_style_lora(tmp_path / "x.safetensors")
    assert not lora_layers(pipeline.transformer)


def test_metadata_mark_a_reference_lora(tmp_path: Path) -> None:
    save_file(style_tensors(), tmp_path / "x.safetensors", metadata={"mosaic": '{"adapter": "reference"}'})
    with pytest.raises(ValueError, match="is a reference LoRA"):
        style_pipeline().load_style_lora(tmp_path / "x.safetensors")


def test_other_things_are_refused(tmp_path: Path) -> None:
    pipeline = style_pipeline()
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"x\.safetensors: not a safetensors file .*Style LoRAs are read from \.safetensors only"):
        pipeline.load_style_lora(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"style LoRA not found: .*pytorch_lora_weights\.safetensors"):
        pipeline.load_style_lora(tmp_path)
    save_file(style_tensors(), tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="adapter_name 'reference' is taken"):
        pipeline.load_style_lora(tmp_path / "y.safetensors", adapter_name="reference")


def test_a_reference_lora_in_another_style_names_the_cure(tmp_path: Path) -> None:
    donor, pipeline = style_pipeline(), style_pipeline()
    tensors = {key: value.detach() for key, value in tiny.attach_random_lora(donor.transformer).items()}
    save_file(in_style(tensors, "kohya"), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"Missing 50: .* Unexpected .*`python scripts/lora_tools\.py import` makes its keys ours"):
        pipeline.load_reference_lora(tmp_path / "x.safetensors")
    save_reference_lora(donor.transformer, tmp_path / "y.safetensors")
    pipeline.load_reference_lora(tmp_path / "y.safetensors")


# ---- in the case runner


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.write_world(tmp_path_factory.mktemp("world"))
    (folder / "cases.json").write_text(json.dumps(CASES))
    (folder / "config.json").write_text(json.dumps(runs.settings(folder, folder / "unused")))
    stock = tiny.build_transformer(False, stock=True, num_layers=1, num_single_layers=1)
    modules = ["x_embedder", "context_embedder", "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"]
    tensors = tiny.random_lora_file(tiny.linear_shapes(stock, modules), 2, 8)
    save_file(in_style(tensors, "kohya"), folder / "style.safetensors")
    return folder


def render(world: Path, output: Path, *more: str) -> int:
    return inference.main(["--config", str(world / "config.json"), "--output-dir", str(output), *more])


def pictures(folder: Path) -> list[bytes]:
    return [(folder / f"case_00{index}.png").read_bytes() for index in range(2)]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_cases_with_a_style(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    style = str(world / "style.safetensors")
    assert render(world, tmp_path / "plain") == 0
    assert render(world, tmp_path / "styled", "--style-lora", style) == 0
    plain, styled = rows(tmp_path / "plain"), rows(tmp_path / "styled")
    digest = weights_digest(world / "style.safetensors")
    assert [row["style_lora"] for row in plain] == [None, None]
    assert [row["style_lora"] for row in styled] == [{"name": "style.safetensors", "digest": digest, "scale": 1.0}] * 2
    assert read_recipe(tmp_path / "styled" / "case_000.png")["style_lora"] == styled[0]["style_lora"]
    assert all(a["digest"] != b["digest"] for a, b in zip(plain, styled, strict=True))
    assert all(a != b for a, b in zip(pictures(tmp_path / "plain"), pictures(tmp_path / "styled"), strict=True))
    capsys.readouterr()
    first = pictures(tmp_path / "styled")
    assert render(world, tmp_path / "styled", "--style-lora", style) == 0  # finished pictures stay
    assert "(2 were finished before)" in capsys.readouterr().out
    assert render(world, tmp_path / "styled", "--style-lora", style, "--style-lora-scale", "0.5") == 0  # another scale is another picture
    assert "finished before" not in capsys.readouterr().out
    assert all(a != b for a, b in zip(pictures(tmp_path / "styled"), first, strict=True))
    assert render(world, tmp_path / "styled") == 0  # and back
    assert pictures(tmp_path / "styled") == pictures(tmp_path / "plain")


def test_the_pipeline_gives_the_same(world: Path, tmp_path: Path) -> None:
    assert render(world, tmp_path, "--style-lora", str(world / "style.safetensors"), "--style-lora-scale", "0.5") == 0
    row = rows(tmp_path)[0]
    pipeline = MosaicFluxPipeline.from_pretrained(world / "model")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_reference_lora(world / "lora.safetensors")
    pipeline.load_style_lora(world / "style.safetensors", scale=0.5)
    picture = pipeline(
        row["prompt"],
        [load_image(world / "reference_0.png")],
        **{key: row[key] for key in ("height", "width", "num_inference_steps", "guidance_scale", "image_guidance_scale", "reference_size")},
        generator=torch.Generator().manual_seed(row["seed"]),
        max_sequence_length=row["text_length"],
    ).images[0]
    assert picture.tobytes() == load_image(tmp_path / row["file"]).tobytes()


def test_a_style_without_a_reference_lora(world: Path, tmp_path: Path) -> None:
    assert render(world, tmp_path, "--style-lora", str(world / "style.safetensors"), "--set", "inference.lora=null") == 0
    assert [(row["lora"], row["style_lora"]["name"]) for row in rows(tmp_path)] == [(None, "style.safetensors")] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "style LoRA not found"),
        (b"no tensors", "not a safetensors file"),
        ({"transformer.x_embedder.lora_A.weight": torch.ones(1, 16)}, "Missing 1: up matrix of x_embedder"),
        ({"unet.down.lora_A.weight": torch.ones(1, 16)}, "Unexpected 1: unet.down.lora_A.weight"),
    ],
)
def test_a_bad_style_ends_in_one_line_before_the_model_loads(
    content: bytes | dict[str, Tensor] | None,
    message: str,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "style.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        save_file(content, path)
    monkeypatch.setattr(MosaicFluxPipeline, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    assert render(world, tmp_path / "out", "--style-lora", str(path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
