"""Weights that somebody published: found in a folder or on the hub, read without running code, put into a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from velatura.api import Context, Options, RewardModel, Sample, Scores, Status, VelaturaError

ENDINGS = (".safetensors", ".pt", ".pth", ".bin")
"""Of files that hold weights."""
Given = TypeVar("Given", bound=Options)
NOT_FINITE = "The picture holds values that are not finite."


class NetworkOptions(Options):
    """How a network is run."""

    revision: str | None = Field(None, description="On the hub: branch, tag or commit of `path`.")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="`auto` is the device of the run; or `cuda:1`."
    )
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="Of the network; scores are fp32.")
    batch: int = Field(16, ge=1, description="Pictures in one forward.")

    def place(self, context: Context) -> torch.device:
        """Where the network lives."""
        return context.device if self.device == "auto" else torch.device(self.device)

    @property
    def precision(self) -> torch.dtype:
        """Of the network."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


class NetworkReward(RewardModel[Given]):
    """A reward of published weights: learned, and the same in whatever batches and on whatever device."""

    operational = frozenset({"batch", "device"})

    def needs_card(self) -> bool:
        """Learned."""
        return True


def weights_file(user: str, path: str, file: str | None, revision: str | None, context: Context) -> Path:
    """The file of weights that `path` is, or that `file` is in the folder or hub repository `path`.

    Raises:
        VelaturaError: there is none.
    """
    local = context.resolve(path)
    if local.is_file():
        return local
    if local.is_dir():
        return _in_folder(user, local, file)
    reason = "it is neither a file nor a folder"
    if file is not None and path.count("/") == 1 and not path.startswith((".", "/")):
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(path, file, revision=revision))
        except (OSError, ValueError) as error:
            reason += f" nor to be had from the hub ({first_line(error)})"
    raise VelaturaError(
        f"'{user}' finds no weights at {path!r}: {reason}. Give the path of the file or of its folder, seen from the "
        f"recipe ({local} does not exist), or a name on the hub that has {file or 'the file that `file` names'}."
    )


def _in_folder(user: str, folder: Path, file: str | None) -> Path:
    """`file` in `folder`, or the only file of weights in it."""
    if file is not None and folder.joinpath(file).is_file():
        return folder / file
    held = sorted(one.name for one in folder.iterdir() if one.suffix in ENDINGS)
    if len(held) == 1 and (file is None or file.endswith(ENDINGS)):
        return folder / held[0]
    asked = f"no {file}" if file is not None else "not one file of weights"
    there = f" but {', '.join(held)}" if held else ""
    raise VelaturaError(f"'{user}': the folder {folder} holds {asked}{there}. Name the file in the options.")


def read_weights(user: str, path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, or from a file of torch in which nothing but tensors is read.

    Raises:
        VelaturaError: the file holds something else.
    """
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=device)
        found: Any = torch.load(path, map_location=device, weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise VelaturaError(
            f"'{user}' cannot read weights from {path}: {first_line(error)}. It takes safetensors, or a file of "
            "`torch.save` that holds tensors and nothing that would have to be run."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise VelaturaError(f"'{user}': {path} holds {type(found).__name__}, and not tensors by name.")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def checked(
    user: str, path: Path, network: nn.Module, weights: Mapping[str, Tensor], optional: Sequence[str] = ()
) -> None:
    """See that `weights` are those of `network`, each name and each shape; `optional` ones may be missing.

    Raises:
        VelaturaError: a tensor is missing, too many, or of another shape.
    """
    wanted = network.state_dict()
    missing = sorted(wanted.keys() - weights.keys() - set(optional))
    extra = sorted(weights.keys() - wanted.keys())
    shapes = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    said = [f"lacks {len(missing)} (first {missing[0]})"] if missing else []
    said += [f"has {len(extra)} that do not belong (first {extra[0]})"] if extra else []
    said += [f"has {name} as {list(weights[name].shape)}, not {list(wanted[name].shape)}" for name in shapes[:1]]
    if said:
        raise VelaturaError(
            f"'{user}': the weights in {path} are not those of {type(network).__name__}: of {len(wanted)} tensors it "
            f"{', and '.join(said)}. Check the file, and the model that gives the configuration."
        )


def fitted(user: str, path: Path, network: Any, weights: Mapping[str, Tensor]) -> Any:
    """A small `network` with `weights`, frozen.

    Raises:
        VelaturaError: they do not fit.
    """
    checked(user, path, network, weights)
    network.load_state_dict(weights)
    return network.requires_grad_(False).train(False)


def filled(
    user: str, path: Path, kind: Any, config: Any, weights: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32, optional: Sequence[str] = (),
) -> Any:  # fmt: skip
    """A transformers model of class `kind`, made of `config` and filled with `weights` without a draw of its own.

    Raises:
        VelaturaError: they do not fit.
    """
    with torch.device("meta"):
        shape = kind(config)
    checked(user, path, shape, weights, optional)
    network = kind.from_pretrained(None, config=config, state_dict=dict(weights), dtype=dtype)
    return network.requires_grad_(False).train(False)


def opened(user: str, kind: Any, name: str, context: Context, what: str = "model", **options: Any) -> Any:
    """`kind.from_pretrained` of a folder seen from the recipe, or of a name on the hub.

    Raises:
        VelaturaError: it is in neither.
    """
    local = context.resolve(name)
    try:
        return kind.from_pretrained(str(local) if local.exists() else name, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise VelaturaError(
            f"'{user}' finds no {what} in {name!r}: it is neither a folder that has one ({local}) nor to be had from "
            f"the hub ({first_line(error)}). Check the name, log in with `hf auth login` if the model is gated, or "
            "give the path of a folder, seen from the recipe."
        ) from error


def first_line(error: Exception) -> str:
    """What went wrong, in a line."""
    return (str(error).strip().split("\n")[0] or type(error).__name__).removesuffix(".")


def image_alone(sample: Sample) -> Sequence[Tensor]:
    """What is shown of a sample by judges that look at no source."""
    return (sample.image,)


def is_finite(pictures: Sequence[Tensor]) -> bool:
    """Whether all of them can be shown."""
    return all(bool(picture.isfinite().all()) for picture in pictures)


def scored(
    samples: Sequence[Sample], size: int, judge: Callable[[Sequence[Sample]], Tensor],
    shows: Callable[[Sample], Sequence[Tensor]] = image_alone,
) -> Scores:  # fmt: skip
    """What `judge` says, [n] for n pictures, `size` at a time; values that are not finite fail, and so do samples of
    which it is shown (`shows`) a picture that is not."""
    status = [Status.OK if is_finite(shows(sample)) else Status.FAILED for sample in samples]
    reasons = ["" if state is Status.OK else NOT_FINITE for state in status]
    shown = [row for row, state in enumerate(status) if state is Status.OK]
    values = torch.zeros(len(samples))
    for start in range(0, len(shown), size):
        rows = shown[start : start + size]
        values[rows] = judge([samples[row] for row in rows]).detach().float().cpu()
    for row in shown:
        if not bool(values[row].isfinite()):
            values[row], status[row], reasons[row] = 0.0, Status.FAILED, "The network's answer is not finite."
    return Scores(values=values, status=tuple(status), reasons=tuple(reasons))


def ready(network: Any, user: str) -> Any:
    """`network`, which `setup` has made.

    Raises:
        VelaturaError: it has not.
    """
    if network is None:
        raise VelaturaError(f"'{user}' has no network yet: call `setup` before it is asked.")
    return network
