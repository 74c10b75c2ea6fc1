"""Tiny random weights in the layouts that preference models are published in, and what they should score."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import tiny_clip


class Block(nn.Module):
    """A block of open_clip's transformers, with the names that its files have."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 24))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(24, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Eye(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(16))
        self.positional_embedding = nn.Parameter(torch.randn(17, 16))
        self.conv1 = nn.Conv2d(3, 16, 8, stride=8, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(16), nn.LayerNorm(16)
        self.transformer = Transformer(16, 2, 2)
        self.proj = nn.Parameter(torch.randn(16, 16))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """A CLIP as open_clip builds it (pre-norm, GELU, the text pooled where it ends)."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.visual = Eye()
        self.token_embedding = nn.Embedding(words, 16)
        self.positional_embedding = nn.Parameter(torch.randn(77, 16))
        self.transformer = Transformer(16, 2, 2)
        self.ln_final = nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.randn(16, 16))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def cosine(self, pixels: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]], mask)
        text = self.ln_final(x)[torch.arange(len(ids)), ends] @ self.text_projection
        return torch.cosine_similarity(self.visual(pixels), text)


def hps(folder: Path) -> OpenClip:
    """A base that sees 32 x 32 pixels in `base`, and other weights for it in open_clip's layout in `hps.pt`."""
    from transformers import CLIPConfig

    base = tiny_clip.clip(folder / "base")
    config = CLIPConfig.from_pretrained(base)
    config.text_config.hidden_act = config.vision_config.hidden_act = "gelu"
    config.save_pretrained(base)
    torch.manual_seed(5)
    net = OpenClip(config.text_config.vocab_size).eval()
    torch.save({"state_dict": net.state_dict()}, folder / "hps.pt")
    return net


def head(width: int, prefix: str, gaps: tuple[int, ...]) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """Linear layers alone, and their weights under the numbers that dropout leaves them."""
    torch.manual_seed(6)
    widths = [width, 12, 8, 6, 4, 1]
    made = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    names = zip(gaps, made, strict=True)
    return made, {f"{prefix}.{i}.{key}": value for i, layer in names for key, value in layer.state_dict().items()}


def bert_tokenizer(folder: Path) -> int:
    """An uncased BERT tokenizer of letters; how many words it has."""
    from transformers import BertTokenizer

    letters = [chr(code) for code in range(97, 123)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return len(words)


EYE_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "post_layernorm": "norm",
}


def _published(name: str) -> str:
    """The name that BLIP's own code gives a tensor of the vision transformer."""
    for ours, theirs in EYE_NAMES.items():
        if name.startswith(ours):
            return name.replace(ours, theirs)
    for ours, theirs in {"encoder.layers": "blocks", "self_attn.projection": "attn.proj", "self_attn.qkv": "attn.qkv",
                         "layer_norm1": "norm1", "layer_norm2": "norm2"}.items():  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def image_reward(folder: Path) -> tuple[Any, Any, nn.Sequential]:
    """A folder like THUDM/ImageReward with a tokenizer, and its eye, reader and head as plain modules."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    words = bert_tokenizer(folder / "words")
    sizes = {"vocab_size": words, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 40, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
             "pad_token_id": 0, "encoder_width": 16}  # fmt: skip
    torch.manual_seed(7)
    eye = BlipVisionModel(BlipVisionConfig(
        hidden_size=128, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16,
        layer_norm_eps=1e-6,
    )).eval()  # fmt: skip
    known = {name: value for name, value in sizes.items() if name != "encoder_width"}
    reader = BlipTextModel(
        BlipTextConfig(**known, bos_token_id=0, eos_token_id=0, sep_token_id=0, encoder_hidden_size=128),
        add_pooling_layer=False,
    ).eval()
    with torch.no_grad():
        for weight in [*eye.parameters(), *reader.parameters()]:
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape) * 0.3)
    mlp, weights = head(16, "mlp.layers", (0, 2, 4, 6, 7))
    weights |= {f"blip.visual_encoder.{_published(name)}": value for name, value in eye.state_dict().items()}
    weights |= {f"blip.text_encoder.{name}": value for name, value in reader.state_dict().items()}
    weights |= {
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
        "blip.vision_proj.bias": mlp[0].bias,
    }
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(sizes))
    return eye, reader, mlp


def save(path: Path, weights: Mapping[str, Tensor]) -> Path:
    """A safetensors file."""
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, path)
    return path
