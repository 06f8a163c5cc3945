"""The naive twin of tests/naive.py in the transformer's place: LoRA on all tokens and then masked, a dense mask, full attention maps."""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from mosaic.lora.adapter import reference_lora_parameters
from mosaic.model.attention_rows import CaptureRequest, resolve_capture_blocks
from mosaic.model.transformer import MosaicFluxTransformer2DModel, MosaicTransformerOutput
from tests import naive

#: Arguments of the transformer that the twin knows as well.
INPUTS = (
    *("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance"),
    *("reference_hidden_states", "reference_ids", "reference_attention"),
)
TOLERANCE = 1e-3  # that both may be apart, of the larger one: they must do the same work


class Twin:
    """The twin of a transformer, with weights and an adapter of its own, equal to the transformer's now. On a CPU.

    Attributes:
        parameters: The adapter's.
        tensors: These and the base's.
    """

    def __init__(self, transformer: MosaicFluxTransformer2DModel) -> None:
        adapter = reference_lora_parameters(transformer)
        stock = FluxTransformer2DModel(**{key: value for key, value in transformer.config.items() if not key.startswith("_")})
        base = {key.replace(".base_layer", ""): value for key, value in transformer.state_dict().items() if ".lora_" not in key}
        stock.load_state_dict(base)
        tensors = {key: value.detach().clone().requires_grad_() for key, value in adapter.items()}
        self.parameters = list(tensors.values())
        self.tensors = [*self.parameters, *stock.parameters()]
        self._config = stock.config
        self._flux = naive.NaiveFlux(stock.requires_grad_(False), naive.lora_matrices(tensors))

    def __call__(self, capture: CaptureRequest | None = None, **inputs: Any) -> MosaicTransformerOutput:
        """The transformer's output: the velocity, and the rows at the supervised points, picked from the full maps."""
        output = self._flux(**{name: inputs[name] for name in INPUTS if inputs.get(name) is not None})
        rows = None
        if capture is not None and capture.global_index is not None:
            blocks = resolve_capture_blocks(capture.blocks, self._config.num_layers, self._config.num_single_layers)
            maps = naive.mean_maps(output.maps, sorted(blocks))
            rows = maps[torch.arange(len(maps))[:, None], capture.global_index].float()
        return MosaicTransformerOutput(sample=output.velocity, attention_rows=rows)


def check_agreement(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Ours and the twin's numbers must agree.

    Raises:
        RuntimeError: They do not, so that the comparison would mean nothing.
    """
    gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    if not gap <= TOLERANCE:
        raise RuntimeError(f"ours and the twin disagree by {gap:.2e}; the comparison would mean nothing.")
