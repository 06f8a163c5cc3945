"""LoRAs as other programs write them, made from LoRAs in diffusers' keys: an independent twin of what is read."""

import torch
from torch import Tensor

DOUBLE_STREAM = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE_STREAM = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}


def place(module: str) -> tuple[str, tuple[str, ...]]:
    """The matrix of FLUX's original code in which a module of diffusers lies, and the modules that lie there, in their order."""
    ours, _, rest = module.partition("transformer_blocks.")
    if not rest:
        return next((name, parts) for name, parts in OUTSIDE.items() if module in parts)
    index, _, layer = rest.partition(".")
    table, head = (SINGLE_STREAM, "single") if ours else (DOUBLE_STREAM, "double")
    name, parts = next((name, parts) for name, parts in table.items() if layer in parts)
    return f"{head}_blocks.{index}.{name}", tuple(f"{ours}transformer_blocks.{index}.{part}" for part in parts)


def in_style(tensors: dict[str, Tensor], style: str) -> dict[str, Tensor]:
    """`transformer.<module>.lora_A.weight` and `.lora_B.weight` in the keys of "kohya", "comfyui", "fal" or "diffusers".

    A of the modules of one matrix stacked, B on a block diagonal (rows of zeros for a module without a LoRA); kohya's and ComfyUI's get an
    alpha, the rank.
    """
    if style == "diffusers":
        return dict(tensors)
    prefix = {"kohya": "lora_unet_", "comfyui": "diffusion_model.", "fal": "base_model.model."}[style]
    down, up = ("lora_A", "lora_B") if style == "fal" else ("lora_down", "lora_up")
    result = {}
    for name, parts in dict.fromkeys(place(key.split(".", 1)[1].removesuffix(".lora_A.weight")) for key in tensors if ".lora_A." in key):
        pairs = [(tensors.get(f"transformer.{part}.lora_A.weight"), tensors.get(f"transformer.{part}.lora_B.weight")) for part in parts]
        a = torch.cat([a for a, _ in pairs if a is not None])
        if len(parts) > 1:
            widths = [a.shape[1] * (4 if part.endswith("proj_mlp") else 1) for part in parts]
            b = block_diagonal([torch.zeros(w, 0) if b is None else b for (_, b), w in zip(pairs, widths, strict=True)])
        else:
            b = pairs[0][1]
            b = torch.cat(b.chunk(2)[::-1]) if parts == ("norm_out.linear",) else b  # (scale, shift) is (shift, scale) there
        stem = prefix + (name.replace(".", "_") if style == "kohya" else name)
        result |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b}
        if style != "fal":
            result[f"{stem}.alpha"] = torch.tensor(float(len(a)))
    return result


def block_diagonal(blocks: list[Tensor]) -> Tensor:
    """As `torch.block_diag`, which takes no block without columns."""
    columns = [block.shape[1] for block in blocks]
    rows = [
        torch.cat([block if i == j else block.new_zeros(len(block), count) for j, count in enumerate(columns)], dim=1)
        for i, block in enumerate(blocks)
    ]
    return torch.cat(rows)
