"""Compiled blocks: how often they are compiled in a run that mixes numbers of references and points with validation, and their gradients."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from mosaic.method.correspondence import LEAST_POINTS, Points, batch_points
from mosaic.model.acceleration import RECOMPILE_LIMIT, compile_blocks
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.transformer import MosaicFluxTransformer2DModel
from tests import tiny

pytestmark = [
    # Dynamo itself looks at `.grad` of a block's inputs, and makes an instance of every autograd function.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(backend: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """A backend, and the numbers of operations of the graphs that it has compiled."""
    graphs: list[int] = []

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return backend(graph, inputs, **options)

    return compile_graph, graphs


def points_of(batch: tiny.Batch, count: int) -> Points:
    """The first points of each sample's first reference; 0: as samples whose references were dropped."""
    samples = [[pairs[:count] if k == 0 else pairs[:0] for k, pairs in enumerate(sample)] for sample in batch.samples]
    return batch_points(samples, batch.num_reference_tokens, tiny.TARGET_GRID.num_tokens, at_least=LEAST_POINTS)


def step(transformer: MosaicFluxTransformer2DModel, parameters: dict[str, nn.Parameter], num_references: int, count: int) -> list[Tensor]:
    """Velocity, rows and gradients of a training step."""
    batch = tiny.build_batch(num_references, seed=num_references + count)
    points = points_of(batch, count)
    output = transformer(**batch.inputs, capture=CaptureRequest(points.global_index))
    assert output.attention_rows is not None
    rows = output.attention_rows * points.mask[..., None]
    (output.sample.square().mean() + rows.square().sum()).backward()
    gradients = [parameter.grad for parameter in parameters.values()]
    for parameter in parameters.values():
        parameter.grad = None
    return [output.sample.detach(), output.attention_rows.detach(), *gradients]


def test_a_run_with_validation_mixed_references_and_dropped_samples() -> None:
    """A picture before the first step, and steps of 0, 1 and 2 points: three graphs in all, and the gradients of eager blocks."""
    transformer = tiny.build_transformer(num_layers=0, num_single_layers=1)
    parameters = tiny.attach_random_lora(transformer)
    steps = [(2, 2), (2, 0), (1, 2), (2, 1), (1, 1), (1, 0)]
    expected = [step(transformer, parameters, *sizes) for sizes in steps]
    backend, graphs = counted(aot_eager)
    # Without sizes left open, any other size is another graph: of fewer points, too, if they were not padded.
    compile_blocks(transformer, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        transformer(**tiny.build_batch(2, batch=1).inputs)
    for sizes, eager in zip(steps, expected, strict=True):
        for ours, theirs in zip(step(transformer, parameters, *sizes), eager, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        transformer(**tiny.build_batch(2, batch=1).inputs)
    assert len(graphs) == 3  # of pictures, of steps with two references and with one


def test_a_kind_of_block_is_compiled_once() -> None:
    """The first of its kind is given what no block has made: it must look the same in memory. Any numbers above 1 are one graph."""
    transformer = tiny.build_transformer(num_layers=0, num_single_layers=2)
    tiny.attach_random_lora(transformer)
    backend, graphs = counted(lambda graph, _: graph)
    compile_blocks(transformer, backend=backend, fullgraph=True, dynamic=True)
    for num_references, batch in ((4, 3), (3, 4)):  # unlike one another and the two branches: equal sizes would be taken for one size
        with torch.no_grad():
            transformer(**tiny.build_batch(num_references, batch).inputs)
    assert len(graphs) == 1


def test_more_graphs_than_pytorch_allows_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    transformer = tiny.build_transformer(num_layers=0, num_single_layers=0)
    monkeypatch.setattr(transformer, "compile_repeated_blocks", lambda **options: given.append(options))
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_blocks(transformer, fullgraph=True)
        assert torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT >= 64
    assert given == [{"fullgraph": True}]
