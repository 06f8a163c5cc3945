"""Bad calls of the pipeline: each is named before anything is computed. Where its options come from."""

from types import SimpleNamespace

import pytest
import torch

from mosaic.config.loading import from_dict
from mosaic.images import PreparedReference
from mosaic.pipeline.options import ResolvedOptions
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from tests import tiny
from tests.tiny import run


@pytest.fixture(scope="module")
def shared() -> MosaicFluxPipeline:
    """One pipeline for the tests that do not change it."""
    return tiny.build_pipeline()


PICTURE = tiny.picture(1)
BAD_CALLS = {
    "prepared for another size": (
        {"reference_images": [PICTURE, PreparedReference.make(PICTURE, 12, 0.9)], "reference_size": 16},
        r"reference_images\[0\]\[1\] must be prepared for 16 px at scale 0.9, as this call says, got one of 12 px at scale 0.9",
    ),
    "prepared at another scale": (
        {"reference_images": [PreparedReference.make(PICTURE, 12, 0.5)], "reference_size": 12},
        "must be prepared for 12 px at scale 0.9, as this call says, got one of 12 px at scale 0.5",
    ),
    "size": (
        {"height": 22},
        r"image size: height and width must be positive multiples of the token size 4 px, got 22 x 16\. Nearest: 24 x 16",
    ),
    "reference size": (
        {"reference_size": 10},
        "reference_size: height and width must be positive multiples of the token size 4 px, got 10 x 10",
    ),
    "no prompt": ({"prompt": None}, "give prompt or prompt_embeds"),
    "both prompts": ({"prompt_embeds": torch.ones(1, 8, 32)}, "give prompt or prompt_embeds .*one of the two"),
    "empty prompt": ({"prompt": "  "}, r"prompt\[0\] must be a non-empty string, got '  '"),
    "empty second prompt": ({"prompt": ["a", ""]}, r"prompt\[1\] must be a non-empty string, got ''"),
    "no prompts": ({"prompt": []}, "prompt must not be an empty list"),
    "prompt type": ({"prompt": ["a", 3]}, r"prompt\[1\] must be a non-empty string, got 3"),
    "embeds alone": ({"prompt": None, "prompt_embeds": torch.ones(1, 8, 32)}, "prompt_embeds need pooled_prompt_embeds"),
    "count": ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a positive integer, got 0"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps must be a positive integer, got 0"),
    "generators": ({"generator": [torch.Generator()] * 2}, "a list of generators must hold one per picture: 1, got 2"),
    "generator of a GPU": (
        {"generator": SimpleNamespace(device=torch.device("cuda:0"))},
        r"generators must be of the CPU, got one of cuda:0: give torch.Generator\(\).manual_seed",
    ),
    "callback": (
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        r"callback_on_step_end_tensor_inputs may name .*latents.*got \['noise'\]",
    ),
    "both references": (
        {"reference_images": [PICTURE], "reference_latents": torch.ones(1, 4, 6, 6)},
        "reference_images or reference_latents, not both",
    ),
    "a single picture": (
        {"reference_images": PICTURE},
        r"must be a list of pictures, got a single picture: write reference_images=\[picture\]",
    ),
    "a path": (
        {"reference_images": [PICTURE, "cat.png"]},
        r"reference_images\[0\]\[1\] must be a PIL picture, got str; see mosaic\.load_image",
    ),
    "flat list": (
        {"prompt": ["a", "b"], "reference_images": [PICTURE, PICTURE]},
        "one list of pictures per prompt: 2 lists, got 2 entries",
    ),
    "short list": ({"prompt": ["a", "b"], "reference_images": [[PICTURE]]}, "one list of pictures per prompt: 2 lists, got 1 entries"),
    "latents count": (
        {"prompt": ["a", "b"], "reference_latents": torch.ones(1, 4, 6, 6)},
        r"one tensor \[K, C, h, w\] per prompt: 2, got 1",
    ),
    "latents shape": (
        {"reference_latents": [torch.ones(4, 6, 6)]},
        r"reference_latents\[0\] must have shape \[K, C, h, w\] with even h and w, got \(4, 6, 6\)",
    ),
    "odd latents": ({"reference_latents": torch.ones(1, 4, 5, 6)}, r"reference_latents\[0\] must have shape .*got \(1, 4, 5, 6\)"),
    "latents channels": ({"reference_latents": torch.ones(1, 3, 6, 6)}, r"reference_latents\[0\] must have 4 channels.*got 3"),
    "mixed latents": (
        {"prompt": ["a", "b"], "reference_latents": [torch.ones(1, 4, 6, 6), torch.ones(2, 4, 8, 8)]},
        "all references of a call share one size",
    ),
    "noise": (
        {"latents": torch.ones(1, 4, 12, 8)},
        r"latents must be packed noise of shape \(1, 24, 16\) for this call, got \(1, 4, 12, 8\)",
    ),
    "mode": ({"reference_images": [PICTURE], "reference_attention": "all"}, "reference_attention must be one of"),
    "position": ({"reference_images": [PICTURE], "reference_position": "left"}, "reference_position must be one of"),
    "output": ({"output_type": "jpeg"}, "output_type must be one of"),
}


@pytest.mark.parametrize("case", list(BAD_CALLS))
def test_bad_calls_are_named_before_anything_runs(case: str, shared: MosaicFluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, message = BAD_CALLS[case]
    monkeypatch.setattr(shared, "encoders", SimpleNamespace(vae_scale_factor=shared.vae_scale_factor))  # which encode nothing
    with pytest.raises(ValueError, match=message):
        run(shared, **{"prompt": "a cat"} | arguments)


def test_references_need_a_reference_lora() -> None:
    pipeline = tiny.build_pipeline(lora_rank=None)
    for arguments in ({"reference_images": [PICTURE]}, {"reference_latents": torch.ones(1, 4, 6, 6)}):
        with pytest.raises(ValueError, match=r"references need a reference LoRA: call load_reference_lora"):
            run(pipeline, prompt="a cat", **arguments)
    run(pipeline, prompt="a cat", reference_images=[])  # none: fine
    with pytest.raises(ValueError, match="no reference LoRA is attached"):
        pipeline.save_reference_lora("/no/such/file.safetensors")


def test_every_option_comes_from_its_setting() -> None:
    inference = {"height": 320, "width": 640, "num_inference_steps": 7, "guidance_scale": 2.0, "image_guidance_scale": 1.5}
    inference |= {"reference_scale": 0.7, "reference_cache": True}
    model = {"reference_attention": "isolated", "reference_position": "index", "text_length": 64}
    found = ResolvedOptions.from_config(from_dict({"model": model, "data": {"reference_size": 256}, "inference": inference}))
    rest = {"reference_size": 256, "max_sequence_length": 64, "refresh_references": None}
    assert found.arguments == inference | rest | {"reference_attention": "isolated", "reference_position": "index"}
    assert ResolvedOptions.from_config(from_dict({"inference": {"refresh_references": 3}})).refresh_references == 3
