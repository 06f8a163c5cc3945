"""Training of the pocket Kontext by flow matching: pictures drawn and encoded once, a LoRA of the frozen base, measures on others."""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from PIL import Image
from safetensors import safe_open
from scipy.ndimage import binary_fill_holes
from torch import Tensor
from tqdm import tqdm

from mosaic.files import replacing, save_tensors, write_text
from mosaic.locks import FolderLock
from mosaic.weights.digests import weights_digest
from mosaic.weights.numbers import without_tiny_numbers
from scripts.ablation.plan import WORLD_DIGEST, base_digest
from scripts.pocket import kontext, runs, world
from scripts.pocket.base_data import Layout, decode_tokens, encode_pictures
from scripts.pocket.evaluation import MIN_VISIBLE, candidate_lists, held_out_scenes, judged_tensors, proportion
from scripts.pocket.judge import ATTRIBUTES, load_judge
from scripts.pocket.model import SCENE_PIXELS
from scripts.pocket.provenance import ROOT, commit, hardware, versions
from scripts.pocket.sampling import fast_attention
from scripts.pocket.train_base import draw_noise
from scripts.pocket.train_encoders import IDENTITIES

FIRST_SEED = 400_000_000  # scenes of the training; far from the seeds of data sets and of the evaluation
BASE = ROOT / "assets" / "pocket" / "flux"
RECORD = "kontext.json"
DECODED_SHARE = 0.7  # of the scenes that go through the VAE first, as generated pictures have
NEAR_WHITE = 235  # of 255, from which a pixel is background
SAME_OUTLINE = 0.85  # IoU of what is not white with the reference's, from which a pose is called the canonical one
_LAYOUT = Layout("reference", 1, scene=False, count=0, weight=0.0)  # a panel by itself
_SHARD = 250  # scenes
_CHECKPOINT_EVERY = 100  # steps
_FREE = ("output", "threads", "test_scenes", "test_steps")  # flags that may change when the command goes on
_INDEX = {identity: number for number, identity in enumerate(IDENTITIES)}


def draw_shard(file: Path, start: int, count: int, vae: AutoencoderKL) -> None:
    """Draw scenes of the training split, cut their subjects out and encode these: tokens float16 `[n, tokens, channels]` and who it is."""
    rng = np.random.default_rng([FIRST_SEED, start])
    cut_outs, shown = [], []
    scenes = [world.sample_scene(FIRST_SEED + i, "train", 1 + i % world.MAX_SUBJECTS) for i in range(start, start + count)]
    drawn = [world.render_scene(scene, SCENE_PIXELS) for scene in scenes]
    pixels = np.stack([np.asarray(one.image) for one in drawn])
    decoded = np.concatenate([decode_tokens(vae, encode_pictures(vae, part)) for part in np.array_split(pixels, max(1, count // 25))])
    for scene, one, copy in zip(scenes, drawn, decoded, strict=True):
        for k, placement in enumerate(scene.placements):
            picture = Image.fromarray(copy) if rng.random() < DECODED_SHARE else one.image
            cut_outs.append(np.asarray(kontext.posed_cut_out(picture, one.masks[k] > 0, rng)))
            shown.append(_INDEX[placement.identity])
    tokens = torch.cat([encode_pictures(vae, part) for part in np.array_split(np.stack(cut_outs), max(1, len(cut_outs) // 50))])
    with replacing(file) as aside:
        save_tensors({"tokens": tokens, "identities": torch.tensor(shown)}, aside)


def draw_references(file: Path, vae: AutoencoderKL) -> None:
    """Encode the references of all identities of the training split: tokens float16 `[identities, tokens, channels]`."""
    pictures = np.stack([np.asarray(world.render_reference(identity, kontext.PIXELS)) for identity in IDENTITIES])
    with replacing(file) as aside:
        save_tensors({"tokens": torch.cat([encode_pictures(vae, part) for part in np.array_split(pictures, 20)])}, aside)


def prepare(folder: Path, num_scenes: int, vae: AutoencoderKL) -> tuple[Tensor, Tensor, Tensor]:
    """Draw what is not yet there, and read all.

    Returns:
        Tokens of cut-outs float16 `[n, tokens, channels]`, their identities int64 `[n]`, tokens of the references by identity.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "references.safetensors").exists():
        draw_references(folder / "references.safetensors", vae)
    tokens, shown = [], []
    for start in tqdm(range(0, num_scenes, _SHARD), desc="drawing", unit="shard", mininterval=5.0):
        file = folder / f"cutouts_{start:06d}.safetensors"
        if not file.exists():
            draw_shard(file, start, min(_SHARD, num_scenes - start), vae)
        with safe_open(file, framework="pt") as content:
            tokens.append(content.get_tensor("tokens"))
            shown.append(content.get_tensor("identities"))
    with safe_open(folder / "references.safetensors", framework="pt") as content:
        return torch.cat(tokens), torch.cat(shown), content.get_tensor("tokens")


def train(arguments: argparse.Namespace, pipeline: FluxKontextPipeline, folder: Path) -> float:
    """Train the LoRA, or go on; the transformer ends with its averaged weights. Returns the seconds that it took."""
    cut_outs, shown, references = prepare(folder / "tokens", arguments.num_scenes, pipeline.vae)
    texts = kontext.embed_instructions(pipeline.components, world.CLASSES)
    classes = torch.tensor([world.CLASSES.index(identity.class_name) for identity in IDENTITIES])
    torch.manual_seed(arguments.seed)
    parameters = kontext.add_lora(pipeline.transformer, arguments.rank)
    lora = torch.nn.ParameterDict({name.replace(".", "/"): parameter for name, parameter in parameters.items()})
    optimizer = torch.optim.AdamW(parameters.values(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    average, clock = runs.MovingAverage(parameters, 0.998), runs.Clock(arguments.steps, None)
    file = folder / "checkpoint.pt"
    runs.load_checkpoint(file, {"lora": lora}, optimizer, average, clock)
    bar = tqdm(initial=clock.step, total=arguments.steps, desc="kontext", unit="step", mininterval=5.0)
    losses: list[float] = []
    while clock.step < arguments.steps:
        optimizer.param_groups[0]["lr"] = arguments.lr * runs.learning_rate(clock.step, clock.progress(), 100, 0.2)
        generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + clock.step)
        chosen = torch.randint(len(cut_outs), (arguments.batch_size,), generator=generator)
        clean, given = references[shown[chosen]].float(), cut_outs[chosen].float()
        named = classes[shown[chosen]]
        noisy = draw_noise(_LAYOUT, clean, (named, named), generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = kontext.predict_velocity(pipeline.transformer, noisy.tokens, given, noisy.time, (texts[0][named], texts[1][named]))
        loss = (velocity - noisy.velocity).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        average.update(parameters)
        clock.step += 1
        losses.append(loss.item())
        bar.update()
        if clock.step % 50 == 0 or clock.step == arguments.steps:
            bar.set_postfix(loss=f"{np.mean(losses):.4f}")
            runs.append_log(folder / "log.jsonl", step=clock.step, loss=float(np.mean(losses)), seconds=clock.elapsed())
            losses = []
        if clock.step % _CHECKPOINT_EVERY == 0 or clock.step == arguments.steps:
            runs.save_checkpoint(file, {"lora": lora}, optimizer, average, clock)
    bar.close()
    with torch.no_grad():
        for name, value in average.values.items():
            parameters[name].copy_(value)
    return clock.elapsed()


def load_kontext(folder: Path) -> FluxKontextPipeline:
    """The pocket base with an editing LoRA from a folder, merged into its weights."""
    pipeline = FluxKontextPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipeline.load_lora_weights(folder, weight_name=kontext.WEIGHTS)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit(pipeline: FluxKontextPipeline, cut_outs: list[Image.Image], class_names: list[str], steps: int, seed: int) -> list[Image.Image]:
    """References of cut-outs, each from noise of its own."""
    made: list[Image.Image] = []
    for start in range(0, len(cut_outs), 32):
        part = slice(start, start + 32)
        made += pipeline(
            image=cut_outs[part],
            prompt=[kontext.instruction(name) for name in class_names[part]],
            height=kontext.PIXELS,
            width=kontext.PIXELS,
            max_area=kontext.PIXELS**2,
            _auto_resize=False,
            num_inference_steps=steps,
            guidance_scale=kontext.GUIDANCE_SCALE,
            max_sequence_length=pipeline.tokenizer_2.model_max_length,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(cut_outs[part]))],
        ).images
    return made


def in_a_scene(picture: Image.Image, seed: int) -> Image.Image:
    """A reference's subject, as large as it is there, in the middle of a background: the judge knows subjects in scenes."""
    subject = binary_fill_holes(np.asarray(picture).min(axis=2) < NEAR_WHITE)
    scene = world.render_scene(world.Scene(world.BACKGROUNDS[seed % len(world.BACKGROUNDS)], seed, ()), SCENE_PIXELS).image
    corner = (SCENE_PIXELS - picture.width) // 2
    scene.paste(picture, (corner, corner), Image.fromarray(subject.astype(np.uint8) * 255))
    return scene


def outline_agreement(picture: Image.Image, reference: Image.Image) -> float:
    """IoU of what is not near white in two pictures of one size."""
    first, second = (np.asarray(one).min(axis=2) < NEAR_WHITE for one in (picture, reference))
    return float((first & second).sum() / max(1, (first | second).sum()))


def measure(pipeline: FluxKontextPipeline, count: int, steps: int) -> dict[str, Any]:
    """What edits of cut-outs with exact masks are worth, on subjects of held-out identities that are at least half visible.

    Returns:
        Shares with intervals: "identification" as its reference among 8 candidates of the class (chance 12.5 %), "class" as that which the
        judge finds likeliest, "palette", "pattern", "marking" and "looks" (all three) right among all there are, "canonical" pose; and the
        same of the references themselves, under "reference".
    """
    judge = load_judge()
    who, candidates, cut_outs = [], [], []
    for k in range(1, 5):
        for scene in held_out_scenes(k, count):
            drawn = world.render_scene(scene, SCENE_PIXELS)
            for j, options in enumerate(candidate_lists(scene)):
                if drawn.visible_fraction[j] >= MIN_VISIBLE:
                    who.append(scene.placements[j].identity)
                    candidates.append(options)
                    cut_outs.append(kontext.cut_out(drawn.image, drawn.masks[j] > 0, 0.9))
    references = [world.render_reference(identity, kontext.PIXELS) for identity in who]
    edits = edit(pipeline, cut_outs, [identity.class_name for identity in who], steps, seed=0)
    found: dict[str, Any] = {"subjects": len(who)}
    for name, pictures in (("edit", edits), ("reference", references)):
        hits: dict[str, list[bool]] = {key: [] for key in ("identification", "class", *ATTRIBUTES, "looks", "canonical")}
        for number, (picture, reference, identity, options) in enumerate(zip(pictures, references, who, candidates, strict=True)):
            tensor, c = judged_tensors([in_a_scene(picture, number)]), world.CLASSES.index(identity.class_name)
            hits["identification"].append(options[int(judge.identify(tensor, identity.class_name, options))] == identity)
            hits["class"].append(int(judge.presence_probability(tensor)[0].argmax()) == c)
            verdict = judge.verdict(tensor)
            right = [getattr(identity, key) == names[int(getattr(verdict, key)[0, c].argmax())] for key, names in ATTRIBUTES.items()]
            for key, value in zip(ATTRIBUTES, right, strict=True):
                hits[key].append(value)
            hits["looks"].append(all(right))
            hits["canonical"].append(outline_agreement(picture, reference) >= SAME_OUTLINE)
        found[name] = {key: {**proportion(values).__dict__} for key, values in hits.items()}
    return found


def run(arguments: argparse.Namespace) -> None:
    """Draw, train, measure, write.

    Raises:
        OSError, ValueError: A flag will not do, or the folder is in use or was begun with other flags.
    """
    torch.set_num_threads(arguments.threads)
    work, target = arguments.output / "work", arguments.output / "kontext"
    with FolderLock(arguments.output, "--output") as lock:
        lock.acquire()
        settings = {name: value for name, value in vars(arguments).items() if name not in _FREE}
        runs.check_begun(work / "settings.json", settings, str(arguments.output))
        pipeline = FluxKontextPipeline.from_pretrained(BASE, dtype=torch.float32)
        for name in ("vae", "text_encoder", "text_encoder_2"):
            pipeline.components[name].eval().requires_grad_(False)
        with fast_attention("cpu"), without_tiny_numbers():
            seconds = train(arguments, pipeline, work)
        kontext.save_lora(pipeline.transformer, target)
        pipeline = load_kontext(target)
        record = {
            "command": "python scripts/make_pocket_kontext.py",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": settings,
            "hardware": hardware(),
            "commit": commit(),
            "versions": versions(),
            "world_digest": WORLD_DIGEST,
            "base_digest": base_digest(str(BASE)),
            "instruction": kontext.INSTRUCTION,
            "seconds": round(seconds, 1),
            "digest": weights_digest(target / kontext.WEIGHTS),
            "held_out": {f"{steps}_steps": measure(pipeline, arguments.test_scenes, steps) for steps in arguments.test_steps},
        }
        write_text(target / RECORD, json.dumps(record, indent=1) + "\n")
    print(f"LoRA: {target / kontext.WEIGHTS}; what was done and measured: {target / RECORD}")
