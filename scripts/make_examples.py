"""Draw the example references and write example_cases.json: `python scripts/make_examples.py`.

Held-out identities of the pocket world, one to six to a case; prompts name classes and background only.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mosaic.commands import command
from mosaic.files import write_text
from scripts.pocket import world

NUM_REFERENCES = (1, 1, 2, 2, 3, 3, 3, 4, 5, 6)  # K of each case
FIRST_SEED = 90_000_000
PICTURE_SIZE = 256


def reference_name(identity: world.Identity) -> str:
    """File name of an identity's reference picture."""
    words = (identity.class_name, identity.palette, identity.pattern, identity.marking)
    return "_".join(word.replace(" ", "-") for word in words) + ".png"


@command("some of the pictures are new; start again")
def main(argv: list[str] | None = None) -> None:
    """Write assets/references/*.png and example_cases.json."""
    argparse.ArgumentParser(description="Draw the example references and write example_cases.json.").parse_args(argv)
    from mosaic.reports.figures import save_picture  # and with it torch

    cases: list[dict[str, Any]] = []
    for index, num_references in enumerate(NUM_REFERENCES):
        scene = world.sample_scene(FIRST_SEED + index, "heldout", num_references, "distinct")
        paths = []
        for placement in scene.placements:
            path = Path("assets/references") / reference_name(placement.identity)
            save_picture(world.render_reference(placement.identity, PICTURE_SIZE), ROOT / path)
            paths.append(path.as_posix())
        cases.append({"index": index, "prompt": world.caption(scene), "image_paths": paths})
    write_text(ROOT / "example_cases.json", json.dumps(cases, indent=2) + "\n")
    print(f"{len(cases)} cases, {len({path for case in cases for path in case['image_paths']})} reference pictures")


if __name__ == "__main__":
    sys.exit(main())
