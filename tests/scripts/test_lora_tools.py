"""scripts/lora_tools.py: ranks lowered and reported, other key styles, what is in a file, and hostile files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mosaic.lora.adapter import reference_module_names, write_reference_lora
from mosaic.lora.files import LoraFile
from mosaic.lora.formats import to_diffusers
from mosaic.lora.resize import rank_for_energy, reduce_module, singular_values
from mosaic.weights.digests import weights_digest
from scripts import lora_tools
from scripts.loras.command import describe, show_info
from tests.lora.foreign import in_style

WIDTH = 8
SHAPES = {"x_embedder": (5, 8), "transformer_blocks.0.attn.to_q": (8, 8), "transformer_blocks.0.ff.net.2": (32, 8)}  # in, out


def lora(
    rank: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, int]] = SHAPES
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (fan_in, fan_out) in shapes.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, fan_in, generator=generator).to(dtype)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(fan_out, rank, generator=generator).to(dtype)
    return tensors


def reference_lora(rank: int = 2) -> dict[str, Tensor]:
    """A reference LoRA of one block of each kind, width 8."""
    wide = {"norm1.linear": 48, "norm.linear": 24, "proj_mlp": 32}
    shapes = {}
    for name in reference_module_names(1, 1):
        fan_in = {"ff.net.2": 32, "proj_out": 40, "x_embedder": 5}.get(
            next((e for e in ("ff.net.2", "proj_out") if name.endswith(e)), name), WIDTH
        )
        shapes[name] = fan_in, next((rows for end, rows in wide.items() if name.endswith(end)), WIDTH)
    return lora(rank, shapes=shapes)


def product(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors[f"transformer.{name}.lora_B.weight"].double() @ tensors[f"transformer.{name}.lora_A.weight"].double()


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def report_of(path: Path) -> dict[str, Any]:
    return json.loads(metadata(path)["mosaic_reduction"])


# ---- reduce: the numbers


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_nearest_of_a_rank_and_its_error(style: str, rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the singular value decomposition of the whole product (Eckart and Young)."""
    tensors = lora()
    source = write(tmp_path / "in.safetensors", in_style(tensors, style))
    out = tmp_path / "deep" / "out.safetensors"
    assert lora_tools.main(["reduce", str(source), "--rank", str(rank), "--output", str(out)]) == 0
    found, report = to_diffusers(LoraFile(out)), report_of(out)
    names = {"diffusers": list(SHAPES), "kohya": ["img_in", "double_blocks_0_img_attn_qkv", "double_blocks_0_img_mlp_2"]}[style]
    lost = whole = 0.0
    for name, reported in zip(SHAPES, names, strict=True):
        u, values, v = torch.linalg.svd(product(tensors, name), full_matrices=False)
        torch.testing.assert_close(product(found, name), u[:, :rank] * values[:rank] @ v[:rank], rtol=1e-5, atol=1e-5)
        squares = values.square()
        entry = report["modules"][reported]
        assert entry["kept"] == pytest.approx(float(squares[:rank].sum() / squares.sum()))
        assert entry["relative_error"] == pytest.approx(float((squares[rank:].sum() / squares.sum()).sqrt()), rel=1e-4)
        assert (entry["rank_before"], entry["rank"]) == (4, rank)
        lost, whole = lost + float(squares[rank:].sum()), whole + float(squares.sum())
    assert report["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert report["kept"] == pytest.approx(1 - lost / whole)
    assert report["source"] == {"name": "in.safetensors", "digest": weights_digest(source)}
    printed = capsys.readouterr().out.splitlines()
    worst = max(report["modules"], key=lambda name: report["modules"][name]["relative_error"])
    assert printed[0].split() == ["module", "rank", "kept", "relative", "error"]
    assert printed[1].startswith(worst)
    assert f"{report['relative_error']:.3e}" in printed[-2]
    assert [path.name for path in out.parent.iterdir()] == ["out.safetensors"]


def test_the_error_is_measured_on_what_is_stored() -> None:
    """In bfloat16 the factors are rounded: the error is more than the missing singular values alone."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((6, 9), (7, 6)))
    new_a, new_b, found = reduce_module(a, b, 0.5, 4)
    whole = 0.5 * b.double() @ a.double()
    assert (new_a.dtype, new_b.dtype) == (torch.bfloat16, torch.bfloat16)
    assert found.norm == pytest.approx(float(whole.norm()))
    assert found.error == pytest.approx(float((new_b.double() @ new_a.double() - whole).norm()), rel=1e-6)
    squares = torch.linalg.svdvals(whole).square()
    assert found.error > float(squares[4:].sum().sqrt())
    assert found.energy == pytest.approx(float(squares[:4].sum() / squares.sum()))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7), st.integers(1, 6), st.integers(0, 1000))
def test_reducing_any_shape(rank: int, fan_in: int, fan_out: int, wanted: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, fan_in, generator=generator), torch.randn(fan_out, rank, generator=generator)
    new_a, new_b, found = reduce_module(a, b, 2.0, wanted)
    whole = 2 * b.double() @ a.double()
    values = torch.linalg.svdvals(whole)
    few = singular_values(a.double(), 2 * b.double())  # as many as the smallest of the three sizes
    torch.testing.assert_close(torch.cat([few, few.new_zeros(len(values) - len(few))]), values, rtol=1e-7, atol=1e-12)
    best = float(values[wanted:].square().sum().sqrt())
    difference = float((new_b.double() @ new_a.double() - whole).norm())
    assert difference == pytest.approx(best, rel=1e-4, abs=1e-5)
    assert found.error == pytest.approx(difference, rel=1e-6, abs=1e-9)
    assert len(new_a) == new_b.shape[1] == found.rank <= max(wanted, 1)


def test_a_module_of_zeros_loses_nothing() -> None:
    new_a, new_b, found = reduce_module(torch.randn(3, 5), torch.zeros(4, 3), 1.0, 2)
    assert not new_b.any()
    assert bool(new_a.isfinite().all())
    assert (found.relative_error, found.energy) == (0, 1)


def test_the_rank_for_an_energy_by_hand() -> None:
    """Squares by rank: 16 + 9, 4 + 0, 1: 25, 29 and 30 of 30."""
    spectra = [torch.tensor([4.0, 2.0, 1.0]).double(), torch.tensor([3.0, 0.0]).double()]
    assert [rank_for_energy(spectra, share) for share in (0.1, 25 / 30, 0.84, 29 / 30, 0.97, 1.0)] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_an_energy_takes_the_lowest_rank_that_keeps_it(energy: float, tmp_path: Path) -> None:
    source = write(tmp_path / "in.safetensors", lora())
    assert lora_tools.main(["reduce", str(source), "--energy", str(energy), "--output", str(tmp_path / "out.safetensors")]) == 0
    report = report_of(tmp_path / "out.safetensors")
    (rank,) = {module["rank"] for module in report["modules"].values()}
    assert report["kept"] >= energy
    assert lora_tools.main(["reduce", str(source), "--rank", str(rank - 1), "--output", str(tmp_path / "less.safetensors")]) == (
        0 if rank > 1 else 2
    )
    assert rank == 1 or report_of(tmp_path / "less.safetensors")["kept"] < energy


def test_modules_of_lower_rank_stay_and_alphas_are_taken_up(tmp_path: Path) -> None:
    low = {
        f"transformer.context_embedder.lora_{side}.weight": value for side, value in (("A", torch.randn(1, 6)), ("B", torch.randn(8, 1)))
    }
    tensors = in_style(lora() | low, "kohya")
    tensors |= {key: value * 0.5 for key, value in tensors.items() if key.endswith("alpha")}
    source = write(tmp_path / "in.safetensors", tensors, {"ss_tag": "x", "sshs_model_hash": "y"})
    assert lora_tools.main(["reduce", str(source), "--rank", "2", "--output", str(tmp_path / "out.safetensors")]) == 0
    before, after = to_diffusers(LoraFile(source)), to_diffusers(LoraFile(tmp_path / "out.safetensors"))
    torch.testing.assert_close(product(after, "context_embedder"), product(before, "context_embedder"))
    raw = load_file(tmp_path / "out.safetensors")
    assert raw.keys() == tensors.keys()
    assert {key.split(".")[0]: value.item() for key, value in raw.items() if key.endswith("alpha")} == {
        "lora_unet_txt_in": 1,
        "lora_unet_img_in": 2,
        "lora_unet_double_blocks_0_img_attn_qkv": 2,
        "lora_unet_double_blocks_0_img_mlp_2": 2,
    }
    assert report_of(tmp_path / "out.safetensors")["modules"]["txt_in"]["relative_error"] < 1e-6
    assert metadata(tmp_path / "out.safetensors").keys() == {"format", "ss_tag", "mosaic_reduction"}


def test_a_reduced_reference_lora_is_one(tmp_path: Path) -> None:
    source = write_reference_lora(reference_lora(3), tmp_path / "in.safetensors", {"lora": {"rank": 3}})
    assert lora_tools.main(["reduce", str(source), "--rank", "2", "--output", str(tmp_path / "out.safetensors")]) == 0
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == reference_lora().keys()
    assert {len(value) for key, value in found.items() if "lora_A" in key} == {2}
    assert metadata(tmp_path / "out.safetensors")["mosaic"] == metadata(source)["mosaic"]


# ---- import


@pytest.mark.parametrize("style", ["kohya", "comfyui", "fal", "diffusers"])
@pytest.mark.parametrize("marked", [True, False])
def test_a_reference_lora_of_another_style_is_brought_back(style: str, marked: bool, tmp_path: Path) -> None:
    tensors, out = reference_lora(), tmp_path / "out.safetensors"
    mark = {"mosaic": json.dumps({"adapter": "reference", "config": {"a": 1}})} if marked else {}
    source = write(tmp_path / "in.safetensors", in_style(tensors, style), mark | {"author": "x", "sshs_model_hash": "y"})
    assert describe(LoraFile(source))["kind"] == "reference LoRA"
    assert lora_tools.main(["import", str(source), "--output", str(out)]) == 0
    found = load_file(out)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
    assert metadata(out) == {"format": "pt", "author": "x"} | mark


def test_nothing_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lora_tools.main(["export", "in.safetensors", "--format", "kohya", "--output", "out.safetensors"])
    assert "invalid choice: 'export'" in capsys.readouterr().err


def test_text_encoders_are_left_out_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = in_style(lora(), "kohya") | {"lora_te1_text_model_x.lora_down.weight": torch.ones(1, 1)}
    source = write(tmp_path / "in.safetensors", tensors)
    out = tmp_path / "out.safetensors"
    assert lora_tools.main(["import", str(source), "--output", str(out)]) == 2
    assert "import --transformer-only" in capsys.readouterr().err
    assert not out.exists()
    assert lora_tools.main(["import", str(source), "--transformer-only", "--output", str(out)]) == 0
    assert "left out 1 tensors of text encoders: lora_te1_text_model_x.lora_down.weight" in capsys.readouterr().err
    assert not [key for key in load_file(out) if not key.startswith("transformer.")]
    assert load_file(out).keys() >= lora().keys()


# ---- info


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_reference_lora(reference_lora(), tmp_path / "in.safetensors", {"lora": {"rank": 2}})
    assert lora_tools.main(["info", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = [tensor.numel() for tensor in reference_lora().values()]
    assert found == {
        "file": "in.safetensors",
        "digest": weights_digest(source),
        "bytes": source.stat().st_size,
        "kind": "reference LoRA",
        "styles": ["diffusers"],
        "modules": 13,
        "ranks": {"2": 13},
        "dtypes": {"F32": 26},
        "parameters": sum(sizes),
        "with_alpha": 0,
        "scales": {"1": 13},
        "all_zero": False,
        "text_encoder_tensors": 0,
        "config": {"lora": {"rank": 2}},
        "reduction": None,
        "metadata": {},
    }
    assert lora_tools.main(["info", str(source)]) == 0
    assert f"parameters:    {sum(sizes):,}\n" in capsys.readouterr().out


def test_info_of_another_style(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = lora(2, shapes={"context_embedder": (6, 8)})
    tensors = in_style(lora() | other, "kohya") | {"lora_te1_a.lora_up.weight": torch.ones(1)}
    source = write(tmp_path / "in.safetensors", tensors, {"author": "\x1b[31mred\nline", "mosaic_reduction": "["})
    found = describe(LoraFile(source))
    assert (found["kind"], found["styles"], found["ranks"], found["with_alpha"]) == ("style LoRA", ["kohya"], {4: 3, 2: 1}, 4)
    assert (found["text_encoder_tensors"], found["reduction"]) == (1, None)
    show_info(found)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert len(printed.splitlines()) == 13


# ---- what is refused


@pytest.mark.parametrize("command", [["info"], ["reduce", "--rank", "2"], ["import"]])
@pytest.mark.parametrize("damage", ["missing", "empty", "pickle", "cut", "header", "other", "key", "mosaic"])
def test_hostile_files_end_in_one_line(damage: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    write(path, lora(), {"mosaic": "[1]"} if damage == "mosaic" else None)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "pickle":
        torch.save({"x": torch.ones(1)}, path)
    elif damage in ("empty", "cut", "header"):
        path.write_bytes({"empty": b"", "cut": whole[:-10], "header": (2**62).to_bytes(8, "little") + whole[8:]}[damage])
    elif damage == "other":
        write(path, {"conv.weight": torch.ones(2)})
    elif damage == "key":
        write(path, lora() | {"evil\x1b[31m\nkey" + "x" * 10_000: torch.ones(1)})
    code = lora_tools.main([command[0], str(path), *command[1:], *([] if command == ["info"] else ["--output", str(out)])])
    if damage == "mosaic" and command[0] == "reduce":
        assert code == 0  # what it does not use is carried along
        return
    captured = capsys.readouterr()
    assert code == 2
    (line,) = [line for line in captured.err.splitlines() if "module" not in line or "error" in line]
    assert line.startswith("error: ")
    assert "in.safetensors" in line
    assert "\x1b" not in line
    assert len(line) < 2000
    assert not out.exists()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reduce", "--rank", "4"], "must be at least 1 and less than the file's, 4, got 4. Nothing to reduce"),
        (["reduce", "--rank", "0"], "must be at least 1"),
        (["reduce", "--energy", "0"], "the energy must be more than 0 and at most 1, got 0"),
        (["reduce", "--energy", "nan"], "the energy must be more than 0 and at most 1, got nan"),
    ],
)
def test_settings_that_make_no_sense(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.safetensors", lora())
    assert lora_tools.main([arguments[0], str(source), *arguments[1:], "--output", str(tmp_path / "out.safetensors")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_outputs_are_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in.safetensors", lora()), tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    (tmp_path / "folder.safetensors").mkdir()
    for target, message in (
        (out, "is there already. Give another --output, or --overwrite"),
        (source, "must be another file than"),
        (tmp_path / "out.bin", "must end in .safetensors"),
        (tmp_path / "folder.safetensors", "is a folder"),
    ):
        assert lora_tools.main(["import", str(source), "--output", str(target)]) == 2
        assert message in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    assert lora_tools.main(["import", str(source), "--overwrite", "--output", str(source)]) == 2
    assert lora_tools.main(["import", str(source), "--overwrite", "--output", str(out)]) == 0
    assert load_file(out).keys() == lora().keys()
