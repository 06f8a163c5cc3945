"""The shipped golden cases: outputs of the authors' released code on tiny random weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import golden

CASES = sorted(path.parent for path in (Path(__file__).parents[1] / "golden_cases").glob("*/meta.json"))


@pytest.fixture(scope="module", params=CASES, ids=[case.name for case in CASES])
def case(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_both_kinds_are_there() -> None:
    assert {"steps" in json.loads((case / "meta.json").read_text()) for case in CASES} == {True, False}


def test_within_tolerance(case: Path) -> None:
    outputs, recorded = golden.run_case(case), golden.recorded_outputs(case)
    assert recorded.keys() <= outputs.keys()
    if "final" not in recorded:
        names = {"pred", "attn_rows", "attn_rows_all", "loss.diffusion", "loss.paper_correspondence", "loss.paper_disentanglement"}
        assert names <= recorded.keys()
        lora = {"grad." + key.removeprefix("transformer.") for key in load_file(case / "lora.safetensors")}
        assert {key for key in recorded if key.startswith("grad.")} == lora
    for key, want in recorded.items():
        limit = golden.TOLERANCE * max(want.abs().max().item(), 1e-3)
        torch.testing.assert_close(outputs[key].float(), want.float(), atol=limit, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_the_comparison_notices_an_error(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = golden.recorded_outputs(case)
    key = sorted(recorded)[0]
    assert golden.compare(recorded, recorded)
    assert not golden.compare(recorded | {key: recorded[key] + 1e-3 * recorded[key].abs().max().clamp(min=1)}, recorded)
    assert f"FAIL {key}" in capsys.readouterr().out


def test_outputs_need_no_recorded_outputs(case: Path, tmp_path: Path) -> None:
    # The contract: inputs alone are enough, and OUT holds exactly the names of the contract.
    io, meta = load_file(case / "io.safetensors"), json.loads((case / "meta.json").read_text())
    inputs = {
        k: v for k, v in io.items() if k in ("noisy", "latents", "noise", "prompt_embeds", "pooled", "timestep") or k.startswith("ref.")
    }
    bare = tmp_path / "case"
    bare.mkdir()
    golden.save_file(inputs, bare / "io.safetensors")
    (bare / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if "loss" not in k}))
    for name in ("transformer.safetensors", "lora.safetensors"):
        (bare / name).symlink_to(case / name)
    assert golden.main([str(bare), str(tmp_path / "out.safetensors")]) == 0
    found, want = load_file(tmp_path / "out.safetensors"), golden.run_case(case)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[key], want[key]) for key in want)
