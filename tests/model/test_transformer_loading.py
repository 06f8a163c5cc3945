"""Where a transformer comes from, and what its forward pass refuses."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.blocks import MosaicFluxSingleTransformerBlock, MosaicFluxTransformerBlock
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from tests import tiny


def test_adopt_changes_classes_and_no_weight(stock_transformer: FluxTransformer2DModel) -> None:
    weights = {key: value.clone() for key, value in stock_transformer.state_dict().items()}
    adopted = MosaicFluxTransformer2DModel.adopt(stock_transformer)
    assert adopted is stock_transformer
    assert type(adopted) is MosaicFluxTransformer2DModel
    assert {type(block) for block in adopted.transformer_blocks} == {MosaicFluxTransformerBlock}
    assert {type(block) for block in adopted.single_transformer_blocks} == {MosaicFluxSingleTransformerBlock}
    assert adopted.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in adopted.state_dict().items())


def test_saved_folders_travel_both_ways(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch, tmp_path: Path) -> None:
    inputs = tiny.without_references(batch.inputs)
    transformer.save_pretrained(tmp_path / "ours")
    stock = FluxTransformer2DModel.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(stock(**inputs).sample, transformer(**inputs).sample, atol=2e-5, rtol=1e-5)
    stock.save_pretrained(tmp_path / "stock")
    again = MosaicFluxTransformer2DModel.from_pretrained(tmp_path / "stock")
    assert type(again.transformer_blocks[0]) is MosaicFluxTransformerBlock
    torch.testing.assert_close(again(**batch.inputs).sample, transformer(**batch.inputs).sample, atol=2e-5, rtol=1e-5)


def test_capture_without_references_is_refused(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    with pytest.raises(ValueError, match="capture needs reference_hidden_states with K >= 1"):
        transformer(**tiny.without_references(batch.inputs), capture=CaptureRequest(batch.points.global_index))


@pytest.mark.parametrize("blocks", ["single", [], [4], [-1]])
def test_unknown_capture_blocks_are_refused(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch, blocks: object) -> None:
    with pytest.raises(ValueError, match="capture_blocks must"):
        transformer(**batch.inputs, capture=CaptureRequest(batch.points.global_index, blocks=blocks))


def test_unknown_mode_is_refused(transformer: MosaicFluxTransformer2DModel, batch: tiny.Batch) -> None:
    with pytest.raises(ValueError, match="reference_attention must be one of .*'target', 'joint', 'isolated'.*got 'all'"):
        transformer(**batch.inputs, reference_attention="all")


def test_fused_projections_are_refused(transformer: MosaicFluxTransformer2DModel) -> None:
    with pytest.raises(ValueError, match=r"fuse_qkv_projections\(\) cannot be used"):
        transformer.fuse_qkv_projections()
