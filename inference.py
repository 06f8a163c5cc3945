"""Render a cases file: `python inference.py` draws example_cases.json with the shipped pocket weights, from any current directory.

FLUX.1-dev: `python inference.py --config configs/flux_dev.json`. Per case: the picture, a panel references | result (all of them in
overview.png), and with --save-attention the attention maps with lines from reference points to their peaks.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from mosaic.cases import Case, load_cases
from mosaic.config import Config, load_config

ROOT = Path(__file__).resolve().parent
DEFAULT_CONFIG = ROOT / "configs" / "pocket.json"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; every flag but --config and --set stands for one setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="JSON file; its paths start at the current directory (default: this repository's pocket.json)")
    parser.add_argument("--model", help="model.pretrained: a diffusers FLUX folder or hub id")
    parser.add_argument("--lora", help="inference.lora: a .safetensors file, a folder or a hub id")
    parser.add_argument("--cases", help="inference.cases: the cases file")
    parser.add_argument("--output-dir", help="inference.output_dir: where pictures go")
    parser.add_argument("--seed", type=int, help="inference.seed")
    parser.add_argument("--steps", type=int, help="inference.num_inference_steps")
    parser.add_argument("--save-attention", action="store_true", help="also write attention maps")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one setting; may be repeated")
    return parser.parse_args(argv)


def pocket_inputs() -> list[str]:
    """The inputs of the default config as `--set` overrides that find them in this repository from any current directory."""
    config = load_config(DEFAULT_CONFIG)
    model, settings = config.model.pretrained, config.inference
    inputs = {"model.pretrained": model, "inference.lora": settings.lora, "inference.cases": settings.cases}
    return [f"{key}={json.dumps(os.path.relpath(ROOT / value))}" for key, value in inputs.items()]


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The flags as `--set` overrides; flags win over --set."""
    settings = {
        "model.pretrained": arguments.model,
        "inference.lora": arguments.lora,
        "inference.cases": arguments.cases,
        "inference.output_dir": arguments.output_dir,
        "inference.seed": arguments.seed,
        "inference.num_inference_steps": arguments.steps,
        "inference.save_attention": arguments.save_attention or None,
    }
    return arguments.set + [f"{key}={json.dumps(value)}" for key, value in settings.items() if value is not None]


def render(config: Config, cases: list[Case]) -> list[Path]:
    """Render all cases; returns the paths of the pictures."""
    import torch
    from tqdm.auto import tqdm

    from mosaic.figures import attention_panel, case_panel, contact_sheet, save_picture
    from mosaic.hub import resolve_lora_file
    from mosaic.images import load_image, prepare_reference
    from mosaic.pipeline import MosaicFluxPipeline
    from mosaic.tokens import token_grid

    settings, folder = config.inference, Path(config.inference.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"inference.output_dir: must be a folder, but {folder} is a file.")
    lora_file = settings.lora and resolve_lora_file(settings.lora, settings.lora_weight_name)  # before the base, which loads for long
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.model.dtype]
    pipeline = MosaicFluxPipeline.from_pretrained(config.model.pretrained, dtype=dtype)
    grid = token_grid(settings.height, settings.width, pipeline.vae_scale_factor, where="inference.height, inference.width")
    size = config.data.reference_size
    reference_grid = token_grid(size, size, pipeline.vae_scale_factor, where="data.reference_size")
    if lora_file is not None:
        pipeline.load_reference_lora(lora_file)
    if torch.cuda.is_available() and settings.cpu_offload:
        pipeline.enable_model_cpu_offload()
    elif torch.cuda.is_available():
        pipeline.to("cuda")
    pipeline.set_progress_bar_config(leave=False)
    written, panels = [], []
    for case in tqdm(cases, desc="cases", unit="case"):
        references = [load_image(path) for path in case.image_paths]
        result = pipeline(
            case.prompt,
            references if lora_file is not None else None,
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            image_guidance_scale=settings.image_guidance_scale,
            generator=torch.Generator().manual_seed(settings.seed + case.index),
            reference_size=size,
            reference_scale=settings.reference_scale,
            reference_attention=config.model.reference_attention,
            max_sequence_length=config.model.text_length,
            output_attention=settings.save_attention,
        )
        picture = result.images[0]
        written.append(save_picture(picture, folder / f"case_{case.index:03d}.png"))
        panels.append(case_panel(references, picture, case.prompt))
        save_picture(panels[-1], folder / f"case_{case.index:03d}_panel.png")
        if result.attention is not None and result.attention[0] is not None:
            prepared = [prepare_reference(reference, size, settings.reference_scale) for reference in references]
            maps = attention_panel(prepared, picture, result.attention[0], reference_grid, grid)
            save_picture(maps, folder / f"case_{case.index:03d}_attention.png")
    save_picture(contact_sheet(panels), folder / "overview.png")
    return written


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = parse_arguments(argv)
    try:
        defaults = [] if arguments.config else pocket_inputs()
        config = load_config(arguments.config or DEFAULT_CONFIG, defaults + overrides(arguments))
        cases = load_cases(config.inference.cases, config.data.reference_size, config.inference.reference_scale)
        written = render(config, cases)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(written)} pictures in {config.inference.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
