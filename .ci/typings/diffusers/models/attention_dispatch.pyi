from contextlib import AbstractContextManager
from enum import Enum
from typing import Any

from torch import Tensor

class AttentionBackendName(Enum):
    NATIVE = "native"
    _NATIVE_MATH = "_native_math"

def attention_backend(backend: str | AttentionBackendName) -> AbstractContextManager[None]: ...
def dispatch_attention_fn(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor: ...
