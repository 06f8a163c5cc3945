"""How the losses pull at the adapter: against the gradient of their weighted sum, by hand, and that nothing is left changed."""

import pytest
import torch
from torch import Tensor

from mosaic.config.loading import load_config
from mosaic.lora.adapter import reference_lora_parameters
from mosaic.pipeline.pipeline import MosaicFluxPipeline
from mosaic.training.objective import call_settings, draw_inputs, sample_generators, train_step
from scripts.pocket.evaluation import held_out_scenes, scene_batch
from scripts.pocket.gradients import Gradients, batch_gradients, mean_pulls, paper_objective

SEED, FIRST = 3, 8


def test_the_parts_make_the_gradient_of_the_sum() -> None:
    config = paper_objective(load_config("configs/pocket.json", ["data.text_dropout=0.9", "loss.preset=release"]))
    assert (config.data.text_dropout, config.loss.preset, config.loss.disentanglement_start_step) == (0, "paper", 0)
    pipeline = MosaicFluxPipeline.from_pretrained("assets/pocket/flux", dtype=torch.float32)
    pipeline.load_reference_lora("assets/pocket/lora.safetensors")
    parameters = list(reference_lora_parameters(pipeline.transformer).values())
    batch = scene_batch(held_out_scenes(2, 2), pipeline, config)
    found = batch_gradients(pipeline, batch, config, SEED, FIRST)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters)

    def total(**weights: float) -> tuple[float, Tensor]:
        """The sum and its gradient."""
        weighted = config.replace(loss=config.loss.replace(**weights))
        inputs = draw_inputs(pipeline.encoders, batch, weighted, sample_generators(SEED, FIRST, 2), torch.device("cpu"))
        terms = train_step(pipeline.transformer, *inputs, weighted.loss, 0, call_settings(weighted, pipeline.transformer))
        gradients = torch.autograd.grad(terms.total, parameters)
        return terms.total.item(), torch.cat([gradient.flatten() for gradient in gradients])

    for parameter in parameters:
        parameter.requires_grad_(True)
    loss, alone = total(correspondence_weight=0.0, disentanglement_weight=0.0)
    assert (found.samples, found.loss) == (2, pytest.approx(loss))
    torch.testing.assert_close(found.flow_matching, alone)
    whole = found.flow_matching + 0.4 * found.correspondence + 0.6 * found.disentanglement
    torch.testing.assert_close(whole, total()[1], atol=1e-6, rtol=1e-3)
    assert min(gradient.norm() for gradient in found[2:]) > 0


def test_pulls_are_of_the_mean_over_samples() -> None:
    """Means, a sample counting one: g_FM (0, 4), g_SCAL (3, -4), g_MDL (2, 0)."""
    first = Gradients(1, 0.5, *(torch.tensor(x) for x in ([3.0, 4.0], [0.0, -1.0], [2.0, 3.0])))
    second = Gradients(3, 0.1, *(torch.tensor(x) for x in ([-1.0, 4.0], [4.0, -5.0], [2.0, -1.0])))
    pulls = mean_pulls([first, second], paper_objective(load_config("configs/pocket.json")))
    assert pulls == pytest.approx((0.2, 0.4 * 5 / 4, -4 / 5, 0.6 * 2 / 4, 0))
