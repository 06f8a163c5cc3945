"""The runs of an ablation: arms that differ only in what they state, digests, and config files as train.sh reads them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mosaic.config.loading import LOSS_PRESETS, LossConfig, load_config, resolved_dict
from mosaic.model.attention_rows import resolve_capture_blocks
from scripts.ablation import plan as ablation_plan
from scripts.ablation.arms import PARTS, attention_arms, factor_arms, main_arms, stable_settings
from scripts.ablation.command import main
from scripts.ablation.plan import SIZES, WARMUP, Plan, make_plan

SIZE = dataclasses.replace(SIZES["short"], seeds=2, factor_seeds=1)
SCHEDULE = {"loss.disentanglement_start_step", "loss.disentanglement_warmup_steps"}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(SIZE, tmp_path_factory.mktemp("ablation"))


def flat(path: Path) -> dict[str, Any]:
    values = resolved_dict(load_config(path))
    return {f"{section}.{name}": value for section, fields in values.items() for name, value in fields.items()}


def differences(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    return {name for name in first if first[name] != second[name]}


def test_arms_differ_only_in_their_stated_settings(plan: Plan) -> None:
    for part in ("main", "factors", "attention"):
        runs = plan.of_part(part)
        for run in runs:
            first = next(other for other in runs if other.arm.trained and other.seed == run.seed)
            stated = {*run.arm.settings, *first.arm.settings}
            if run.arm.settings.get("loss.preset") != first.arm.settings["loss.preset"] and run.arm.trained:
                stated |= {f"loss.{name}" for name in LOSS_PRESETS["paper"]}
            assert differences(flat(run.config), flat(first.config)) <= stated | {"training.output_dir"}, run.name
            assert {name: flat(run.config)[name] for name in run.arm.settings} == dict(run.arm.settings)


def test_seeds_of_an_arm_differ_in_nothing_else(plan: Plan) -> None:
    for arm in main_arms(SIZE.steps)[1:]:
        first, second = (run for run in plan.of_part("main") if run.arm.name == arm.name)
        assert differences(flat(first.config), flat(second.config)) == {"training.seed", "training.output_dir"}
        assert first.digest != second.digest


def test_a_variant_changes_one_factor(plan: Plan) -> None:
    baseline, *variants = plan.of_part("factors")
    assert len({run.name for run in variants}) == len(variants) == len({run.digest for run in variants})
    for run in variants:
        changed = differences(flat(run.config), flat(baseline.config)) - {"training.output_dir"}
        if run.arm.factor.startswith("preset paper"):  # one factor from the arm "paper"
            changed -= {*SCHEDULE, "loss.disentanglement_cap"}
            assert len(changed) <= 1, run.name
            continue
        if "weights" in run.arm.factor:  # of both losses, as one factor or beside it
            assert changed >= {"loss.correspondence_weight", "loss.disentanglement_weight"}
            changed = changed - {"loss.correspondence_weight", "loss.disentanglement_weight"} or {"weights"}
        assert len(changed) == 1 or changed <= SCHEDULE, run.name
        assert changed


def test_no_two_variants_capture_the_same_blocks(plan: Plan) -> None:
    runs = [run for run in plan.of_part("factors") if run.arm.factor in ("none", "captured blocks")]
    captured = [tuple(resolve_capture_blocks(load_config(run.config).loss.capture_blocks, 2, 5)) for run in runs]
    assert len(set(captured)) == len(captured) == 5


def test_the_losses_are_those_of_the_presets() -> None:
    paper, stable, light, release = (resolved_loss(arm) for arm in main_arms(3000)[3:])
    assert paper == LossConfig(preset="paper")
    schedule = {"disentanglement_start_step": 200, "disentanglement_warmup_steps": 200}
    assert stable == paper.replace(disentanglement_cap=1.0, **schedule)
    assert release.replace(disentanglement_start_step=10_000, disentanglement_warmup_steps=1_000) == LossConfig(preset="release")
    assert light.replace(preset="light") == LossConfig(preset="light")
    flow, scal = (resolved_loss(arm) for arm in main_arms(3000)[1:3])
    assert (flow.correspondence_weight, flow.disentanglement_weight) == (0, 0)
    assert (scal.correspondence_weight, scal.disentanglement_weight) == (0.4, 0)


def resolved_loss(arm: Any) -> LossConfig:
    return LossConfig(**{name.removeprefix("loss."): value for name, value in arm.settings.items()})


def test_the_base_is_measured_once_and_the_stable_arm_is_the_target_mode(plan: Plan) -> None:
    assert [run.seed for run in plan.runs if not run.arm.trained] == [0]
    shared = [run for run in plan.runs if len(run.parts) > 1]
    assert [(run.parts, run.arm.name, run.seed) for run in shared] == [(("main", "attention"), "stable", seed) for seed in (0, 1)]
    assert load_config(shared[0].config).model.reference_attention == "target"
    assert {load_config(run.config).model.reference_attention for run in plan.of_part("attention")} == {"target", "isolated", "joint"}


def test_digests_do_not_depend_on_the_folder_but_on_what_is_trained(plan: Plan, tmp_path: Path) -> None:
    elsewhere = make_plan(SIZE, tmp_path / "other")
    assert [run.digest for run in elsewhere.runs] == [run.digest for run in plan.runs]
    for change in ({"steps": 81}, {"batch_size": 4}, {"train_samples": 601}):
        other = make_plan(dataclasses.replace(SIZE, **change), tmp_path / "third", ("main",))
        assert not {run.digest for run in other.runs if run.lora} & {run.digest for run in plan.runs}
    more_cases = make_plan(dataclasses.replace(SIZE, cases=9), tmp_path / "fourth")
    assert [run.digest for run in more_cases.runs] == [run.digest for run in plan.runs]


def test_blocks_of_the_pocket_model_are_covered_by_thirds() -> None:
    blocks = {arm.meaning: arm.settings["loss.capture_blocks"] for arm in factor_arms(30, 2, 5) if arm.factor == "captured blocks"}
    assert blocks["single"] == [2, 3, 4, 5, 6]
    assert [*blocks["middle third"], *blocks["last third"]] == [2, 3, 4, 5, 6]  # the first third is "double"


def test_parts_are_computed_one_after_the_other(plan: Plan) -> None:
    """An interrupted ablation has the losses at all seeds before variants."""
    first = [run.parts[0] for run in plan.runs]
    assert first == sorted(first, key=PARTS.index)
    assert [run.seed for run in plan.runs if run.parts[0] == "main"] == [0] * 7 + [1] * 6


def test_another_world_makes_other_runs_and_data(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation_plan, "WORLD_DIGEST", "f" * 64)
    other = make_plan(SIZE, tmp_path)
    assert not {run.digest for run in other.runs} & {run.digest for run in plan.runs}
    assert other.data.name != plan.data.name


def test_warm_ups_are_shares_of_a_run() -> None:
    assert round(3000 * WARMUP) == load_config("configs/pocket.json").optimizer.warmup_steps


def test_unknown_arms_and_wrong_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--arms", "papper"], "--arms: papper unknown; there are base, flow_matching, scal, paper, stable, light, release"),
        (["--arms", "scal", "mdl_weight_0"], 'variants are compared with the arm "stable", which must be named beside them.'),
        (["--cases", "1"], "--cases must be at least 2, got 1."),
        (["--ks", "7"], "--ks must be of 1..6, got [7]."),
        (["--parallel", "0"], "--parallel at least 1"),
    ):
        assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_attention_modes_keep_the_losses() -> None:
    for arm in attention_arms(60):
        assert {name: value for name, value in arm.settings.items() if name.startswith("loss.")} == stable_settings(60)
