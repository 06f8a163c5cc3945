"""The example cases of the page."""

from typing import NamedTuple

from mosaic.config.loading import Config
from mosaic.rendering.cases.reading import Case, read_cases
from scripts.app.uploads import MAX_REFERENCES, Upload, read_upload

MAX_EXAMPLES = 24


class Example(NamedTuple):
    """An example case, ready to be put into the page."""

    case: Case
    uploads: tuple[Upload, ...]


def load_examples(config: Config) -> tuple[list[Example], list[str]]:
    """The good ones of the config's cases that the page can hold, and a message for each of the others."""
    size, scale = config.data.reference_size, config.inference.reference_scale
    try:
        file = read_cases(config.inference.cases, size, scale)
    except (ValueError, OSError) as error:
        return [], [str(error)]
    examples, problems = [], [str(problem) for problem in file.problems]
    for case in file.cases[:MAX_EXAMPLES]:
        try:
            if len(case.references) > MAX_REFERENCES:
                raise ValueError(f"{case.place}: the page holds at most {MAX_REFERENCES} references, got {len(case.references)}.")
            examples.append(Example(case, tuple(read_upload(path, size, scale) for path in case.image_paths)))
        except ValueError as error:
            problems.append(str(error))
    return examples, problems
