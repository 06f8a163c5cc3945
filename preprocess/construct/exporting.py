"""Stage 6: the candidates that passed, as a data set in the multi-reference format."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from tqdm import tqdm

from mosaic.data import DatasetWriter, ReferenceRecord, SampleRecord, sample_id
from mosaic.data.multi_reference.points_file import MATCH_SCORES
from mosaic.data.multi_reference.records import reference_grid_of, target_grid_of
from mosaic.data.multi_reference.storage import DESCRIPTION
from mosaic.files import read_json, remove_folder
from preprocess.construct.candidates import Candidate, known, points_name, read_stage_picture, seed_of
from preprocess.construct.config import ConstructConfig
from preprocess.construct.points.stage import good_references


def export(config: ConstructConfig, passing: Callable[[], Iterator[Candidate]], made_by: Mapping[str, Any], folder: Path) -> bool:
    """Write the data set, in place of one of other candidates or other references.

    Args:
        config: The settings.
        passing: The candidates that passed, in order, as often as they are asked for; the first `num_samples` are taken.
        made_by: What computed each stage; goes into the data set's description.
        folder: Of the data set.

    Returns:
        Whether it was written; False: it was there.
    """
    wanted = {
        "construction": dict(made_by),
        "license": config.output.license,
        "selection": selection_digest(config, islice(passing(), config.num_samples)),
    }
    description = folder / DESCRIPTION
    if description.exists():
        found = read_json(description)
        if {name: found.get(name) for name in wanted} == json.loads(json.dumps(wanted)):
            return False
        remove_folder(folder)
    with DatasetWriter(folder, provenance=wanted) as writer:
        for candidate in tqdm(islice(passing(), config.num_samples), desc="6 data set", unit="sample", total=config.num_samples):
            writer.add(sample_of(config, candidate))
    return True


def selection_digest(config: ConstructConfig, candidates: Iterable[Candidate]) -> str:
    """SHA-256 of what of which candidates goes into the data set."""
    digest = hashlib.sha256(json.dumps(config.output.model_dump(include={"test_share"})).encode())
    for candidate in candidates:
        digest.update(f"{good_references(config.points, candidate)} {known(candidate.points).model_dump_json()}\n".encode())
    return digest.hexdigest()


def sample_of(config: ConstructConfig, candidate: Candidate) -> SampleRecord:
    """One candidate as a sample: the references whose points are good, the others' subjects being part of the picture."""
    synthesis, segmentation = known(candidate.synthesis), known(candidate.segmentation)
    edits, points = known(candidate.references), known(candidate.points)
    tensors = load_file(candidate.folders["points"] / points_name(candidate.number))
    target = read_stage_picture(candidate, "synthesis")
    references, pictures, made = [], [], []
    for k in good_references(config.points, candidate):
        matched, subject, seen = known(points.subjects[k]), candidate.prompt.subjects[k], known(segmentation.subjects[k])
        edit = edits.subjects[k][matched.edit]
        image = read_stage_picture(candidate, "references", f"ref{k}_{matched.edit}")
        pictures.append(image)
        made.append({"subject": k, "edit": matched.edit, "instruction": edit.instruction, "seed": edit.seed})
        references.append(
            ReferenceRecord(
                image=image,
                phrase=subject.phrase,
                points=tensors[f"{k}"].numpy(),
                mask=np.asarray(read_stage_picture(candidate, "segmentation", f"mask{k}").convert("L")) > 127,
                grid=reference_grid_of((image.height, image.width), config.points.reference_cells),
                scores={
                    **{f"segmentation.{name}": value for name, value in seen.model_dump(exclude={"box"}).items()},
                    **{f"references.{name}": value for name, value in edit.scores.items()},
                    **{f"points.{name}": value for name, value in matched.scores.items()},
                },
                kind=subject.kind,
                similarity=tensors[f"{k}.similarity"].numpy(),
                match_scores={name: value for name, value in matched.scores.items() if name in MATCH_SCORES},
            )
        )
    drawn = seed_of(config.seed, "split", candidate.number) / 2**63
    return SampleRecord(
        id=sample_id([target, *pictures], candidate.prompt.caption),
        split="test" if drawn < config.output.test_share else "train",
        prompt=candidate.prompt.caption,
        target=target,
        references=references,
        reference_grid=references[0].grid or (1, 1),
        target_grid=target_grid_of((target.height, target.width), config.points.target_cells),
        metadata={
            "source": "construction",
            "candidate": candidate.number,
            "prompt": candidate.prompt.prompt,
            "subjects": [subject.model_dump() for subject in candidate.prompt.subjects],
            "seed": synthesis.seed,
            "references": made,
        },
        scores={f"synthesis.{name}": value for name, value in synthesis.scores.items()},
    )
