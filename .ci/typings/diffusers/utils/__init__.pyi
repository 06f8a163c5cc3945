from collections import OrderedDict
from typing import Any

from diffusers.utils import logging as logging
from torch import nn

class BaseOutput(OrderedDict[str, Any]): ...

def recurse_remove_peft_layers(model: nn.Module) -> nn.Module: ...
