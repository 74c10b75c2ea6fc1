"""A trained model as the folder that stock diffusers loads, and its LoRA weights alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from velatura.plugins.adapters.export_folder import MARK, replacing
from velatura.plugins.adapters.lora import LORA_NAME, merged_state, unwrap
from velatura.plugins.adapters.model_folder import INDEX, ModelFolder
from velatura.plugins.adapters.processors import name_stock_classes
from velatura.plugins.adapters.quiet import without_bars


def write_pipeline(net: nn.Module, folder: Path, source: ModelFolder, info: Mapping[str, Any]) -> None:
    """Write everything to a hidden sibling, then rename: `folder` is never half an export.

    The frozen parts are copied from `source` file by file; the transformer is the stock class with merged weights.

    Raises:
        VelaturaError: `folder` holds something else.
    """
    with without_bars(), replacing(folder) as draft:
        _copy_frozen(source, draft)
        _write_transformer(net, draft / "transformer", source)
        _write_lora(net, draft / "lora", source)
        name_stock_classes(draft)
        (draft / MARK).write_text(json.dumps(dict(info), indent=2, default=str) + "\n")


def _copy_frozen(source: ModelFolder, folder: Path) -> None:
    """Every part but the transformer, the index and the licence; not what else lies there, such as one file with the
    weights of everything, which would still be the old ones."""
    folder.mkdir(parents=True)
    for path in source.path.iterdir():
        if path.is_dir() and path.name in source.index and path.name != "transformer":
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns(".*"))
        elif path.is_file() and (path.name == INDEX or path.name.upper().startswith(("LICENSE", "NOTICE"))):
            shutil.copy(path, folder)


def _write_transformer(net: nn.Module, folder: Path, source: ModelFolder) -> None:
    """Merged weights, in the precision of `net`."""
    with torch.device("meta"):
        plain = source.transformer_class().from_config(source.config("transformer"))
    state = {name: tensor.cpu().contiguous() for name, tensor in merged_state(net).items()}
    plain.load_state_dict(state, assign=True)
    plain.save_pretrained(folder, safe_serialization=True)


def _write_lora(net: nn.Module, folder: Path, source: ModelFolder) -> None:
    """`pytorch_lora_weights.safetensors`, where there are LoRA weights."""
    from peft import get_peft_model_state_dict

    network = unwrap(net)
    if LORA_NAME not in getattr(network, "peft_config", {}):
        return
    import diffusers

    pipeline: Any = getattr(diffusers, source.pipeline_class)
    if not hasattr(pipeline, "save_lora_weights"):
        return  # a pipeline class that loads none; the merged transformer has them
    layers = get_peft_model_state_dict(network, adapter_name=LORA_NAME)
    options = {"transformer_lora_layers": {name: tensor.cpu().contiguous() for name, tensor in layers.items()}}
    config = network.peft_config[LORA_NAME]
    if config.lora_alpha != config.r:
        options["transformer_lora_adapter_metadata"] = config.to_dict()
    pipeline.save_lora_weights(folder, **options)
