"""The subcommand push: a reference LoRA with a model card, its scores and example pictures, as a folder or on the Hugging Face hub."""

import argparse
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData

from mosaic.evaluation.tables import make_tables, read_scores, to_markdown
from mosaic.files import replacing, require_folder, write_text
from mosaic.images import load_image
from mosaic.lora.files import LoraFile, reference_metadata
from mosaic.reports.html import environment
from mosaic.weights.digests import file_digest, weights_digest

MANIFEST = "manifest.parquet"
MAX_EXAMPLES = 12
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

#: Licence of what is trained on a base, by the base: the hub's id, and for "other" its name and where it stands.
LICENCES = {
    "black-forest-labs/FLUX.1-dev": {
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    },
    "black-forest-labs/FLUX.1-schnell": {"license": "apache-2.0"},
}


def push(arguments: argparse.Namespace) -> str:
    """Do what the command line says; returns a summary.

    Raises:
        FileNotFoundError, ValueError: The LoRA, scores or pictures cannot be read, or the licence is not known.
        FileExistsError: The folder is there already.
        OSError: The hub cannot be reached, or refuses.
    """
    repo_id = arguments.repo
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"USER/NAME: must be a user and a name of letters, digits, -, _ and ., as in user/name, got {repo_id}.")
    card, files = make_card(arguments)
    if arguments.dry_run is not None:
        require_folder(arguments.dry_run.parent, "--dry-run: the place of the folder")
        if arguments.dry_run.exists():
            raise FileExistsError(f"--dry-run: {arguments.dry_run} is there already. Name another folder, or move it away.")
        with replacing(arguments.dry_run) as folder:
            write_repository(folder, card, files)
        return f"wrote {len(files) + 1} files to {arguments.dry_run}; nothing was uploaded"
    api = HfApi()
    try:
        api.create_repo(repo_id, private=arguments.private, exist_ok=True)
        info = api.model_info(repo_id)
    except OSError as error:
        raise OSError(f"REPO: the Hugging Face hub does not take {repo_id} ({error}). Log in with `hf auth login`.") from error
    if arguments.private and not info.private:
        raise ValueError(f"--private: {repo_id} is there already, and public. Choose another name, or make it private on its page.")
    with tempfile.TemporaryDirectory() as work:
        write_repository(Path(work), card, files)
        api.upload_folder(repo_id=repo_id, folder_path=work, commit_message=f"{arguments.lora.name} with its card")
    return f"pushed {len(files) + 1} files to https://huggingface.co/{repo_id}"


def write_repository(folder: Path, card: str, files: Mapping[str, Path]) -> None:
    """Write what the repository holds.

    Args:
        folder: Which may not be there yet.
        card: Text of README.md.
        files: By name in the repository the file that is copied.
    """
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    write_text(folder / "README.md", card)


def make_card(arguments: argparse.Namespace) -> tuple[str, dict[str, Path]]:
    """The card, and by name in the repository the files beside it. Raises as `push`."""
    file = LoraFile(arguments.lora)
    config = reference_metadata(file.metadata, str(file.path)).get("config", {})
    if not config:
        raise ValueError(f"--lora: {file.path} must be a reference LoRA that this project trained: it has no config in its metadata.")
    base = arguments.base_model or config["model"]["pretrained"]
    if not HUB_ID.fullmatch(base):
        raise ValueError(
            f"--base-model: must be given as a hub id, for the LoRA was trained on {base}, which others do not have by this name."
        )
    scored = [_named_scores(text) for text in arguments.scores]
    for picture in arguments.examples:
        load_image(picture)
    if len(arguments.examples) > MAX_EXAMPLES:
        raise ValueError(f"--examples: at most {MAX_EXAMPLES} pictures, got {len(arguments.examples)}.")
    examples = {f"examples/{number}{picture.suffix.lower()}": picture for number, picture in enumerate(arguments.examples)}
    scores = {f"scores/{number}.json": path for number, (_, _, path) in enumerate(scored)}
    settings, loss = config.get("inference", {}), config.get("loss", {})
    template = environment(Path(__file__).parent).from_string((Path(__file__).parent / "card.md.jinja").read_text(encoding="utf-8"))
    card = template.render(
        header=_header(base, arguments.license),
        repo=arguments.repo,
        base=base,
        file="lora.safetensors",
        digest=weights_digest(file.path),
        rank=config.get("lora", {}).get("rank"),
        references=config.get("data", {}).get("max_references"),
        preset=loss.get("preset"),
        steps=config.get("training", {}).get("max_steps"),
        data=Path(str(config.get("data", {}).get("root", "unknown"))).name,
        data_digest=_data_digest(arguments.data),
        settings={
            name: settings.get(name) for name in ("height", "width", "num_inference_steps", "guidance_scale", "image_guidance_scale")
        },
        tables=[to_markdown(table) for table in make_tables([(name, values) for name, values, _ in scored])],
        examples=list(examples),
    )
    return card, {"lora.safetensors": file.path, **scores, **examples}


def _named_scores(text: str) -> tuple[str, dict[str, Any], Path]:
    """Name, scores and file of `NAME=FOLDER`, or of a folder."""
    name, equals, path = text.rpartition("=")
    folder = Path(path)
    values = read_scores(folder)
    return name if equals else "this adapter", values, folder / "scores.json" if folder.is_dir() else folder


def _data_digest(data: Path | None) -> str | None:
    """SHA-256 of the manifest of the training data."""
    if data is None:
        return None
    manifest = data / MANIFEST
    if not manifest.is_file():
        raise FileNotFoundError(f"--data: {manifest} is missing; name the folder of the training data, or leave --data out.")
    return file_digest(manifest)


def _header(base: str, license_id: str | None) -> str:
    """The YAML that the hub reads."""
    licence: Mapping[str, Any] | None = {"license": license_id} if license_id else LICENCES.get(base)
    if licence is None:
        raise ValueError(f"--license: must be given, for the licence of {base} is not known here: an id as the hub writes it, or other.")
    tags: Sequence[str] = ("lora", "flux", "multi-subject", "subject-driven", "mosaic")
    data = ModelCardData(base_model=base, library_name="diffusers", pipeline_tag="text-to-image", tags=list(tags), **licence)
    return str(data.to_yaml())
