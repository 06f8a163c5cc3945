"""XVerseBench's files in small: lists with questions, reference pictures, and lines on generated pictures."""

import json
from pathlib import Path
from typing import Any

from mosaic.evaluation.faces import TEMPLATE
from tests.evaluation import toys

LETTERS = {"H": "human", "A": "animal", "O": "object"}
SINGLE = {"O": 41, "A": 29, "H": 20}
MULTI = dict.fromkeys(("HO", "HH", "HA", "AO", "AA", "OO"), 20) | dict.fromkeys(
    ("HAO", "HOO", "HAA", "AOO", "HHO", "HHA", "HHH", "OOO", "AAA"), 10
)


def write_lists(data: Path, name: str, groups: dict[str, int]) -> Path:
    """A list of cases of kinds and its questions in the form and place of XVerse's repository; returns the list."""
    folder = data / "eval/tools"
    folder.mkdir(parents=True, exist_ok=True)
    cases: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for group, count in groups.items():
        for _ in range(count):
            kinds = [LETTERS[letter] for letter in group]
            names = [f"{kind} {place}" for place, kind in enumerate(kinds)]
            prompt = "a " + " and a ".join(names) + f" in place {len(cases)}\n"
            sources = [
                {"image_path": f"assets/XVerseBench/{kind}/{place:02d}_{kind} {place}.jpg", "caption": f"a {kind} {place}"}
                for place, kind in enumerate(kinds)
            ]
            modulation = {"type": "adapter", "src_inputs": sources, "use_words": [[k, name, name] for k, name in enumerate(names)]}
            cases.append(
                {"index": len(cases), "input_images": [], "position_delta": [0, -32], "prompt": prompt, "modulation": [modulation]}
            )
            texts = {str(k + 1): f"is there a {name}?" for k, name in enumerate(names)} | {str(len(names) + 1): "is it in a place?"}
            parents = {qid: [0] for qid in texts} | {str(len(names) + 1): list(range(1, len(names) + 1))}
            kinds_of = dict.fromkeys(texts, "entity - whole")
            questions.append({"prompt": prompt, "qid2tuple": kinds_of, "qid2dependency": parents, "qid2question": texts})
    path = folder / f"XVerseBench_{name}.json"
    path.write_text(json.dumps(cases))
    (folder / f"XVerseBench_{name}_DSG.json").write_text(json.dumps(questions))
    return path


def write_references(data: Path, sizes: int = 40) -> None:
    """The pictures that `write_lists` names."""
    for number, kind in enumerate(LETTERS.values()):
        folder = data / "assets/XVerseBench" / kind
        folder.mkdir(parents=True, exist_ok=True)
        for place in range(3):
            toys.picture(10 * number + place, sizes, sizes).save(folder / f"{place:02d}_{kind} {place}.jpg")


class Facer:
    """Stands for the package pyfacer: one face a picture, but none where the picture is mostly dark."""

    def face_detector(self, name: str, device: Any) -> Any:
        assert name == "retinaface/resnet50", device
        return self

    def __call__(self, pixels: Any) -> dict[str, Any]:
        height, width = pixels.shape[2:]
        if pixels.float().mean() < 60:
            return {"rects": pixels.new_zeros(0), "points": pixels.new_zeros(0)}
        points = pixels.new_tensor(TEMPLATE, dtype=float) / 112 * width
        return {"rects": pixels.new_tensor([[0.1 * width, 0.1 * height, 0.9 * width, 0.9 * height]], dtype=float), "points": points[None]}
