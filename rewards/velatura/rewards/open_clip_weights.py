"""The names that open_clip gives the weights of a CLIP, and those that transformers gives them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

FIXED = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TURNED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
"""Matrices that are applied from the right there, and from the left here."""
BLOCKS = {
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
}
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
DERIVED = {"attn_mask"}
"""Kept in old files, and made anew here."""


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an open_clip CLIP by the names of `transformers.CLIPModel`; unknown names stay as they are."""
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name in DERIVED:
            continue
        if name in TURNED:
            made[TURNED[name]] = value.T.contiguous()
            continue
        prefix = next((one for one in BLOCKS if name.startswith(one)), None)
        if prefix is None:
            made[FIXED.get(name, name)] = value
        else:
            made |= _of_block(BLOCKS[prefix], name.removeprefix(prefix), value)
    return made


def _of_block(prefix: str, name: str, value: Tensor) -> dict[str, Tensor]:
    """One tensor of a block; the three matrices of the attention lie in one there."""
    number, _, rest = name.partition(".")
    stem, _, end = rest.rpartition(".")
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"{prefix}{number}.self_attn.{letter}_proj.{kind}": part.contiguous() for letter, part in parts}
    return {f"{prefix}{number}.{IN_BLOCK.get(stem, stem)}.{end}": value}
