"""Benchmarks of multi-subject generation, from their authors' data to a table.

    python scripts/bench.py list
    python scripts/bench.py prepare dreambench --data dreambooth/dataset --output outputs/dreambench
    accelerate launch scripts/bench.py render outputs/dreambench --output outputs/dreambench/run --config configs/flux_dev.json
    accelerate launch scripts/bench.py score dreambench --prepared outputs/dreambench --run outputs/dreambench/run --output outputs/scores
    python scripts/bench.py score dreambench --pictures pictures.jsonl --output outputs/theirs
    python scripts/bench.py table Ours=outputs/scores Theirs=outputs/theirs --output outputs/table
    python scripts/bench.py pocket --output outputs/pocket_bench

`render` is inference.py with the prepared cases: further flags go to it. `score` takes a run of it, or anyone's pictures by a JSON Lines
file. Rendering and scoring go on where they stopped when they are started again. docs/benchmarks.md says how to get the data.
"""

import argparse
import os
from pathlib import Path

from mosaic.commands import GOES_ON, command

JUDGE = "Qwen/Qwen3-VL-8B-Instruct"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | prepare | render | score | table | pocket")
    commands.add_parser("list", help="the benchmarks, how their pictures are made and what is measured")
    prepare = commands.add_parser("prepare", help="write a cases file for rendering, from the authors' data")
    prepare.add_argument("name", help="a benchmark of `list`")
    prepare.add_argument("--data", type=Path, required=True, help="folder of the data as their authors ship them")
    prepare.add_argument("--list", type=Path, help="a list in UNO's or XVerse's form instead of the data's own")
    prepare.add_argument("--output", type=Path, required=True, help="folder for the cases")
    for name, what in (("runs", "pictures per case"), ("size", "sides of the pictures in px"), ("seed", "seed of a case's first picture")):
        prepare.add_argument(f"--{name}", type=int, help=f"{what} (default: the protocol's)")
    render = commands.add_parser("render", help="inference.py with the prepared cases; further flags go to it")
    render.add_argument("prepared", type=Path, help="folder that `prepare` wrote")
    render.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    score = commands.add_parser("score", help="measure pictures")
    score.add_argument("name", help="a benchmark of `list`")
    source = score.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a finished run of the prepared cases; needs --prepared")
    source.add_argument("--pictures", type=Path, help="JSON Lines file on anyone's pictures; its paths start at its folder")
    source.add_argument("--grids", type=Path, help="folder of XVerse's files {index}_....png, four pictures each; needs --prepared")
    score.add_argument("--prepared", type=Path, help="folder that `prepare` wrote")
    score.add_argument("--output", type=Path, required=True, help="folder for records.jsonl and scores.json")
    score.add_argument("--metrics", nargs="+", help="measure these only (default: the benchmark's)")
    models = score.add_argument_group("models", "each a folder or a hub id, but for files; what no metric needs is not loaded")
    models.add_argument("--clip", default="openai/clip-vit-base-patch32", help="clip_i, clip_t: a CLIP")
    models.add_argument("--dino", default="facebook/dino-vits16", help="dino, ip_sim: a DINO of the first version (ViT)")
    models.add_argument("--vqa", default="Salesforce/blip-vqa-capfilt-large", help="dpg: a BLIP or ViLT, or a model of pictures and texts")
    models.add_argument("--arcface", type=Path, help="id_sim: the file model_ir_se50.pth; the package pyfacer finds faces")
    models.add_argument(
        "--detector", default="florence-community/Florence-2-large", help="ip_sim, --collapse: a Florence-2 or Grounding DINO"
    )
    models.add_argument("--segmenter", default="facebook/sam2.1-hiera-large", help="ip_sim, --collapse: a SAM 2")
    models.add_argument("--dinov2", help="measure ip_sim by this DINOv2, too, such as facebook/dinov2-base")
    models.add_argument("--siglip", default="google/siglip-so400m-patch14-384", help="aes: the SigLIP below the head")
    models.add_argument("--aesthetic", type=Path, help="aes: the file of the head, aesthetic_predictor_v2_5.pth")
    models.add_argument("--collapse", action="store_true", help="also say which subjects are lost, doubled or of another's looks (DINOv2)")
    models.add_argument("--judge", nargs="?", const=JUDGE, help=f"also ask a model of pictures and texts (without a name: {JUDGE})")
    models.add_argument("--judge-url", help="endpoint with OpenAI's protocol where the judge is; a key in the environment's JUDGE_API_KEY")
    score.add_argument("--device", help="such as cuda:0 or cpu (default: what there is)")
    score.add_argument("--partial", action="store_true", help="score what is sound where something is wrong; the scores then say so")
    table = commands.add_parser("table", help="our scores beside published ones: table.md, and table.html with the worst and best pictures")
    table.add_argument("scores", nargs="+", help="folder of a scoring, or NAME=FOLDER")
    table.add_argument("--output", type=Path, required=True, help="folder for both files")
    table.add_argument("--ours-alone", action="store_true", help="without published rows")
    pocket = commands.add_parser("pocket", help="all of it on the pocket world, with what is in this repository")
    pocket.add_argument("--output", type=Path, required=True, help="folder for data, pictures, scores and the page")
    pocket.add_argument("--lora", help="another adapter of the pocket base than the shipped one: a .safetensors file")
    pocket.add_argument("--size", choices=("tiny", "full"), default="full", help="tiny: a few cases at one step, a trial")
    pocket.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="that render and score (default: two)")
    arguments, further = parser.parse_known_args(argv)
    if further and arguments.command != "render":
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    arguments.further = further
    return arguments


@command(GOES_ON)
def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = parse_arguments(argv)
    if arguments.command == "render":
        from inference import main as inference  # which frames itself

        return inference(["--cases", str(arguments.prepared / "cases.json"), "--output-dir", str(arguments.output), *arguments.further])
    if arguments.command == "pocket":
        from scripts.bench.pocket import run as run_pocket

        run_pocket(arguments, main)
        return 0
    if arguments.command == "score":
        from scripts.bench.scoring import run
    elif arguments.command == "table":
        from scripts.bench.tabulating import run
    else:
        from scripts.bench.preparing import run
    run(arguments)
    return 0
