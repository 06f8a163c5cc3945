"""What rendering a benchmark with FLUX.1-dev costs, by the FLOP model."""

from collections import Counter
from collections.abc import Sequence

from mosaic.evaluation.prepared import PreparedCase, Protocol
from mosaic.model.costs import FLUX_DEV, Workload, sampling_flops

STEPS, RANK, TEXT_TOKENS, REFERENCE_SIDE, TOKEN = 28, 128, 512, 512, 16  # of configs/flux_dev.json
PEAK = 989e12  # FLOP/s of an H100 or H200 in bfloat16, by its data sheet
UTILISATION = (0.50, 0.30)  # with compiled blocks and without, as others measure FLUX.1-dev on these cards


def gpu_hours(cases: Sequence[PreparedCase], protocol: Protocol) -> tuple[float, float]:
    """Hours of one H100 or H200 for all pictures, without image guidance: with compiled blocks, and without. Encoders are not in it."""
    counts = Counter(len(case.references) for case in cases)
    tokens = (protocol.size // TOKEN) ** 2
    flops = 0.0
    for num_references, count in counts.items():
        load = Workload(1, num_references, tokens, (REFERENCE_SIDE // TOKEN) ** 2, TEXT_TOKENS, RANK, "target")
        flops += count * protocol.runs * sampling_flops(FLUX_DEV, load, STEPS)
    fast, slow = (flops / (PEAK * share) / 3600 for share in UTILISATION)
    return fast, slow
