"""DreamBench: the lists by rule, scores against a naive twin, and what makes them what they are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, ViTModel

from mosaic.evaluation import dreambench
from mosaic.images import load_image
from scripts.bench.command import main
from tests.evaluation import toys

PROMPTS_FILE = """Classes

subject_name,class
{classes}

Prompts

Object Prompts

prompt_list = [
{objects}
]

Live Subject Prompts

prompt_list = [
{live}
]
"""


def write_prompts(folder: Path) -> Path:
    """A file of DreamBooth's form, with its subjects and prompts of our own that are told apart by their numbers."""
    classes = "\n".join(f"{name},{name.strip('0123456789').replace('_', ' ')}" for name in dreambench.REFERENCES)
    objects = ",\n".join(f"'a {{0}} {{1}} at place {n}'.format(unique_token, class_token)" for n in range(20))
    objects += ",\n" + ",\n".join(f"'a kind{n} {{0}} {{1}}'.format(unique_token, class_token)" for n in range(5))
    live = ",\n".join(f"'a {{0}} {{1}} at place {n}'.format(unique_token, class_token)" for n in range(10))
    live += ",\n" + ",\n".join(f"'a {{0}} {{1}} wearing hat {n}'.format(unique_token, class_token)" for n in range(10))
    live += ",\n" + ",\n".join(f"'a kind{n} {{0}} {{1}}'.format(unique_token, class_token)" for n in range(5))
    path = folder / dreambench.CLASSES_FILE
    path.write_text(PROMPTS_FILE.format(classes=classes, objects=objects, live=live))
    return path


def test_lists_by_rule(tmp_path: Path) -> None:
    prompts = dreambench.read_prompts(write_prompts(tmp_path))
    single, multi = dreambench.single_list(prompts), dreambench.multi_list(prompts)
    assert (len(single), len(multi), len(dreambench.PAIRS), len(set(dreambench.PAIRS))) == (750, 750, 30, 30)
    assert single[0] == ("a backpack at place 0", ("backpack/02.jpg",))
    assert single[24] == ("a kind4 backpack", ("backpack/02.jpg",))
    assert single[25 * 6 + 10] == ("a cat wearing hat 0", ("cat/04.jpg",))
    assert multi[19] == ("a backpack dog and a bear plushie at place 19", ("backpack_dog/02.jpg", "bear_plushie/03.jpg"))
    assert multi[20].prompt == "a kind0 backpack dog and a kind0 bear plushie"
    cat_and_dog = [item.prompt for item in multi[250:275]]
    assert cat_and_dog[9] == "a cat and a dog at place 9"
    assert cat_and_dog[10] == "a cat wearing hat 0, next to it is a dog"
    assert cat_and_dog[20] == "a kind0 cat, next to it is a dog"
    dog_and_can = [item.prompt for item in multi if item.pictures == ("dog/02.jpg", "can/01.jpg")]
    assert dog_and_can[24] == "a kind4 dog, next to it is a can"


def test_a_list_in_unos_form_is_the_rules(tmp_path: Path) -> None:
    items = dreambench.multi_list(dreambench.read_prompts(write_prompts(tmp_path)))
    path = tmp_path / "list.json"
    path.write_text(
        json.dumps([{"prompt": p, "image_paths": [f"./dreambooth/dataset/{one}" for one in pictures]} for p, pictures in items])
    )
    assert dreambench.read_list(path) == items
    for bad in ("../../etc/passwd", "/etc/passwd", "./dreambooth/dataset/cat/deep/04.jpg", "cat"):
        path.write_text(json.dumps([{"prompt": "a cat", "image_paths": [bad]}]))
        with pytest.raises(ValueError, match=r"list\.json\[0\]\.image_paths\[0\]"):
            dreambench.read_list(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"clip": toys.write_clip(folder / "clip"), "dino": toys.write_dino(folder / "dino", 28)}


def score(pictures: Path, models: dict[str, Path], output: Path, *flags: str) -> dict:
    given = [f"--{name}={folder}" for name, folder in models.items()]
    assert main(["score", "dreambench", "--pictures", str(pictures), "--output", str(output), "--device", "cpu", *given, *flags]) == 0
    return json.loads((output / "scores.json").read_text())


@pytest.mark.usefixtures("fresh_accelerator")
def test_scores_are_those_of_a_naive_twin(models: dict[str, Path], tmp_path: Path) -> None:
    lines = toys.write_benchmark(tmp_path)
    scores = score(lines, models, tmp_path / "scores")
    twin = naive_scores(toys.read_lines(lines), tmp_path, models)
    assert {name: scores[name] for name in twin} == pytest.approx(twin, abs=1e-4)
    assert scores["num_pictures"] == 8
    assert len({round(scores[name], 2) for name in twin}) == 3  # the toys tell pictures apart
    assert scores["plain"]["dino"] != pytest.approx(scores["dino"], abs=1e-3)  # blocks are not of one size
    low, high = scores["intervals"]["clip_i"]
    assert low < scores["clip_i"] < high
    assert set(scores["per_subject"]["clip_i"]) == {"cat", "mug"}
    assert set(scores["per_prompt"]["clip_t"]) == set(toys.PROMPTS)


def naive_scores(lines: list[dict], folder: Path, models: dict[str, Path]) -> dict[str, float]:
    """The protocol's words in loops, pictures prepared by transformers' processors, one at a time."""
    clip, tokenizer = CLIPModel.from_pretrained(models["clip"]).eval(), CLIPTokenizer.from_pretrained(models["clip"])
    dino = ViTModel.from_pretrained(models["dino"], add_pooling_layer=False).eval()
    for_clip = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32, resample=3)
    for_dino = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=28, resample=3, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )

    def vectors(path: Path) -> dict[str, np.ndarray]:
        image = load_image(path).convert("RGB")
        with torch.no_grad():
            clip_i = clip.get_image_features(**for_clip(image, return_tensors="pt")).pooler_output[0]
            class_token = dino(**for_dino(image, return_tensors="pt")).last_hidden_state[0, 0]
        return {"clip_i": clip_i.double().numpy(), "dino": class_token.double().numpy()}

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))

    by_run: dict[int, dict[tuple, dict[str, list[float]]]] = {}
    for line in lines:
        block = by_run.setdefault(line["run"], {}).setdefault(tuple(line["subjects"]), {"clip_i": [], "clip_t": [], "dino": []})
        made = vectors(folder / line["picture"])
        for metric in ("clip_i", "dino"):
            subjects = []
            for subject in line["subjects"]:
                references = [vectors(path)[metric] for path in sorted((folder / subject).iterdir())]
                subjects.append(np.mean([cosine(made[metric], reference) for reference in references]))
            block[metric].append(float(np.mean(subjects)))
        with torch.no_grad():
            text = clip.get_text_features(**tokenizer([line["prompt"]], return_tensors="pt")).pooler_output[0].double().numpy()
        block["clip_t"].append(max(cosine(made["clip_i"], text), 0.0))
    runs = {
        metric: [np.mean([np.mean(block[metric]) for block in blocks.values()]) for blocks in by_run.values()]
        for metric in ("clip_i", "clip_t", "dino")
    }
    return {metric: 100 * float(np.mean(values)) for metric, values in runs.items()}
