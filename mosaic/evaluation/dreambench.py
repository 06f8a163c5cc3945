"""DreamBench: lists of prompts with references, by the rule of UNO's lists, and pictures to score against a subject's whole folder.

The data are DreamBooth's (github.com/google/dreambooth, `dataset/`). A subject is a folder of pictures; a list names one of them as the
reference, while scores compare with all of them.
"""

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from mosaic.config.schema import FieldError, Section
from mosaic.config.sections import Text
from mosaic.evaluation.entries import Entry, Subject, pictures_in
from mosaic.evaluation.prepared import PreparedCase
from mosaic.files import path_below, read_json, read_text, relative_path, shown

CLASSES_FILE = "prompts_and_classes.txt"
LIVE = ("cat", "dog")  # classes whose subjects have the prompts on clothes
SCENES, LIVE_SCENES = 20, 10  # of the 25 prompts, how many at the start put a subject somewhere and leave it as it is

#: Number in the name of the picture that UNO's list gives as a subject's reference.
REFERENCES = {
    "backpack": 2, "backpack_dog": 2, "bear_plushie": 3, "berry_bowl": 2, "can": 1, "candle": 2, "cat": 4, "cat2": 2, "clock": 3,
    "colorful_sneaker": 1, "dog": 2, "dog2": 2, "dog3": 5, "dog5": 0, "dog6": 2, "dog7": 1, "dog8": 4, "duck_toy": 1, "fancy_boot": 2,
    "grey_sloth_plushie": 4, "monster_toy": 4, "pink_sunglasses": 4, "poop_emoji": 0, "rc_car": 3, "red_cartoon": 0, "robot_toy": 0,
    "shiny_sneaker": 1, "teapot": 4, "vase": 2, "wolf_plushie": 4,
}  # fmt: skip

#: The pairs of UNO's list for two subjects, in its order.
PAIRS = (
    ("backpack_dog", "bear_plushie"), ("berry_bowl", "can"), ("candle", "clock"), ("colorful_sneaker", "duck_toy"),
    ("fancy_boot", "grey_sloth_plushie"), ("monster_toy", "pink_sunglasses"), ("poop_emoji", "rc_car"), ("red_cartoon", "robot_toy"),
    ("shiny_sneaker", "teapot"), ("vase", "wolf_plushie"),
    ("cat", "dog"), ("cat", "dog6"), ("cat", "dog8"), ("cat2", "cat"), ("cat2", "dog3"), ("cat2", "dog7"), ("dog", "dog2"),
    ("dog3", "dog5"), ("dog6", "dog7"), ("dog7", "dog8"),
    ("cat", "backpack"), ("cat2", "bear_plushie"), ("dog", "can"), ("dog2", "clock"), ("dog3", "duck_toy"), ("dog5", "grey_sloth_plushie"),
    ("dog6", "pink_sunglasses"), ("dog7", "rc_car"), ("dog8", "robot_toy"), ("dog6", "teapot"),
)  # fmt: skip


class ListItem(NamedTuple):
    """An entry of a list.

    Attributes:
        prompt: The prompt.
        pictures: The reference of each subject, relative to the folder of the data, such as "cat/04.jpg"; its folder is the subject.
    """

    prompt: str
    pictures: tuple[str, ...]


class Prompts(NamedTuple):
    """What DreamBooth's file of prompts and classes says.

    Attributes:
        classes: By subject its class, in the order of the file.
        objects, live: Templates such as "a {} in the jungle", for objects and for live subjects.
    """

    classes: dict[str, str]
    objects: tuple[str, ...]
    live: tuple[str, ...]


def read_prompts(path: Path) -> Prompts:
    """Read `prompts_and_classes.txt`.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It does not hold classes and two lists of 25 prompts.
    """
    text = read_text(path)
    classes = dict(
        re.findall(r"^([\w-]+),([\w -]+?)\s*$", text.partition("subject_name,class")[2].partition("Prompts")[0], flags=re.MULTILINE)
    )
    lists = []
    for block in re.findall(r"prompt_list = \[(.*?)\]", text, flags=re.DOTALL):
        templates = [ast.literal_eval(quoted) for quoted in re.findall(r"('[^'\n]*'|\"[^\"\n]*\")\.format\(", block)]
        lists.append(tuple(template.replace("{0} {1}", "{}") for template in templates))
    if not classes or [len(templates) for templates in lists] != [25, 25] or not all(t.count("{}") == 1 for one in lists for t in one):
        raise ValueError(
            f"{path}: must be DreamBooth's {CLASSES_FILE}: a class for every subject and two lists of 25 prompts, got "
            f"{len(classes)} classes and lists of {[len(templates) for templates in lists]}. Download it again."
        )
    return Prompts(classes, *lists)


def single_list(prompts: Prompts) -> list[ListItem]:
    """UNO's list for one subject: of every subject all prompts of its kind, subjects in alphabetical order."""
    return [
        ListItem(template.format(prompts.classes[subject]), (reference_of(subject),))
        for subject in REFERENCES
        for template in templates_of(prompts, subject)
    ]


def multi_list(prompts: Prompts) -> list[ListItem]:
    """UNO's list for two subjects: `PAIRS` with the prompts of the first one's kind."""
    return [
        ListItem(_pair_prompt(prompts, pair, number), tuple(reference_of(subject) for subject in pair))
        for pair in PAIRS
        for number in range(len(prompts.objects))
    ]


def templates_of(prompts: Prompts, subject: str) -> tuple[str, ...]:
    """The templates for a subject."""
    return prompts.live if prompts.classes[subject] in LIVE else prompts.objects


def reference_of(subject: str) -> str:
    """The picture of a subject that is its reference, relative to the data."""
    return f"{subject}/{REFERENCES[subject]:02d}.jpg"


def _pair_prompt(prompts: Prompts, pair: Sequence[str], number: int) -> str:
    """Scenes hold both; what a prompt does to a subject it does to both objects, or to the first subject alone where that is live."""
    first, second = (prompts.classes[subject] for subject in pair)
    template = templates_of(prompts, pair[0])[number]
    is_live = prompts.classes[pair[0]] in LIVE
    if number < (LIVE_SCENES if is_live else SCENES):
        return template.format(f"{first} and a {second}")
    if is_live:
        return f"{template.format(first)}, next to it is a {second}"
    return f"{template.format(first)} and {template.format(second)}"


def read_list(path: Path, root: str = "dreambooth/dataset") -> list[ListItem]:
    """Read a list in UNO's form: `[{"prompt": "...", "image_paths": ["./dreambooth/dataset/cat/04.jpg"]}]`.

    Args:
        path: The file.
        root: What its paths call the folder of the data.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It has another form, or a path leads elsewhere.
    """
    values = read_json(path)
    if not isinstance(values, list) or not values:
        raise ValueError(f'{path}: must be a list of objects with "prompt" and "image_paths", got {shown(values)}.')
    items = []
    for number, value in enumerate(values):
        place = f"{path}[{number}]"
        pictures = value.get("image_paths") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not isinstance(pictures, list) or not pictures:
            raise ValueError(f'{place}: must be an object with "prompt", a text, and "image_paths", a list of paths, got {shown(value)}.')
        items.append(ListItem(value["prompt"], tuple(_below(one, f"{place}.image_paths[{k}]", root) for k, one in enumerate(pictures))))
    return items


def _below(path: object, place: str, root: str) -> str:
    """A path of a list relative to the folder of the data."""
    found = relative_path(path, place, f"the folder {root}").removeprefix("./").removeprefix(f"{root}/")
    if len(found.split("/")) != 2:
        raise ValueError(f"{place}: must name a picture in a subject's folder, such as ./{root}/cat/04.jpg, got {shown(path)}.")
    return found


class PictureLine(Section):
    """A line on a generated picture."""

    path: ClassVar[str] = "line"

    picture: Text
    """The file, relative to the file of lines."""
    prompt: Text
    """The prompt."""
    run: Annotated[int, Field(ge=0)]
    """Which of the pictures of this prompt and these subjects it is."""
    subjects: Annotated[tuple[Text, ...], Field(min_length=1, max_length=10)]
    """The folder of each subject, relative to the file of lines."""


def read_entry(value: dict[str, Any], place: str, root: Path) -> list[Entry]:
    """The entry of a line, as `entries.read_lines` takes it.

    Args:
        value: The line's value, such as {"picture": "a.png", "prompt": "a cat in the snow", "run": 0, "subjects": ["dreambooth/cat"]}.
        place: Where it stands.
        root: Folder at which paths start and that they may not leave.

    Raises:
        FieldError, FileNotFoundError, ValueError: A key, the picture's path or a subject's folder will not do.
    """
    line = PictureLine(**value)
    folders = [path_below(root, folder, f"{place}.subjects[{k}]", str(root)) for k, folder in enumerate(line.subjects)]
    if len(set(folders)) < len(folders):
        raise FieldError("line.subjects", f"must differ, got {shown(list(line.subjects))}")
    subjects = tuple(Subject(folder.name, pictures_in(folder, f"{place}.subjects[{k}]")) for k, folder in enumerate(folders))
    return [
        Entry(
            path_below(root, line.picture, f"{place}.picture", str(root)),
            case_name(subjects, line.prompt),
            line.run,
            line.prompt,
            subjects,
            place=place,
        )
    ]


def case_name(subjects: Sequence[Subject], prompt: str) -> str:
    """What tells cases of DreamBench apart."""
    return f"{block_name(subjects)}: {prompt}"


def block_name(subjects: Sequence[Subject]) -> str:
    """What tells blocks apart: the cases of the same subjects, over which means are taken first."""
    return "+".join(subject.name for subject in subjects)


def cases_of_data(data: Path, listed: Path | None, *, multi: bool) -> list[PreparedCase]:
    """The cases of a folder of data, by the rule or of a list.

    Args:
        data: DreamBooth's `dataset`.
        listed: A list in UNO's form to take instead of the rule's.
        multi: Two subjects.

    Raises:
        FileNotFoundError, ValueError: The prompts, the list or pictures will not do.
    """
    if listed:
        return prepared_cases(read_list(listed), data, "--data")
    path = data / CLASSES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"--data: {path} is missing; name the folder `dataset` of google/dreambooth, or give a list with --list.")
    prompts = read_prompts(path)
    return prepared_cases(multi_list(prompts) if multi else single_list(prompts), data, "--data")


def prepared_cases(items: Sequence[ListItem], data: Path, place: str) -> list[PreparedCase]:
    """The cases of a list, with all pictures of a subject's folder to compare with.

    Args:
        items: The list.
        data: Folder of the subjects, such as DreamBooth's `dataset`.
        place: What says where the data are, for messages.

    Raises:
        FileNotFoundError: Folders of subjects or pictures are missing; all are named.
        ValueError: A folder is empty, or an entry is in the list twice.
    """
    folders = {picture.split("/")[0]: data / picture.split("/")[0] for item in items for picture in item.pictures}
    missing = [str(folder) for folder in folders.values() if not folder.is_dir()]
    missing += sorted({str(data / picture) for item in items for picture in item.pictures if not (data / picture).is_file()})
    if missing:
        raise FileNotFoundError(f"{place}: {data} must hold the subjects' folders and pictures. Missing are: {', '.join(missing)}.")
    subjects = {name: Subject(name, pictures_in(folder, place)) for name, folder in folders.items()}
    cases: dict[str, PreparedCase] = {}
    for item in items:
        shown_subjects = tuple(subjects[picture.split("/")[0]] for picture in item.pictures)
        case = case_name(shown_subjects, item.prompt)
        if case in cases:
            raise ValueError(f"{place}: the list has {shown(case)} twice. Remove one of them.")
        cases[case] = PreparedCase(case, item.prompt, tuple(data / picture for picture in item.pictures), shown_subjects)
    return list(cases.values())
