from typing import Any

from torch import Tensor, nn

class TimestepEmbedding(nn.Module):
    linear_1: nn.Linear
    linear_2: nn.Linear
    act: nn.Module

class TextProjection(nn.Module):
    linear_1: nn.Linear
    linear_2: nn.Linear
    act_1: nn.Module

class CombinedTimestepGuidanceTextProjEmbeddings(nn.Module):
    time_proj: nn.Module
    timestep_embedder: TimestepEmbedding
    guidance_embedder: TimestepEmbedding
    text_embedder: TextProjection

def apply_rotary_emb(x: Tensor, freqs_cis: tuple[Tensor, Tensor], sequence_dim: int = 2, **kwargs: Any) -> Tensor: ...
