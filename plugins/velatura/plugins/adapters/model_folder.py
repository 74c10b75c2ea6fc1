"""A model folder as diffusers saves it: found, checked, and loaded part by part."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from velatura.api import Context, VelaturaError
from velatura.plugins.adapters.processors import IMAGE_ONLY, load_processor
from velatura.plugins.adapters.quiet import without_bars

INDEX = "model_index.json"
WANTED = (INDEX, "LICENSE*", "*/*")
"""What is fetched from the hub: the parts, and not the one large file that often lies beside them."""
UNWANTED = ("*.fp16.*", "*.fp16-*", "*.bin", "*.ckpt", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx*", "*.gguf")
"""What is not: other variants and formats of the same weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a transformer's configuration says of it, without its weights."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of every parameter."""

    @property
    def parameters(self) -> int:
        """How many numbers there are to train."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def trainable(self, rank: int | None, targets: Sequence[str]) -> int:
        """Of these, or of the LoRA weights of `rank` on the layers `targets`."""
        if rank is None:
            return self.parameters
        layers = [
            shape
            for name, shape in self.shapes.items()
            if len(shape) == 2
            and any(name.removesuffix(".weight").endswith(f".{t}") or name == f"{t}.weight" for t in targets)
        ]
        return rank * sum(sum(shape) for shape in layers)


@dataclass(frozen=True)
class ModelFolder:
    """One folder on this machine."""

    path: Path
    index: Mapping[str, Any]
    """model_index.json."""

    @property
    def pipeline_class(self) -> str:
        """The stock pipeline's class."""
        return str(self.index["_class_name"])

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a part."""
        path = self.path / part / "config.json"
        if not path.is_file():
            raise VelaturaError(f"{self.path} has no {part}: there is no {path}. Was the folder copied to the end?")
        return _json(path)

    def transformer_class(self) -> Any:
        """The stock class of the transformer."""
        import diffusers

        with without_bars():
            return getattr(diffusers, self.index["transformer"][1])

    def transformer(self, dtype: torch.dtype) -> nn.Module:
        """The transformer with its weights."""
        self.config("transformer")
        with without_bars():
            loaded = self.transformer_class().from_pretrained(
                self.path, subfolder="transformer", dtype=dtype, local_files_only=True
            )
        return cast("nn.Module", loaded.train(False))

    def facts(self) -> Facts:
        """Shapes of the transformer's parameters; no weight is read."""
        with torch.device("meta"):
            net = self.transformer_class().from_config(self.config("transformer"))
        return Facts(shapes={name: tuple(p.shape) for name, p in net.named_parameters()})

    def blank(self, part: str, dtype: torch.dtype) -> nn.Module:
        """A part without its weights, on the meta device."""
        import diffusers

        with torch.device("meta"):
            net: nn.Module = getattr(diffusers, self.index[part][1]).from_config(self.config(part))
        one_by_one(net.train(False).requires_grad_(part == "transformer"))
        return nn.Module.to(net, dtype)  # the stock class would warn where nothing is cast

    def frozen_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """Part beside the transformer -> bytes of its weights in `dtype`, from the heads of its files."""
        found = {}
        for part in self.index:
            files = [] if part == "transformer" else _weights(self.path / part)
            if files:
                found[part] = sum(map(_numbers, files)) * dtype.itemsize
        return found

    def scheduler(self) -> Any:
        """A fresh scheduler: setting its times changes it."""
        return self._scheduler_class.from_config(self._scheduler_config)

    @cached_property
    def _scheduler_class(self) -> Any:
        import diffusers

        return getattr(diffusers, self.index["scheduler"][1])

    @cached_property
    def _scheduler_config(self) -> dict[str, Any]:
        return _json(self.path / "scheduler" / "scheduler_config.json")

    def pipeline(self, dtype: torch.dtype) -> Any:
        """The stock pipeline without its transformer, on the CPU."""
        import diffusers

        parts: dict[str, Any] = {"transformer": None}
        for part, value in self.index.items():
            if isinstance(value, list) and value[1] is None:  # an optional part that this model does without
                parts[part] = None
            elif isinstance(value, list) and value[1] in IMAGE_ONLY:
                parts[part] = load_processor(self.path / part, value[1])
        with without_bars():
            found: Any = getattr(diffusers, self.pipeline_class)
            pipe = found.from_pretrained(self.path, dtype=dtype, local_files_only=True, **parts)
        pipe.set_progress_bar_config(disable=True)
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                one_by_one(module.requires_grad_(False).train(False))
        return pipe


def _json(path: Path) -> dict[str, Any]:
    """What a configuration says.

    Raises:
        VelaturaError: it is not there, or cut off.
    """
    try:
        return cast("dict[str, Any]", json.loads(path.read_text()))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise VelaturaError(f"{path} cannot be read: {error}. Was the folder copied to the end?") from error


def one_by_one(module: nn.Module) -> None:
    """Let an autoencoder take the pictures of a batch one after the other: for several, it needs more memory than
    anything else in a round, and it is as fast."""
    if hasattr(module, "use_slicing"):
        cast("Any", module).use_slicing = True


def _weights(folder: Path) -> list[Path]:
    """The files that stock classes read where no variant is asked for: not those of `model.fp16.safetensors`."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if "." not in file.stem.split("-")[0]] or files


def _numbers(file: Path) -> int:
    """How many numbers a safetensors file holds."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        names = opened.keys()
        return sum(math.prod(opened.get_slice(name).get_shape()) for name in names)


def open_folder(
    given: str, revision: str | None, context: Context | None, adapter: str, pipelines: Sequence[str]
) -> ModelFolder:
    """The model folder `given`, on disk or fetched from the hub.

    Raises:
        VelaturaError: it is not there, is no model folder, or holds a pipeline that `adapter` does not stand for.
    """
    local = context.resolve(given) if context is not None else Path(given)
    path = local if local.exists() else _fetch(given, revision, local)
    if not (path / INDEX).is_file():
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "it is a file"
        raise VelaturaError(
            f"{path} is no model folder: it has no {INDEX} (there is: {inside or 'nothing'}). Give the folder that "
            "diffusers' save_pretrained of a whole pipeline wrote."
        )
    index = _json(path / INDEX)
    found = str(index.get("_class_name"))
    if found not in pipelines:
        raise VelaturaError(
            f"{path} holds a {found}, and adapter '{adapter}' stands for {', '.join(pipelines)}.{_other(found)}"
        )
    return ModelFolder(path=path, index=index)


def _other(found: str) -> str:
    """Which adapter to take instead."""
    for name, classes in FAMILIES.items():
        if found in classes:
            return f" Use adapter '{name}'."
    supported = {pipeline: name for name, classes in FAMILIES.items() for pipeline in classes}
    near = nearest(found, supported)
    hint = f" Did you mean {near!r}? It is opened by adapter '{supported[near]}'." if near else ""
    known = ", ".join(f"{pipeline} ('{name}')" for pipeline, name in supported.items())
    return f"{hint} Or try adapter 'diffusers-flow', which takes other families by their shape. There is: {known}."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant."""
    return next(iter(get_close_matches(name, list(known), n=1)), None)


def _fetch(given: str, revision: str | None, local: Path) -> Path:
    """Download a model from the hub, unless it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(given, revision=revision, allow_patterns=[*WANTED], ignore_patterns=[*UNWANTED])
        return Path(found)
    except HFValidationError as error:
        raise VelaturaError(f"there is no model folder {local}. Paths start at the folder of the recipe.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise VelaturaError(
            f"there is no model folder {local}, and {given!r} cannot be fetched from the hub: {_said(error)}. Check "
            "the name, log in with `hf auth login` if the model is gated, or give the path of a folder."
        ) from error


def _said(error: Exception) -> str:
    """What the hub's client says, on one line and without a full stop."""
    return " ".join(str(error).split()).rstrip(". ")


FAMILIES: Mapping[str, tuple[str, ...]] = {
    "qwen-image-21": ("QwenImage21Pipeline",),
    "qwen-image": ("QwenImagePipeline",),
    "qwen-image-edit-plus": ("QwenImageEditPlusPipeline",),
    "sd3": ("StableDiffusion3Pipeline",),
    "flux": ("FluxPipeline", "FluxKontextPipeline"),
    "flux2": ("Flux2Pipeline", "Flux2KleinPipeline"),
    "z-image": ("ZImagePipeline",),
    "sana": ("SanaPipeline",),
}
"""Adapter -> the pipelines it stands for: for messages."""
