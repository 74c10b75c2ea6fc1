"""Tiny random Qwen2-VL and Qwen2.5-VL judges with reward heads, saved as the published ones were."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "judge"))
sys.path.insert(0, str(Path(__file__).parents[1] / "adapters" / "families"))

from parts import qwen_tokenizer
from qwen_image import text_encoder as qwen25
from tiny_models import qwen_processor

QUESTIONS = '''import nothing_that_exists
INSTRUCTION = """
How good is it?
Textual prompt - {text_prompt}
"""
INSTRUCTION_EDIT_FOLLOWING = """Was it followed? {text_prompt}"""
INSTRUCTION_EDIT_QUALITY = """How does it look? {text_prompt}"""
prompt_with_special_token = """
Rate: <|Reward|>

END
"""
raise RuntimeError("this file must be read and not run")
'''


def qwen2(tokenizer: Any) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 14},
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
    ))  # fmt: skip


def head() -> nn.Sequential:
    """As the authors build it: dropout is third."""
    made = nn.Sequential(
        nn.Linear(16, 12), nn.ReLU(), nn.Dropout(0.05), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2)
    ).eval()  # fmt: skip
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(3)
    return made


def old_name(name: str) -> str:
    """The name that transformers 4.45 gave a weight."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def save(folder: Path, family: str, heads: dict[str, nn.Sequential], file: str) -> Any:
    """A base folder, the authors' file, and a checkpoint with one more word and heads; gives the network back."""
    tokenizer = qwen_tokenizer()
    torch.manual_seed(8)
    net = {"Qwen2VLProcessor": qwen2, "Qwen2_5_VLProcessor": qwen25}[family](tokenizer)
    net.save_pretrained(folder / "base")
    qwen_processor(family, 14, tokenizer).save_pretrained(folder / "base")
    config = folder / "base" / "processor_config.json"
    config.write_text(config.read_text().replace('"ImageOnly', '"'))
    net.resize_token_embeddings(len(tokenizer) + 1, mean_resizing=False)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape) * 0.3)
    weights = {old_name(name): value.clone() for name, value in net.state_dict().items()}
    weights |= {f"{prefix}{name}": v.clone() for prefix, made in heads.items() for name, v in made.state_dict().items()}
    save_file(weights, folder / file)
    return net.eval()
