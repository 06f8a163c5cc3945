"""The identity judge of the pocket world: which individual of a class does a picture show?

A small convolutional network reads the whole picture. Every class has a query that looks for that class on the feature
map; what it finds is classified by palette, pattern and marking. The judge never sees a layout, a mask or a caption.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from mosaic.files import replacing, save_tensors
from scripts.pocket.world import BACKGROUNDS, CLASSES, MARKINGS, PALETTES, PATTERNS, Identity

JUDGE_SIZE = 64  # px, side of the pictures it reads
NUM_CANDIDATES = 8
MAX_COUNT = 4
GRID = 16  # cells per side of the maps on which it looks for classes
ATTRIBUTES: dict[str, tuple[str, ...]] = {"palette": PALETTES, "pattern": PATTERNS, "marking": MARKINGS}
WEIGHTS = Path(__file__).resolve().parents[2] / "assets" / "pocket" / "judge.safetensors"
_FORMAT = "pocket-judge"


@dataclass(frozen=True)
class JudgeConfig:
    """Widths of the network: channels at 1/2 and at 1/4 of the picture's side, and of a class's findings."""

    fine: int = 48
    coarse: int = 96
    found: int = 128


@dataclass(frozen=True)
class Verdict:
    """What the judge sees, logits for every class c of a batch of B pictures.

    Attributes:
        palette: `[B, C, 8]`.
        pattern: `[B, C, 5]`.
        marking: `[B, C, 4]`.
        presence: `[B, C]`, positive where the class is in the picture.
        count: `[B, C, MAX_COUNT + 1]`.
        background: `[B, 6]`.
        attention: `[B, C, 256]`, where it looked for the class (sums to 1).
    """

    palette: Tensor
    pattern: Tensor
    marking: Tensor
    presence: Tensor
    count: Tensor
    background: Tensor
    attention: Tensor


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape `[B, channels, H, W]`."""
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(x + self.second_norm(self.second(y)))


class Judge(nn.Module):
    """Picture `[B, 3, 64, 64]` in [-1, 1] -> `Verdict`."""

    def __init__(self, config: JudgeConfig = JudgeConfig()) -> None:
        super().__init__()
        self.config = config
        fine, coarse, found, classes = config.fine, config.coarse, config.found, len(CLASSES)
        self.trunk = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, fine, 3, padding=1, bias=False),
            nn.BatchNorm2d(fine),
            nn.ReLU(),
            _Residual(fine),
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(coarse),
            nn.ReLU(),
            _Residual(coarse),
            _Residual(coarse),
        )
        self.look = nn.Sequential(nn.Conv2d(coarse, coarse, 5, padding=2, groups=8), nn.ReLU(), nn.Conv2d(coarse, classes, 1))
        self.class_embedding = nn.Parameter(torch.randn(classes, found) * 0.1)
        self.find = nn.Sequential(nn.Linear(coarse, found), nn.ReLU())
        self.judge = nn.Sequential(nn.Linear(found, found), nn.ReLU())
        self.palette = nn.Linear(found, len(PALETTES))
        self.pattern = nn.Linear(found, len(PATTERNS))
        self.marking = nn.Linear(found, len(MARKINGS))
        self.presence = nn.Linear(found + 1, 1)
        self.count = nn.Linear(2, MAX_COUNT + 1)
        self.background = nn.Linear(coarse, len(BACKGROUNDS))

    def forward(self, pictures: Tensor) -> Verdict:
        """Look for every class in every picture."""
        features = self.trunk(pictures)  # (B, coarse, 16, 16)
        scores = self.look(features).flatten(2).float()  # (B, C, 256)
        attention = scores.softmax(dim=-1)
        values = features.flatten(2).transpose(1, 2)  # (B, 256, coarse)
        found = self._found(attention.to(values.dtype) @ values, self.class_embedding)
        peak = scores.amax(dim=-1, keepdim=True)
        area = torch.sigmoid(scores).sum(dim=-1, keepdim=True) / 16
        return Verdict(
            palette=self.palette(found).float(),
            pattern=self.pattern(found).float(),
            marking=self.marking(found).float(),
            presence=self.presence(torch.cat([found, peak.to(found.dtype)], dim=-1)).squeeze(-1).float(),
            count=self.count(torch.cat([area, peak], dim=-1).to(found.dtype)).float(),
            background=self.background(features.mean(dim=(2, 3))).float(),
            attention=attention,
        )

    def _found(self, pooled: Tensor, embedding: Tensor) -> Tensor:
        """What is known of features that attention has gathered for classes."""
        return self.judge(self.find(pooled) + embedding)

    @torch.no_grad()
    def maps(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Features of every cell, `[B, 256, coarse]`, and the scores by which each class is looked for, float32 `[B, C, 256]`."""

        def read(pictures: Tensor) -> tuple[Tensor, Tensor]:
            features = self.trunk(pictures)
            return features.flatten(2).transpose(1, 2), self.look(features).flatten(2).float()

        return self._evaluate(read, pictures)

    @torch.no_grad()
    def looks_at(self, features: Tensor, attention: Tensor, class_index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of palette, pattern and marking where attention `[256]` gathers features `[256, coarse]` for a class."""
        found = self._found(attention.to(features.dtype) @ features, self.class_embedding[class_index])
        return self.palette(found).float(), self.pattern(found).float(), self.marking(found).float()

    @torch.no_grad()
    def score(self, pictures: Tensor, class_name: str, identities: Sequence[Identity]) -> Tensor:
        """Log-likelihood of each identity's looks for the subject of a class; its own class is not compared.

        Args:
            pictures: `[B, 3, 64, 64]` in [-1, 1].
            class_name: the class to look at.
            identities: looks to compare; their own class names are ignored, so that one can ask whether the cat
                looks like the mug's reference.

        Returns:
            `[B, N]`, the sum of the palette's, the pattern's and the marking's log-probability.
        """
        verdict, c = self.verdict(pictures), class_index(class_name)
        total = torch.zeros(len(pictures), len(identities))
        for attribute, names in ATTRIBUTES.items():
            logits = getattr(verdict, attribute)
            columns = [names.index(getattr(identity, attribute)) for identity in identities]
            total += logits[:, c].log_softmax(dim=-1)[:, columns].cpu()
        return total

    def identify(self, pictures: Tensor, class_name: str, candidates: Sequence[Identity]) -> Tensor:
        """Index of the likeliest candidate in each picture, int64 `[B]`."""
        return self.score(pictures, class_name, candidates).argmax(dim=1)

    @torch.no_grad()
    def presence_probability(self, pictures: Tensor) -> Tensor:
        """Probability that each class is in the picture, `[B, C]`."""
        return self.verdict(pictures).presence.sigmoid().cpu()

    @torch.no_grad()
    def counts(self, pictures: Tensor) -> Tensor:
        """Likeliest number of subjects of each class, int64 `[B, C]`, at most `MAX_COUNT`."""
        return self.verdict(pictures).count.argmax(dim=-1).cpu()

    @torch.no_grad()
    def backgrounds(self, pictures: Tensor) -> Tensor:
        """Index of the likeliest background, int64 `[B]`."""
        return self.verdict(pictures).background.argmax(dim=-1).cpu()

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """What the last layer of the picture's own head (background) reads: the trunk's mean over places, float32 `[B, coarse]`."""
        return self._evaluate(lambda x: self.trunk(x).mean(dim=(2, 3)), pictures).float().cpu()

    @torch.no_grad()
    def verdict(self, pictures: Tensor) -> Verdict:
        """All that the judge says of pictures `[B, 3, 64, 64]` in [-1, 1], as logits."""
        return self._evaluate(self, pictures)

    def _evaluate(self, function: Callable[[Tensor], Any], pictures: Tensor) -> Any:
        """Call a part of the judge on pictures in evaluation mode."""
        if pictures.ndim != 4 or pictures.shape[1:] != (3, JUDGE_SIZE, JUDGE_SIZE):
            raise ValueError(f"the judge reads pictures [B, 3, {JUDGE_SIZE}, {JUDGE_SIZE}]; got {list(pictures.shape)}")
        was_training = self.training
        self.eval()
        found = function(pictures.to(self.class_embedding))
        self.train(was_training)
        return found


def class_index(class_name: str) -> int:
    """Index of a class; unknown names raise ValueError."""
    if class_name not in CLASSES:
        raise ValueError(f"class must be one of {', '.join(CLASSES)}; got {class_name!r}")
    return CLASSES.index(class_name)


def make_candidates(identity: Identity, rng: np.random.Generator) -> list[Identity]:
    """The true identity among seven others of its class, shuffled.

    Half of the others (3 or 4) share its palette and differ in pattern, half share its pattern and differ in palette.
    Markings are drawn freely. All eight differ.
    """
    same_palette = (NUM_CANDIDATES - 1) // 2 + int(rng.integers(2))
    candidates = [identity]
    while len(candidates) < NUM_CANDIDATES:
        palette, pattern, marking = (str(rng.choice(names)) for names in (PALETTES, PATTERNS, MARKINGS))
        if len(candidates) <= same_palette:
            palette = identity.palette
            wanted = pattern != identity.pattern
        else:
            pattern = identity.pattern
            wanted = palette != identity.palette
        candidate = Identity(identity.class_name, palette, pattern, marking)
        if wanted and candidate not in candidates:
            candidates.append(candidate)
    return [candidates[i] for i in rng.permutation(NUM_CANDIDATES)]


def to_tensor(picture: np.ndarray) -> Tensor:
    """RGB uint8 `[..., H, W, 3]` -> float32 `[..., 3, H, W]` in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).movedim(-1, -3).float() / 127.5 - 1


def save_judge(judge: Judge, path: Path) -> None:
    """Write weights as float16, with the config in the metadata; the file appears complete or not at all."""
    state = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in judge.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    with replacing(path) as aside:
        save_tensors(state, aside, {"format": _FORMAT, "config": json.dumps(asdict(judge.config))})


def load_judge(path: Path = WEIGHTS) -> Judge:
    """Read a judge in evaluation mode, float32.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a judge file, or its tensors do not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no judge weights there; train them with scripts/train_pocket_judge.py")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path}: the metadata must say format {_FORMAT!r}; got {metadata.get('format')!r}")
    try:
        judge = Judge(JudgeConfig(**json.loads(metadata["config"])))
        missing, unexpected = judge.load_state_dict(state, strict=False)
    except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: the weights do not fit the judge: {error}") from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"{path}: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}")
    return judge.eval()
