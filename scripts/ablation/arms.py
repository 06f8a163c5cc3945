"""What the ablation compares: the arms of the paper's Table 3, one-factor variants, and the modes of reference attention.

Every arm is a few settings over one common config, which extends configs/pocket.json; nothing else differs between two arms of a part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mosaic.config.sections import LOSS_PRESETS

ARMS_FOLDER = Path(__file__).resolve().parents[2] / "assets/pocket/arms"  # adapters of the main arms, as shipped
BASELINE = "stable"  # the arm from which factors and modes differ by one setting
PARTS = ("main", "attention", "factors")  # in the order in which they are computed
LIGHT = 0.1  # of the paper's weights: chosen by the one-factor variants, at seed 0
# The release starts MDL at step 10,000 and raises it for 1,000; the share is of the paper's 100,000 steps.
RELEASE_START, RELEASE_WARMUP, STABLE_START, STABLE_WARMUP = 1 / 10, 1 / 100, 1 / 15, 1 / 15


@dataclass(frozen=True)
class Arm:
    """One set of settings.

    Attributes:
        name: Unique within a part; letters, digits and "_".
        meaning: For tables.
        settings: "section.field" to value, over the common config.
        factor: What a variant varies; empty in the other parts.
        trained: False: the base alone, without references.
    """

    name: str
    meaning: str
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    factor: str = ""
    trained: bool = True


def stable_settings(steps: int) -> dict[str, Any]:
    """The paper's losses with a cap of 1 nat, and MDL raised over a fifteenth of the run after a fifteenth of it."""
    return {
        "loss.preset": "paper",
        "loss.disentanglement_cap": 1.0,
        "loss.disentanglement_start_step": round(steps * STABLE_START),
        "loss.disentanglement_warmup_steps": round(steps * STABLE_WARMUP),
    }


def bare_settings() -> dict[str, Any]:
    """The paper's preset as it is: no cap, MDL from the first step."""
    return {
        "loss.preset": "paper",
        "loss.disentanglement_cap": None,
        "loss.disentanglement_start_step": 0,
        "loss.disentanglement_warmup_steps": 0,
    }


def both_weights(times: float) -> dict[str, Any]:
    """The weights of both losses, as a multiple of the paper's."""
    return {f"loss.{name}": round(times * LOSS_PRESETS["paper"][name], 6) for name in ("correspondence_weight", "disentanglement_weight")}


def main_arms(steps: int) -> tuple[Arm, ...]:
    """The arms of Table 3, two gentler forms of the last one, and the release's losses."""
    bare = bare_settings()
    light = {**bare, **both_weights(LIGHT), "loss.disentanglement_cap": 1.0}
    release = {
        "loss.preset": "release",
        "loss.disentanglement_cap": None,
        "loss.disentanglement_start_step": round(steps * RELEASE_START),
        "loss.disentanglement_warmup_steps": round(steps * RELEASE_WARMUP),
    }
    return (
        Arm("base", "base, without references", trained=False),
        Arm("flow_matching", "flow matching only", {**bare, **both_weights(0.0)}),
        Arm("scal", "+ SCAL", {**bare, "loss.disentanglement_weight": 0.0}),
        Arm("paper", "+ SCAL + MDL (preset paper)", bare),
        Arm(BASELINE, "+ SCAL + MDL, with cap and warm-up", stable_settings(steps)),
        Arm("light", "+ SCAL + MDL at a tenth of their weights, with cap", light),
        Arm("release", "preset release, MDL's start in the same share of the run", release),
    )


def factor_arms(steps: int, num_double: int, num_single: int) -> tuple[Arm, ...]:
    """Variants of the stable arm, one factor at a time; the stable arm itself comes first.

    Args:
        steps: Length of these runs.
        num_double: Double-stream blocks of the base; they are numbered first.
        num_single: Single-stream blocks.
    """
    blocks = list(range(num_double + num_single))
    third = max(1, len(blocks) // 3)
    bare, doubled = bare_settings(), both_weights(2.0)
    variants: Sequence[tuple[str, str, dict[str, Any]]] = (
        ("weights of both losses", "0: flow matching only", both_weights(0.0)),
        ("weights of both losses", "a tenth of the paper's", both_weights(LIGHT)),
        ("weights of both losses", "a quarter of the paper's", both_weights(0.25)),
        ("MDL's weight", "0", {"loss.disentanglement_weight": 0.0}),
        ("MDL's weight", "0.1", {"loss.disentanglement_weight": 0.1}),
        ("MDL's weight", "0.3", {"loss.disentanglement_weight": 0.3}),
        ("MDL's weight", "1.2", {"loss.disentanglement_weight": 1.2}),
        ("MDL's cap", "0.5 nats", {"loss.disentanglement_cap": 0.5}),
        ("MDL's cap", "2 nats", {"loss.disentanglement_cap": 2.0}),
        ("MDL's cap", "none", {"loss.disentanglement_cap": None}),
        ("MDL's warm-up", "none", {"loss.disentanglement_start_step": 0, "loss.disentanglement_warmup_steps": 0}),
        ("MDL's warm-up", "second half", {"loss.disentanglement_start_step": steps // 2}),
        ("SCAL's weight", "0", {"loss.correspondence_weight": 0.0}),
        ("SCAL's weight", "0.1", {"loss.correspondence_weight": 0.1}),
        ("SCAL's weight", "1", {"loss.correspondence_weight": 1.0}),
        ("captured blocks", "double", {"loss.capture_blocks": "double"}),
        ("captured blocks", "single", {"loss.capture_blocks": blocks[num_double:]}),
        ("captured blocks", "middle third", {"loss.capture_blocks": blocks[third:-third]}),
        ("captured blocks", "last third", {"loss.capture_blocks": blocks[-third:]}),
        ("points per sample", "2", {"loss.max_points": 2}),
        ("points per sample", "8", {"loss.max_points": 8}),
        # About half of the samples lie on either side; doubled weights keep the losses' share of the gradient.
        ("supervised noise levels, weights doubled", "t <= 0.6", {"loss.supervised_timesteps": [0.0, 0.6], **doubled}),
        ("supervised noise levels, weights doubled", "t >= 0.6", {"loss.supervised_timesteps": [0.6, 1.0], **doubled}),
        ("divergence", "Jensen-Shannon", {"loss.divergence": "jensen_shannon"}),
        ("rows of MDL", "all tokens", {"loss.disentanglement_rows": "all"}),
        ("learning rate", "3e-4", {"optimizer.learning_rate": 3e-4}),
        ("preset paper, no cap and warm-up", "learning rate 1e-3", bare),
        ("preset paper, no cap and warm-up", "learning rate 3e-4", {**bare, "optimizer.learning_rate": 3e-4}),
        ("preset paper, no cap and warm-up", "learning rate 1e-4", {**bare, "optimizer.learning_rate": 1e-4}),
        ("preset paper, no cap and warm-up", "MDL's weight 0.1", {**bare, "loss.disentanglement_weight": 0.1}),
    )
    stable = stable_settings(steps)
    arms = [Arm(BASELINE, "with cap and warm-up", stable, "none")]
    for factor, value, settings in variants:
        arms.append(Arm(_slug(f"{factor} {value}"), value, {**stable, **settings}, factor))
    return tuple(arms)


def attention_arms(steps: int) -> tuple[Arm, ...]:
    """The stable arm in the three modes of reference attention; "target" is the stable arm itself."""
    meanings = {"target": "text, target and itself", "isolated": "itself only", "joint": "everything"}
    stable = stable_settings(steps)
    return tuple(
        Arm(BASELINE if mode == "target" else mode, f"{mode}: a reference sees {meaning}", {**stable, "model.reference_attention": mode})
        for mode, meaning in meanings.items()
    )


def _slug(text: str) -> str:
    text = text.replace("<=", "up to").replace(">=", "from")
    return "_".join("".join(c if c.isalnum() else " " for c in text.replace("'s", "")).lower().split())
