"""Where weights come from: a local file, a local folder, or a repository of the Hugging Face Hub."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError

from mosaic.commands import is_meant
from mosaic.files import in_one_line

DEFAULT_WEIGHT_NAME = "lora.safetensors"  # as training writes it
STYLE_WEIGHT_NAME = "pytorch_lora_weights.safetensors"  # as diffusers saves a LoRA
PUBLISHED_WEIGHT_NAMES = {"ByteDance-FanQie/MOSAIC": "subject_512.safetensors"}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
POCKET_MODEL = "assets/pocket/flux"
POCKET_LORA = "assets/pocket/lora.safetensors"


def require_model_name(name: str | os.PathLike) -> None:
    """Check that a model name is a local folder or has the form of a hub id.

    Raises:
        FileNotFoundError: If it is neither.
    """
    if not Path(name).is_dir() and (Path(name).exists() or not HUB_ID.fullmatch(str(name))):
        raise FileNotFoundError(
            f"model {str(name)!r}: no such folder, and not a hub id of the form user/name. Paths are relative to the current "
            f"directory; the pocket model is {POCKET_MODEL}."
        )


def unreachable_message(name: str, error: Exception, what: str = "model") -> str:
    """What to do when a model or a reference LoRA cannot be had: gated, misspelt, no network, or a damaged folder.

    Args:
        name: Folder or hub id.
        error: What its loading raised.
        what: The thing's name in the message.
    """
    if Path(name).is_dir():
        cure = "the folder is not a complete diffusers FLUX folder: save or download it anew"
    elif isinstance(error, GatedRepoError) or "gated" in str(error).lower():
        cure = f"it is gated: accept its licence at https://huggingface.co/{name}, then log in with `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError) or "not a valid model identifier" in str(error):
        cure = "there is no such repository, or it is private: check the spelling, or log in with `hf auth login`"
    elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        cure = "the repository has no such file: check the file's name (lora_weight_name, style_lora_weight_name, lora.weight_name)"
    elif constants.HF_HUB_OFFLINE:
        cure = "there is no such local folder, it is not in the local cache, and HF_HUB_OFFLINE is set: unset it, or download it first"
    else:
        cure = "there is no such local folder, and the Hub cannot be reached: check the path and the network"
    return (
        f"{what} {name!r} cannot be loaded: {cure}. To try everything without a download, use the pocket model: configs/pocket.json, "
        f"or model {POCKET_MODEL} with reference LoRA {POCKET_LORA}. ({in_one_line(error, 200, with_kind=True)})"
    )


@contextmanager
def loading(name: str | os.PathLike) -> Iterator[None]:
    """Context in which a model is loaded: what its files cause, by whatever error of a library, is told with what to do.

    Raises:
        OSError: The id is gated, missing or unreachable, or the folder damaged.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(unreachable_message(str(name), error)) from error
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        if is_meant(error) or not Path(name).is_dir():  # our own words, a full memory; or nothing that the user can mend
            raise
        raise OSError(unreachable_message(str(name), error)) from error


def resolve_lora_file(source: str | os.PathLike, weight_name: str | None = None, revision: str | None = None) -> Path:
    """Path of a reference LoRA file, downloaded if `source` is a hub repository.

    Args:
        source: A .safetensors file, a folder, or a repository `user/name`.
        weight_name: File inside the folder or repository. None: `lora.safetensors`, or the published file's name
            for the published repository.
        revision: Branch, tag or commit of the repository.

    Raises:
        FileNotFoundError: If a local file is missing.
        OSError: If the repository is gated, missing or unreachable.
    """
    name = weight_name or PUBLISHED_WEIGHT_NAMES.get(str(source), DEFAULT_WEIGHT_NAME)
    return _local_or_download(source, name, revision, "reference LoRA")


def resolve_style_lora_file(source: str | os.PathLike, weight_name: str | None = None) -> Path:
    """Path of a style LoRA file, downloaded if `source` is a hub repository.

    Args:
        source: A .safetensors file, a folder, or a repository `user/name`.
        weight_name: File inside the folder or repository. None: `pytorch_lora_weights.safetensors`.

    Raises:
        FileNotFoundError: If a local file is missing.
        OSError: If the repository is gated, missing or unreachable.
    """
    return _local_or_download(source, weight_name or STYLE_WEIGHT_NAME, None, "style LoRA")


def download(name: str, file: str, revision: str | None = None) -> Path:
    """A file of a repository, from the local cache or downloaded.

    The Hub's client asks five more times, over half a minute, before it says that there is no network; here one question comes first.

    Raises:
        EntryNotFoundError, HfHubHTTPError, OSError: It is gated, missing or unreachable.
    """
    if not constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(name, file, revision=revision), str):
        try:
            get_hf_file_metadata(hf_hub_url(name, file, revision=revision))
        except HfHubHTTPError:
            pass  # there is a network; the download knows what else is wrong
        except Exception as error:  # of the client's transport, which has been another library in every major version
            raise ConnectionError(in_one_line(error, with_kind=True)) from error
    return Path(hf_hub_download(name, file, revision=revision))


def _local_or_download(source: str | os.PathLike, name: str, revision: str | None, what: str) -> Path:
    """The file `source`, or `name` in the folder or the repository `source`."""
    path, source = Path(source), str(source)
    if path.is_dir():
        path = path / name
    if path.is_file():
        return path
    if path.suffix == ".safetensors" or not HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"{what} not found: {path}. Give a .safetensors file, a folder, or a hub repository as user/name.")
    try:
        return download(source, name, revision)
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise OSError(unreachable_message(source, error, what)) from error
