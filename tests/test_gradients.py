"""How the losses pull at the adapter: against the gradient of their weighted sum, and that nothing is left changed."""

import dataclasses

import pytest
import torch

from mosaic.config import load_config
from mosaic.lora import reference_lora_parameters
from mosaic.objective import sample_generators, train_step
from mosaic.pipeline import MosaicFluxPipeline
from scripts.pocket.evaluation import held_out_scenes, scene_batch
from scripts.pocket.gradients import loss_pulls, paper_objective

SEED, FIRST = 3, 8


def test_the_parts_make_the_gradient_of_the_sum() -> None:
    """|g_FM + a g_SCAL|^2 = |g_FM|^2 (1 + 2 pull cosine + pull^2), and likewise with MDL."""
    config = paper_objective(load_config("configs/pocket.json", ["data.text_dropout=0.9", "loss.preset=release"]))
    assert (config.data.text_dropout, config.loss.preset, config.loss.disentanglement_start_step) == (0, "paper", 0)
    pipeline = MosaicFluxPipeline.from_pretrained("assets/pocket/flux", dtype=torch.float32)
    pipeline.load_reference_lora("assets/pocket/lora.safetensors")
    parameters = list(reference_lora_parameters(pipeline.transformer).values())
    batch = scene_batch(held_out_scenes(2, 2), pipeline, config)
    pulls = loss_pulls(pipeline, batch, config, SEED, FIRST)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters)

    def total(**weights: float) -> tuple[float, float]:
        """The sum, and the squared length of its gradient."""
        weighted = dataclasses.replace(config, loss=dataclasses.replace(config.loss, **{"disentanglement_weight": 0.0, **weights}))
        terms = train_step(pipeline, pipeline.transformer, batch, weighted, 0, sample_generators(SEED, FIRST, 2))
        gradients = torch.autograd.grad(terms.total, parameters, allow_unused=True)
        return terms.total.item(), sum(float(gradient.double().square().sum()) for gradient in gradients if gradient is not None)

    for parameter in parameters:
        parameter.requires_grad_(True)
    loss, alone = total(correspondence_weight=0.0)
    assert pulls.flow_matching == pytest.approx(loss)
    for pull, cosine, weights in (
        (pulls.correspondence_pull, pulls.correspondence_cosine, {"correspondence_weight": 0.4}),
        (pulls.disentanglement_pull, pulls.disentanglement_cosine, {"correspondence_weight": 0.0, "disentanglement_weight": 0.6}),
    ):
        assert total(**weights)[1] / alone == pytest.approx(1 + 2 * pull * cosine + pull**2, rel=1e-3)
