"""What the pictures of a call are made from besides noise, and their groups of equal K."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from mosaic.method.grids import Grid
from mosaic.method.tokens import pack_latents
from mosaic.pipeline.attention_report import AttentionRecorder, subject_tokens
from mosaic.pipeline.encoders import PromptEmbeddings
from mosaic.pipeline.sampler import Group, ReferenceGroup


@dataclass(frozen=True)
class Conditions:
    """Encoded prompts and references, one entry per prompt.

    Attributes:
        text: Embeddings of the prompts.
        references: Per prompt latents [K, C, h, w] (posterior mode, shifted and scaled), or None without references.
        prepared: Per prompt its prepared pictures; none where there are no references, or latents were given.
        strengths: Per prompt one number per reference.
    """

    text: PromptEmbeddings
    references: Sequence[Tensor | None]
    prepared: Sequence[Sequence[Image.Image]]
    strengths: Sequence[Sequence[float]]

    def groups(self, num_images_per_prompt: int) -> list[list[int]]:
        """Numbers of the pictures, those of equal K together, in order of first appearance; prompts outermost in the numbers."""
        # Sequences of one batch have one length, and masks would rule out the fast attention kernels: pictures of unequal K run apart.
        groups: dict[int, list[int]] = {}
        for prompt, latents in enumerate(self.references):
            first = prompt * num_images_per_prompt
            groups.setdefault(0 if latents is None else len(latents), []).extend(range(first, first + num_images_per_prompt))
        return list(groups.values())

    def group(self, pictures: Sequence[int], num_images_per_prompt: int, noise: Tensor, grid: Grid, with_attention: bool) -> Group:
        """The batch of pictures of equal K.

        Args:
            pictures: Their numbers, one member of `groups`.
            num_images_per_prompt: Pictures per prompt.
            noise: Packed start noise of all pictures, [B, N, C].
            grid: Grid of N.
            with_attention: Whether the attention of every step is to be recorded.
        """
        prompts = [picture // num_images_per_prompt for picture in pictures]
        references = self._reference_group(prompts, noise, with_attention)
        return Group(noise[pictures], self.text.prompt_embeds[prompts], self.text.pooled[prompts], references, grid)

    def _reference_group(self, prompts: Sequence[int], noise: Tensor, with_attention: bool) -> ReferenceGroup | None:
        latents = [found for found in (self.references[prompt] for prompt in prompts) if found is not None]
        if not latents:
            return None
        stacked = torch.stack(latents)  # [B, K, C, h, w]
        grid = Grid(stacked.shape[-2] // 2, stacked.shape[-1] // 2)
        packed = pack_latents(stacked.flatten(0, 1)).unflatten(0, stacked.shape[:2]).to(noise)
        strengths = [self.strengths[prompt] for prompt in prompts]
        # Strengths widen the heads by 8 channels, which costs time and last bits: not where they change nothing.
        all_one = all(strength == 1 for row in strengths for strength in row)
        return ReferenceGroup(
            packed,
            grid,
            None if all_one else torch.tensor(strengths, device=noise.device),
            AttentionRecorder([self._subjects(prompt, grid, noise.device) for prompt in prompts]) if with_attention else None,
        )

    def _subjects(self, prompt: int, grid: Grid, device: torch.device) -> Tensor:
        """bool [K, N_ref], the tokens that the subjects cover: all where latents were given."""
        # There is no picture whose white could be told from the subject.
        if not self.prepared[prompt]:
            return torch.ones(len(self.strengths[prompt]), grid.num_tokens, dtype=torch.bool, device=device)
        return torch.stack([subject_tokens(picture, grid) for picture in self.prepared[prompt]]).to(device)
