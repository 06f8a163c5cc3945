"""The runs of the trial: arms that differ only in what they state, seeds and scenes, starts, digests, and config files for train.sh."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mosaic.config.loading import LOSS_PRESETS, LossConfig, load_config, resolved_dict
from scripts.ablation import plan as ablation_plan
from scripts.ablation.arms import BASELINE, DEFAULT_PARTS, PARTS, Arm, all_losses, emergence_arms, late_arms, selection_arms
from scripts.ablation.command import main
from scripts.ablation.plan import FIRST_SCENES, SIZES, WARMUP, Plan, make_plan
from scripts.ablation.tasks import run_tasks

SIZE = dataclasses.replace(SIZES["short"], seeds=2, late_seeds=3, selection_seeds=2)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(SIZE, tmp_path_factory.mktemp("ablation"))


def flat(path: Path) -> dict[str, Any]:
    values = resolved_dict(load_config(path))
    return {f"{section}.{name}": value for section, fields in values.items() for name, value in fields.items()}


def differences(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    return {name for name in first if first[name] != second[name]}


def test_arms_differ_only_in_their_stated_settings(plan: Plan) -> None:
    for part in ("scratch", "selection", "late"):
        runs = [run for run in plan.of_part(part) if run.arm.trained]
        for run in runs:
            first = next(other for other in runs if other.arm.name == BASELINE and other.seed == run.seed)
            stated = {*run.arm.settings, *first.arm.settings}
            if run.arm.settings["loss.preset"] != "paper":
                stated |= {f"loss.{name}" for name in LOSS_PRESETS["paper"]}
            assert differences(flat(run.config), flat(first.config)) <= stated | {"training.output_dir"}, run.name
            assert {name: flat(run.config)[name] for name in run.arm.settings} == dict(run.arm.settings)
        assert len({run.name for run in runs}) == len({run.digest for run in runs}) == len(runs)


def test_seeds_of_an_arm_differ_in_nothing_else(plan: Plan) -> None:
    first, second = (run for run in plan.of_part("scratch") if run.arm.name == "paper")
    assert differences(flat(first.config), flat(second.config)) == {"training.seed", "training.output_dir"}
    assert first.digest != second.digest


def loss_of(arm: Arm) -> LossConfig:
    return LossConfig(**{name.removeprefix("loss."): value for name, value in arm.settings.items()})


def test_the_losses_are_those_of_the_presets() -> None:
    flow, scal, mdl, paper, release, light, own = (loss_of(arm) for arm in all_losses(3000)[1:])
    assert paper == LossConfig(preset="paper")
    assert release.replace(disentanglement_start_step=10_000, disentanglement_warmup_steps=1_000) == LossConfig(preset="release")
    assert (release.disentanglement_start_step, release.disentanglement_warmup_steps) == (300, 30)
    assert light.replace(preset="light") == LossConfig(preset="light")
    weights = [(loss.correspondence_weight, loss.disentanglement_weight, loss.own_reference_weight) for loss in (flow, scal, mdl, own)]
    assert weights == [(0, 0, 0), (0.4, 0, 0), (0, 0.6, 0), (0, 0, 0.02)]
    assert (own.target_keys, own.supervised_timesteps, flow.supervised_timesteps) == ("references", (0.7, 1.0), (0.0, 1.0))


def test_late_arms_are_those_that_are_registered() -> None:
    arms = {arm.name: loss_of(arm) for arm in late_arms(2400)}
    assert [arms[f"scal_{weight}"].correspondence_weight for weight in ("0.001", "0.004", "0.04")] == [0.001, 0.004, 0.04]
    assert [arms[f"own_{weight}"].own_reference_weight for weight in ("0.005", "0.02")] == [0.005, 0.02]
    assert arms["mdl_0.06"] == LossConfig(preset="light", correspondence_weight=0.0).replace(preset="paper")
    ended = arms["light_then_none"]
    assert (ended.decay_start_step, ended.until_step) == (1200, 1200)
    assert ended.replace(decay_start_step=0, until_step=None) == arms["light"]
    assert {loss_of(arm).supervised_queries for arm in selection_arms()} == {"reference", "target"}
    assert [arms[0].name for arms in (emergence_arms(), late_arms(10), selection_arms())] == [BASELINE] * 3


def test_late_starts_start_from_flow_matching_in_turn(plan: Plan) -> None:
    sources = [run for run in plan.of_part("scratch") if run.arm.name == BASELINE]
    starts = [run.folder / "checkpoints/step_00000040/ema.safetensors" for run in sources]
    assert [run.start for run in plan.of_part("late") if run.arm.name == "light"] == [starts[0], starts[1], starts[0]]
    assert {run.start for run in plan.of_part("selection")} == {starts[0]}
    assert {run.start for run in plan.of_part("scratch")} == {None}
    for run in plan.runs:
        assert load_config(run.config).lora.pretrained == (str(run.start) if run.start else None)
    other = make_plan(dataclasses.replace(SIZE, late_from=80), plan.output, ("late",), ("light",))
    assert not {run.digest for run in other.of_part("late")} & {run.digest for run in plan.runs}


def test_seeds_and_scenes_of_the_selection_are_its_own(tmp_path: Path) -> None:
    full = make_plan(SIZES["long"], tmp_path)
    seeds = {part: {run.seed for run in full.of_part(part) if run.arm.trained} for part in ("scratch", "selection", "late")}
    assert seeds == {"scratch": {10, 11, 12}, "selection": {0, 1}, "late": {20, 21, 22, 23}}
    size, firsts = SIZES["long"], sorted({*FIRST_SCENES.values(), 0, 500_000})
    assert all(later - first > max(size.cases, size.real_scenes) for first, later in pairwise(firsts))
    assert FIRST_SCENES["selection"] != FIRST_SCENES["late"] == FIRST_SCENES["scratch"] != FIRST_SCENES["confirmation"]


def test_a_trial_that_ends_early_has_fewer_arms_not_fewer_seeds(plan: Plan) -> None:
    """What late starts start from comes first, then arm by arm with all its seeds."""
    assert [(run.part, run.arm.name, run.seed) for run in plan.runs[:4]] == [
        *(("scratch", BASELINE, seed) for seed in (10, 11)),
        *(("selection", BASELINE, seed) for seed in (0, 1)),
    ]
    late = [(run.arm.name, run.seed) for run in plan.of_part("late")]
    assert late == [(arm.name, seed) for arm in late_arms(SIZE.late_steps) for seed in (20, 21, 22)]
    assert [run.seed for run in plan.runs if not run.arm.trained] == [10]


def test_runs_from_scratch_are_measured_on_the_way(plan: Plan) -> None:
    by_part = {run.part: run.measured_steps for run in plan.runs if run.arm.trained}
    assert by_part == {"scratch": (40, 80), "selection": (20,), "late": (20,)}
    run = next(run for run in plan.of_part("scratch") if run.arm.name == "light")
    assert [run.adapter(step) for step in run.measured_steps] == [run.folder / "checkpoints/step_00000040/ema.safetensors", run.lora]
    training = load_config(run.config).training
    assert (training.milestone_every, training.checkpoint_every, training.keep_checkpoints) == (40, 4, 1)


def test_only_what_is_asked_for_and_what_it_starts_from(tmp_path: Path) -> None:
    late = make_plan(SIZE, tmp_path, ("late",), ("light",))
    assert [(run.part, run.arm.name) for run in late.runs] == [("scratch", BASELINE)] * 2 + [("late", "light")] * 3
    scratch = make_plan(SIZE, tmp_path, ("scratch",), ("base", "paper"))
    assert [run.arm.name for run in scratch.runs] == ["base", "paper", "paper"]
    confirmation = make_plan(SIZE, tmp_path, ("late",), ("scal_0.04",), confirmed="light")
    found = [(run.arm.name, run.seed) for run in confirmation.of_part("confirmation")]
    assert found == [(name, seed) for name in (BASELINE, "light") for seed in (24, 25, 26)]
    assert [run.arm.name for run in confirmation.of_part("late")] == ["scal_0.04"] * 3


def test_binding_is_a_late_start_on_scenes_of_its_own(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not plan.of_part("binding")
    binding = make_plan(SIZE, tmp_path, ("binding",))
    runs = binding.of_part("binding")
    assert [(run.arm.name, run.seed) for run in runs] == [(name, seed) for name in (BASELINE, "left_to_right") for seed in (30, 31, 32)]
    assert binding.runs[0].adapter(SIZE.late_from) == runs[0].start == runs[3].start
    assert differences(flat(runs[0].config), flat(runs[3].config)) == {"data.reference_order", "training.output_dir"}
    for number in (0, 3):
        Path(binding.runs[0].lora).parent.mkdir(parents=True, exist_ok=True)
        Path(binding.runs[0].lora).touch()
        runs[number].lora.parent.mkdir(parents=True, exist_ok=True)
        runs[number].lora.touch()
    plain, ordered = (run_tasks(binding, runs[number])[20, "pictures", SIZE.cells[1]] for number in (0, 3))
    assert plain.first_scene == ordered.first_scene == 600_000
    assert plain.digest() != ordered.digest()  # of equal adapters
    assert main(["--list", "--parts", "binding", "--output", str(tmp_path / "list")]) == 0
    assert "binding_left_to_right_seed30_" in capsys.readouterr().out


def test_digests_do_not_depend_on_the_folder_but_on_what_is_trained(plan: Plan, tmp_path: Path) -> None:
    elsewhere = make_plan(SIZE, tmp_path / "other")
    assert [run.digest for run in elsewhere.runs] == [run.digest for run in plan.runs]
    for change in ({"steps": 120}, {"batch_size": 4}, {"train_samples": 601}, {"max_subjects": 4}):
        other = make_plan(dataclasses.replace(SIZE, **change), tmp_path / "third")
        assert not {run.digest for run in other.of_part("late")} & {run.digest for run in plan.runs}
    more_cases = make_plan(dataclasses.replace(SIZE, cases=9), tmp_path / "fourth")
    assert [run.digest for run in more_cases.runs] == [run.digest for run in plan.runs]


def test_another_base_is_trained_on_measured_and_told_apart(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux/model_index.json").write_text("{}")
    folder = str(tmp_path / "flux")
    other = make_plan(SIZE, tmp_path / "trial", base=folder)
    assert {load_config(run.config).model.pretrained for run in other.runs} == {folder}
    assert not {run.digest for run in other.runs} & {run.digest for run in plan.runs}
    first = next(run for run in plan.runs if run.arm == other.runs[0].arm)
    assert differences(flat(other.runs[0].config), flat(first.config)) == {
        "model.pretrained", "data.root", "data.latent_cache", "data.text_cache", "training.output_dir"
    }  # fmt: skip
    assert main(["--list", "--base", str(tmp_path / "none"), "--output", str(tmp_path / "bad")]) == 2


def test_another_world_makes_other_runs_and_data(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation_plan, "WORLD_DIGEST", "f" * 64)
    other = make_plan(SIZE, tmp_path)
    assert not {run.digest for run in other.runs} & {run.digest for run in plan.runs}
    assert other.data.name != plan.data.name


def test_warm_ups_are_shares_of_a_run() -> None:
    assert round(3000 * WARMUP) == load_config("configs/pocket.json").optimizer.warmup_steps
    assert set(PARTS) - set(DEFAULT_PARTS) == {"confirmation", "binding"}


def test_unknown_arms_and_wrong_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--parts", "scratch", "--arms", "papper"], "--arms: papper unknown; there are base, flow_matching, scal, mdl, paper, release"),
        (["--confirm", "paper"], "--confirm must be one of scal_0.004, own_0.02_high_noise"),
        (["--cases", "1"], "--cases must be at least 2, got 1."),
        (["--every", "30"], "--steps and --late-from must be multiples of --every"),
        (["--late-from", "120"], "--late-from no later than --steps"),
        (["--parallel", "0"], "--parallel at least 1"),
    ):
        assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_settings_at_their_defaults_are_not_part_of_a_digest(plan: Plan) -> None:
    config = load_config(plan.of_part("late")[0].config)
    kept = ablation_plan.what_matters(config)
    assert "max_pull" not in kept["loss"]
    assert config.loss.max_pull is None
    assert ablation_plan.what_matters(config.replace(loss={"max_pull": 0.5}))["loss"]["max_pull"] == 0.5
