"""Measure the shipped pocket weights on held-out identities: `python scripts/evaluate.py`.

For every K: subject identification among 8 candidates of the same class (chance 12.5 %), attribute leakage, class presence and
attention accuracy, with the adapter and without references, and the judge's own accuracy on real renderings of the same scenes; and
what the base draws of class, count and background without references. Intervals are 95 % Wilson intervals over subjects. Prints the
tables of docs/pocket_world.md; --output also writes JSON, with the digests of all that was measured. assets/pocket/evaluation.json is that
of the shipped weights.

With --regime the scenes are of distinct classes, twins (all of one class) or mixed, and subjects are judged by their places: is each
reference there exactly once, do two subjects bear one look, are palettes and patterns blended? Several adapters may be named then, which
are set side by side; assets/pocket/regimes.json is of the shipped ones.

With --interventions rows of attention are replaced instead (scripts/pocket/interventions.py), in scenes of distinct classes and twins at
K = 2 and 4: how much does L_diff grow without what they carry? A minute on one core.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mosaic.commands import NOTHING, command
from mosaic.config.loading import load_config
from mosaic.files import require_file
from scripts.pocket import world

INTERVENTION_CASES = 16  # at which they take a minute


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pocket.json", help="model, adapter and sampling; from the repository's root")
    parser.add_argument(
        "--lora", nargs="+", default=[], help="reference LoRA to measure (default: the config's inference.lora); with --regime one or more"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one setting; may be repeated")
    parser.add_argument("--num-cases", type=int, help=f"held-out cases per K (default: 200; of interventions {INTERVENTION_CASES})")
    parser.add_argument("--k", type=int, nargs="+", help="numbers of references (default: 1 2 3 4; of regimes 2 3 4; of interventions 2 4)")
    parser.add_argument("--regime", nargs="+", choices=world.REGIMES, help="measure scenes of these regimes, by places, instead")
    parser.add_argument(
        "--settling", action="store_true", help="of --regime also when, while a picture is sampled, its places settle on references"
    )
    parser.add_argument("--interventions", action="store_true", help="measure what attention carries instead; no picture is drawn")
    parser.add_argument("--batch-size", type=int, default=25, help="pictures per call")
    parser.add_argument("--seed", type=int, default=42, help="seed of the start noise")
    parser.add_argument("--output", type=Path, help="also write the numbers as JSON")
    return parser.parse_args(argv)


@command(NOTHING)
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    if arguments.num_cases is None:
        arguments.num_cases = INTERVENTION_CASES if arguments.interventions else 200
    if min(arguments.num_cases, arguments.batch_size) < 1 or arguments.seed < 0:
        raise ValueError("--num-cases and --batch-size must be at least 1, --seed at least 0.")
    for name in arguments.regime or (["twins"] if arguments.interventions else ["distinct"]):
        least = world.REGIMES[name]
        if not all(least <= k <= world.MAX_SUBJECTS for k in arguments.k or []):
            where = f" with --regime {name}" if arguments.regime else ""
            raise ValueError(f"--k must be of {least}..{world.MAX_SUBJECTS}{where}, got {arguments.k}.")
    if arguments.settling and (arguments.interventions or not arguments.regime):
        raise ValueError("--settling is of scenes of a regime: name one with --regime, such as twins, and no --interventions.")
    if len(arguments.lora) > 1 and (arguments.interventions or not arguments.regime):
        raise ValueError(f"--lora takes several adapters with --regime only, got {' '.join(arguments.lora)}.")
    lora = [f"inference.lora={json.dumps(name)}" for name in arguments.lora[:1]]
    config = load_config(arguments.config, [*arguments.set, *lora])
    if config.inference.lora is None:
        raise ValueError(f"inference.lora is null in {arguments.config}; name a reference LoRA with --lora.")
    require_file(arguments.output, "--output")
    if arguments.interventions:
        from scripts.pocket.intervention_report import run  # torch and the like only once the config stands
    elif arguments.regime:
        from scripts.pocket.evaluate_regimes import run
    else:
        from scripts.pocket.evaluate import run
    run(config, arguments)


if __name__ == "__main__":
    sys.exit(main())
