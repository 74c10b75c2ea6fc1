"""The folder that a trained tiny world leaves: stock classes, plain files, and a script that draws."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from velatura.plugins.adapters.export_folder import MARK, replacing
from velatura.plugins.adapters.qwen_image_21_network import export_transformer
from velatura.plugins.tinyworld import vae, words

SCRIPT = Path(__file__).with_name("tinyworld_sample.py")


def write_export(
    net: nn.Module, folder: Path, *, autoencoder: vae.PcaVae, shift: float, info: Mapping[str, Any]
) -> None:
    """Write everything to a hidden sibling, then rename: `folder` is never half an export."""
    with replacing(folder) as draft:
        draft.mkdir()
        _write(net, draft, autoencoder=autoencoder, shift=shift, info=info)


def _write(net: nn.Module, folder: Path, *, autoencoder: vae.PcaVae, shift: float, info: Mapping[str, Any]) -> None:
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler
    from safetensors.torch import save_file

    export_transformer(net, folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder / "scheduler")
    vae.save(autoencoder.cpu(), folder / "vae.safetensors")
    save_file({"table": words.table()}, folder / "words.safetensors")
    _write_json(folder / "words.json", {"words": words.VOCABULARY, "length": words.LENGTH, "context": words.CONTEXT})
    classes = {
        "_class_name": "QwenImage21Pipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
    }
    _write_json(folder / "model_index.json", classes)
    facts = {"adapter": "tinyworld", **info, "steps": info.get("steps", 20)}
    if info.get("guidance_scale") is None:  # the network alone, which is what a model without a recipe is
        facts["guidance_scale"] = 1.0
    _write_json(folder / MARK, facts)
    shutil.copyfile(SCRIPT, folder / "sample.py")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")
