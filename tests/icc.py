"""ICC profiles made by hand, and their colours in sRGB by the formulas of the standard (ICC.1, IEC 61966-2-1)."""

import struct

import numpy as np

SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
"""XYZ of red, green and blue, adapted to D50."""
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


def rgb_profile(name: str, colorants: tuple = DISPLAY_P3, gamma: float = 2.2) -> bytes:
    tags = {f"{channel}XYZ": _xyz(colour) for channel, colour in zip("rgb", colorants, strict=True)}
    return _profile("RGB ", name, tags | {f"{channel}TRC": _curve(gamma) for channel in "rgb"})


def grey_profile(name: str, gamma: float) -> bytes:
    return _profile("GRAY", name, {"kTRC": _curve(gamma)})


def cmyk_profile(name: str) -> bytes:
    """Of one ink, black: L* = 100 (1 - K), whatever the others are."""
    tables = bytes(range(256))
    corners = b"".join(struct.pack(">3B", 0 if number & 1 else 255, 128, 128) for number in range(16))  # the last input changes fastest
    identity = struct.pack(">9i", *(65536 * (row == column) for row in range(3) for column in range(3)))
    return _profile("CMYK", name, {"A2B0": b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * tables + corners + 3 * tables}, "Lab ")


def in_srgb(values: np.ndarray, colorants: tuple = DISPLAY_P3, gamma: float = 2.2) -> np.ndarray:
    """RGB values [..., 3] of 0 to 255 of such a profile, in sRGB, float."""
    linear = (values / 255) ** gamma @ np.array(colorants) @ np.linalg.inv(np.array(SRGB))
    return encoded(linear)


def encoded(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _profile(space: str, name: str, tags: dict[str, bytes], connection: str = "XYZ ") -> bytes:
    tags = {
        "desc": b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name.encode() + bytes(79),
        "wtpt": _xyz((0.9642, 1, 0.8249)),
    } | tags
    tags |= {"cprt": b"text" + bytes(4) + b"none\0"}
    table, content, start = b"", b"", 132 + 12 * len(tags)
    for tag, value in tags.items():
        table += tag.encode() + struct.pack(">II", start + len(content), len(value))
        content += value + bytes(-len(value) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(content), b"none", 0x02100000, b"mntr", space.encode(), connection.encode())
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _xyz((0.9642, 1, 0.8249))[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + content


def _xyz(colour: tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * part) for part in colour))


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma))
