"""Qwen vision-language processors that need no torchvision, and every other one as it is.

The stock classes insist on a video processor, which exists only with torchvision. A processor's parts are read off the
signature of its `__init__`, so a subclass that does not mention videos loads the same folder without one.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

IMAGE_ONLY = {
    "Qwen2VLProcessor": "Qwen2VLProcessor",
    "Qwen2_5_VLProcessor": "Qwen2_5_VLProcessor",
    "Qwen3VLProcessor": "Qwen3VLProcessor",
}
"""Stock classes that are replaced where they cannot be loaded; exported folders name the stock ones."""
_TOKENS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}


@cache
def image_only(name: str) -> type[Any]:
    """The stock processor class `name` without its video part."""
    import transformers
    from transformers.processing_utils import ProcessorMixin

    stock = getattr(transformers, name)

    def __init__(
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **ignored: Any
    ) -> None:
        for part, token in _TOKENS.items():
            setattr(self, f"{part}_token", token)
            setattr(self, f"{part}_token_id", tokenizer.convert_tokens_to_ids(token))
        start: Any = ProcessorMixin.__init__
        start(self, image_processor, tokenizer, chat_template=chat_template)

    return type(f"ImageOnly{name}", (stock,), {"__init__": __init__, "__module__": __name__})


def load_processor(folder: Path, name: str) -> Any:
    """The processor of a model folder; `name` is the stock class that its `model_index.json` asks for."""
    return image_only(name).from_pretrained(folder)


def name_stock_classes(folder: Path) -> None:
    """Let the `model_index.json` of an exported pipeline name the classes that everybody has."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    for part, value in index.items():
        if isinstance(value, list) and str(value[1]).startswith("ImageOnly"):
            index[part] = ["transformers", str(value[1]).removeprefix("ImageOnly")]
    path.write_text(json.dumps(index, indent=2) + "\n")
    for config in folder.glob("*/processor_config.json"):
        content = json.loads(config.read_text())
        if str(content.get("processor_class", "")).startswith("ImageOnly"):
            content["processor_class"] = content["processor_class"].removeprefix("ImageOnly")
            config.write_text(json.dumps(content, indent=2) + "\n")
