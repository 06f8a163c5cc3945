"""Reading activations out of stock models by hooks, ending the forward pass as soon as the last one is there."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from torch import Tensor, nn


class _AllCaptured(Exception):
    """Ends a forward pass; never leaves this module."""


def outputs_until(modules: Sequence[nn.Module], run: Callable[[], object], element: int = 0) -> list[Tensor]:
    """Run a forward pass and return the outputs of some of its modules; the pass ends at the last of them.

    Args:
        modules: In the order in which the pass meets them, each met once.
        run: Runs the pass.
        element: Which is wanted of an output that is a tuple.

    Returns:
        One tensor per module: its output, or that element of it.
    """
    captured: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        captured.append(output if isinstance(output, Tensor) else output[element])
        if len(captured) == len(modules):
            raise _AllCaptured

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(keep).remove)
        try:
            run()
        except _AllCaptured:
            return captured
    raise AssertionError(f"the forward pass met {len(captured)} of {len(modules)} modules")
