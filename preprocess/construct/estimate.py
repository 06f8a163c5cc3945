"""What a construction will cost, before it starts: GPU hours, disk, models with their licences. Nothing is loaded or downloaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mosaic.planning.cards import find_card
from preprocess.construct.estimate_settings import EstimateSettings
from preprocess.construct.licences import licence_of
from preprocess.construct.model_costs import (
    Use,
    chat_use,
    encode_flops,
    flux_features_use,
    painter,
    picture_use,
    unet_use,
)
from preprocess.extractors import extractor_spec

#: Bytes per second from a card's memory, by the makers' data sheets: what the answers of language models wait for.
BANDWIDTH = {
    "RTX 3090": 0.94e12,
    "RTX 4090": 1.01e12,
    "L4": 0.30e12,
    "RTX 5090": 1.79e12,
    "A100 40GB": 1.56e12,
    "L40S": 0.86e12,
    "RTX A6000": 0.77e12,
    "RTX 6000 Ada": 0.96e12,
    "A100 80GB": 2.04e12,
    "H100 PCIe": 2.0e12,
    "H100": 3.35e12,
    "H100 NVL": 3.94e12,
    "H200": 4.8e12,
    "B200": 8.0e12,
}
PICTURE_BYTES, REFERENCE_BYTES, MASK_BYTES = 1.5, 0.8, 0.02  # a pixel of a PNG: a photograph, one on white, a mask
POINT_BYTES, ROW_BYTES = 10, 2500  # u and v as int32 and a similarity as float16; a candidate's rows of all stages as JSON
POINT_SHARE = 0.15  # of a target's cells: a subject's that are matched
QUESTION_TOKENS = 300  # of a judge's or a prompt's instruction


class Part(NamedTuple):
    """One kind of work on the candidates of a stage.

    Attributes:
        what: In a few words.
        model: Its folder or id; "": none.
        calls: Of the model for each candidate.
        use: Cost of a call; None: not known.
        is_painter: Whether it is a pipeline, which uses a card better than the small models.
        is_here: False: an endpoint computes it.
    """

    what: str
    model: str
    calls: float
    use: Use | None
    is_painter: bool = False
    is_here: bool = True


@dataclass(frozen=True)
class StagePlan:
    """A stage as the config has it.

    Attributes:
        name: Of the stage.
        parts: Its work on a candidate.
        bytes: Of a candidate's files in the work folder.
        kept_bytes: Of a sample's files in the data set that come from this stage.
    """

    name: str
    parts: list[Part] = field(default_factory=list)
    bytes: float = 0.0
    kept_bytes: float = 0.0


@dataclass(frozen=True)
class StageCost:
    """What a stage will cost.

    Attributes:
        plan: The stage.
        share: What it lets through.
        measured: Whether that was measured, not assumed.
        candidates: Those that come to it.
        hours: GPU hours by part; None where the cost of a call is not known, or where it is computed elsewhere.
    """

    plan: StagePlan
    share: float
    measured: bool
    candidates: float
    hours: list[float | None]

    @property
    def known_hours(self) -> float:
        """Of the parts whose cost is known."""
        return sum(hours or 0.0 for hours in self.hours)

    @property
    def unknown(self) -> list[str]:
        """Models whose cost is not known."""
        return [part.model for part in self.plan.parts if part.use is None and part.is_here]


def dry_run(config: Any, measured: Mapping[str, float] | None = None) -> str:
    """What a run of a `ConstructConfig` will cost, in words.

    Args:
        config: The settings.
        measured: Yields by stage, of what has been computed of it.
    """
    mean_subjects = mean_number_of_subjects(config.prompts.num_subjects)
    found = costs(plan_of(config, mean_subjects), config.num_samples, config.estimate, measured)
    return in_words(found, config.num_samples, mean_subjects, config.estimate)


def plan_of(config: Any, mean_subjects: float) -> list[StagePlan]:
    """The stages of a `ConstructConfig`."""
    assumed: EstimateSettings = config.estimate
    heights_widths = config.synthesis.sizes
    pixels = sum(height * width for height, width in heights_widths) / len(heights_widths)
    target_cells = config.points.target_cells**2
    side = config.points.reference_cells
    reference_pixels, tries = config.references.size[0] * config.references.size[1], config.references.tries
    return [
        StagePlan("prompts", list(prompt_parts(config.prompts, assumed)), ROW_BYTES),
        StagePlan(
            "synthesis",
            list(synthesis_parts(config.synthesis, pixels, mean_subjects, assumed)),
            PICTURE_BYTES * pixels,
            PICTURE_BYTES * pixels,
        ),
        StagePlan(
            "segmentation",
            list(segmentation_parts(config.segmentation, mean_subjects)),
            MASK_BYTES * pixels * mean_subjects,
            MASK_BYTES * pixels * mean_subjects,
        ),
        StagePlan(
            "references",
            list(reference_parts(config.references, mean_subjects, assumed)),
            REFERENCE_BYTES * reference_pixels * mean_subjects * tries,
            REFERENCE_BYTES * reference_pixels * mean_subjects,
        ),
        StagePlan(
            "points",
            list(point_parts(config.points, mean_subjects)),
            POINT_BYTES * POINT_SHARE * min(target_cells, side**2) * mean_subjects,
            POINT_BYTES * POINT_SHARE * min(target_cells, side**2) * mean_subjects,
        ),
    ]


def mean_number_of_subjects(shares: Sequence[float]) -> float:
    """K of a prompt on average, by the shares of 1, 2, ... subjects."""
    return sum(k * share for k, share in enumerate(shares, 1)) / sum(shares)


def prompt_parts(settings: Any, assumed: EstimateSettings) -> Iterator[Part]:
    """Stage 1: a question for each prompt, where a model writes them."""
    if settings.chat is not None:
        yield _chat("the prompt's words", settings.chat, 1, 0, assumed)


def synthesis_parts(settings: Any, pixels: float, mean_subjects: float, assumed: EstimateSettings) -> Iterator[Part]:
    """Stage 2: the picture, and what measures it."""
    found = painter(settings.model, settings.max_sequence_length)
    passes = 2 if settings.negative_prompt is not None else 1
    uses = (
        []
        if found is None
        else [found.call(height, width, settings.num_inference_steps, passes=passes) for height, width in settings.sizes]
    )
    use = Use(sum(one.flops for one in uses) / len(uses)) if uses else None
    yield Part(f"pictures, {settings.num_inference_steps} steps", settings.model, 1, use, True)
    for what, model in (("aesthetics", settings.siglip), ("fit to the prompt", settings.prompt_fit)):
        if model is not None:
            yield Part(what, model, 1, picture_use(model))
    if settings.text_detector is not None:
        yield Part("text in the picture", settings.text_detector, len(settings.text_words), picture_use(settings.text_detector))
    if settings.judge is not None:
        yield _chat("judge of the picture", settings.judge, 1, pixels, assumed)


def segmentation_parts(settings: Any, mean_subjects: float) -> Iterator[Part]:
    """Stage 3: a detector asked for each subject, a segmenter that sees the picture once (but CLIPSeg and SAM 3, asked for each)."""
    if settings.detector is not None:
        yield Part("boxes", settings.detector, mean_subjects, picture_use(settings.detector))
        yield Part("masks", settings.model, 1, picture_use(settings.model))
    else:
        yield Part("masks", settings.model, mean_subjects, picture_use(settings.model))


def reference_parts(settings: Any, mean_subjects: float, assumed: EstimateSettings) -> Iterator[Part]:
    """Stage 4: every try of every subject, and what compares it with the cut-out."""
    calls, pixels = mean_subjects * settings.tries, settings.size[0] * settings.size[1]
    if settings.editor != "none":
        found = painter(settings.model, settings.max_sequence_length)
        passes = 2 if settings.negative_prompt is not None else 1
        height, width = settings.size
        use = None if found is None else found.call(height, width, settings.num_inference_steps, pictures=1, passes=passes)
        yield Part(f"edits, {settings.num_inference_steps} steps", settings.model, calls, use, True)
    if settings.encoder is not None:
        yield Part("identity", settings.encoder, calls + mean_subjects, picture_use(settings.encoder))
    if settings.detector is not None:
        yield Part("boxes in the references", settings.detector, calls, picture_use(settings.detector))
    if settings.judge is not None:
        yield _chat("judge of the references", settings.judge, calls, 2 * pixels, assumed)


def point_parts(settings: Any, mean_subjects: float) -> Iterator[Part]:
    """Stage 5: features of the target and of each reference, by each extractor."""
    for name, options in settings.extractors.items():
        spec = extractor_spec(name, options).options
        values = {"model": "", "size": 0, "ensemble": 1, "block": None, **spec.model_dump()}
        yield Part(f"features, {name}", values["model"] or "", 1 + mean_subjects, extractor_use(name, values))


def extractor_use(name: str, options: Mapping[str, Any]) -> Use | None:
    """The features of one picture; None: not known."""
    size = options["size"]
    if name in ("dift", "cleandift"):
        return unet_use(size, options["ensemble"] if name == "dift" else 1)
    if name in ("dinov2", "dinov3", "dinov2_diysc"):
        return picture_use(options["model"], size)
    if name == "flux":
        found = painter(options["model"])
        if found is None:
            return None
        share = 0.5 if options["block"] is None else min(1.0, (options["block"] + 1) / found.blocks)
        return flux_features_use(found, size, options["ensemble"], share)
    if name == "vae":
        return Use(encode_flops((size or 512) ** 2))
    return Use(0.0) if name == "pixels" else None


def costs(
    plans: Sequence[StagePlan], num_samples: float, assumed: EstimateSettings, measured: Mapping[str, float] | None = None
) -> list[StageCost]:
    """Candidates and hours of every stage, for a number of samples that pass all.

    Args:
        plans: Stages in order.
        num_samples: Wanted.
        assumed: Yields, card and its utilisation.
        measured: Yields by stage, where some are known; one of 0 is not taken.
    """
    known = {name: share for name, share in (measured or {}).items() if share > 0}
    shares = [known.get(plan.name, getattr(assumed.yields, plan.name)) for plan in plans]
    card = find_card(assumed.gpu)
    found, candidates = [], float(num_samples)
    for plan, share in reversed(list(zip(plans, shares, strict=True))):
        candidates /= share
        hours = []
        for part in plan.parts:
            rate = card.peak_tflops * 1e12 * (assumed.utilisation if part.is_painter else assumed.small_utilisation)
            use = part.use if part.is_here else None
            each = None if use is None else use.flops / rate + use.bytes_read / BANDWIDTH[card.name]
            hours.append(None if each is None else candidates * part.calls * each / 3600)
        found.append(StageCost(plan, share, plan.name in known, candidates, hours))
    return found[::-1]


def in_words(found: Sequence[StageCost], num_samples: int, mean_subjects: float, assumed: EstimateSettings) -> str:
    """The estimate as text: a table, the models with their licences, and what was assumed."""
    rows = [("stage", "candidates", "yield", "GPU hours", "disk", "")]
    for number, cost in enumerate(found, 1):
        sign = "" if cost.measured else "~"
        hours = _hours(cost.known_hours) + (" + unknown" if cost.unknown else "")
        rows.append(
            (
                f"{number} {cost.plan.name}",
                f"{cost.candidates:,.0f}",
                f"{sign}{cost.share:.0%}",
                hours,
                _size(cost.candidates * cost.plan.bytes),
                "",
            )
        )
        for part, own in zip(cost.plan.parts, cost.hours, strict=True):
            words = "by the endpoint" if not part.is_here else "unknown" if own is None else _hours(own)
            rows.append((f"  {part.what}", f"x {part.calls:.3g}", "", words, "", part.model))
    total, work = sum(cost.known_hours for cost in found), sum(cost.candidates * cost.plan.bytes for cost in found)
    kept = num_samples * sum(cost.plan.kept_bytes for cost in found)
    rows.append(("6 data set", f"{num_samples:,}", "", "", _size(kept), ""))
    rows.append(("all", "", "", _hours(total), _size(work + kept), ""))
    unknown = list(dict.fromkeys(model for cost in found for model in cost.unknown))
    lines = [*_aligned(rows), ""]
    if unknown:
        lines.append(f"Not in the hours, since their cost is not known: {', '.join(unknown)}.")
    lines += ["Models:", *_models(found), "", *_assumptions(found, mean_subjects, assumed)]
    return "\n".join(lines) + "\n"


def _models(found: Sequence[StageCost]) -> Iterator[str]:
    named = dict.fromkeys(part.model for cost in found for part in cost.plan.parts if part.model)
    notes: dict[str, None] = {}
    for model in named:
        known = licence_of(model)
        if known is None:
            yield f"  {model}: {'a folder of yours' if Path(model).is_dir() else 'its licence is not known here; read its card'}"
        else:
            yield f"  {model}: {known.licence}{'; gated' if known.gated else ''}"
            notes[known.note] = None
    yield from (f"  Note: {note}." for note in notes if note)
    if not named:
        yield "  none"


def _assumptions(found: Sequence[StageCost], mean_subjects: float, assumed: EstimateSettings) -> Iterator[str]:
    card = find_card(assumed.gpu)
    guessed = [cost.plan.name for cost in found if not cost.measured]
    yield "Assumed (section estimate of the config):"
    shares = f"pipelines reach {assumed.utilisation:.0%} of it, other models {assumed.small_utilisation:.0%}"
    yield f"  one {card.name}, {card.peak_tflops:g} TFLOP/s in bf16; {shares}"
    speed = f"{BANDWIDTH[card.name] / 1e12:g} TB/s"
    yield f"  answers of {assumed.answer_tokens} tokens, each of which reads the model's weights once at {speed}"
    yield f"  {mean_subjects:.2f} subjects a picture; candidates that are dropped keep their files in the work folder"
    yield (
        f"  yields marked ~ are guesses ({', '.join(guessed)}); a first run of some hundred samples measures them"
        if guessed
        else "  all yields are measured"
    )


def _chat(what: str, settings: Any, calls: float, pixels: float, assumed: EstimateSettings) -> Part:
    use = chat_use(settings.model, QUESTION_TOKENS, pixels, assumed.answer_tokens)
    return Part(what, settings.model, calls, use, is_here=settings.url is None)


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        first, *others, last = row
        yield "  ".join(
            [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=False)), last]
        ).rstrip()


def _hours(number: float) -> str:
    return "<1" if 0 < number < 0.5 else f"{number:,.0f}"


def _size(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e6:,.0f} MB"
