"""Config files: defaults, presets, overrides, round trip, and the messages for bad input."""

import copy
import json
import math
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from mosaic.config.loading import (
    Config,
    LoraConfig,
    LossConfig,
    OptimizerConfig,
    config_to_json,
    from_dict,
    load_config,
    resolved_dict,
)
from mosaic.config.schema import FieldError, Section
from scripts.schemas import config as make_config_schema

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, values: Any) -> Path:
    """Write a config file; strings are written as they are."""
    path = folder / "c.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def test_defaults_are_the_papers_values() -> None:
    config = Config()
    assert (config.lora.rank, config.optimizer.learning_rate, config.training.max_steps, config.training.batch_size) == (
        128,
        1e-4,
        100_000,
        1,
    )
    assert (config.optimizer.weight_decay, config.optimizer.max_grad_norm, config.optimizer.ema_decay) == (1e-2, 1.0, None)
    assert (config.data.image_dropout, config.data.text_dropout, config.data.both_dropout) == (0.05, 0.05, 0.05)
    assert (config.data.image_size, config.data.reference_size) == ((512, 512), 512)
    assert (config.model.reference_attention, config.model.text_length) == ("target", 512)
    inference = config.inference
    assert (inference.num_inference_steps, inference.guidance_scale, inference.seed, inference.reference_scale) == (28, 3.5, 42, 0.9)


def test_presets_fill_what_is_not_given() -> None:
    paper, release = LossConfig(), LossConfig(preset="release")
    assert (paper.correspondence_weight, paper.disentanglement_weight, paper.capture_blocks) == (0.4, 0.6, "all")
    assert (paper.correspondence_reduction, paper.disentanglement_rows, paper.divergence) == ("reference", "points", "symmetric_kl")
    assert (paper.disentanglement_start_step, paper.disentanglement_warmup_steps) == (0, 0)
    assert (release.correspondence_weight, release.disentanglement_weight, release.capture_blocks) == (0.1, 1.0, "double")
    assert (release.correspondence_reduction, release.disentanglement_rows, release.divergence) == ("point", "all", "jensen_shannon")
    assert (release.disentanglement_start_step, release.disentanglement_warmup_steps) == (10_000, 1_000)
    assert paper.disentanglement_cap is release.disentanglement_cap is None
    light = paper.replace(preset="light", correspondence_weight=0.04, disentanglement_weight=0.06, disentanglement_cap=1.0)
    assert LossConfig(preset="light") == light
    assert LossConfig(preset="light", disentanglement_cap=2.0).disentanglement_cap == 2.0
    assert from_dict({"loss": {"preset": "light", "disentanglement_cap": None}}).loss.disentanglement_cap is None
    mixed = LossConfig(preset="release", disentanglement_weight=0.0, capture_blocks=(0, 19))
    assert (mixed.disentanglement_weight, mixed.capture_blocks, mixed.correspondence_weight) == (0.0, (0, 19), 0.1)


def test_a_preset_sets_only_the_loss() -> None:
    config = from_dict({"loss": {"preset": "release"}})
    assert config.replace(loss=LossConfig()) == Config()


def test_every_field_is_described() -> None:
    source = (ROOT / "mosaic/config/sections.py").read_text(encoding="utf-8")
    fields = re.findall(r"^    (\w+): (?!ClassVar).*\n(.*)", source, flags=re.MULTILINE)
    assert len(fields) == sum(len(section) for section in resolved_dict(Config()).values())
    assert [name for name, below in fields if not below.startswith('    """')] == []


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().lora.rank = 3  # type: ignore[misc]
    assert issubclass(LoraConfig, Section)
    with pytest.raises(TypeError):
        LoraConfig(3)  # type: ignore[misc]


CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.json") if "schema" not in path.name and "construct" not in path.name)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_load_and_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert from_dict(resolved_dict(config)) == config
    assert load_config(write(tmp_path, config_to_json(config))) == config


def test_shipped_configs_hold_the_stated_values() -> None:
    assert load_config(ROOT / "configs/mosaic_512.json").loss == LossConfig(preset="paper")
    release = load_config(ROOT / "configs/release_512.json")
    assert release.loss == LossConfig(preset="release")
    assert (release.lora.rank, release.optimizer.learning_rate, release.optimizer.weight_decay, release.optimizer.ema_decay) == (
        512,
        8e-5,
        1e-2,
        0.99,
    )
    assert (release.training.max_steps, release.training.max_epochs) == (None, 10)


def test_schema_key_is_ignored_and_bom_accepted(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, '\ufeff{"$schema": "x.json", "$comment": "y"}')) == Config()


def test_lists_become_tuples_and_integers_floats() -> None:
    config = from_dict({"data": {"image_size": [64, 96]}, "optimizer": {"learning_rate": 1}})
    assert config.data.image_size == (64, 96)
    assert isinstance(config.optimizer.learning_rate, float)


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, {"lora": {"rank": 8}, "loss": {"preset": "paper"}})
    config = load_config(
        path,
        ["lora.rank=16", "lora.rank=32", "loss.preset=release", "data.root=a=b", 'data.split="7"', "optimizer.learning_rate=5e-5"]
        + ["loss.capture_blocks=[0, 3]", "training.max_steps=null", "training.max_epochs=2", "model.gradient_checkpointing=none"],
    )
    assert (config.lora.rank, config.loss.divergence, config.loss.capture_blocks) == (32, "jensen_shannon", (0, 3))
    assert (config.data.root, config.data.split, config.optimizer.learning_rate) == ("a=b", "7", 5e-5)
    assert (config.training.max_steps, config.training.max_epochs, config.model.gradient_checkpointing) == (None, 2, "none")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank=0", "lora.rank must be an integer of at least 1 and at most 3072, got 0 (--set lora.rank=0)."),
        ("lora.rnk=4", "lora.rnk is not a known setting. Did you mean rank? (--set lora.rnk=4)."),
        ("lra.rank=4", "lra.rank is not a known setting. Did you mean lora? (--set lra.rank=4)."),
        ("lora=4", '--set must have the form section.field=value, such as lora.rank=32, got "lora=4".'),
        ("lora.rank", '--set must have the form section.field=value, such as lora.rank=32, got "lora.rank".'),
        (
            "model.dtype=float16",
            'model.dtype must be one of "bfloat16", "float32", got "float16". Did you mean bfloat16? (--set model.dtype=float16).',
        ),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_config(write(tmp_path, {}), [override])


def test_an_override_does_not_take_the_blame_for_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"lora": {"rank": -1}})
    with pytest.raises(ValueError, match=re.escape(f"lora.rank must be an integer of at least 1 and at most 3072, got -1 ({path}).")):
        load_config(path, ["lora.weight_name=x.safetensors"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"los": {}}, "los is not a known setting. Did you mean loss? (FILE)."),
        (
            {"loss": {"corespondence_weight": 1}},
            "loss.corespondence_weight is not a known setting. Did you mean correspondence_weight? (FILE).",
        ),
        ({"lora": {"zzz": 1}}, "lora.zzz is not a known setting. Known here: rank, pretrained, weight_name, resize (FILE)."),
        ({"lora": {"rank": 0, "rnk": 4}}, "lora.rnk is not a known setting. Did you mean rank? (FILE)."),
        ({"lora": {"rank": "128"}}, 'lora.rank must be an integer of at least 1 and at most 3072, got "128" (FILE).'),
        ({"lora": {"rank": True}}, "lora.rank must be an integer of at least 1 and at most 3072, got true (FILE)."),
        ({"lora": {"rank": 2.0}}, "lora.rank must be an integer of at least 1 and at most 3072, got 2.0 (FILE)."),
        ({"lora": {"rank": None}}, "lora.rank must be an integer of at least 1 and at most 3072, got null (FILE)."),
        ({"lora": []}, "lora must be an object of settings, got [] (FILE)."),
        (
            {"model": {"gradient_checkpointing": True}},
            'model.gradient_checkpointing must be one of "none", "block", "keep_attention", got true (FILE).',
        ),
        (
            {"inference": {"step_cache_threshold": 0.1}},
            'inference.step_cache_threshold must be null where inference.step_cache is "none", got 0.1 (FILE).',
        ),
        (
            {"inference": {"step_cache": "mag", "compile": True}},
            'inference.compile must be false where inference.step_cache is "mag", which runs every block uncompiled, got true (FILE).',
        ),
        (
            {"inference": {"step_cache": "first_block", "report": True}},
            'inference.step_cache must be "none" where a report is written, which reads every block of every step, got "first_block" (FILE).',
        ),
        ({"model": {"text_length": 513}}, "model.text_length must be an integer of at least 1 and at most 512, got 513 (FILE)."),
        ({"data": {"num_workers": 257}}, "data.num_workers must be an integer of at least 0 and at most 256, got 257 (FILE)."),
        ({"data": {"max_references": 65}}, "data.max_references must be an integer of at least 1 and at most 64, got 65 (FILE)."),
        (
            {"data": {"buckets": [[512, 8193]]}},
            "data.buckets must be a list of 0 to 256 values, each a list of 2 values, each an integer of at least 1 and at most 8192, got [[512, 8193]]"
            " (FILE).",
        ),
        ({"training": {"batch_size": 4097}}, "training.batch_size must be an integer of at least 1 and at most 4096, got 4097 (FILE)."),
        (
            {"training": {"gradient_accumulation_steps": 65537}},
            "training.gradient_accumulation_steps must be an integer of at least 1 and at most 65536, got 65537 (FILE).",
        ),
        ({"validation": {"num_cases": 1001}}, "validation.num_cases must be an integer of at least 1 and at most 1000, got 1001 (FILE)."),
        ({"inference": {"batch_size": 0}}, "inference.batch_size must be an integer of at least 1 and at most 4096, got 0 (FILE)."),
        ({"model": {"compile": 1}}, "model.compile must be true or false, got 1 (FILE)."),
        (
            {"optimizer": {"name": "prodigy", "learning_rate": 1e-4}},
            'optimizer.learning_rate must be at least 0.1 where optimizer.name is "prodigy" (a factor, usually 1), got 0.0001 (FILE).',
        ),
        ({"data": {"root": ""}}, 'data.root must be a string that is not empty, got "" (FILE).'),
        (
            {"data": {"image_size": 512}},
            "data.image_size must be a list of 2 values, each an integer of at least 1 and at most 8192, got 512 (FILE).",
        ),
        (
            {"data": {"image_size": [512, 0]}},
            "data.image_size must be a list of 2 values, each an integer of at least 1 and at most 8192, got [512, 0] (FILE).",
        ),
        ({"data": {"text_dropout": 1.5}}, "data.text_dropout must be a number of at least 0 and at most 1, got 1.5 (FILE)."),
        ({"data": {"text_dropout": 0.95}}, "data.image_dropout + text_dropout + both_dropout must be at most 1, got 1.05 (FILE)."),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate must be a number of more than 0, got 0 (FILE)."),
        (
            {"optimizer": {"betas": [0.9, 1]}},
            "optimizer.betas must be a list of 2 values, each a number of at least 0 and less than 1, got [0.9, 1] (FILE).",
        ),
        (
            {"loss": {"preset": "papper"}},
            'loss.preset must be one of "paper", "release", "light", got "papper". Did you mean paper? (FILE).',
        ),
        ({"loss": {"correspondence_weight": None}}, "loss.correspondence_weight must be a number of at least 0, got null (FILE)."),
        ({"loss": {"disentanglement_cap": 0}}, "loss.disentanglement_cap must be a number of more than 0 or null, got 0 (FILE)."),
        (
            {"loss": {"supervised_timesteps": [0.5, 0.5]}},
            "loss.supervised_timesteps must be a lower and a higher timestep, got [0.5, 0.5] (FILE).",
        ),
        ({"loss": {"capture_blocks": [1, 1]}}, "loss.capture_blocks must name each block once, got [1, 1] (FILE)."),
        (
            {"loss": {"capture_blocks": []}},
            'loss.capture_blocks must be one of "all", "double" or a list of one or more values, each an integer of at least 0, got [] (FILE).',
        ),
        (
            {"training": {"max_steps": None}},
            "training.max_steps must be an integer of at least 1 where max_epochs is null, got null (FILE).",
        ),
        (
            {"inference": {"reference_scale": 1.1}},
            "inference.reference_scale must be a number of more than 0 and at most 1, got 1.1 (FILE).",
        ),
        ('{"optimizer": {"eps": NaN}}', "optimizer.eps must be a number of more than 0, got NaN (FILE)."),
        ([], "FILE: must be a JSON object of sections, got []."),
        ("{\n  'lora': 1}", "FILE: not valid JSON: line 2, column 3: Expecting property name enclosed in double quotes."),
        ("", "FILE: not valid JSON: line 1, column 1: Expecting value."),
        ('{"lora": {"rank": 1, "rank": 2}}', "FILE: not valid JSON: the key 'rank' is given twice in one object."),
    ],
)
def test_messages(tmp_path: Path, values: Any, message: str) -> None:
    path = write(tmp_path, values)
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('FILE', str(path)))}$"):
        load_config(path)


def test_message_of_a_missing_file_a_folder_and_bytes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'no.json'}: file not found.")):
        load_config(tmp_path / "no.json")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: must be a JSON file, but it is a folder.")):
        load_config(tmp_path)
    (tmp_path / "b.json").write_bytes(b"{\xff}")
    with pytest.raises(ValueError, match="must be a UTF-8 text file, but byte 1 is not UTF-8"):
        load_config(tmp_path / "b.json")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"deep\.json: not valid JSON"):
        load_config(tmp_path / "deep.json")


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"^lora\.rank must be an integer of at least 1 and at most 3072, got 0\.$"):
        LoraConfig(rank=0)


def test_integers_fit_64_bits_and_numbers_are_finite() -> None:
    assert OptimizerConfig(warmup_steps=2**63 - 1).warmup_steps == 2**63 - 1
    with pytest.raises(FieldError, match=r"^optimizer\.warmup_steps must be an integer of at least 0, got 9223372036854775808\.$"):
        OptimizerConfig(warmup_steps=2**63)
    for value in (math.inf, -math.inf, math.nan, 10**400):
        with pytest.raises(FieldError, match=r"^optimizer\.weight_decay must be a number of at least 0, got "):
            OptimizerConfig(weight_decay=value)


def test_a_copy_with_other_values_is_checked_and_keeps_the_rest() -> None:
    loss = LossConfig(preset="release", max_points=7)
    assert loss.replace(preset="paper", capture_blocks=[1]) == LossConfig(**{**dict(loss), "preset": "paper", "capture_blocks": (1,)})
    with pytest.raises(FieldError, match=r"^loss\.max_points must be an integer of at least 1 and at most 65536, got 0\.$"):
        loss.replace(max_points=0)
    with pytest.raises(FieldError, match=r"^loss\.supervised_timesteps must be a lower and a higher timestep, got \[1\.0, 0\.5\]\.$"):
        loss.replace(supervised_timesteps=[1, 0.5])
    with pytest.raises(FieldError, match=r"^lora must be an object of settings, got 3\.$"):
        Config().replace(lora=3)


def test_configs_travel_to_other_processes() -> None:
    config = from_dict({"data": {"buckets": [[64, 96]]}, "loss": {"preset": "release"}})
    assert copy.deepcopy(config) == config
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(config_to_json, (config,)) == config_to_json(config)
    assert hash(copy.deepcopy(config)) == hash(config)


@pytest.mark.parametrize("command", [["inference.py", "--help"], ["scripts/train.py", "configs/mosaic_512.json", "--print-config"]])
def test_settings_are_read_without_torch(command: list[str]) -> None:
    """A mistake in a config is told in an instant, so what reads it imports no framework."""
    program = (
        "import runpy, sys\nsys.argv = sys.argv[1:]\nsys.path.insert(0, '.')\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", program, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stderr.splitlines()[-1] == "[]"


# ---- extends


def test_a_file_builds_on_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/far.json").write_text('{"lora": {"rank": 8}, "optimizer": {"eps": 1e-6, "learning_rate": 1e-3}}')
    (tmp_path / "base/near.json").write_text('{"extends": "far.json", "optimizer": {"learning_rate": 2e-3}, "loss": {"max_points": 9}}')
    path = write(tmp_path, {"$schema": "x", "extends": "base/near.json", "loss": {"preset": "release"}})
    config = load_config(path, ["loss.max_points=7"])
    assert config == from_dict(
        {"lora": {"rank": 8}, "optimizer": {"eps": 1e-6, "learning_rate": 2e-3}, "loss": {"preset": "release", "max_points": 7}}
    )


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ('{"lora": {"rank": 0}}', r"lora.rank must be an integer of at least 1 and at most 3072, got 0 \(.*base.json\)"),
        ('{"lora": {"ranc": 1}}', r"lora.ranc is not a known setting. Did you mean rank\? \(.*base.json\)"),
        ('{"lore": {}}', r"lore is not a known setting. Did you mean lora\? \(.*base.json\)"),
        ('{"lora": 3}', r"lora must be an object of settings, got 3 \(.*base.json\)"),
        ('{"extends": "c.json"}', r'base.json: "extends" leads in a circle|"extends" leads in a circle: c.json -> base.json -> c.json'),
        ('{"extends": 3}', r"extends must be the path of a config file, relative to this one, got 3 \(.*base.json\)"),
        ("[1]", r"base.json: must be a JSON object of sections, got \[1\]"),
    ],
)
def test_mistakes_are_reported_where_they_stand(tmp_path: Path, base: str, message: str) -> None:
    (tmp_path / "base.json").write_text(base)
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, {"extends": "base.json", "optimizer": {"eps": 1e-7}}), ["training.seed=1"])


@pytest.mark.parametrize("kind", ["pipe", "socket", "/dev/zero", "/dev/stdin"])
def test_what_is_no_ordinary_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """It might have no end, or wait for ever. Also at the end of a link, and where another config names it."""
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path(kind if kind.startswith("/") else "config.json")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    elif kind == "/dev/stdin":  # a pipe whose writer does not write
        path = Path(f"/proc/self/fd/{os.pipe()[0]}")
    Path("link.json").symlink_to(path)
    for name in (path, Path("link.json")):
        with pytest.raises(ValueError, match=re.escape(f"{name}: must be an ordinary file, but it is a pipe, a socket or a device.")):
            load_config(name)


def test_a_text_file_has_a_bound(tmp_path: Path) -> None:
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", 2**30 + 2**20)  # takes no room on the disk
    with pytest.raises(ValueError, match=r"large.json: must be a text file of at most 1024 MiB, got 1025 MiB\."):
        load_config(tmp_path / "large.json")


def test_configs_that_build_on_one_another_without_end(tmp_path: Path) -> None:
    for number in range(1200):
        (tmp_path / f"{number}.json").write_text(f'{{"extends": "{number + 1}.json", "training": {{"seed": {number}}}}}')
    (tmp_path / "1200.json").write_text("{}")
    with pytest.raises(ValueError, match=r'0.json: "extends" must lead through at most 32 files, and leads on to .*32.json\.'):
        load_config(tmp_path / "0.json")
    assert load_config(tmp_path / "1169.json").training.seed == 1169  # 31 more


def test_the_extended_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"\"extends\" names 'nowhere.json', relative to this file, but .*nowhere.json is no file"):
        load_config(write(tmp_path, {"extends": "nowhere.json"}))


# ---- the schema for editors


def test_the_schema_file_is_current() -> None:
    text = (ROOT / "configs/schema.json").read_text(encoding="utf-8")
    assert text == make_config_schema.schema_text(), "run python scripts/make_config_schema.py"
    jsonschema.Draft202012Validator.check_schema(json.loads(text))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_fit_the_schema_and_point_to_it(path: Path) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values["$schema"] == "schema.json"
    jsonschema.validate(values, make_config_schema.config_schema())


def test_the_schema_agrees_with_the_models() -> None:
    jsonschema.validate(resolved_dict(Config()), make_config_schema.config_schema())
    wrong = [
        ("lora", "rank", 0),
        ("lora", "rank", 1.5),
        ("data", "image_size", [1, 2, 3]),
        ("loss", "divergence", "x"),
        ("data", "root", " "),
    ]
    for section, field, value in [*wrong, ("optimizer", "eps", 0), ("data", "image_dropout", 1.1), ("optimizer", "betas", [0.9, 1])]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({section: {field: value}}, make_config_schema.config_schema())
        with pytest.raises(ValueError, match=f"{section}.{field}"):
            from_dict({section: {field: value}})
    assert list(make_config_schema.config_schema()["properties"])[3:] == list(Config.model_fields)


def test_every_number_that_takes_memory_or_time_is_bounded() -> None:
    """Those without an upper bound are steps after which something happens, factors, and numbers of what there is anyway."""
    free = {
        "loss.disentanglement_start_step", "loss.disentanglement_warmup_steps", "loss.correspondence_weight", "loss.disentanglement_weight",
        "loss.own_reference_weight", "loss.region_weight", "loss.decay_start_step", "loss.until_step", "loss.max_pull", "loss.pull_every",
        "loss.disentanglement_cap", "loss.capture_blocks", "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.eps",
        "optimizer.max_grad_norm", "optimizer.warmup_steps", "training.max_steps", "training.max_epochs", "training.log_every",
        "training.checkpoint_every", "training.keep_checkpoints", "training.milestone_every", "training.peak_tflops", "validation.every",
        "inference.refresh_references", "inference.step_cache_threshold",
    }  # fmt: skip

    def numbers(schema: dict[str, Any]) -> list[dict[str, Any]]:
        """The schemas of all numbers within one."""
        parts = [
            *schema.get("anyOf", ()),
            *schema.get("prefixItems", ()),
            *([schema["items"]] if isinstance(schema.get("items"), dict) else []),
        ]
        return [schema] if schema.get("type") in ("integer", "number") else [found for part in parts for found in numbers(part)]

    sections = json.loads((ROOT / "configs/schema.json").read_text(encoding="utf-8"))["$defs"]
    unbounded = {
        f"{section.path}.{name}"
        for section in Section.__subclasses__()
        if section.__module__ == "mosaic.config.sections"
        for name, schema in sections[section.__name__]["properties"].items()
        if any("maximum" not in number and "exclusiveMaximum" not in number for number in numbers(schema))
    }
    assert unbounded == free


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("data.root", "a\ud800", r'data\.root must be plain text, but it holds half of a surrogate pair: "a\\ud800"'),
        ("model.quantization", {"\udfff": 1}, r"model\.quantization must be "),
        ("data.image_size", json.loads("[" * 900 + "]" * 900), r"data\.image_size must be "),
        ("loss.capture_blocks", json.loads("[" * 200 + "]" * 200), r"loss\.capture_blocks must be "),
        ("data.root", 10**30, r"data\.root must be "),
    ],
)
def test_values_that_cannot_be_written_down(field: str, value: object, problem: str) -> None:
    section, name = field.split(".")
    with pytest.raises(FieldError, match=problem):
        from_dict({section: {name: value}})


def test_a_long_override_is_not_repeated_in_full(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FieldError) as caught:
        load_config(tmp_path / "config.json", ["lora.rank=" + "a" * 20_000])
    assert len(str(caught.value)) < 400
    assert str(caught.value).startswith("lora.rank must be ")
