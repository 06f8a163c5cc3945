"""Distillation of text guidance into the pocket FLUX: the student learns v + (g - 1) (v - u) of its teacher."""

import argparse
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from scripts.pocket import runs
from scripts.pocket.base_data import Layout
from scripts.pocket.model import build_transformer, save_pocket_flux
from scripts.pocket.sampling import fast_attention, predict_velocity
from scripts.pocket.train_base import BaseTraining, NoisyBatch, build_components, draw_noise

#: Guidance scales of the student; the share of samples at exactly 1, at which reference adapters are trained.
MAX_GUIDANCE, SHARE_OF_ONE = 4.0, 0.25


def with_guidance(teacher: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The teacher's weights with a guidance embedding that adds nothing yet."""
    student = build_transformer(0, guidance_embeds=True, channels=teacher.config.in_channels)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert all("guidance_embedder" in name for name in missing), missing
    last = student.time_text_embed.guidance_embedder.linear_2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return student


def draw_guidance(count: int, generator: torch.Generator) -> Tensor:
    """[count] guidance scales on the generator's device: some 1, the others uniform up to MAX_GUIDANCE."""
    on: dict[str, Any] = {"generator": generator, "device": generator.device}
    guidance = 1.0 + (MAX_GUIDANCE - 1.0) * torch.rand(count, **on)
    return torch.where(torch.rand(count, **on) < SHARE_OF_ONE, 1.0, guidance)


def guidance_direction(teacher: dict[str, Any], layout: Layout, noisy: NoisyBatch, empty: tuple[Tensor, Tensor]) -> Tensor:
    """v - u of the teacher, [batch, tokens, channels]; `empty` are the ids of the empty caption, each [1, text length]."""
    first, second = (torch.cat([given, blank.expand_as(given)]) for given, blank in zip(noisy.ids, empty, strict=True))
    captioned, uncaptioned = predict_velocity(teacher, layout, noisy.tokens.repeat(2, 1, 1), noisy.time.repeat(2), (first, second)).chunk(2)
    return captioned - uncaptioned


class GuidanceDistillation(BaseTraining):
    """Training of the student's transformer."""

    trained = ("transformer",)
    subfolder = "distilled"
    sample_guidance = 2.5

    def build(self) -> dict[str, Any]:
        """The student; the teacher is kept beside it."""
        teacher = FluxPipeline.from_pretrained(self.arguments.teacher, dtype=torch.float32).components
        names = ("scheduler", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer")
        self.teacher = {name: teacher[name] for name in names}
        for name in ("vae", "text_encoder", "text_encoder_2", "transformer"):
            self.teacher[name].eval().requires_grad_(False).to(self.device)
        return {**self.teacher, "transformer": with_guidance(self.teacher["transformer"])}

    def compile(self) -> None:
        """Compiles the blocks of student and teacher."""
        super().compile()
        self.teacher["transformer"].compile_repeated_blocks(dynamic=True if self.device.type == "cuda" else None)

    def loss(self, layout: Layout, clean: Tensor, ids: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        """Mean squared error to v + (g - 1) (v - u)."""
        guidance = draw_guidance(len(clean), generator)[runs.processes()[0] :: runs.processes()[1]]
        noisy = draw_noise(layout, clean, ids, generator)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            with torch.no_grad():
                direction = guidance_direction(self.teacher, layout, noisy, self.empty)
            velocity = predict_velocity(self.components, layout, noisy.tokens, noisy.time, noisy.ids, guidance)
        goal = noisy.velocity + (guidance - 1.0)[:, None, None] * direction
        return (velocity - goal).square().mean()

    def export(self) -> None:
        """Writes the averaged weights of the latest checkpoint as a diffusers folder."""
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        student = with_guidance(self.teacher["transformer"])
        parameters = runs.named_parameters({"transformer": student})
        with torch.no_grad():
            for name, value in state["average"].items():
                parameters[name].copy_(value)
        fresh = build_components(self.arguments.run_dir, 0)  # used tokenizers would save how they were called
        tokenizers = {name: fresh[name] for name in ("tokenizer", "tokenizer_2")}
        save_pocket_flux({**self.teacher, **tokenizers, "transformer": student.to(torch.bfloat16)}, self.run_dir / "export")


def run(arguments: argparse.Namespace) -> None:
    """Trains and exports."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    runs.join_processes()
    with fast_attention(arguments.device):
        GuidanceDistillation(arguments).run()
