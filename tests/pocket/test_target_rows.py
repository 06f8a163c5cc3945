"""Where target tokens look among the references: against the naive twin's full maps, and by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from mosaic.method.correspondence import batch_points
from mosaic.method.grids import Grid
from scripts.pocket.target_rows import TargetLooks, reading_target_rows, target_looks
from tests import naive, tiny


class TwinWithTargetMaps(naive.NaiveFlux):
    """Keeps, of each block, the attention of the target's tokens over the references' in a softmax over all keys, head mean."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor, maps: list[Tensor]) -> Tensor:
        axes = self.transformer.config.axes_dims_rope
        turned, keys = (naive.rotate(x, self.ids, axes).transpose(1, 2) for x in (query, key))
        everything = torch.softmax(turned @ keys.transpose(2, 3) / math.sqrt(query.shape[-1]), dim=-1)
        self.target_maps = [*getattr(self, "target_maps", []), everything[:, :, self.target, self.token_reference >= 0].mean(dim=1)]
        return super().attention(query, key, value, maps)


@pytest.mark.parametrize("mode", ["joint", "target", "isolated"])
def test_rows_are_those_of_the_full_maps(batch: tiny.Batch, mode: str) -> None:
    transformer, stock = tiny.build_transformer(), tiny.build_transformer(stock=True)
    parameters = tiny.attach_random_lora(transformer)
    twin = TwinWithTargetMaps(stock, naive.lora_matrices({key: parameter.detach() for key, parameter in parameters.items()}))
    with torch.no_grad():
        twin(**batch.inputs, reference_attention=mode)
        with reading_target_rows(transformer) as rows:
            assert hooks(transformer) == 2 * 5 + 2 * 3  # four norms and the block, two norms and the block
            read = transformer(**batch.inputs, reference_attention=mode).sample
        assert torch.equal(transformer(**batch.inputs, reference_attention=mode).sample, read)
    assert len(rows) == len(twin.target_maps) == 4
    for ours, theirs in zip(rows, twin.target_maps, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert hooks(transformer) == 0


def hooks(transformer: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in transformer.modules())


def test_it_ends_with_an_error() -> None:
    transformer = tiny.build_transformer()
    with pytest.raises(RuntimeError, match="stop"), reading_target_rows(transformer):
        raise RuntimeError("stop")
    assert hooks(transformer) == 0


def looks_of(weights: list[float]) -> TargetLooks:
    """Of one point, from token 5 = (1, 2) of the second of two references of 2 x 3 tokens to target token 1."""
    rows = torch.zeros(1, 3, 12)
    rows[0, 1] = torch.tensor(weights)
    return target_looks(rows, batch_points([[torch.zeros(0, 2).long(), torch.tensor([[5, 1]])]], 6, 3, "cpu"), Grid(2, 3))


@pytest.mark.parametrize(
    ("peak", "exact", "near"),
    [(11, 1, 1), (10, 0, 1), (7, 0, 1), (8, 0, 1), (6, 0, 0), (9, 0, 0), (5, 0, 0), (4, 0, 0)],
)
def test_a_peak_by_hand(peak: int, exact: int, near: int) -> None:
    weights = [0.01] * 12
    weights[peak] = 0.3
    own = 0.35 if peak >= 6 else 0.06
    assert looks_of(weights) == pytest.approx((0.41, own / 0.41, exact, near))


def test_the_mean_is_over_points_of_all_samples() -> None:
    points = batch_points([[torch.tensor([[0, 0], [1, 1]])], [torch.tensor([[1, 2]])]], 2, 3, "cpu")
    rows = torch.zeros(2, 3, 2)
    rows[0, 0], rows[0, 1], rows[1, 2] = torch.tensor([0.2, 0.1]), torch.tensor([0.3, 0.1]), torch.tensor([0.1, 0.4])
    assert target_looks(rows, points, Grid(1, 2)) == pytest.approx(((0.3 + 0.4 + 0.5) / 3, 1, 2 / 3, 1))
