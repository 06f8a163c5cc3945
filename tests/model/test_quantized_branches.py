"""Quantised bases on the real classes: text and target are the bare quantised model's bit for bit, only reference tokens see the LoRA."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mosaic.lora.adapter import detach_reference_lora, reference_lora_modules
from mosaic.model import blocks
from mosaic.model.attention import AttentionOutput, Layout, branch_attention
from mosaic.model.branch import ADAPTER_NAME, branch_linear
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from mosaic.rendering.loading import load_gguf
from mosaic.weights.quantization import PACKAGES, quantize_base
from tests import runs, tiny
from tests.weights.test_quantization import round_base

TEXT = 5  # tokens of tiny.build_batch


def quantized(quantization: str) -> Callable[[Path], nn.Module]:
    def build(folder: Path) -> nn.Module:
        transformer = tiny.build_transformer(guidance_embeds=False)
        quantize_base(transformer, quantization, torch.device("cpu"))
        return transformer

    return build


def rounded(folder: Path) -> nn.Module:
    transformer = tiny.build_transformer(guidance_embeds=False)
    round_base(transformer)
    return transformer


def packed(kind: str) -> Callable[[Path], nn.Module]:
    def build(folder: Path) -> nn.Module:
        runs.write_model(folder / "model")
        file = runs.write_gguf(folder / "model", folder / "t.gguf", kind)
        return MosaicFluxTransformer2DModel.adopt(load_gguf(str(file), str(folder / "model"), torch.float32)).eval()

    return build


def path(name: str, build: Callable[[Path], nn.Module], package: str) -> pytest.param:
    missing = importlib.util.find_spec(package) is None
    marks = [pytest.mark.skipif(missing, reason=f"needs {package}"), pytest.mark.filterwarnings("ignore")]
    return pytest.param(build, id=name, marks=marks)


BASES = [
    pytest.param(rounded, id="rounded"),
    *(path(f"gguf-{kind}", packed(kind), "gguf") for kind in ("Q8_0", "Q4_0")),
    *(path(name, quantized(name), package) for name, package in PACKAGES.items()),
]


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
    return request.param(tmp_path)


@pytest.fixture
def batch() -> tiny.Batch:
    return tiny.build_batch(guidance_embeds=False)


@contextmanager
def reference_keys_taken_away() -> Iterator[None]:
    """Text and target attend to text and target only; references go on through the same layers, in the same sequence."""

    def attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, attend: Any, *rest: Any) -> AttentionOutput:
        output = branch_attention(query, key, value, layout, attend, *rest)
        if layout.length == 0:
            return output
        main = query.shape[1] - layout.length
        return output._replace(main=attend(*(x[:, :main].contiguous() for x in (query, key, value))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "branch_attention", attention)
        yield


def tokens_of_all_blocks(transformer: nn.Module, inputs: dict[str, Any], num_target: int) -> dict[str, list[Tensor]]:
    """What comes out of every block, by branch, and the velocity."""
    found: dict[str, list[Tensor]] = {"text": [], "target": [], "references": []}

    def keep(module: nn.Module, arguments: Any, output: blocks.BlockOutput) -> None:
        found["text"].append(output.encoder_hidden_states)
        found["target"].append(output.hidden_states[:, :num_target])
        found["references"].append(output.hidden_states[:, num_target:])

    hooks = [block.register_forward_hook(keep) for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)]
    with torch.no_grad():
        found["target"].append(transformer(**inputs).sample)
    for hook in hooks:
        hook.remove()
    return found


def test_text_and_target_are_the_bare_quantised_models(base: nn.Module, batch: tiny.Batch) -> None:
    num_target = batch.inputs["hidden_states"].shape[1]
    alone = tokens_of_all_blocks(base, tiny.without_references(batch.inputs), num_target)
    with_keys = tokens_of_all_blocks(base, batch.inputs, num_target)
    with reference_keys_taken_away():
        bare = tokens_of_all_blocks(base, batch.inputs, num_target)
    tiny.attach_random_lora(base)
    with reference_keys_taken_away():
        without = tokens_of_all_blocks(base, batch.inputs, num_target)
    adapted = tokens_of_all_blocks(base, batch.inputs, num_target)
    unused = tokens_of_all_blocks(base, tiny.without_references(batch.inputs), num_target)

    for branch in ("text", "target"):
        assert all(map(torch.equal, without[branch], bare[branch])), branch
        assert all(map(torch.equal, unused[branch], alone[branch])), branch
        for found, want in zip(without[branch], alone[branch], strict=True):  # in a sequence of its own: products may round otherwise
            torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
        assert not any(map(torch.equal, adapted[branch], with_keys[branch])), branch  # the references' keys carry the LoRA to them
    assert not any(map(torch.equal, without["references"], bare["references"]))
    assert not any(map(torch.equal, adapted["references"], with_keys["references"]))


def test_the_lora_is_exact_on_every_quantised_layer(base: nn.Module) -> None:
    names = reference_lora_modules(base)
    before = {name: base.get_submodule(name) for name in names}
    tiny.attach_random_lora(base)
    for name in names:
        layer = base.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        assert layer.get_base_layer() is before[name]
        tokens = torch.randn(2, 7, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            want = before[name](tokens).clone()
            found = branch_linear(layer, tokens, 4)
            up, down = layer.lora_B[ADAPTER_NAME].weight, layer.lora_A[ADAPTER_NAME].weight
            delta = tokens[:, 4:] @ down.T @ up.T
        assert torch.equal(found[:, :4], want[:, :4]), name
        torch.testing.assert_close(found[:, 4:], want[:, 4:] + delta, atol=1e-5, rtol=1e-5)
        assert delta.abs().mean() > 1e-3


def test_taking_the_lora_off_leaves_the_quantised_model(base: nn.Module, batch: tiny.Batch) -> None:
    with torch.no_grad():
        want = base(**batch.inputs).sample
        tiny.attach_random_lora(base)
        detach_reference_lora(base)
        assert torch.equal(base(**batch.inputs).sample, want)
