"""What a construction will cost: hand-computed uses of models, how hours grow, and what is said of models that are not known."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mosaic.model.costs import FLUX_DEV, Workload, forward_flops
from preprocess.construct.estimate import (
    Part,
    StagePlan,
    costs,
    dry_run,
    in_words,
    mean_number_of_subjects,
    plan_of,
    point_parts,
    segmentation_parts,
)
from preprocess.construct.estimate_settings import EstimateSettings
from preprocess.construct.licences import LICENCES, licence_of, licences_in
from preprocess.construct.model_costs import (
    CHATS,
    PAINTERS,
    PICTURES,
    VITS,
    Use,
    chat_use,
    decode_flops,
    encode_flops,
    painter,
    picture_use,
    stack_flops,
)

ASSUMED = EstimateSettings()
DEV = "black-forest-labs/FLUX.1-dev"


def config(**changes: Any) -> SimpleNamespace:
    """Sections of a config with FLUX.1-dev and all judges."""
    judge = SimpleNamespace(model="Qwen/Qwen3-VL-8B-Instruct", url=None)
    synthesis = SimpleNamespace(
        model=DEV, sizes=((1024, 1024),), num_inference_steps=28, max_sequence_length=512, negative_prompt=None,
        siglip="google/siglip-so400m-patch14-384", prompt_fit=None, text_detector=None, judge=judge,
    )  # fmt: skip
    sections = {
        "estimate": ASSUMED,
        "num_samples": 1_200_000,
        "prompts": SimpleNamespace(chat=None, num_subjects=(0.25, 0.35, 0.2, 0.1, 0.05, 0.05)),
        "synthesis": synthesis,
        "segmentation": SimpleNamespace(detector="IDEA-Research/grounding-dino-base", model="facebook/sam2.1-hiera-large"),
        "references": SimpleNamespace(
            editor=None, model="black-forest-labs/FLUX.1-Kontext-dev", tries=2, size=(1024, 1024), num_inference_steps=28,
            max_sequence_length=None, negative_prompt=None, encoder="facebook/dinov2-base", detector=None, judge=None,
        ),
        "points": SimpleNamespace(extractors={"dift": {}, "dinov2": {}}, target_cells=64, reference_cells=64),
    }  # fmt: skip
    return SimpleNamespace(**(sections | changes))


def test_a_picture_of_flux_by_hand() -> None:
    """performance.md's figures: 12.910 GFLOP a token, 700,416 FLOP a pair; T5's 4.8e9 parameters; the decoder's 10.47 TFLOP."""
    tokens = 4096 + 512
    transformer = 28 * (12.910e9 * tokens + 700_416 * tokens**2)
    by_hand = transformer + 2 * 4.762e9 * 512 + 10.47e12
    assert painter(DEV).call(1024, 1024, 28).flops == pytest.approx(by_hand, rel=1e-3)
    edited = 28 * (12.910e9 * (tokens + 4096) + 700_416 * (tokens + 4096) ** 2) + 2 * 4.762e9 * 512 + 10.47e12 + 4.88e12
    assert painter("black-forest-labs/FLUX.1-Kontext-dev").call(1024, 1024, 28, pictures=1).flops == pytest.approx(edited, rel=1e-3)
    assert (
        painter(DEV, 77).call(512, 1024, 4).flops < painter(DEV).call(512, 1024, 4).flops < painter(DEV).call(512, 1024, 4, passes=2).flops
    )
    assert (encode_flops(512**2), decode_flops(1024**2)) == pytest.approx((1.12e12, 10.47e12))


def test_stacks_of_blocks_agree_with_the_exact_count() -> None:
    exact = forward_flops(FLUX_DEV, Workload(1, 0, 1024, 0, 512, 0, "target")).total
    assert stack_flops(3072, 57, 12, 512, 1024) == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize(
    ("model", "billions"), [(DEV, 11.9), ("black-forest-labs/FLUX.2-klein-4B", 3.7), ("black-forest-labs/FLUX.2-klein-9B", 8.7)]
)
def test_shapes_have_the_size_in_their_name(model: str, billions: float) -> None:
    assert PAINTERS[model].parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_vision_transformer_by_hand() -> None:
    tokens = 64 * 64 + 1
    by_hand = 12 * (2 * tokens * (4 * 768**2 + 2 * 768 * 3072) + 4 * 768 * tokens**2)
    assert picture_use("facebook/dinov2-base", 896).flops == pytest.approx(by_hand)


def test_a_judge_waits_for_its_weights() -> None:
    use = chat_use("Qwen/Qwen3-VL-8B-Instruct", 300, 1024**2, 100)
    assert use.bytes_read == 100 * 2 * 8.2e9
    assert use.flops == pytest.approx(2 * 8.2e9 * (300 + 1024 + 100) + 2 * 0.6e9 * 4096)


def test_local_folders_tell_their_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"vision_config": {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "patch_size": 4, "image_size": 16}}
        )
    )
    assert picture_use(str(tmp_path)).flops == 2 * (2 * 17 * (4 * 64 + 2 * 8 * 16) + 4 * 8 * 17**2)
    assert painter(str(tmp_path)) is None
    pocket = painter("assets/pocket/flux")
    assert 0 < pocket.call(64, 64, 8).flops < 1e-3 * painter(DEV).call(64, 64, 8).flops
    (tmp_path / "config.json").write_text("[")
    assert picture_use(str(tmp_path)) is None


def plans() -> list[StagePlan]:
    part = Part("pictures", DEV, 2, Use(1e15), True)
    judge = Part("judge", "j", 1, Use(1e12, 1e10))
    return [StagePlan("prompts"), StagePlan("synthesis", [part, judge], bytes=1000.0, kept_bytes=500.0), StagePlan("points")]


def test_hours_by_hand() -> None:
    """1,000 samples at yields of 0.98, 0.5 and 0.9 on an H100."""
    found = costs(plans(), 1000, ASSUMED)
    assert [cost.candidates for cost in found] == pytest.approx([1000 / 0.98 / 0.5 / 0.9, 1000 / 0.5 / 0.9, 1000 / 0.9])
    candidates = 1000 / 0.45
    by_hand = candidates * 2 * 1e15 / (989e12 * 0.33) / 3600, candidates * (1e12 / (989e12 * 0.15) + 1e10 / 3.35e12) / 3600
    assert found[1].hours == pytest.approx(by_hand)
    assert found[1].known_hours == pytest.approx(sum(by_hand))


def test_hours_grow_with_samples_and_fall_with_yields() -> None:
    one, many = (costs(plans(), number, ASSUMED)[1].known_hours for number in (1000, 1_200_000))
    assert many == pytest.approx(1200 * one)
    half = EstimateSettings(yields=ASSUMED.yields.replace(points=0.45))
    assert costs(plans(), 1000, half)[1].known_hours == pytest.approx(2 * one)
    measured = costs(plans(), 1000, ASSUMED, {"points": 0.45, "prompts": 0.0})
    assert measured[1].known_hours == pytest.approx(2 * one)
    assert [cost.measured for cost in measured] == [False, False, True]
    slow = EstimateSettings(gpu="A100 80GB")
    assert costs([StagePlan("points", [plans()[1].parts[0]])], 1000, slow)[0].known_hours == pytest.approx(
        costs([StagePlan("points", [plans()[1].parts[0]])], 1000, ASSUMED)[0].known_hours * 989 / 312
    )


def test_a_model_that_is_not_known_is_named() -> None:
    parts = list(segmentation_parts(SimpleNamespace(detector=None, model="somebody/new"), 2.5))
    assert parts == [Part("masks", "somebody/new", 2.5, None)]
    found = costs([StagePlan("segmentation", parts)], 100, ASSUMED)
    text = in_words(found, 100, 2.5, ASSUMED)
    assert "not known: somebody/new." in text
    assert "somebody/new: its licence is not known here" in text
    assert " + unknown" in text
    found = costs([StagePlan("points", [Part("features", "assets/pocket/flux", 1, Use(1e12))])], 1, ASSUMED)
    text = in_words(found, 1, 1.0, ASSUMED)
    assert "assets/pocket/flux: a folder of yours" in text
    assert re.search(r"^all +<1 ", text, re.MULTILINE)


def test_an_endpoint_costs_no_hours_here() -> None:
    judge = SimpleNamespace(model="gpt", url="https://host/v1")
    found = config().synthesis
    found.judge = judge
    text = in_words(costs(plan_of(config(synthesis=found), 2.0), 10, ASSUMED), 10, 2.0, ASSUMED)
    assert "by the endpoint" in text
    assert "not known: gpt" not in text


def test_extractors_by_their_options() -> None:
    (one,) = point_parts(SimpleNamespace(extractors={"flux": {"block": 56, "ensemble": 4, "size": 512}}), 2.0)
    assert one.calls == 3
    assert one.use.flops == pytest.approx(4 * PAINTERS[DEV].forward(512, 1024) + 1.12e12)
    (middle,) = point_parts(SimpleNamespace(extractors={"flux": {"ensemble": 4, "size": 512}}), 2.0)
    assert middle.use.flops == pytest.approx(2 * PAINTERS[DEV].forward(512, 1024) + 1.12e12)
    eight, one = (next(point_parts(SimpleNamespace(extractors={"dift": {"ensemble": draws}}), 1)).use.flops for draws in (8, 1))
    assert eight - one == pytest.approx(7 * 2.35e12)


def test_the_whole_estimate_in_words() -> None:
    mean = mean_number_of_subjects((0.25, 0.35, 0.2, 0.1, 0.05, 0.05))
    assert mean == pytest.approx(2.5)
    found = costs(plan_of(config(), mean), 1_200_000, ASSUMED)
    text = dry_run(config())
    assert text == in_words(found, 1_200_000, mean, ASSUMED)
    synthesis = next(line for line in text.splitlines() if line.startswith("2 synthesis"))
    assert f"{1_200_000 / 0.9 / 0.6 / 0.6 / 0.5:,.0f}" in synthesis
    assert "~50%" in synthesis
    assert "FLUX.1-Kontext-dev: FLUX.1 [dev] Non-Commercial License; gated" in text
    assert "IDEA-Research/grounding-dino-base: Apache-2.0" in text
    assert "unknown" not in text
    edits = found[3].plan.parts[0]
    assert edits.calls == pytest.approx(5.0)
    assert found[3].plan.parts[1].calls == pytest.approx(7.5)  # the cut-outs, too
    assert max(map(len, text.splitlines())) <= 140
    measured = dry_run(config(), {plan.plan.name: 0.5 for plan in found})
    assert "~" not in measured
    assert "all yields are measured" in measured


def test_the_card_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"estimate\.gpu must be a card that is known"):
        EstimateSettings(gpu="abacus")


def test_the_guide_has_the_table_of_licences() -> None:
    rows = [f"| `{one.model}` | {one.role} | {one.licence} | {'yes' if one.gated else ''} |" for one in LICENCES]
    assert "\n".join(rows) in Path("docs/construct.md").read_text(encoding="utf-8")


def test_every_model_with_a_cost_has_a_licence() -> None:
    assert [model for model in (*PAINTERS, *VITS, *PICTURES, *CHATS) if licence_of(model) is None] == []
    assert len({one.model for one in LICENCES}) == len(LICENCES)
    found = licences_in({"a": [{"model": DEV}, "facebook/sam3"], "b": "nothing"})
    assert [one.model for one in found] == [DEV, "facebook/sam3"]
