"""Every stage held against the truth: on drawings, of which all is known, and where pictures are synthesised by the judge alone."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from mosaic.method.grids import Grid
from preprocess.construct.candidates import Candidate, points_name, read_stage_picture
from preprocess.construct.chunks import Chunks
from preprocess.construct.config import ConstructConfig
from preprocess.construct.decisions import Decisions
from preprocess.construct.page.counting import measured_yields
from preprocess.construct.points.stage import good_references
from preprocess.construct.references.stage import chosen_edits
from preprocess.construct.run import WORK, stages_of
from preprocess.matching.evaluation import CORRECT, box_side
from preprocess.matching.metrics import Truth, cell_positions
from preprocess.matching.samples import ReferencePicture
from scripts.construction.drawings import scene_of
from scripts.pocket import world
from scripts.pocket.evaluation import candidate_lists, judged_tensors, proportion
from scripts.pocket.judge import ATTRIBUTES, Judge, load_judge
from scripts.pocket.model import SCENE_PIXELS
from scripts.pocket.segmenter import subject_ious
from scripts.pocket.train_kontext import in_a_scene


def looks(judge: Judge, picture: Image.Image, class_name: str) -> tuple[str, ...]:
    """The attributes that the judge sees in what is likeliest of that class in a picture, in the order of `ATTRIBUTES`."""
    verdict, place = judge.verdict(judged_tensors([picture])), world.CLASSES.index(class_name)
    return tuple(names[int(getattr(verdict, key)[0, place].argmax())] for key, names in ATTRIBUTES.items())


def every_candidate(config: ConstructConfig, output: Path) -> tuple[Decisions, list[Candidate]]:
    """All candidates of a construction, and what decides about them."""
    stages, chunks = stages_of(config), Chunks(output / WORK, config.chunk_size)
    decisions = Decisions(stages, config.prompts.limits.max_uses)
    return decisions, [one for chunk in range(chunks.count(stages[0].name)) for one in chunks.candidates(stages, chunk)]


def samples_of(decisions: Decisions, candidates: Iterable[Candidate], count: int) -> list[Candidate]:
    """The first `count` of those that nothing drops: the samples of the data set."""
    return [candidate for candidate in candidates if decisions.dropped(candidate) is None][:count]


def trace(config: ConstructConfig, output: Path, count: int, *, drawn: bool) -> dict[str, Any]:
    """Yields of all stages, and how right their results are in the samples of the data set.

    Args:
        config: Of the construction.
        output: Its folder.
        count: Samples of the data set.
        drawn: Whether the pictures are those of `scene_of`.

    Returns:
        "yields": share that each stage passes; "candidates": how many it took until the last sample; "references": how many samples have
        one, two, ...; "same_looks": share of the references in which the judge sees all that it sees of the subject in the picture, and of
        single attributes. Where the pictures are drawn also "found": subjects of all candidates that stage 3 came to; "iou": mean of the
        masks', "recognised": references that the judge takes for their individual among 8 of the class, "right": points within 0.1 of the
        subject's box, and "points" of a reference, all in the samples. Shares of things come with a 95 % Wilson interval and their number.
    """
    decisions, candidates = every_candidate(config, output)
    samples, judge = samples_of(decisions, candidates, count), load_judge()
    hits: dict[str, list[bool]] = {name: [] for name in ("looks", *ATTRIBUTES, "recognised", "right")}
    ious, numbers, kept = [], [], []
    for candidate in tqdm(samples, desc="tracing", unit="sample"):
        picture, chosen = read_stage_picture(candidate, "synthesis"), chosen_edits(config.references, candidate)
        good = good_references(config.points, candidate)
        numbers.append(len(good))
        for k in good:
            name = candidate.prompt.subjects[k].name
            reference = read_stage_picture(candidate, "references", f"ref{k}_{chosen[k]}")
            placed = in_a_scene(reference, candidate.number)
            same = [a == b for a, b in zip(looks(judge, picture, name), looks(judge, placed, name), strict=True)]
            for key, value in zip(("looks", *ATTRIBUTES), (all(same), *same), strict=True):
                hits[key].append(value)
            if drawn:
                scene = scene_of(candidate.number, config)
                options, truth = candidate_lists(scene)[k], scene.placements[k].identity
                hits["recognised"].append(options[int(judge.identify(judged_tensors([placed]), name, options))] == truth)
                right = right_points(config, candidate, scene, k)
                hits["right"] += right
                kept.append(len(right))
        if drawn:
            ious += [mask_ious(candidate, scene_of(candidate.number, config))[k] for k in good]
    names = ("recognised", "right") if drawn else ()
    result: dict[str, Any] = {
        "yields": measured_yields(decisions.stages, candidates, decisions.reasons),
        "candidates": samples[-1].number + 1,
        "references": {str(number): numbers.count(number) for number in sorted(set(numbers))},
        "same_looks": {key: asdict(proportion(hits[key])) for key in ("looks", *ATTRIBUTES)},
    }
    if drawn:
        seen = [candidate for candidate in candidates if candidate.segmentation is not None]
        result |= {name: asdict(proportion(hits[name])) for name in names}
        result |= {"found": found_subjects(seen, config), "iou": float(np.mean(ious)), "points": float(np.mean(kept))}
    return result


def found_subjects(candidates: Sequence[Candidate], config: ConstructConfig) -> dict[str, Any]:
    """Of all subjects of some candidates, whether stage 3 passed or not: share with a mask, and mean IoU, 0 for those without."""
    ious, found = [], []
    for candidate in candidates:
        assert candidate.segmentation is not None
        found += [one is not None for one in candidate.segmentation.subjects]
        ious += mask_ious(candidate, scene_of(candidate.number, config))
    return {**asdict(proportion(found)), "iou": float(np.mean(ious))}


def mask_ious(candidate: Candidate, scene: world.Scene) -> list[float]:
    """IoU of each subject's mask with what is seen of it; 0 where nothing was found."""
    assert candidate.segmentation is not None
    nothing = np.zeros((SCENE_PIXELS, SCENE_PIXELS), bool)
    masks = [
        nothing if found is None else np.asarray(read_stage_picture(candidate, "segmentation", f"mask{k}").convert("L")) > 127
        for k, found in enumerate(candidate.segmentation.subjects)
    ]
    exact = world.render_scene(scene, SCENE_PIXELS).masks > 0
    return subject_ious(masks, list(exact), [subject.name for subject in candidate.prompt.subjects])


def right_points(config: ConstructConfig, candidate: Candidate, scene: world.Scene, k: int) -> list[bool]:
    """Of each point of subject k, whether it lies within `CORRECT` of the subject's box of where it belongs in the true reference."""
    side, cells = config.points.reference_cells, config.points.target_cells
    reference = world.render_reference(scene.placements[k].identity, config.references.size[0])
    exact = torch.from_numpy(world.correspondences(scene, k, side, cells, reference.width))
    grid = Grid(side, side)
    box = box_side(ReferencePicture(reference, grid, None))
    truth = Truth(exact[:, 0], exact[:, 1], grid, (reference.height, reference.width), box)
    pairs = load_file(candidate.folders["points"] / points_name(candidate.number))[f"{k}"].long()
    index = torch.full((cells * cells,), -1)
    index[pairs[:, 1]] = pairs[:, 0]
    errors = dict(zip(truth.v.tolist(), truth.errors(cell_positions(index, grid)).tolist(), strict=True))
    return [errors.get(v, np.inf) <= CORRECT for v in pairs[:, 1].tolist()]
