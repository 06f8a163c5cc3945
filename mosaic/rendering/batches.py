"""Which pictures are made at once: those of equal shape, settings and number of references, so that nothing is padded."""

import json
from collections.abc import Iterable, Sequence

from mosaic.rendering.recipes import PictureJob

OWN = ("name", "index", "prompt", "seed", "references", "digest")  # of a picture in a recipe; all else must be equal


def plan_batches(jobs: Iterable[PictureJob], batch_size: int) -> list[list[PictureJob]]:
    """Put jobs together, in order of each batch's first job.

    Args:
        jobs: All jobs, finished or not: so a batch holds the same pictures however often the work was interrupted.
        batch_size: Most pictures of a batch.
    """
    batches: list[list[PictureJob]] = []
    open_batches: dict[str, list[PictureJob]] = {}
    for job in jobs:
        key = batch_key(job)
        batch = open_batches.get(key)
        if batch is None or len(batch) == batch_size:
            batch = open_batches[key] = []
            batches.append(batch)
        batch.append(job)
    return batches


def batch_key(job: PictureJob) -> str:
    """What the pictures of a batch have in common: all settings, and the references' number and strengths."""
    shared = {key: value for key, value in job.recipe.to_json().items() if key not in OWN}
    return json.dumps([shared, job.recipe.strengths], sort_keys=True)


def unfinished_batches(batches: Sequence[Sequence[PictureJob]], todo: Iterable[PictureJob]) -> list[list[PictureJob]]:
    """The batches of which a picture is still to be made, whole: a picture's last bits depend on the size of its batch."""
    names = {job.name for job in todo}
    return [list(batch) for batch in batches if any(job.name in names for job in batch)]
