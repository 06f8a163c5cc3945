"""Publish a data set of the multi-reference format (preprocess/FORMAT.md), or write it as a repository of the Hugging Face hub has it.

python preprocess/push.py DATA --to user/name --license cc-by-4.0 --private    to the hub
python preprocess/push.py DATA --to ./folder --license cc-by-4.0               into a folder, which `data.root` may name as well
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from huggingface_hub import HfApi

from mosaic.commands import NOTHING, command
from mosaic.data.multi_reference.repository import HUB, hub_id, looks_local
from mosaic.files import require_folder

FILE = "file://"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@command(f"{NOTHING}, or, to the hub, some files that a second try uses")
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    print(publish(parse_arguments(argv)))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="the data set, in either form")
    parser.add_argument("--to", required=True, metavar="PLACE", help="user/name on the hub; or a folder to make: ./..., /... or file://...")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="licence of the data as the hub writes it, e.g. cc-by-4.0 (default: output.license of the config that constructed them)",
    )
    parser.add_argument("--private", action="store_true", help="make the data set on the hub a private one")
    parser.add_argument("--replace", action="store_true", help="replace the shards of a data set on the hub that has files already")
    args = parser.parse_args(argv)
    if args.license is not None and not LICENSE.fullmatch(args.license):
        parser.error(f"--license must be an id as the hub writes it, e.g. cc-by-4.0 or other, got {args.license!r}")
    return args


def publish(args: argparse.Namespace) -> str:
    """Do as the command line says; returns a summary.

    Raises:
        FileExistsError: The folder exists, or the data set on the hub has files.
        FileNotFoundError, ValueError, OSError: The data set cannot be read, the place is none, or the hub refuses.
    """
    from preprocess.publishing import license_of, write_repository  # and with it torch

    license_id = args.license or license_of(args.data)
    folder = local_folder(args.to)
    if folder is not None:
        require_folder(folder.parent, "--to: the place of the folder")
        facts = write_repository(args.data, folder, license_id, folder.name)
        return f"wrote {sum(found.samples for found in facts.values())} samples to {folder}"
    hub = hub_id(args.to)
    if hub is None or hub.revision or looks_local(args.to):
        raise ValueError(
            f"--to: must be user/name or {HUB}user/name for the hub, and ./name, /name or {FILE}/name for a folder, got {args.to}."
        )
    return upload(args, hub.id, license_id)


def local_folder(place: str) -> Path | None:
    """The folder that `--to` names; None: it names no folder. Without one of these beginnings nothing is a folder, lest it be published."""
    if place.startswith(FILE):
        return Path(place.removeprefix(FILE))
    return Path(place) if place.startswith(("/", "./", "../")) else None


def upload(args: argparse.Namespace, repo_id: str, license_id: str) -> str:
    """Write the repository into a temporary folder (`TMPDIR`), and have the hub take it in one commit.

    What is uploaded is what `--to ./folder` writes, which is what the tests read; `Dataset.push_to_hub` would make shards and a card of
    its own. A second try after an interruption writes the same shards, of which the hub has what it got.

    Raises:
        FileExistsError: The data set has files, and `--replace` is not given.
        ValueError: It is public, and `--private` is given.
        OSError: The hub cannot be reached, or refuses.
    """
    from preprocess.publishing import write_repository

    api = HfApi()
    try:  # before long work
        api.create_repo(repo_id, repo_type="dataset", private=args.private, exist_ok=True)
        info = api.dataset_info(repo_id)
    except OSError as error:
        raise OSError(f"--to: the Hugging Face hub does not take {repo_id} ({error}). Log in with `hf auth login`.") from error
    if args.private and not info.private:
        raise ValueError(f"--private: {repo_id} is there already, and public. Choose another name, or make it private on its page.")
    found = sorted({file.rfilename for file in info.siblings or ()} - {".gitattributes"})
    if found and not args.replace:
        raise FileExistsError(f"--to: {repo_id} has files already ({', '.join(found[:3])}). Choose another name, or give --replace.")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "repository"
        facts = write_repository(args.data, folder, license_id, HUB + repo_id)
        message = f"{sum(one.samples for one in facts.values())} samples"
        api.upload_folder(
            repo_id=repo_id, repo_type="dataset", folder_path=folder, commit_message=message, delete_patterns=["data/*.parquet"]
        )
    return f"pushed {message} to {HUB}{repo_id}"


if __name__ == "__main__":
    sys.exit(main())
