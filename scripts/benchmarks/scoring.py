"""How fast pictures are scored and how much memory that holds: the command `scoring` of scripts/benchmark.py.

DreamBench's metrics by tiny random encoders, so that what is measured is everything around the encoders: reading, decoding, preparing,
records. Each number of pictures has a process of its own, whose peak memory shows whether it grows with them.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mosaic.files import write_text

SUBJECTS, REFERENCES, RUNS = 30, 5, 6
NUM_STORED = 60  # different pictures on disk, to which the lines of many point


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure, print a table, return the result."""
    if args.folder is not None:
        print(json.dumps(measure(args.folder, args.pictures[0])))
        return None
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), args.size)
        for count in args.pictures:
            command = [
                sys.executable,
                str(Path(__file__).parents[1] / "benchmark.py"),
                "scoring",
                "--pictures",
                str(count),
                "--folder",
                folder,
            ]
            rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
    print("| pictures | CPU ms per picture | of that looking at them first | peak MiB | reference pictures encoded |")
    print("|---:|---:|---:|---:|---:|")
    for row in rows:
        print("| {pictures} | {ms:.1f} | {ms_looking:.1f} | {mib:.0f} | {references} |".format(**row))
    result = {"size": args.size, "rows": rows}
    if args.output:
        write_text(args.output, json.dumps(result, indent=2) + "\n")
    return result


def write_pictures(folder: Path, size: int) -> None:
    """Subjects with references, and generated pictures, as smooth PNGs."""
    for subject in range(SUBJECTS):
        (folder / "subjects" / str(subject)).mkdir(parents=True)
        for number in range(REFERENCES):
            _photo([subject, number], size).save(folder / "subjects" / str(subject) / f"{number}.png")
    for number in range(NUM_STORED):
        _photo([number], size).save(folder / f"{number}.png")


def measure(folder: Path, count: int) -> dict[str, Any]:
    """Score so many pictures in this process."""
    from accelerate import PartialState

    from mosaic.evaluation import dreambench
    from mosaic.evaluation.entries import read_lines
    from mosaic.evaluation.measures import ClipSimilarity, ReferenceSimilarity
    from mosaic.evaluation.scoring import score, sound_entries

    lines = []
    for number in range(count):
        case, subject = number // RUNS, number // RUNS % SUBJECTS
        line = {
            "picture": f"{number % NUM_STORED}.png",
            "prompt": f"prompt {case}",
            "run": number % RUNS,
            "subjects": [f"subjects/{subject}"],
        }
        lines.append(json.dumps(line))
    path = folder / f"{count}.jsonl"
    write_text(path, "\n".join(lines))
    listed = read_lines(path, lambda value, place: dreambench.read_entry(value, place, folder))
    clip, dino = tiny_encoders(folder)
    similarity, start = ReferenceSimilarity("dino", dino), time.process_time()
    sound = sound_entries(listed, partial=False, shown=False)
    looked = time.process_time()
    score(sound.entries, [ClipSimilarity(clip), similarity], folder / f"scores_{count}", PartialState(cpu=True))
    scored = time.process_time()
    return {
        "pictures": count,
        "ms": 1000 * (scored - start) / count,
        "ms_looking": 1000 * (looked - start) / count,
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "references": similarity.num_encoded,
    }


def tiny_encoders(folder: Path) -> tuple[Any, Any]:
    """A random CLIP and a random ViT of DreamBench's picture sizes."""
    import torch
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    from mosaic.evaluation.encoders import ClipEncoder, DinoEncoder
    from scripts.pocket.tokenizers import build_clip_tokenizer

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = build_clip_tokenizer(["prompt"], 77)
    text = shape | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=shape | {"image_size": 224, "patch_size": 32}, projection_dim=16))
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    ViTModel(ViTConfig(**shape, image_size=224, patch_size=32), add_pooling_layer=False).save_pretrained(folder / "dino")
    return ClipEncoder(str(folder / "clip")), DinoEncoder(str(folder / "dino"))


def _photo(seed: list[int], size: int) -> Image.Image:
    """A smooth picture."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)
