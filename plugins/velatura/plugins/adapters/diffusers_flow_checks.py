"""What can be said of a family from its classes, signatures and configurations, without loading it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from velatura.core.errors import suggest
from velatura.plugins.adapters.model_folder import ModelFolder

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
NEEDED: Mapping[str, tuple[str, ...]] = {
    "__call__": ("prompt", "height", "width", "num_inference_steps", "num_images_per_prompt", "generator", "latents",
                 "output_type", "return_dict"),
    "encode_prompt": ("prompt",),
    "prepare_latents": ("batch_size", "generator", "dtype", "device"),
}  # fmt: skip
"""Methods of a pipeline that can be followed, and arguments that they must have."""
KNOBS = ("true_cfg_scale", "guidance_scale", "distilled_guidance_scale")
"""Arguments of a pipeline's call that hold a guidance scale: the first that makes two branches is the true one."""


class AnyPipeline(tuple[str, ...]):
    """Every class of pipeline: whether it can be followed is seen later."""

    __slots__ = ()

    def __contains__(self, name: object) -> bool:
        return True


def unusual(folder: ModelFolder) -> str:
    """Why the family of `folder` cannot be followed, or nothing."""
    import diffusers

    parts = {name: value[1] for name, value in folder.index.items() if isinstance(value, list)}
    for part in ("scheduler", "transformer", "vae"):
        if parts.get(part) is None:
            return f"it has no {part}."
    if parts["scheduler"] != SCHEDULER:
        return f"its scheduler is {parts['scheduler']}, and only {SCHEDULER} is supported."
    if not hasattr(diffusers, folder.pipeline_class):
        known = [name for name in dir(diffusers) if name.endswith("Pipeline")]
        return f"diffusers has no such class.{suggest(folder.pipeline_class, known)}"
    return _unusual_pipeline(getattr(diffusers, folder.pipeline_class)) or _unusual_transformer(folder)


def _unusual_pipeline(pipeline: Any) -> str:
    for method, needed in NEEDED.items():
        if not hasattr(pipeline, method):
            return f"it has no method `{method}`."
        parameters = inspect.signature(getattr(pipeline, method)).parameters
        if missing := [name for name in needed if name not in parameters]:
            return f"its `{method}` has no argument {', '.join(map(repr, missing))}."
    call = inspect.signature(pipeline.__call__).parameters.values()
    unknown = [one.name for one in call if one.default is one.empty and one.name not in ("self", "prompt")]
    if unknown:
        return f"its call needs {', '.join(map(repr, unknown))}, and only text can be given."
    return ""


def _unusual_transformer(folder: ModelFolder) -> str:
    transformer = folder.transformer_class()
    parameters = inspect.signature(transformer.forward).parameters
    for name in ("hidden_states", "timestep"):
        if name not in parameters:
            there = ", ".join(list(parameters)[1:])
            return f"the forward of its {transformer.__name__} has no argument {name!r}; there is: {there}."
    return ""


def scalings(config: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Scale and shift, each [1 C 1 1] or [1 1 1 1], that the configuration of an autoencoder may mean."""
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and deviation is not None:
        yield _per_channel(deviation), _per_channel(mean)
    if factor := config.get("scaling_factor"):
        yield _per_channel([1 / factor]), _per_channel([config.get("shift_factor") or 0.0])
        yield _per_channel([1 / factor]), _per_channel([0.0])
    yield _per_channel([1.0]), _per_channel([0.0])


def fits(x: Tensor, scale: Tensor, shift: Tensor, decoded: Tensor | None) -> bool:
    """Whether x scale + shift is what was decoded."""
    if decoded is None or x.ndim != 4 or scale.shape[1] not in (1, x.shape[1]):
        return False
    wanted = decoded.squeeze(2) if decoded.ndim == 5 else decoded
    close = 1e-4 if decoded.dtype == torch.float32 else 0.1
    scaled = x.float() * scale.to(x.device) + shift.to(x.device)
    return wanted.shape == scaled.shape and torch.allclose(scaled, wanted.to(scaled), rtol=close, atol=close)


def _per_channel(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)
