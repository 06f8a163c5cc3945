"""What others have published, value by value as they printed it, and how it was measured as far as they say."""

from collections.abc import Mapping
from dataclasses import dataclass

PAPER = "paper, not stated: pictures per prompt, sizes, seeds"
PAPER_1024 = "paper; weights for 1024 px that are not released"


@dataclass(frozen=True)
class Published:
    """A row of a published table.

    Attributes:
        benchmark: Name in `benchmarks.BENCHMARKS`.
        method: What made the pictures.
        values: By metric, in percent.
        source: Where it is printed.
        protocol: How it was measured, as far as it is said.
    """

    benchmark: str
    method: str
    values: Mapping[str, float]
    source: str
    protocol: str


def _rows(
    benchmark: str, metrics: tuple[str, ...], source: str, rows: Mapping[str, tuple[float, ...]], protocol: str = PAPER
) -> list[Published]:
    return [Published(benchmark, method, dict(zip(metrics, values, strict=True)), source, protocol) for method, values in rows.items()]


_DREAMBENCH, _XVERSEBENCH = ("clip_i", "clip_t", "dino"), ("dpg", "id_sim", "ip_sim", "aes", "avg")
AVERAGED = _XVERSEBENCH[:4]
_ISSUE = "a user of the released weights, github.com/bytedance-fanqie-ai/MOSAIC issue 10"
_ISSUE_PROTOCOL = "released weights for 512 px"

PUBLISHED = (
    *_rows("dreambench", _DREAMBENCH, "Table 1", {
        "DreamBooth": (80.30, 30.52, 66.81),
        "BLIP-Diffusion": (80.47, 30.24, 69.82),
        "SSR-Encoder": (82.10, 30.79, 61.22),
        "MS-Diffusion": (80.82, 31.05, 70.32),
        "UNO": (83.50, 30.41, 75.97),
        "DreamO": (83.35, 30.61, 76.03),
        "XVerse": (83.20, 30.20, 75.44),
    }),
    *_rows("dreambench", _DREAMBENCH, "Table 1", {"MOSAIC": (84.30, 31.64, 77.40)}, PAPER_1024),
    *_rows("dreambench_multi", _DREAMBENCH, "Table 1", {
        "MS-Diffusion": (72.60, 31.91, 52.50),
        "UNO": (73.29, 32.23, 54.22),
        "DreamO": (73.32, 32.10, 52.17),
        "XVerse": (73.47, 31.20, 53.71),
    }),
    *_rows("dreambench_multi", _DREAMBENCH, "Table 1", {"MOSAIC": (76.30, 32.40, 56.83)}, PAPER_1024),
    *_rows("dreambench_multi", _DREAMBENCH, "Table 3", {
        "MOSAIC without both losses": (73.45, 29.90, 52.03),
        "MOSAIC without L_MD": (75.89, 31.10, 55.99),
    }, PAPER_1024),
    *_rows("xversebench", _XVERSEBENCH, "Table 2", {
        "MS-Diffusion": (96.89, 6.52, 55.71, 59.63, 54.69),
        "UNO": (89.65, 47.91, 80.40, 55.90, 68.47),
        "DreamO": (96.93, 75.48, 70.84, 54.57, 74.46),
        "OmniGen2": (92.60, 62.41, 74.08, 52.34, 70.36),
        "XVerse": (93.69, 79.48, 76.86, 56.84, 76.72),
    }),
    *_rows("xversebench", _XVERSEBENCH, "Table 2", {"MOSAIC": (96.55, 81.98, 80.92, 60.77, 80.05)}, PAPER_1024),
    *_rows("xversebench", _XVERSEBENCH, _ISSUE, {"MOSAIC, released": (94.22, 64.67, 73.93, 57.32, 72.54)}, _ISSUE_PROTOCOL),
    *_rows("xversebench_multi", _XVERSEBENCH, "Table 2", {
        "MS-Diffusion": (87.21, 3.77, 46.21, 55.91, 48.28),
        "UNO": (85.28, 31.82, 67.00, 54.24, 59.59),
        "DreamO": (88.80, 50.24, 64.63, 52.47, 64.04),
        "OmniGen2": (91.55, 40.81, 67.15, 51.40, 62.73),
        "XVerse": (88.26, 66.59, 71.48, 53.97, 70.08),
    }),
    *_rows("xversebench_multi", _XVERSEBENCH, "Table 2", {"MOSAIC": (88.94, 69.90, 74.27, 55.02, 72.03)}, PAPER_1024),
    *_rows("xversebench_multi", _XVERSEBENCH, _ISSUE, {"MOSAIC, released": (90.14, 39.39, 66.24, 55.26, 62.76)}, _ISSUE_PROTOCOL),
)  # fmt: skip


def published_for(benchmark: str) -> list[Published]:
    """The rows of a benchmark, in the order of their tables."""
    return [row for row in PUBLISHED if row.benchmark == benchmark]


def overall(single: Mapping[str, float], multi: Mapping[str, float]) -> float:
    """XVerseBench's Overall: the mean of its two AVG, each the mean of DPG, ID-Sim, IP-Sim and AES."""
    return (average(single) + average(multi)) / 2


def average(values: Mapping[str, float]) -> float:
    """XVerseBench's AVG."""
    return sum(values[metric] for metric in AVERAGED) / len(AVERAGED)
