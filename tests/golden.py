"""Run our code on a golden case: `python tests/golden.py CASE_DIR [OUT.safetensors]`.

With OUT, writes our tensors; the case's recorded outputs are not needed. Without, compares with them, prints the largest
absolute error per tensor and exits 1 above 1e-4 relative to the tensor's largest magnitude (at least 1e-3).
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.lora.adapter import reference_lora_parameters
from mosaic.lora.loading import load_reference_lora
from mosaic.method.correspondence import Points, batch_points
from mosaic.method.grids import Grid
from mosaic.method.losses import correspondence_loss, disentanglement_loss, flow_matching_loss, reference_distributions
from mosaic.method.tokens import position_ids, reference_position_ids, text_position_ids, unpack_latents
from mosaic.model.attention_rows import CaptureRequest
from mosaic.model.transformer import MosaicFluxTransformer2DModel, MosaicTransformerOutput
from mosaic.pipeline.pipeline import MosaicFluxPipeline

TOLERANCE = 1e-4


def load_transformer(case: Path, meta: dict) -> MosaicFluxTransformer2DModel:
    """The case's base weights with its reference LoRA, trainable."""
    transformer = MosaicFluxTransformer2DModel(**meta["config"])
    transformer.load_state_dict(load_file(case / "transformer.safetensors"))
    load_reference_lora(transformer, case / "lora.safetensors")
    for parameter in reference_lora_parameters(transformer).values():
        parameter.requires_grad_(True)
    return transformer


def forward(
    transformer: MosaicFluxTransformer2DModel, io: dict[str, Tensor], meta: dict, points: Points, blocks: str
) -> MosaicTransformerOutput:
    """One forward pass of a case with captured rows of `blocks`."""
    references = torch.stack([io[f"ref.{k}"] for k in range(meta["K"])], dim=1)
    return transformer(
        hidden_states=io["noisy"],
        encoder_hidden_states=io["prompt_embeds"],
        pooled_projections=io["pooled"],
        timestep=io["timestep"],
        guidance=torch.ones(len(io["noisy"])) if meta["config"].get("guidance_embeds") else None,
        img_ids=position_ids(Grid(*meta["target_grid"])),
        txt_ids=text_position_ids(io["prompt_embeds"].shape[1]),
        reference_hidden_states=references,
        reference_ids=reference_position_ids(Grid(*meta["ref_grid"]), meta["K"]),
        reference_attention="isolated" if meta.get("reference_kv_cache") else "target",
        capture=CaptureRequest(points.global_index, all_tokens=True, blocks=blocks),
    )


def run_forward_case(case: Path, meta: dict) -> dict[str, Tensor]:
    """Prediction, rows, both presets' losses and every LoRA gradient."""
    io = load_file(case / "io.safetensors")
    transformer = load_transformer(case, meta)
    lists = [torch.tensor([[int(u), v] for u, v in pairs.items()], dtype=torch.long).reshape(-1, 2) for pairs in meta["coords"]]
    points = batch_points([lists] * len(io["noisy"]), Grid(*meta["ref_grid"]).num_tokens, Grid(*meta["target_grid"]).num_tokens)
    with torch.no_grad():
        every = forward(transformer, io, meta, points, "all")
    double = forward(transformer, io, meta, points, "double")

    diffusion = flow_matching_loss(double.sample, io["noise"], io["latents"])
    release_correspondence = correspondence_loss(double.attention_rows, points, "point")
    kept = torch.ones(len(io["noisy"]), meta["K"], dtype=torch.bool)
    release_disentanglement = disentanglement_loss(double.reference_rows, kept, "jensen_shannon")
    (diffusion + 0.1 * release_correspondence + 1.0 * release_disentanglement).mean().backward()

    distributions = reference_distributions(every.attention_rows, points)
    outputs = {
        "pred": double.sample,
        "attn_rows": double.attention_rows,
        "attn_rows_all": every.attention_rows,
        "loss.diffusion": diffusion.mean(),
        "loss.release_correspondence": release_correspondence.mean(),
        "loss.release_disentanglement": release_disentanglement.mean(),
        "loss.paper_correspondence": correspondence_loss(every.attention_rows, points, "reference"),
        "loss.paper_disentanglement": disentanglement_loss(distributions, points.reference_mask, "symmetric_kl"),
    }
    for key, parameter in reference_lora_parameters(transformer).items():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        outputs["grad." + key.removeprefix("transformer.")] = gradient
    return {key: value.detach().contiguous() for key, value in outputs.items()}


def run_sampling_case(case: Path, meta: dict) -> dict[str, Tensor]:
    """Final packed latents of the pipeline."""
    io = load_file(case / "io.safetensors")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(meta["scheduler"])
    transformer = load_transformer(case, meta)
    pipeline = MosaicFluxPipeline(
        scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer
    )
    pipeline.set_progress_bar_config(disable=True)
    grid, reference_grid = Grid(*meta["target_grid"]), Grid(*meta["ref_grid"])
    references = torch.stack([unpack_latents(io[f"ref.{k}"], reference_grid) for k in range(meta["K"])], dim=1)
    token = pipeline.encoders.vae_scale_factor * 2
    isolated = bool(meta.get("reference_kv_cache"))
    result = pipeline(
        prompt_embeds=io["prompt_embeds"],
        pooled_prompt_embeds=io["pooled"],
        reference_latents=list(references),
        latents=io["latents"],
        height=grid.rows * token,
        width=grid.columns * token,
        num_inference_steps=meta["steps"],
        guidance_scale=meta["guidance_scale"],
        reference_attention="isolated" if isolated else "target",
        reference_cache=isolated,
        output_type="latent",
    )
    return {"final": result.images.contiguous()}


def run_case(case: Path) -> dict[str, Tensor]:
    """All our tensors of a case."""
    meta = json.loads((case / "meta.json").read_text())
    return run_sampling_case(case, meta) if "steps" in meta else run_forward_case(case, meta)


def recorded_outputs(case: Path) -> dict[str, Tensor]:
    """The recorded outputs of a case, under our names."""
    meta, io = json.loads((case / "meta.json").read_text()), load_file(case / "io.safetensors")
    if "steps" in meta:
        return {"final": io["final"]}
    size = meta["ref_grid"][0] * meta["ref_grid"][1]
    index = torch.tensor([k * size + int(u) for k, pairs in enumerate(meta["coords"]) for u in pairs])
    recorded = {"pred": io["pred"], "attn_rows": io["attn_mean"][:, index], "attn_rows_all": io["attn_mean_all"][:, index]}
    recorded |= {key: value for key, value in io.items() if key.startswith("grad.")}
    names = {"diffusion": "diffusion", "align_mean_over_points": "release_correspondence", "sep_jsd_all_tokens": "release_disentanglement"}
    recorded |= {f"loss.{ours}": torch.tensor(meta["losses"][theirs]) for theirs, ours in names.items() if theirs in meta["losses"]}
    for key, name in (("sca", "correspondence"), ("md", "disentanglement")):
        recorded[f"loss.paper_{name}"] = torch.tensor([sample[key] for sample in meta["paper_losses_per_sample"]])
    return recorded


def compare(outputs: dict[str, Tensor], recorded: dict[str, Tensor]) -> bool:
    """Print the largest absolute error per tensor; True if all are within tolerance."""
    good = True
    for key, want in sorted(recorded.items()):
        error = (outputs[key].float() - want.float()).abs().max().item()
        limit = TOLERANCE * max(want.abs().max().item(), 1e-3)
        good &= error <= limit
        print(f"{'ok  ' if error <= limit else 'FAIL'} {key:70s} error {error:.2e}  limit {limit:.2e}")
    return good


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    if len(argv) not in (1, 2):
        print(__doc__)
        return 2
    case = Path(argv[0])
    outputs = run_case(case)
    if len(argv) == 2:
        save_file(outputs, argv[1])
        return 0
    return 0 if compare(outputs, recorded_outputs(case)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
