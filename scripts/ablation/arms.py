"""What the trial compares: losses on attention from scratch, and from an adapter that flow matching has trained for a while.

Every arm is a few settings over one common config, which extends configs/pocket.json; nothing else differs between two arms of a part.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mosaic.config.sections import LOSS_PRESETS

ARMS_FOLDER = Path(__file__).resolve().parents[2] / "assets/pocket/arms"  # adapters of the main arms, as shipped
PARTS = ("scratch", "selection", "late", "confirmation", "binding")
DEFAULT_PARTS = PARTS[:3]  # what is to be confirmed is known only then; binding is no part of what decides
BASELINE = "flow_matching"  # what every arm is compared with, and what late starts start from
# The release starts MDL at step 10,000 and raises it for 1,000; the share is of the paper's 100,000 steps.
RELEASE_START, RELEASE_WARMUP = 1 / 10, 1 / 100
HIGH_NOISE = [0.7, 1.0]  # timesteps; about a third of those that are drawn
SUPERVISED = 1 / 2  # of a run, where supervision ends in it


@dataclass(frozen=True)
class Arm:
    """One set of settings.

    Attributes:
        name: Unique within a part; part of file names.
        meaning: For tables.
        settings: "section.field" to value, over the common config.
        trained: False: the base alone, without references.
    """

    name: str
    meaning: str
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    trained: bool = True


def weights(correspondence: float = 0.0, disentanglement: float = 0.0, cap: float | None = None) -> dict[str, Any]:
    """The paper's losses at weights of SCAL and MDL, MDL from the first step and maybe with a cap in nats."""
    return {
        "loss.preset": "paper",
        "loss.correspondence_weight": correspondence,
        "loss.disentanglement_weight": disentanglement,
        "loss.disentanglement_cap": cap,
    }


def own_reference(weight: float, timesteps: list[float] | None = None) -> dict[str, Any]:
    """The loss on the share of the own reference in what target tokens give to references, at all timesteps or at some."""
    where = {"loss.target_keys": "references", "loss.supervised_timesteps": timesteps or [0.0, 1.0]}
    return {**weights(), "loss.own_reference_weight": weight, **where}


def _of_paper(*names: str) -> dict[str, Any]:
    return weights(**{name: LOSS_PRESETS["paper"][f"{name}_weight"] for name in names})


def _preset_light() -> dict[str, Any]:
    light = LOSS_PRESETS["light"]
    return weights(light["correspondence_weight"], light["disentanglement_weight"], light["disentanglement_cap"])


FLOW_MATCHING = Arm(BASELINE, "flow matching only", weights())
SCAL_LIGHT = Arm("scal_0.04", "+ SCAL 0.04", weights(0.04))
LIGHT = Arm("light", "+ SCAL 0.04 + MDL 0.06 with cap (preset light)", _preset_light())
OWN_HIGH_NOISE = Arm("own_0.02_high_noise", "+ target's own reference 0.02, high noise only", own_reference(0.02, HIGH_NOISE))

OWN = Arm("own_0.02", "+ target's own reference 0.02", own_reference(0.02))
OWN_WEAK_HIGH_NOISE = Arm("own_0.005_high_noise", "+ target's own reference 0.005, high noise only", own_reference(0.005, HIGH_NOISE))
OWN_WEAK = Arm("own_0.005", "+ target's own reference 0.005", own_reference(0.005))


def all_losses(steps: int) -> tuple[Arm, ...]:
    """Each loss by itself and each preset, from scratch: those of the paper's Table 3, and what the trial adds."""
    release = {
        "loss.preset": "release",
        "loss.disentanglement_start_step": round(steps * RELEASE_START),
        "loss.disentanglement_warmup_steps": round(steps * RELEASE_WARMUP),
    }
    return (
        Arm("base", "base, without references", trained=False),
        FLOW_MATCHING,
        Arm("scal", "+ SCAL", _of_paper("correspondence")),
        Arm("mdl", "+ MDL", _of_paper("disentanglement")),
        Arm("paper", "+ SCAL + MDL (preset paper)", _of_paper("correspondence", "disentanglement")),
        Arm("release", "preset release, MDL's start in the same share of the run", release),
        LIGHT,
        OWN_HIGH_NOISE,
    )


def emergence_arms() -> tuple[Arm, ...]:
    """Those of the long runs from scratch, the most important first."""
    return (FLOW_MATCHING, SCAL_LIGHT, OWN_HIGH_NOISE, LIGHT)


def late_arms(steps: int) -> tuple[Arm, ...]:
    """Those of late starts, the most important first: where time runs out, the last ones are left out."""
    until = {name: round(steps * SUPERVISED) for name in ("loss.decay_start_step", "loss.until_step")}
    return (
        FLOW_MATCHING,
        Arm("scal_0.004", "+ SCAL 0.004", weights(0.004)),
        OWN_HIGH_NOISE,
        Arm("mdl_0.06", "+ MDL 0.06 with cap", weights(0.0, 0.06, 1.0)),
        SCAL_LIGHT,
        OWN,
        LIGHT,
        Arm("scal_0.001", "+ SCAL 0.001", weights(0.001)),
        OWN_WEAK_HIGH_NOISE,
        OWN_WEAK,
        Arm("light_then_none", "preset light for half of the run, then flow matching only", {**LIGHT.settings, **until}),
    )


def binding_arms() -> tuple[Arm, ...]:
    """Whether the order of the references can say which of two look-alikes is whose: late starts, measured in their own order."""
    in_order = {**FLOW_MATCHING.settings, "data.reference_order": "left_to_right"}
    return (FLOW_MATCHING, Arm("left_to_right", "flow matching only, references from left to right", in_order))


def selection_arms() -> tuple[Arm, ...]:
    """Among which the arm of the target's side for long runs from scratch is chosen."""
    own = (OWN_HIGH_NOISE, OWN, OWN_WEAK_HIGH_NOISE, OWN_WEAK)
    target = {**weights(0.004), "loss.supervised_queries": "target"}
    low_noise = {**target, "loss.supervised_timesteps": [0.0, 0.5]}
    points = (
        Arm("target_scal_0.004", "+ SCAL 0.004 on the target's queries", target),
        Arm("target_scal_0.004_low_noise", "+ SCAL 0.004 on the target's queries, low noise only", low_noise),
    )
    return (FLOW_MATCHING, *own, *points)
