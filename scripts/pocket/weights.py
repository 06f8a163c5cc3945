"""All pocket weights one after another within a time: what scripts/make_pocket_weights.py does, by the functions of the other commands."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from mosaic.config.loading import Config, load_config
from mosaic.files import in_one_line, replacing, write_text
from mosaic.locks import FolderLock
from mosaic.training import train
from mosaic.training.signals import TrainingStopped
from mosaic.weights.digests import weights_digest
from preprocess import encoding
from preprocess.extractors.arguments import check_device
from scripts import distill_pocket_base, train_pocket_base, train_pocket_vae
from scripts.ablation.plan import base_digest
from scripts.pocket import base_data, distill_base, train_base, train_vae
from scripts.pocket.evaluate import caption_table, evaluate, provenance, table
from scripts.pocket.evaluate_regimes import evaluate_regimes, regime_table
from scripts.pocket.provenance import ROOT, commit, hardware, versions
from scripts.pocket.stages import SHARES, Record
from scripts.pocket.world import RegimeShares

SHIPPED = ROOT / "assets" / "pocket"
RECORD = "weights.json"
FREE = ("output", "device", "minutes", "workers", "threads", "no_compile", "until")  # flags that may change when the command goes on
FINISHING_RATE = 2e-4  # learning rate of the adapter's last stage


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        steps: Of each training; None: as many as its share of the time allows.
        scale: Of the base's pictures, 54,000 at 1; fewer where their share of the time is over.
        scenes: For the adapter, of one to six subjects.
        cases: Held-out cases per K.
        ks: Numbers of references that are measured.
        inference_steps: Sampling steps.
    """

    steps: int | None
    scale: float
    scenes: int
    cases: int
    ks: tuple[int, ...]
    inference_steps: int


SIZES = {
    "tiny": Size(2, 0.01, 12, 1, (1, 2), 1),
    "full": Size(None, 2.0, 16_000, 60, (1, 2, 3, 4), 20),
}


class Weights:
    """The stages, each a method that does what is left of it in about the given seconds and returns what is to be said of it."""

    def __init__(self, arguments: Namespace) -> None:
        self.arguments, self.output = arguments, arguments.output
        self.size = SIZES[arguments.size]
        self.device = check_device(arguments.device)
        self.on_gpu = self.device.type == "cuda"
        self.compiled = self.on_gpu and not arguments.no_compile
        if self.compiled:
            try_compiler(self.device)
        self.shares = RegimeShares(arguments.twins_share, arguments.mixed_share)
        self.workers = arguments.workers or os.cpu_count() or 1
        tiny = self.size.steps is not None
        self.batch_size = arguments.batch_size or (4 if tiny else 1024 if self.on_gpu else 32)
        self.from_shipped = arguments.pixels == 64 and not arguments.from_scratch
        if not any(base_data.layout_weights(arguments.sheets_share)[1:]) and self.from_shipped:
            raise ValueError("--sheets-share 0 needs --from-scratch: the shipped weights have learnt from sheets.")
        self.vae_dir, self.base_dir, self.data_dir = self.output / "vae", self.output / "base", self.output / "data"
        self.drawing: subprocess.Popen | None = None  # of the adapter's data, beside the training of the base

    def pictures(self, seconds: float) -> dict[str, Any]:
        """Draws the base's pictures, until they are enough or the time is over."""
        start, done = time.monotonic(), 0
        shards = base_data.render_all(self.vae_dir / "pictures", self.workers, self.size.scale, self.shares, self.arguments.pixels)
        with contextlib.closing(shards), tqdm(desc="pictures", unit="shard", mininterval=5.0) as bar:
            for done, bar.total in shards:
                bar.update(done - bar.n)
                if time.monotonic() - start > seconds and self.size.steps is None:
                    break
        return {"shards": done}

    def vae(self, seconds: float) -> dict[str, Any]:
        """At 64 px the shipped one; at 128 px one is trained."""
        export = self.vae_dir / "export"
        if self.arguments.pixels == 64:
            with replacing(export) as aside:
                shutil.copytree(SHIPPED / "flux" / "vae", aside)
            return {"from": "shipped"}
        given = [*self.common(self.vae_dir, seconds), "--workers", "0", "--pixels", str(self.arguments.pixels)]
        train_vae.run(train_pocket_vae.parse_arguments([*given, "--batch-size", str(max(4, self.batch_size // 4))]))
        return last_entry(self.vae_dir / "log.jsonl")

    def tokens(self, seconds: float) -> dict[str, Any]:
        """Encodes the pictures."""
        start = SHIPPED / "flux" if self.from_shipped else None
        train_base.prepare_tokens(self.base_dir, self.vae_dir, self.arguments.device, start)
        return {}

    def base(self, seconds: float) -> dict[str, Any]:
        """Trains the base."""
        start = ["--start-from", str(SHIPPED / "flux")] if self.from_shipped else []
        train_base.run(train_pocket_base.parse_arguments([*self.base_settings(seconds), *start]))
        return last_entry(self.base_dir / "log.jsonl")

    def guidance(self, seconds: float) -> dict[str, Any]:
        """Distils guidance into it; the base is then whole."""
        distill_base.run(distill_pocket_base.parse_arguments([*self.base_settings(seconds), "--teacher", str(self.base_dir / "export")]))
        with replacing(self.output / "flux") as aside:
            shutil.copytree(self.base_dir / "distilled" / "export", aside)
        return last_entry(self.base_dir / "distilled" / "log.jsonl") | {"digest": base_digest(str(self.output / "flux"))}

    def latents(self, seconds: float) -> dict[str, Any]:
        """Waits for the adapter's data and encodes them."""
        self.draw_data()
        if self.drawing is not None:
            self.drawing.wait()
        if not self.data_dir.is_dir():
            raise ValueError(f"drawing the adapter's data failed, see {self.output / 'data.log'}; start again.")
        encoding.run(self.config("adapter"), Namespace(shard_size=512, device=self.arguments.device))
        return {"scenes": self.size.scenes}

    def adapter(self, seconds: float) -> dict[str, Any]:
        """Trains the adapter, at 64 px from the shipped one."""
        return self.train_adapter("adapter", seconds)

    def finish(self, seconds: float) -> dict[str, Any]:
        """Goes on from its average at a lower rate."""
        found = self.train_adapter("finish", seconds)
        with replacing(self.output / "lora.safetensors") as aside:
            shutil.copyfile(self.output / "finish" / "lora.safetensors", aside)
        return found | {"digest": weights_digest(self.output / "lora.safetensors")}

    def evaluation(self, seconds: float) -> dict[str, Any]:
        """Measures both on held-out identities, as scripts/evaluate.py does; twins at K = 2, too."""
        config, size, seed = self.config("evaluation"), self.size, 42
        entries = evaluate(config, list(size.ks), size.cases, size.cases, seed, size.cases, self.device)
        regimes = evaluate_regimes(config, {"twins": [2]}, size.cases, size.cases, seed, device=self.device)
        print(f"{table(entries)}\n\nThe base alone, without references:\n\n{caption_table(entries)}\n\n{regime_table(regimes)}")
        numbers = provenance(config, seed) | {"entries": entries, "regimes": regimes}
        write_text(self.output / "evaluation.json", json.dumps(numbers, indent=1, allow_nan=False) + "\n")
        shares = {str(entry["num_references"]): entry for entry in entries}
        return {
            "identification": {k: entry["adapter"]["identification"]["share"] for k, entry in shares.items()},
            "class_present": {k: entry["without_references"]["presence"]["share"] for k, entry in shares.items()},
            "twins_apart": regimes["twins"]["2"]["apart"],
            "count_right": {k: entry["without_references"]["count"]["share"] for k, entry in shares.items()},
        }

    def common(self, folder: Path, seconds: float) -> list[str]:
        """The flags that all trainings of the base's parts have."""
        length = ["--max-minutes", str(seconds / 60.0)] if self.size.steps is None else ["--steps", str(self.size.steps)]
        return ["--run-dir", str(folder), *length, "--device", self.arguments.device, "--seed", str(self.arguments.seed)]

    def base_settings(self, seconds: float) -> list[str]:
        """The flags of the base's training and of the distillation."""
        compiled = ["--compile"] if self.compiled else []
        sizes = ["--batch-size", str(self.batch_size), "--lr", str(self.arguments.lr)]
        share = [] if self.arguments.sheets_share is None else ["--sheets-share", str(self.arguments.sheets_share)]
        return [*self.common(self.base_dir, seconds), *sizes, *share, *compiled]

    def config(self, stage: str) -> Config:
        """The config of the adapter's stages: that of the pocket world, with these weights and data, at this size."""
        pixels, batch_size = self.arguments.pixels, max(2, self.batch_size // 4)
        settings: dict[str, Any] = {
            "model.pretrained": str(self.output / "flux"),
            "data.root": str(self.data_dir),
            "data.image_size": [pixels, pixels],
            "data.reference_size": pixels // 2,
            "data.latent_cache": str(self.output / "latents"),
            "data.text_cache": str(self.output / "texts"),
            "data.num_workers": min(self.workers, 12) if self.on_gpu else 0,
            "optimizer.ema_decay": 0.99 if self.size.steps else 0.998,
            "training.batch_size": batch_size,
            "training.max_steps": self.size.steps or 1_000_000,
            "training.mixed_precision": "bf16",
            "training.output_dir": str(self.output / stage),
            "training.log_every": 1,
            "training.seed": self.arguments.seed,
            "training.keep_checkpoints": 1,
            "training.best_metric": None,
            "training.trackers": [],
            "validation.every": None,
            "inference.lora": str(self.output / "lora.safetensors"),
            "inference.height": pixels,
            "inference.width": pixels,
            "inference.num_inference_steps": self.size.inference_steps,
        }
        if stage == "adapter" and self.from_shipped:
            settings["lora.pretrained"] = str(SHIPPED / "lora.safetensors")
        if stage == "finish":
            settings |= {
                "lora.pretrained": str(self.output / "adapter" / "lora.safetensors"),
                "optimizer.learning_rate": FINISHING_RATE,
            }
        return load_config(ROOT / "configs" / "pocket.json", [f"{name}={json.dumps(value)}" for name, value in settings.items()])

    def train_adapter(self, stage: str, seconds: float) -> dict[str, Any]:
        """Trains a stage of the adapter and says how far it came."""
        config = self.config(stage)
        path = train(config, "auto") if self.size.steps else train_for(config, seconds)
        return last_entry(path.parent / "metrics.jsonl")

    def draw_data(self) -> None:
        """Starts to draw the adapter's data in a process of its own, where they are not there."""
        if self.drawing is not None or self.data_dir.is_dir():
            return
        pixels, shares = self.arguments.pixels, self.shares
        command = [sys.executable, str(ROOT / "scripts/make_pocket_world.py"), "--output", str(self.data_dir), "--max-subjects", "6"]
        command += ["--num-samples", str(self.size.scenes), "--scene-size", str(pixels), "--workers", str(max(1, self.workers // 2))]
        command += ["--twins-share", str(shares.twins), "--mixed-share", str(shares.mixed)]
        with open(self.output / "data.log", "ab") as log:
            self.drawing = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def end_drawing(self) -> None:
        """Ends that process where it still runs."""
        if self.drawing is not None and self.drawing.poll() is None:
            self.drawing.terminate()
            self.drawing.wait()


def try_compiler(device: torch.device) -> None:
    """Compiles a trifle, so that what is missing for it is known before any long work.

    Raises:
        ValueError: it cannot be compiled.
    """
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except Exception as error:  # compilers fail in ways of their own
        raise ValueError(
            f"torch.compile does not work on this device: {in_one_line(error, 300, with_kind=True)}. Give --no-compile."
        ) from error


def last_entry(log: Path) -> dict[str, Any]:
    """The last entry of a training's log: step, loss or losses, seconds."""
    return json.loads(log.read_text().splitlines()[-1])


def train_for(config: Config, seconds: float) -> Path:
    """Trains an adapter for some seconds; returns its file.

    The time ends it as a stop signal would, after a whole step with a checkpoint; its last start then only writes the adapter.

    Raises:
        KeyboardInterrupt: It was stopped from outside.
    """
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the training takes the signal over while it runs
    over = threading.Event()

    def end() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGUSR1)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        return train(config, "auto")
    except TrainingStopped as stopped:
        if not over.is_set():
            raise KeyboardInterrupt from stopped
        step = stopped.step
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, before)
    return train(config.replace(training=config.training.replace(max_steps=max(step, 1))), "auto")


def run(arguments: Namespace) -> None:
    """Does the stages that are left.

    Raises:
        OSError, ValueError: A flag will not do, or the folder is in use or was begun with other flags.
    """
    weights = Weights(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    PartialState(cpu=not weights.on_gpu)  # of which the adapter's training learns its device
    names = list(SHARES)
    shares = {name: SHARES[name] for name in names[: names.index(arguments.until) + 1]}
    if arguments.pixels == 64:
        shares["vae"] = 0.0
    settings = {name: value for name, value in vars(arguments).items() if name not in FREE}
    with FolderLock(arguments.output, "--output") as lock:
        lock.acquire()
        record = Record(arguments.output / RECORD, settings, shares, 60.0 * arguments.minutes)
        name = torch.cuda.get_device_name(weights.device) if weights.on_gpu else "CPU"
        record.state |= {"device": name, "hardware": hardware(), "commit": commit(), "versions": versions()}
        try:
            for number, stage in enumerate(shares, start=1):
                if record.entry(stage)["done"]:
                    continue
                seconds = record.planned(stage)
                print(f"stage {number} of {len(shares)}, {stage}: about {seconds:.0f} s of {record.seconds:.0f} s", flush=True)
                if stage in ("base", "guidance") and "latents" in shares:
                    weights.draw_data()
                with record.stage(stage) as entry:
                    entry["results"] = getattr(weights, stage)(seconds)
        finally:
            weights.end_drawing()
    print(f"weights: {arguments.output}, what was done: {record.file}")
