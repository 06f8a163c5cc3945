"""The example cases of the page."""

from pathlib import Path
from typing import NamedTuple

from mosaic.config.loading import Config
from mosaic.rendering.cases.pictures import ReferencePictures
from mosaic.rendering.cases.reading import Case, read_cases
from mosaic.reports.figures import TILE
from scripts.app.uploads import MAX_REFERENCES, Upload, file_name, thumbnail

MAX_EXAMPLES = 24


class Example(NamedTuple):
    """An example case, ready to be put into the page."""

    case: Case
    uploads: tuple[Upload, ...]


def load_examples(config: Config) -> tuple[list[Example], list[str]]:
    """The good ones of the config's cases that the page can hold, and a message for each of the others."""
    try:
        file = read_cases(config.inference.cases, config.data.reference_size, config.inference.reference_scale)
    except (ValueError, OSError) as error:
        return [], [str(error)]
    examples, problems = [], [str(problem) for problem in file.problems]
    for case in file.cases[:MAX_EXAMPLES]:
        try:
            if len(case.references) > MAX_REFERENCES:
                raise ValueError(f"{case.place}: the page holds at most {MAX_REFERENCES} references, got {len(case.references)}.")
            examples.append(Example(case, tuple(_upload(path, file.pictures) for path in case.image_paths)))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return examples, problems


def _upload(path: Path, pictures: ReferencePictures) -> Upload:
    """A picture of the cases file as if it had come from the browser; the check of the cases has prepared it."""
    picture = pictures.load(path)
    return Upload(file_name(path), pictures.digests[path], picture.prepared, thumbnail(picture.tiles[TILE]))
