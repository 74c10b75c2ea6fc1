"""Families without an adapter of their own, by listening to their stock pipeline.

What can be read off classes and signatures is checked when the folder is opened; the rest is heard in rehearsals with a
stand-in for the transformer (`diffusers_flow_rehearsal`). Where something cannot be followed, an error says what.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn

from velatura.api import Conditioning, Prompt, VelaturaError
from velatura.core.errors import suggest
from velatura.plugins.adapters.conditioning import Row, RowsConditioning
from velatura.plugins.adapters.diffusers_base import DiffusersAdapter, DiffusersOptions
from velatura.plugins.adapters.diffusers_flow_checks import (
    KNOBS,
    NEEDED,
    AnyPipeline,
    fits,
    scalings,
    unusual,
)
from velatura.plugins.adapters.diffusers_flow_habits import Habits, branches, clocks, guided, learn
from velatura.plugins.adapters.diffusers_flow_rehearsal import (
    Answer,
    Heard,
    StandIn,
    bound,
    known_numbers,
    listen,
    moved,
    nothing,
)  # fmt: skip
from velatura.plugins.adapters.lora import unwrap
from velatura.plugins.adapters.model_folder import ModelFolder, open_folder
from velatura.plugins.adapters.pictures import to_signed
from velatura.plugins.adapters.sizes import Size

UNCONDITIONAL = "\0"
"""Begins the text of the null branch, whose rows must not be mistaken for those of a prompt with the same text."""
STEPS = 2
"""Of a rehearsal: a schedule that ends above 0 is not defined for a single step."""


class DiffusersFlowOptions(DiffusersOptions):
    """Options of `diffusers-flow`."""

    arguments: dict[str, JsonValue] = Field(
        {}, description="Further arguments of the stock pipeline's call, such as `max_sequence_length`."
    )
    embedded_guidance: float | None = Field(
        None, gt=0, description="Guidance scale that a distilled model is told; null is the stock pipeline's own."
    )


class DiffusersFlow(DiffusersAdapter[DiffusersFlowOptions]):
    """A text-to-image family of diffusers that has the usual shape.

    Latents are what `prepare_latents` of its pipeline draws. Guidance is null + scale (cond - null), with the length of
    cond where the stock pipeline restores it.
    """

    name = "diffusers-flow"
    pipelines: ClassVar[tuple[str, ...]] = ()

    @cached_property
    def folder(self) -> ModelFolder:
        """The model folder, whose classes are of the usual shape.

        Raises:
            VelaturaError: there is none, or it cannot be followed: the message names what is missing.
        """
        found = open_folder(self.options.path, self.options.revision, self._context, self.name, AnyPipeline())
        if reason := unusual(found):
            raise VelaturaError(f"'{self.name}' cannot follow {found.pipeline_class} in {found.path}: {reason}")
        return found

    @cached_property
    def habits(self) -> Habits:
        """How the stock pipeline uses its transformer."""
        known = self._call_parameters
        size = self.size_of(None)
        self._check_arguments()
        negative = {"negative_prompt": self.options.negative_prompt} if "negative_prompt" in known else {}

        def play(*, prompt: str = "a red fox", steps: int = STEPS, **arguments: Any) -> Heard:
            return self._listen({"prompt": prompt, "num_inference_steps": steps, **negative, **arguments}, size)

        try:
            habits = learn(play, self.folder.config("transformer"), tuple(k for k in KNOBS[:2] if k in known))
        except (VelaturaError, AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
            reason = (
                str(error) if isinstance(error, VelaturaError) else f"with text alone its rehearsal fails: {error!r}."
            )
            raise VelaturaError(f"'{self.name}' cannot follow {self.folder.pipeline_class}: {reason}") from error
        if self.options.embedded_guidance is not None and self._embedded.keys() <= habits.guidance.off.keys():
            raise VelaturaError(
                f"{self.folder.pipeline_class} tells its network no guidance scale: leave `embedded_guidance` out, and "
                "set the scale of the guidance policy."
            )
        return habits

    @property
    def multiple(self) -> int:
        """The autoencoder's shrinking times the patch."""
        patch = self.folder.config("transformer").get("patch_size") or 1
        side = int(patch[-1] if isinstance(patch, list) else patch)
        return int(self.pipe.vae_scale_factor) * (max(2, side) if hasattr(self.pipe, "_pack_latents") else side)

    def check_guided(self) -> None:
        """Whether there is an unconditional branch is heard in the rehearsals.

        Raises:
            VelaturaError: the pipeline has no unconditional branch that can be followed.
        """
        if missing := self.habits.guidance.missing:
            raise VelaturaError(
                f"a guidance scale was asked of {self.folder.pipeline_class}, but {missing}. Take guidance `none`; a "
                "scale that the network itself is told is set with `embedded_guidance`."
            )

    def null(self, prompts: Sequence[Prompt]) -> Conditioning:
        """The negative prompt as the stock pipeline encodes it; one stored row serves all prompts."""
        self.check_guided()
        for prompt in prompts:
            self.check_sources(prompt)
        one = self._rows(prompts[:1], [UNCONDITIONAL + self.options.negative_prompt])
        return cast("RowsConditioning", one).expand(len(prompts))

    def row(self, prompt: Prompt, text: str, size: Size) -> Row:
        """Every tensor that the stock pipeline tells its transformer, by the name of the argument."""
        guidance = self.habits.guidance
        told = {"prompt": text, "num_inference_steps": STEPS}
        if text.startswith(UNCONDITIONAL):
            plain = text.removeprefix(UNCONDITIONAL)
            heard = self._listen({**told, "prompt": plain, "negative_prompt": plain, **guidance.on}, size)
            branch = branches(heard)[guidance.null]
        else:
            branch = branches(self._listen({**told, **guidance.off}, size))[0]
        tensors = {name: value for name, value in branch.items() if isinstance(value, Tensor)}
        return {name: value if name in self.habits.shared else value[0] for name, value in tensors.items()}

    def collate(self, layout: tuple[Any, ...], rows: Sequence[Row]) -> Conditioning:
        """Rows padded to the longest; `velocity` cuts them to their own length again."""
        for name, first in rows[0].items():
            if any(row[name].shape[1:] != first.shape[1:] for row in rows):
                raise VelaturaError(f"'{self.name}' cannot batch these prompts: their {name!r} differ in two axes.")
        return RowsConditioning.of(layout, rows, [name for name, tensor in rows[0].items() if tensor.ndim])

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, rows: Tensor) -> Tensor:
        """dx/dt [N ...] at x [N ...], t [N]; a forward for each length of prompt."""
        known = cast("RowsConditioning", cond)
        stored = known.index[rows.to(known.index.device)].cpu()
        lengths = torch.stack([length[stored] for length in known.lengths.values()], dim=1)
        kinds, kind = torch.unique(lengths, dim=0, return_inverse=True)
        if len(kinds) == 1:
            return self._velocity(net, x, t, known, rows)
        v = torch.empty_like(x)
        for i in range(len(kinds)):
            own = (kind == i).nonzero()[:, 0].to(x.device)
            v = v.index_copy(0, own, self._velocity(net, x[own], t[own], known, rows.to(x.device)[own]))
        return v

    def guide(self, cond: Tensor, null: Tensor, scale: Tensor) -> Tensor:
        """null + scale (cond - null), `scale` [N], and the stock pipeline's rescaling."""
        per_point = scale.reshape(-1, *[1] * (cond.ndim - 1))
        return guided(cond, null, per_point, self.habits.guidance.rescaled)

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Of x, as `prepare_latents` makes it, for one picture."""
        return tuple(self._heard(size).calls[0].x.shape[1:])

    def noise(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
        """What `prepare_latents` draws in fp32 from a CPU generator per seed."""
        drawing = self._heard(self.size(prompts[0])).drawing
        fixed = {**drawing, "batch_size": 1, "dtype": torch.float32, "device": torch.device("cpu"), "latents": None}
        known = {name: value for name, value in fixed.items() if name in drawing}
        drawn = []
        for seed in seeds:
            made = self.pipe.prepare_latents(**{**known, "generator": torch.Generator().manual_seed(seed)})
            drawn.append(made[0] if isinstance(made, tuple) else made)
        return torch.cat(drawn)

    def times(self, steps: int, prompt: Prompt | None = None) -> Tensor:
        """The sigmas [steps + 1], 1 down to 0, that the stock pipeline sets for this size."""
        sigmas = self._heard(self.size_of(prompt), steps).sigmas
        if float(sigmas[-1]) != 0 or not bool((sigmas.diff() < 0).all()) or not 0.9 < float(sigmas[0]) <= 1:
            raise VelaturaError(f"the noise levels of {self.folder.pipeline_class} do not fall from 1 to 0: {sigmas}.")
        return sigmas

    def decode(self, x: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Latents [B ...] to images [B 3 H W], by the end of the stock pipeline, one by one."""
        size = self.size_of(prompt)
        images = [self._decode(x[i : i + 1], size).result for i in range(len(x))]
        return torch.cat(images).float().clamp(0, 1)

    def latents(self, images: Tensor) -> Tensor:
        """Images [B 3 H W] to x_0 [B ...].

        Raises:
            VelaturaError: the pipeline scales its latents in a way that cannot be turned round.
        """
        size = (images.shape[2], images.shape[3])
        scale, shift, video = self._scaling
        with torch.no_grad(), self.on_device("vae") as vae:
            pixels = to_signed(images).to(vae.dtype)
            coded = vae.encode(pixels.unsqueeze(2) if video else pixels)
            z = coded.latent_dist.mode() if hasattr(coded, "latent_dist") else coded.latent
            z = (z.squeeze(2) if video else z).float()
            z = (z - shift.to(z)) / scale.to(z)
        if len(self.latent_shape(size)) != 2:
            return cast("Tensor", z.reshape(len(z), *self.latent_shape(size)))
        batch, channels, height, width = z.shape
        shape = {"batch_size": batch, "num_channels_latents": channels, "height": height, "width": width}
        pack = self.pipe._pack_latents
        return cast("Tensor", pack(**bound(pack, {"latents": z, **shape})))

    # How it is done

    def _velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: RowsConditioning, rows: Tensor) -> Tensor:
        """Of points whose prompts have one length."""
        tensors, _ = cond.take(rows)
        habits, dtype = self.habits, unwrap(net).dtype
        heard = self._heard(cast("tuple[Size]", cond.layout)[0]).calls[0]
        told = {name: value for name, value in heard.told.items() if not isinstance(value, Tensor)}
        for name in habits.repeated:
            told[name] = told[name] * len(x)
        for name, value in tensors.items():
            cast_to = dtype if value.dtype == self.dtype else value.dtype
            told[name] = (value[0] if name in habits.shared else value).to(cast_to)
        time = clocks(self.folder.config("transformer"))[habits.time](t)
        told |= {
            "hidden_states": x.to(dtype),
            "timestep": time.to(dtype if heard.time.dtype == self.dtype else time.dtype),
        }
        v: Tensor = net(**{**told, "return_dict": False})[0].float()
        if v.shape != x.shape:
            raise VelaturaError(
                f"'{self.name}' cannot follow {self.folder.pipeline_class}: its transformer predicts "
                f"{tuple(v.shape[1:])} for latents of {tuple(x.shape[1:])}."
            )
        return habits.sign * v

    @cached_property
    def _call_parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(type(self.pipe).__call__).parameters

    @cached_property
    def _meta(self) -> Any:
        with torch.device("meta"):
            return self.folder.transformer_class().from_config(self.folder.config("transformer"))

    @cached_property
    def _remembered(self) -> dict[tuple[Size, int], Heard]:
        return {}

    def _heard(self, size: Size, steps: int = STEPS) -> Heard:
        """A run without guidance; its text is that of a rehearsal."""
        key = (size, steps)
        if key not in self._remembered:
            arguments = {"prompt": "", "num_inference_steps": steps, **self.habits.guidance.off}
            self._remembered[key] = self._listen(arguments, size, encoded=self.habits.encoded)
        return self._remembered[key]

    def _decode(self, x: Tensor, size: Size) -> Heard:
        """A run that begins at `x` [1 ...] and does not move."""
        drawn = self._heard(size).drawing["dtype"]
        wanted = {"prompt": "", "num_inference_steps": STEPS, "latents": x.to(drawn), "output_type": "pt"}
        arguments = wanted | dict(self.habits.guidance.off)
        return self._listen(arguments, size, answer=nothing, encoded=self.habits.encoded)

    def _listen(
        self, arguments: Mapping[str, Any], size: Size, *, answer: Answer = known_numbers, encoded: Any = None
    ) -> Heard:
        """One run of the stock pipeline at `size`; only what it needs is moved to the device."""
        folder = self.folder
        pictures = "latents" in arguments
        modules = [name for name, part in self.pipe.components.items() if isinstance(part, nn.Module)]
        frozen = [name for name in modules if name != "transformer"]
        needed = frozen if encoded is None else ["vae"] if pictures else []
        device = self.device if needed else torch.device("cpu")
        stand_in = StandIn(folder.transformer_class(), self._meta, device, self.dtype)
        said = {
            "height": size[0], "width": size[1], "output_type": "latent",
            "generator": torch.Generator().manual_seed(0), **self._embedded, **self.options.arguments, **arguments,
        }  # fmt: skip
        with torch.no_grad(), self.on_device(*needed):
            heard = listen(self.pipe, stand_in, moved(said, device), answer=answer, encoded=moved(encoded, device))
        asked = (heard.drawing.get("height", size[0]), heard.drawing.get("width", size[1]))
        if asked != size:
            raise VelaturaError(
                f"it draws {asked[1]} x {asked[0]} pixels where {size[1]} x {size[0]} were asked. "
                "Look in its call for what changes the size, as `use_resolution_binning` does; set it in `arguments`."
            )
        return heard

    @property
    def _embedded(self) -> dict[str, float]:
        """The argument that says what guidance a distilled network is told."""
        if self.options.embedded_guidance is None:
            return {}
        names = [knob for knob in reversed(KNOBS[1:]) if knob in self._call_parameters]
        return {names[0]: self.options.embedded_guidance} if names else {}

    @cached_property
    def _scaling(self) -> tuple[Tensor, Tensor, bool]:
        """Scale and shift [1 C 1 1] from x, unpacked, to what the autoencoder decodes; and whether that is a video."""
        size = self.size_of(None)
        x = self._heard(size).calls[0].x
        z = self._decode(x, size).decoded
        unpacked = x
        if x.ndim == 3 and hasattr(self.pipe, "_unpack_latents"):
            unpack = self.pipe._unpack_latents
            measures = {"height": size[0], "width": size[1], "vae_scale_factor": self.pipe.vae_scale_factor}
            unpacked = unpack(**bound(unpack, {"latents": x, **measures}))
        unpacked = unpacked.squeeze(2) if unpacked.ndim == 5 else unpacked
        for scale, shift in scalings(self.pipe.vae.config):
            if fits(unpacked, scale, shift, z):
                return scale, shift, z is not None and z.ndim == 5
        raise VelaturaError(
            f"'{self.name}' cannot turn pictures into latents of {self.folder.pipeline_class}: its scaling is none "
            "that the autoencoder's configuration names. Stages that start from noise, such as `rl`, need no latents."
        )

    def _check_arguments(self) -> None:
        """Arguments of the call that the recipe may set."""
        taken = {*NEEDED["__call__"], *KNOBS, "negative_prompt", "return_dict"}
        for name in self.options.arguments:
            if name in taken:
                raise VelaturaError(f"`{name}` is set by '{self.name}' itself: leave it out of `arguments`.")
            if name not in self._call_parameters:
                raise VelaturaError(
                    f"{self.folder.pipeline_class} has no argument {name!r}.{suggest(name, [*self._call_parameters])}"
                )

    def _depends(self) -> dict[str, Any]:
        facts = {"pipeline": self.folder.pipeline_class, "transformer": self.folder.config("transformer")}
        return super()._depends() | facts

    @property
    def encoders(self) -> tuple[str, ...]:  # type: ignore[override]
        """Every text encoder and tokenizer of the folder."""
        return tuple(name for name in self.folder.index if name.startswith(("text_encoder", "tokenizer")))
