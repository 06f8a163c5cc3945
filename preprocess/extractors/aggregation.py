"""The adapter of GeoAware-SC and DIY-SC: one bottleneck block per feature map, mixed by learned weights (data fact B2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic.weights.frozen import load_into, read_state_dict

GROUPS = 32
UNUSED = ("logit_scale", "self_logit_scale")
"""Scalars of the published files that only their training uses."""


class NormedConv(nn.Conv2d):
    """Convolution without bias, followed by a group norm that is its child `norm`, as the published keys want."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.GroupNorm(GROUPS, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """[B, in, rows, columns] -> [B, out, rows, columns]."""
        return self.norm(super().forward(features))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut, which has weights only where the number of channels changes."""

    def __init__(self, in_channels: int, width: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = NormedConv(in_channels, width, 1)
        self.conv2 = NormedConv(width, width, 3)
        self.conv3 = NormedConv(width, out_channels, 1)
        self.shortcut = nn.Identity() if in_channels == out_channels else NormedConv(in_channels, out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, in, rows, columns] -> [B, out, rows, columns]."""
        hidden = F.relu(self.conv2(F.relu(self.conv1(features))))
        return F.relu(self.conv3(hidden) + self.shortcut(features))


class AggregationNetwork(nn.Module):
    """One `Bottleneck` per feature map; their outputs are added with softmax weights and normalised to length 1 per cell."""

    def __init__(self, in_channels: list[int], width: int, out_channels: int) -> None:
        """Make the network.

        Args:
            in_channels: Of each feature map, in the order of the input: [640, 1280, 1280, 768] in GeoAware-SC, [768] in DIY-SC.
            width: Channels inside a bottleneck (192).
            out_channels: Of the result (768).
        """
        super().__init__()
        self.in_channels = in_channels
        self.mixing_weights = nn.Parameter(torch.ones(len(in_channels)))
        self.bottleneck_layers = nn.ModuleList(nn.Sequential(Bottleneck(channels, width, out_channels)) for channels in in_channels)

    def forward(self, features: Tensor) -> Tensor:
        """[B, sum of in_channels, rows, columns] -> [B, out_channels, rows, columns]."""
        parts = features.split(self.in_channels, dim=1)
        weights = self.mixing_weights.softmax(dim=0)
        mixed = sum(weight * layer(part) for weight, layer, part in zip(weights, self.bottleneck_layers, parts, strict=True))
        return F.normalize(mixed, dim=1)


def load_aggregation(path: str, what: str, in_channels: list[int], device: torch.device, dtype: torch.dtype) -> AggregationNetwork:
    """Read an adapter; its widths are those of the file.

    Args:
        path: State dict, such as best_856.PTH of GeoAware-SC or a file of DIY-SC.
        what: The option that names it, for messages.
        in_channels: Channels of the feature maps that it will be given.
        device: Where it goes.
        dtype: Of its weights.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Damaged, holds pickled objects, or is an adapter for other feature maps.
    """
    state = {name: tensor for name, tensor in read_state_dict(path, what).items() if name not in UNUSED}
    first = [state[key] for i in range(len(in_channels)) if (key := f"bottleneck_layers.{i}.0.conv1.weight") in state]
    last = state.get("bottleneck_layers.0.0.conv3.weight")
    branches = sum(name.endswith(".0.conv1.weight") for name in state)
    if last is None or last.ndim != 4 or not branches == len(first) == len(in_channels) or any(weight.ndim != 4 for weight in first):
        raise ValueError(f"{what}: {path} must hold an aggregation network of {len(in_channels)} branches, found {branches}.")
    found = [weight.shape[1] for weight in first]
    if found != in_channels:
        raise ValueError(f"{what}: {path} was made for feature maps of {found} channels, but the models give {in_channels}.")
    width, out_channels = first[0].shape[0], last.shape[0]
    if width % GROUPS or out_channels % GROUPS or not width or not out_channels:
        raise ValueError(f"{what}: {path}: widths must be multiples of {GROUPS}, got {width} and {out_channels}.")
    network = AggregationNetwork(in_channels, width, out_channels)
    load_into(network, state, what)
    return network.to(device=device, dtype=dtype).eval().requires_grad_(False)
