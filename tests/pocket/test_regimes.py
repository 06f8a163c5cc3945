"""Measures of look-alikes by hand: places with known looks against references."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mosaic.config.loading import Config, load_config
from mosaic.weights.digests import file_digest, model_digest
from scripts.evaluate import main
from scripts.pocket import evaluate_regimes, regimes, world
from scripts.pocket.evaluate_regimes import adapter_tables, percentages
from scripts.pocket.evaluation import held_out_scenes
from scripts.pocket.judge import ATTRIBUTES, load_judge
from scripts.pocket.places import Place
from scripts.pocket.regimes import RegimeOutcome, assign, estimate, judge_places, judge_regime
from scripts.pocket.world import Identity

FIRST, SECOND, THIRD = (
    Identity("cat", "ember", "dots", "star"),
    Identity("cat", "mint", "half", "none"),
    Identity("mug", "honey", "checks", "hat"),
)


def place(class_name: str, *looks: str, sure: float = 0.9) -> Place:
    """A place whose attributes are seen as `looks`, each with probability `sure`."""
    log_looks = {}
    for (attribute, names), seen in zip(ATTRIBUTES.items(), looks, strict=True):
        assert seen in names
        log_looks[attribute] = {name: math.log(sure if name == seen else (1 - sure) / (len(names) - 1)) for name in names}
    return Place(class_name, 0.5, 0.5, log_looks)


def place_of(identity: Identity, class_name: str | None = None) -> Place:
    return place(class_name or identity.class_name, identity.palette, identity.pattern, identity.marking)


def scene_of(*identities: Identity) -> world.Scene:
    return world.Scene("in a meadow", 5, tuple(world.Placement(identity, 0.5, 0.5, 0.4, 0.0, False) for identity in identities))


def judged(identities: tuple[Identity, ...], *places: Place) -> RegimeOutcome:
    return judge_places(places, scene_of(*identities))


TWINS, MIXED = (FIRST, SECOND), (FIRST, SECOND, THIRD)


def test_twins_apart_in_any_order() -> None:
    right = RegimeOutcome(apart=1, same_look=0, identification=1, blending=0, missing=0, doubled=0)
    assert judged(TWINS, place_of(FIRST), place_of(SECOND)) == right
    assert judged(TWINS, place_of(SECOND), place_of(FIRST)) == right
    assert judged(MIXED, place_of(THIRD), place_of(SECOND), place_of(FIRST)) == right


def test_twins_with_one_look() -> None:
    assert judged(TWINS, place_of(FIRST), place_of(FIRST)) == (0, 1, 0.5, 0, 0, 0)


def test_blending_is_palette_of_one_with_pattern_of_the_other() -> None:
    blended = place("cat", "ember", "half", "none")
    assert judged(TWINS, blended, place_of(FIRST)).blending == 0.5
    assert judged(TWINS, place("cat", "mint", "dots", "none"), blended).blending == 1
    assert judged(TWINS, place("cat", "plum", "half", "none"), place_of(FIRST)).blending == 0  # a palette of neither is no blend
    alike = Identity("cat", "ember", "half", "none")  # with FIRST, which shares the palette, there is nothing to blend
    assert math.isnan(judged((FIRST, alike), place_of(FIRST), place_of(alike)).blending)


def test_missing_and_doubled_subjects() -> None:
    assert judged(TWINS, place_of(SECOND)) == (0, 0, 0.5, 0, 0.5, 0)
    assert judged(TWINS) == (0, 0, 0, pytest.approx(math.nan, nan_ok=True), 1, 0)
    assert judged(TWINS, place_of(FIRST), place_of(SECOND), place_of(SECOND)) == (0, 1, 1, 0, 0, 0.5)
    found = judged(MIXED, place_of(FIRST), place_of(SECOND), place_of(SECOND))  # a cat instead of the mug
    assert (found.missing, found.doubled, found.apart) == (pytest.approx(1 / 3), pytest.approx(1 / 3), 0)
    other = place_of(THIRD, "snail")  # no subject of the caption: it is part of the background
    assert judged(TWINS, place_of(FIRST), place_of(SECOND), other) == judged(TWINS, place_of(FIRST), place_of(SECOND))


def test_looks_of_another_class_are_not_apart() -> None:
    """A mug with the looks of a cat's reference, and that cat with the mug's: all looks are there, on the wrong subjects."""
    found = judged(MIXED, place_of(FIRST, "mug"), place_of(THIRD, "cat"), place_of(SECOND))
    assert (found.apart, found.same_look, found.identification) == (0, 0, pytest.approx(1 / 3))
    same = Identity("mug", *(getattr(FIRST, name) for name in ATTRIBUTES))  # equal looks are told apart by the class
    assert judged((FIRST, same), place_of(same), place_of(FIRST)).apart == 1


def test_assignment_is_the_best_of_all() -> None:
    """Taking the best pair first would give 0.9 + 0.0; rows may be fewer or more than columns."""
    assert assign(np.array([[0.9, 0.8], [0.8, 0.0]])) == {0: 1, 1: 0}
    assert assign(np.array([[0.0, 5.0, 1.0]])) == {1: 0}
    assert assign(np.array([[0.0], [5.0], [1.0]])) == {0: 1}
    assert assign(np.zeros((0, 2))) == {}
    rng = np.random.default_rng(0)
    for places, references in ((4, 4), (6, 3), (3, 5)):
        likelihood = rng.normal(size=(places, references)) - 2
        found = assign(likelihood)
        tried = itertools.permutations(range(max(places, references)), min(places, references))
        flat = likelihood if places >= references else likelihood.T
        best = max(sum(flat[row, column] for column, row in enumerate(rows)) for rows in tried)
        assert sum(likelihood[place, reference] for reference, place in found.items()) == pytest.approx(best)


def test_intervals_are_over_seeds_crossed_with_scenes() -> None:
    rows = [[1, 0, 1, 1], [0, 0, 1, 0]]
    outcomes = [[RegimeOutcome(value, 0, 0, math.nan, 0, 0) for value in row] for row in rows]
    assert estimate(outcomes, "apart").mean == 0.5
    assert estimate(outcomes, "apart").count == 2
    assert estimate(outcomes[:1], "apart").half == pytest.approx(3.1824 * math.sqrt(0.25 / 4), rel=1e-4)
    assert math.isnan(estimate(outcomes, "blending").mean)


def known(found: list[list[Place]]) -> Callable[[object, list[Image.Image]], list[list[Place]]]:
    """Finds in the n-th picture what the n-th list says."""
    return lambda _, pictures: [places for _, places in zip(pictures, found, strict=True)]


def test_pictures_and_scenes_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regimes, "find_places", known([[place_of(FIRST)], [place_of(THIRD)]]))
    found = judge_regime(load_judge(), [Image.new("RGB", (8, 8))] * 2, [scene_of(*TWINS), scene_of(THIRD)])
    assert [outcome.missing for outcome in found] == [0.5, 0]


NUMBERS = ["--num-cases", "3", "--set", "inference.num_inference_steps=1", "--set", "inference.image_guidance_scale=1.0", "--seed", "7"]


def test_the_command_writes_the_same_file_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("one.json", "two.json")]
    for file in files:
        assert main(["--regime", "twins", "mixed", "--k", "3", *NUMBERS, "--output", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    found = json.loads(files[0].read_text())
    assert list(found["regimes"]) == ["twins", "mixed"]
    entry = found["regimes"]["twins"]["3"]
    assert set(entry) == {"num_cases", *RegimeOutcome._fields, "intervals", "real_renderings"}
    assert entry["num_cases"] == 3
    assert entry["real_renderings"]["identification"] >= 80  # percent
    assert found["sampling"]["seed"] == 7
    header, _, first, second = capsys.readouterr().out.splitlines()[-4:]
    assert header.count("|") == first.count("|") == second.count("|")
    assert first.startswith("| twins | 3 | 3 | ")


def test_scenes_of_the_regime_are_drawn_with_their_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by the truth, real renderings are all apart, and pictures are made of the same scenes."""
    scenes = held_out_scenes(2, 2, "twins")
    seen = []
    truth = [[place_of(placement.identity) for placement in scene.placements] for scene in scenes]
    monkeypatch.setattr(regimes, "find_places", known(truth))
    monkeypatch.setattr(
        evaluate_regimes, "generate", lambda _, scenes, *rest: seen.append((scenes, rest[1:])) or [Image.new("RGB", (64, 64))] * len(scenes)
    )
    config = load_config("configs/pocket.json")
    found = evaluate_regimes.evaluate_regimes(config, {"twins": [2]}, num_cases=2, batch_size=5, seed=3)
    assert seen == [(scenes, (True, 5, 3))]
    assert found["twins"]["2"]["real_renderings"]["apart"] == 100


def test_several_adapters_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = percentages([RegimeOutcome(1, 0, 1, 0, 0, 0)] * 2)
    shares = {"assets/pocket/arms/scal.safetensors": (1, 0, 0, 1), "assets/pocket/lora.safetensors": (1, 1, 1, 1)}

    def found(config: Config, wanted: dict[str, list[int]], *_: object) -> dict[str, dict]:
        outcomes = [RegimeOutcome(value, 0, value, math.nan, 0, 0) for value in shares[config.inference.lora]]
        return {"twins": {"2": {"num_cases": 4, **percentages(outcomes), "real_renderings": real}}}

    monkeypatch.setattr(evaluate_regimes, "evaluate_regimes", found)
    assert main(["--regime", "twins", "--k", "2", "--lora", *shares, "--output", str(tmp_path / "numbers.json")]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert [adapter["lora"] for adapter in numbers["adapters"]] == [{"name": name, "digest": file_digest(Path(name))} for name in shares]
    assert [adapter["regimes"]["twins"]["2"]["apart"] for adapter in numbers["adapters"]] == [50, 100]
    (table,) = adapter_tables(numbers["adapters"])
    assert table in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert [row[0] for row in rows] == ["twins, K = 2", "---", "scal", "lora", "*real renderings*"]
    assert (rows[0][2], rows[2][1], rows[2][4]) == ("same look", "50.0 [0.0, 100.0]", "-")


def test_the_guide_shows_the_numbers_of_the_shipped_adapters() -> None:
    """Its table is that of the file; the file is of the weights in this repository."""
    numbers = json.loads(Path("assets/pocket/regimes.json").read_text())
    (table,) = adapter_tables(numbers["adapters"])
    assert f"\n{table}\n" in Path("docs/pocket_world.md").read_text()
    assert numbers["model"]["digest"] == model_digest("assets/pocket/flux")
    for adapter in numbers["adapters"]:
        assert adapter["lora"]["digest"] == file_digest(Path(adapter["lora"]["name"]))


def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_regimes, "evaluate_regimes", lambda *_: pytest.fail("nothing may be computed"))
    for arguments, message in (
        (["twins", "--k", "1", "2"], "--k must be of 2..6 with --regime twins, got [1, 2]."),
        (["distinct", "mixed", "--k", "2"], "--k must be of 3..6 with --regime mixed, got [2]."),
        (["distinct", "--k", "7"], "--k must be of 1..6 with --regime distinct, got [7]."),
    ):
        assert main(["--regime", *arguments]) == 2
        assert message in capsys.readouterr().err
    for flags in ([], ["--interventions"]):
        assert main([*flags, "--lora", "one", "two"]) == 2
        assert "--lora takes several adapters with --regime only, got one two." in capsys.readouterr().err
    assert main(["--settling"]) == 2
    assert "--settling is of scenes of a regime: name one with --regime" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--regime", "triplets"])
    assert "invalid choice: 'triplets'" in capsys.readouterr().err


def test_each_regime_has_its_usual_numbers_of_references(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(evaluate_regimes, "evaluate_regimes", lambda _, wanted, *__: asked.append(wanted) or {})
    assert main(["--regime", "mixed", "twins"]) == 0
    assert main(["--regime", "twins", "--k", "3", "2", "3"]) == 0
    assert asked == [{"mixed": [3, 4], "twins": [2, 3, 4]}, {"twins": [2, 3]}]
