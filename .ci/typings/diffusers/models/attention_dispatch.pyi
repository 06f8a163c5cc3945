from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

def attention_backend(backend: str) -> AbstractContextManager[None]: ...
def dispatch_attention_fn(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor: ...
