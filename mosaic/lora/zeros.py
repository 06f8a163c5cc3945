"""Whether a LoRA file changes anything at all, from its bytes. Needs no torch."""

import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

ALL_ZERO = "all its values are zero, so it changes nothing: float16 makes small numbers zero, and a fresh adapter starts at zero"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_PARTNERS = {".lora_B": ".lora_A", ".lora_up": ".lora_down", ".up.": ".down."}


def changes_nothing(path: str | os.PathLike) -> bool:
    """Whether A or B is zero in every module of a LoRA file of any key style; it reads up to the first module that changes something.

    A file without such matrices, or in number formats that no LoRA has, is not said to be zero.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file, or is cut off.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="np"):  # checks header and offsets
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}).") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))

        def acts(key: str) -> bool:
            begin, end = header[key]["data_offsets"]
            width = _BYTES.get(header[key]["dtype"])
            file.seek(8 + size + begin)
            return width is None or bool((np.frombuffer(file.read(end - begin), f"<u{width}") << 1).any())  # without the sign: -0 is zero

        pairs = [(key, key.replace(up, down)) for key in header for up, down in _PARTNERS.items() if up in key]
        return bool(pairs) and not any(down in header and acts(down) and acts(up) for up, down in pairs)
