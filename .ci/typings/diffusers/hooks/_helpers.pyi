from typing import Any

class TransformerBlockMetadata:
    def __init__(self, **settings: Any) -> None: ...

class TransformerBlockRegistry:
    @classmethod
    def register(cls, model_class: type, metadata: TransformerBlockMetadata) -> None: ...
    @classmethod
    def get(cls, model_class: type) -> TransformerBlockMetadata: ...
