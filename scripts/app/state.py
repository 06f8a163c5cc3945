"""The fields of a page as values: the usual ones, those of an example, those that a browser kept over a reload, and the form they make."""

import json
from typing import Any, NamedTuple

from mosaic.config.loading import Config
from mosaic.files import shown
from scripts.app.examples import Example
from scripts.app.form import MAX_GUIDANCE, MAX_STEPS, Form
from scripts.app.uploads import MAX_REFERENCES

MAX_SAVED = 100_000  # letters of the settings that a browser gives back
STRENGTH_SLIDER = 2.0  # its upper end; cases and calls take up to `MAX_STRENGTH`
BEFORE_SEED, AFTER_SEED = ("width", "height", "num_inference_steps"), ("image_guidance_scale", "guidance_scale")  # options of a case
OPTIONS = (*BEFORE_SEED, *AFTER_SEED)
SETTINGS = ("prompt", *BEFORE_SEED, "seed", "new_seed", *AFTER_SEED, "attention")
"""The fields in their order on the page, which is that of the values that a browser keeps."""


class PageState(NamedTuple):
    """What a page shows.

    Attributes:
        settings: Values by the names `SETTINGS`.
        names: One per reference slot.
        strengths: One per reference slot.
    """

    settings: dict[str, Any]
    names: tuple[str, ...]
    strengths: tuple[float, ...]


def default_state(config: Config) -> PageState:
    """A page on which nothing has been done yet."""
    values = {"prompt": "", "new_seed": False, "attention": True} | dict(config.inference)
    return PageState({name: values[name] for name in SETTINGS}, ("",) * MAX_REFERENCES, (1.0,) * MAX_REFERENCES)


def example_state(example: Example, config: Config) -> PageState:
    """A page that shows an example: what the case leaves open is as in the config."""
    state, case = default_state(config), example.case
    options = case.options
    seed = options.seeds[0] if options.seeds else options.seed
    given = {name: value for name, value in options if name in OPTIONS}
    given |= {"prompt": case.prompt, "seed": config.inference.seed + case.index if seed is None else seed}
    strengths = [reference.strength for reference in case.references] + [1.0] * MAX_REFERENCES
    settings = state.settings | {name: value for name, value in given.items() if value is not None}
    return PageState(settings, state.names, tuple(strengths[:MAX_REFERENCES]))


def saved_state(text: str, config: Config) -> PageState:
    """The settings that a browser kept over a reload, as `PageState` fields in a row; the usual ones where they do not make sense."""
    usual = default_state(config)
    rows = (*usual.settings.values(), *usual.names, *usual.strengths)
    try:
        values = json.loads(text) if text and len(text) <= MAX_SAVED else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or len(values) != len(rows):
        return usual
    sound = [value if _alike(value, old) else old for value, old in zip(values, rows, strict=True)]
    bounds = {"num_inference_steps": (1, MAX_STEPS), **dict.fromkeys(AFTER_SEED, (0, MAX_GUIDANCE))}
    settings = dict(zip(SETTINGS, sound, strict=False))
    for name, (low, high) in bounds.items():
        settings[name] = settings[name] if low <= settings[name] <= high else usual.settings[name]
    names, strengths = sound[len(SETTINGS) : -MAX_REFERENCES], sound[-MAX_REFERENCES:]
    return PageState(settings, tuple(names), tuple(strength if 0 <= strength <= STRENGTH_SLIDER else 1.0 for strength in strengths))


def make_form(state: PageState, num_references: int) -> Form:
    """The form of a page with so many references.

    Raises:
        ValueError: A seed is no integer.
    """
    values = state.settings
    seed = values["seed"]
    if seed is not None and seed != int(seed):
        raise ValueError(f"Seed: must be an integer, got {shown(seed)}.")
    return Form(
        prompt=values["prompt"] or "",
        names=tuple(name or "" for name in state.names[:num_references]),
        strengths=state.strengths[:num_references],
        seed=_integer(seed),
        height=_integer(values["height"]),
        width=_integer(values["width"]),
        num_inference_steps=_integer(values["num_inference_steps"]),
        guidance_scale=values["guidance_scale"],
        image_guidance_scale=values["image_guidance_scale"],
    )


def _integer(value: float | None) -> int | None:
    return None if value is None else int(value)


def _alike(value: object, usual: object) -> bool:
    """Whether a value can stand where a usual one stands: both texts, both booleans, or both finite numbers."""
    if isinstance(usual, (str, bool)):
        return type(value) is type(usual)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63
