"""Pictures and latents of the pocket base: rendered once, encoded once, drawn again and again.

Three kinds of pictures, see `scripts.pocket.world`: scenes; sheets (a scene with columns of panels to its left that
show its subjects alone); strips of panels. Every panel and every scene is encoded by itself, so the latents of a panel
are exactly those that the same picture has as a reference. Tokens of a sample: scene first, then the panels.
"""

import json
from collections.abc import Generator, Iterator
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from mosaic.files import replacing, save_tensors
from scripts.pocket.model import SCENE_GRID, SCENE_PIXELS
from scripts.pocket.scenes import USUAL, RegimeShares
from scripts.pocket.workers import drawing_processes

PANEL_GRID = SCENE_GRID // 2  # tokens along one side of a panel
_SHARD = 500
SUBJECT_SHARES = (0.2, 0.25, 0.2, 0.2, 0.08, 0.07)  # of scenes, by their number of subjects, 1 to 6


@dataclass(frozen=True)
class Layout:
    """One arrangement of pictures.

    Args:
        name: also the name of its files.
        columns: panel columns beside a scene, two panels each; strips have no scene and four columns of one panel.
        scene: whether there is a scene.
        count: distinct samples to render.
        weight: share of the training batches, unless another share of sheets is asked for.
    """

    name: str
    columns: int
    scene: bool
    count: int
    weight: float

    @property
    def panels(self) -> int:
        """Panels per sample."""
        return self.columns * (2 if self.scene else 1)

    @property
    def tokens(self) -> int:
        """Tokens per sample."""
        return self.scene * SCENE_GRID**2 + self.panels * PANEL_GRID**2


LAYOUTS = (
    Layout("scene", 0, True, 20_000, 0.60),
    Layout("sheet1", 1, True, 16_000, 0.12),
    Layout("sheet2", 2, True, 8_000, 0.10),
    Layout("sheet3", 3, True, 3_000, 0.05),
    Layout("sheet4", 4, True, 3_000, 0.05),
    Layout("strip", 4, False, 4_000, 0.08),
)


def layout_weights(sheets_share: float | None = None) -> list[float]:
    """The shares of the training batches that each of `LAYOUTS` has; those of sheets and strips in their proportions, together as given.

    Raises:
        ValueError: it is no share.
    """
    weights = [layout.weight for layout in LAYOUTS]
    if sheets_share is None:
        return weights
    if not 0 <= sheets_share <= 1:
        raise ValueError(f"--sheets-share must lie in [0, 1], got {sheets_share:g}.")
    usual = sum(layout.weight for layout in LAYOUTS if layout.columns)
    return [layout.weight * sheets_share / usual if layout.columns else 1 - sheets_share for layout in LAYOUTS]


def position_ids(layout: Layout) -> Tensor:
    """Position ids (0, row, column) of a sample's tokens, in order, float32 [tokens, 3].

    A scene starts at (0, 0). Column k of panels, counted leftwards from the scene, sits where reference k will
    sit: at columns -(k + 1) * 4 and on, the second panel below the first. Strips run to the right from (0, 0).
    """
    corners = [(0, 0, SCENE_GRID)] if layout.scene else []
    for column in range(layout.columns):
        if layout.scene:
            corners += [(row, -(column + 1) * PANEL_GRID, PANEL_GRID) for row in (0, PANEL_GRID)]
        else:
            corners.append((0, column * PANEL_GRID, PANEL_GRID))
    ids = []
    for row, column, side in corners:
        grid = torch.cartesian_prod(torch.arange(side) + row, torch.arange(side) + column)
        ids.append(torch.nn.functional.pad(grid, (1, 0)))
    return torch.cat(ids).float()


def cut(layout: Layout, pictures: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Cuts whole pictures uint8 [n, height, width, 3] into scenes [n, side, side, 3] and panels of half that [n, panels, half, half, 3]."""
    height, width = pictures.shape[1:3]
    if not layout.scene:
        return None, np.stack([pictures[:, :, k * height : (k + 1) * height] for k in range(layout.columns)], 1)
    side = height // 2
    scenes = pictures[:, :, width - height :]
    panels = []
    for column in range(layout.columns):
        left = width - height - (column + 1) * side
        panels += [pictures[:, top : top + side, left : left + side] for top in (0, side)]
    return scenes, np.stack(panels, 1) if panels else None


def draw(layout: Layout, seed: int, shares: RegimeShares = USUAL, pixels: int = SCENE_PIXELS) -> tuple[np.ndarray, str]:
    """Renders one sample of the training split: picture uint8 [height, width, 3] and its caption. `shares` of the scenes, also of those
    on sheets, are twins or mixed; a scene is `pixels` a side.
    """
    from scripts.pocket import world

    if not layout.scene:
        strip = world.sample_strip(seed, "train")
        return np.asarray(world.render_strip(strip, pixels)), world.strip_caption(strip)
    if layout.columns:
        sheet = world.sample_sheet(seed, layout.columns, "train", shares)
        return np.asarray(world.render_sheet(sheet, pixels)), world.sheet_caption(sheet)
    count = int(np.random.default_rng([seed, 0xC0]).choice(len(SUBJECT_SHARES), p=SUBJECT_SHARES)) + 1
    scene = world.sample_scene(seed, "train", count, shares.draw(seed, count))
    return np.asarray(world.render_scene(scene, pixels).image), world.caption(scene)


@dataclass(frozen=True)
class _Shard:
    """A file of pictures to be drawn: the number of a layout, and the file's among those of it."""

    folder: Path
    layout: int
    number: int
    shares: RegimeShares
    pixels: int

    @property
    def file(self) -> Path:
        return self.folder / f"{LAYOUTS[self.layout].name}-{self.number:03d}.safetensors"

    def is_drawn(self) -> bool:
        """Whether it is there.

        Raises:
            ValueError: it was drawn with other shares of regimes or at another size.
        """
        if not self.file.exists():
            return False
        with safe_open(self.file, framework="pt") as content:
            shares = RegimeShares(**json.loads(content.metadata().get("shares", "{}")))
            height = content.get_slice("pictures").get_shape()[1]
        if shares != self.shares:
            raise ValueError(
                f"{self.file} was drawn with other shares of regimes, {shares}, than are asked for, {self.shares}: use another folder."
            )
        pixels = height if LAYOUTS[self.layout].scene else 2 * height
        if pixels != self.pixels:
            raise ValueError(f"{self.file} holds pictures of {pixels} px, {self.pixels} px are asked for: use another folder.")
        return True

    def draw(self) -> None:
        first = self.layout * 10_000_000 + self.number * _SHARD
        samples = [draw(LAYOUTS[self.layout], first + offset, self.shares, self.pixels) for offset in range(_SHARD)]
        pictures = torch.from_numpy(np.stack([picture for picture, _ in samples]))
        captions = json.dumps([caption for _, caption in samples])
        with replacing(self.file) as aside:
            save_tensors({"pictures": pictures}, aside, {"captions": captions, "shares": json.dumps(asdict(self.shares))})


def render_all(
    folder: Path, workers: int, scale: float = 1.0, shares: RegimeShares = USUAL, pixels: int = SCENE_PIXELS
) -> Generator[tuple[int, int]]:
    """Renders every shard that is missing, all layouts in turn. Yields (shards done, shards in all).

    Raises:
        ValueError: a shard that is there was drawn with other shares of regimes or at another size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = [
        ((number + 0.5) / layout.count, index, _Shard(folder, index, number, shares, pixels))
        for index, layout in enumerate(LAYOUTS)
        for number in range(max(1, round(scale * layout.count / _SHARD)))
    ]
    # Sorted so that at any time each layout is rendered to the same share: a reader can start early.
    missing = [shard for *_, shard in sorted(shards, key=lambda entry: entry[:2]) if not shard.is_drawn()]
    there = len(shards) - len(missing)
    if there:
        yield there, len(shards)
    if not missing:
        return
    with drawing_processes(workers) as pool:
        try:
            for done, drawn in enumerate(as_completed([pool.submit(shard.draw) for shard in missing]), start=there + 1):
                drawn.result()
                yield done, len(shards)
        finally:
            pool.shutdown(cancel_futures=True)


def read_shard(file: Path) -> tuple[np.ndarray, list[str]]:
    """Pictures uint8 [n, height, width, 3] and captions of one shard."""
    with safe_open(file, framework="pt") as content:
        return content.get_tensor("pictures").numpy(), json.loads(content.metadata()["captions"])


def shard_files(folder: Path, layout: Layout) -> list[Path]:
    """The finished shards of one layout, in order."""
    return sorted(folder.glob(f"{layout.name}-*.safetensors"))


def to_unit(pictures: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [..., height, width, 3] -> float32 [..., 3, height, width] in [-1, 1] on a device, to which the bytes travel."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pictures, -1, -3))).to(device).float() / 127.5 - 1.0


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: np.ndarray) -> Tensor:
    """Pictures uint8 [n, side, side, 3] -> packed tokens float16 [n, grid^2, channels] on the CPU, shifted and scaled."""
    with torch.autocast(vae.device.type, dtype=torch.bfloat16):
        latents = vae.encode(to_unit(pictures, vae.device)).latent_dist.mode().float()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(latents, *latents.shape).half().cpu()


@torch.no_grad()
def decode_tokens(vae: AutoencoderKL, tokens: Tensor) -> np.ndarray:
    """Packed tokens [n, grid^2, channels] of square pictures -> uint8 [n, side, side, 3]."""
    token = vae.config.sample_size // SCENE_GRID
    pixels = round(tokens.shape[1] ** 0.5) * token
    latents = FluxPipeline._unpack_latents(tokens.float(), pixels, pixels, token // 2)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    pictures = vae.decode(latents.to(vae.dtype)).sample.float().clamp(-1, 1)
    return ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def encode_samples(vae: AutoencoderKL, layout: Layout, pictures: np.ndarray) -> Tensor:
    """Whole pictures of a layout -> tokens float16 [n, tokens, channels] on the CPU, in the order of `position_ids`."""
    scenes, panels = cut(layout, pictures)
    parts = [encode_pictures(vae, scenes)] if scenes is not None else []
    if panels is not None:
        flat = encode_pictures(vae, panels.reshape(-1, *panels.shape[2:]))
        parts.append(flat.reshape(len(pictures), -1, flat.shape[-1]))
    return torch.cat(parts, dim=1)


def decode_samples(vae: AutoencoderKL, layout: Layout, tokens: Tensor) -> np.ndarray:
    """Tokens [n, tokens, channels] -> whole pictures uint8 [n, height, width, 3]: the inverse of `encode_samples`."""
    count, scene_tokens = len(tokens), layout.scene * SCENE_GRID**2
    scenes = decode_tokens(vae, tokens[:, :scene_tokens]) if layout.scene else None
    if scenes is not None and not layout.panels:
        return scenes
    flat = tokens[:, scene_tokens:].reshape(count * layout.panels, PANEL_GRID**2, -1)
    panels = decode_tokens(vae, flat)
    panels = panels.reshape(count, layout.panels, *panels.shape[1:])
    if scenes is None:
        return np.concatenate(list(np.moveaxis(panels, 1, 0)), axis=2)
    columns = [np.concatenate([panels[:, 2 * k], panels[:, 2 * k + 1]], axis=1) for k in range(layout.columns)]
    return np.concatenate([*reversed(columns), scenes], axis=2)


def read_captions(file: Path) -> list[str]:
    """The captions of one shard, without reading its pictures."""
    with safe_open(file, framework="pt") as content:
        return json.loads(content.metadata()["captions"])


def encode_all(pictures: Path, folder: Path, vae: AutoencoderKL, rank: int = 0, world: int = 1) -> Iterator[tuple[int, int]]:
    """Encodes every picture shard that has no token shard yet; process `rank` of `world` takes its share of them.

    Yields:
        (shards done, shards in all).
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [(layout, file) for layout in LAYOUTS for file in shard_files(pictures, layout)][rank::world]
    for done, (layout, file) in enumerate(files, start=1):
        target = folder / file.name
        if not target.exists():
            whole, captions = read_shard(file)
            tokens = torch.cat([encode_samples(vae, layout, part) for part in np.array_split(whole, 5)])
            with replacing(target) as aside:
                save_tensors({"tokens": tokens}, aside, {"captions": json.dumps(captions)})
        yield done, len(files)


class TokenStore:
    """All encoded samples in a device's memory: per layout tokens float16 [n, tokens, channels] and caption ids of both encoders."""

    def __init__(self, folder: Path, tokenizer: CLIPTokenizer, tokenizer_2: T5Tokenizer, device: torch.device | str = "cpu") -> None:
        self.tokens: dict[str, Tensor] = {}
        self.captions: dict[str, list[str]] = {}
        self.ids: dict[str, tuple[Tensor, Tensor]] = {}
        for layout in LAYOUTS:
            tensors, captions = [], []
            for file in shard_files(folder, layout):
                with safe_open(file, framework="pt") as content:
                    tensors.append(content.get_tensor("tokens"))
                    captions += json.loads(content.metadata()["captions"])
            if not tensors:
                raise FileNotFoundError(f"{folder} holds no shard of layout {layout.name!r}: give --vae-dir to encode.")
            self.tokens[layout.name] = torch.cat(tensors).to(device)
            self.captions[layout.name] = captions
            self.ids[layout.name] = (caption_ids(tokenizer, captions).to(device), caption_ids(tokenizer_2, captions).to(device))


def caption_ids(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str]) -> Tensor:
    """Token ids int64 [n, text length], padded.

    Raises:
        ValueError: a caption is longer than the text length, so that its end would never be seen.
    """
    encoded = tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length).input_ids
    for caption, ids in zip(captions, encoded, strict=True):
        if len(ids) > tokenizer.model_max_length:
            raise ValueError(f"{caption!r} has {len(ids)} tokens, the text length is {tokenizer.model_max_length}.")
    return torch.tensor(encoded)
