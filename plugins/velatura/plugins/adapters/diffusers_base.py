"""What the adapters of all diffusers families share: a model folder, its frozen parts, LoRA, sizes, noise, times.

A family adds what is its own: how a prompt becomes a row of tensors, how these enter the transformer, how latents are
packed and scaled, and its guidance rule. Text encoders and tokenizers are used through the family's stock pipeline.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from velatura.api import Conditioning, Context, ModelAdapter, Options, Prompt, VelaturaError
from velatura.core.engine.local import check_precision
from velatura.core.footprint import Footprint
from velatura.plugins.adapters.conditioning import Row, RowsConditioning
from velatura.plugins.adapters.conditioning_cache import ConditioningCache, row_key, weights_hash
from velatura.plugins.adapters.footprints import footprint_of
from velatura.plugins.adapters.lora import ATTENTION, add_lora
from velatura.plugins.adapters.model_folder import ModelFolder, open_folder
from velatura.plugins.adapters.pipeline_export import write_pipeline
from velatura.plugins.adapters.running import compile_blocks, set_attention
from velatura.plugins.adapters.sizes import Buckets, Size, buckets_of, drawable, nearest, shape_of, sides, stretched
from velatura.plugins.adapters.sources import called, check_count
from velatura.plugins.adapters.times import shift_of
from velatura.plugins.adapters.visit import Visit


class DiffusersOptions(Options):
    """Where the model is, how large pictures are, and what is trained."""

    path: str = Field(description="A model folder as diffusers saves it, seen from the recipe, or a name on the hub.")
    revision: str | None = Field(None, description="On the hub: branch, tag or commit.")
    height: int = Field(1024, ge=16, description="Of a picture whose prompt does not say, in pixels.")
    width: int = Field(1024, ge=16, description="Of a picture whose prompt does not say, in pixels.")
    buckets: Buckets | None = Field(
        None,
        description="Sizes, [height, width] each, of which a picture that is asked for in another, and a source image, "
        "get the one nearest in shape; `auto`: nine shapes of height x width pixels; null: as many as there are.",
    )
    lora_rank: int | None = Field(32, ge=1, description="Rank of the trained LoRA weights; null trains all weights.")
    lora_alpha: float | None = Field(None, gt=0, description="LoRA weights count alpha / rank times; null: rank.")
    lora_targets: tuple[str, ...] = Field(ATTENTION, min_length=1, description="Linear layers that LoRA is added to.")
    seed: int = Field(0, ge=0, description="Draws the fresh half of the LoRA weights.")
    negative_prompt: str = Field("", description="The text of the unconditional branch.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass: less memory.")
    attention: str | None = Field(
        None, description="diffusers' attention back-end, such as `flash` or `native`: tried first."
    )
    compile: bool = Field(False, description="torch.compile the blocks: faster after minutes of compilation.")
    cache: bool = Field(True, description="Keep encoded prompts on disk, for every later run.")

    @model_validator(mode="after")
    def _alpha_needs_rank(self) -> DiffusersOptions:
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError("lora_alpha without lora_rank has no effect: set lora_rank, or leave lora_alpha out")
        return self


O = TypeVar("O", bound=DiffusersOptions)  # noqa: E741


class DiffusersAdapter(ModelAdapter[O], Generic[O]):
    """A flow-matching transformer in a diffusers model folder."""

    pipelines: ClassVar[tuple[str, ...]]
    """Pipeline classes (`_class_name` of model_index.json) that this adapter stands for."""
    ragged: ClassVar[tuple[str, ...]] = ()
    """Row tensors whose first axis differs between prompts."""
    pads: ClassVar[bool] = False
    """Whether prompts of different length may share a forward with the null condition: the network takes lists."""
    sources: ClassVar[int | None] = 0
    """How many source images a prompt may have; None for any number."""
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Parts of the pipeline that encode prompts: their weights name the cached rows."""
    template: ClassVar[str] = "1"
    """Raised when a family's rows come out differently."""
    beside_rows: ClassVar[tuple[str, ...]] = ()
    """Options of the family that rows do not depend on: changing them encodes nothing anew."""

    _context: Context | None = None
    _staying: Visit | None = None
    """Whether frozen parts stay on the device between two rows."""
    _still: bool = False
    """Whether frozen parts are never moved."""

    def setup(self, context: Context) -> None:
        """Remember the device and where the recipe is; nothing is loaded before it is needed."""
        self._context = context

    # What a family adds

    @property
    @abstractmethod
    def multiple(self) -> int:
        """Heights and widths are multiples of this many pixels."""

    @abstractmethod
    def row(self, prompt: Prompt, text: str, size: Size) -> Row:
        """What the network is told of one prompt, without a batch axis; `text` stands in for the prompt's own."""

    @abstractmethod
    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Shape of the noise of one picture as the stock pipeline draws it, before packing."""

    def pack(self, x: Tensor, size: Size) -> Tensor:
        """Drawn noise [B ...] to the x of the loop [B ...]."""
        return x

    def compiles(self, told: Mapping[str, Any]) -> bool:
        """Whether a block that is called with the arguments `told` runs compiled, where `compile` asks for it."""
        return True

    def check_guided(self) -> None:
        """Asked before an unconditional branch is made use of.

        Raises:
            VelaturaError: the network has none.
        """

    # The contract

    def load(self, device: torch.device) -> nn.Module:
        """The transformer; trainable are LoRA weights, or all of them."""
        options = self.options
        check_precision(device, "bf16" if self.dtype is torch.bfloat16 else "fp32")
        self.size_of(None)  # refused now, not after minutes of loading
        net = self.equipped(self.folder.transformer(self.dtype)).to(device)
        if options.attention is not None:
            set_attention(net, options.attention, device, self.dtype)
        if options.compile:
            compile_blocks(net, self.compiles)
        return net

    def equipped(self, net: nn.Module) -> nn.Module:
        """With what is trained, and gradient checkpointing where it is asked for."""
        options = self.options
        if options.lora_rank is not None:
            alpha = options.lora_alpha or options.lora_rank
            add_lora(net, options.lora_rank, alpha, seed=options.seed, targets=options.lora_targets)
        if options.gradient_checkpointing:
            cast("Any", net).enable_gradient_checkpointing()
        return net

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """The rows of P prompts of one layout, each encoded alone, so that none depends on its neighbours."""
        return self._rows(prompts, [prompt.text for prompt in prompts])

    def null(self, prompts: Sequence[Prompt]) -> Conditioning:
        """The same with the negative prompt; without source images one stored row serves all.

        Raises:
            VelaturaError: the network has no unconditional branch.
        """
        self.check_guided()
        if any(prompt.sources for prompt in prompts):
            return self._rows(prompts, [self.options.negative_prompt] * len(prompts))
        one = self._rows(prompts[:1], [self.options.negative_prompt])
        return one.expand(len(prompts))  # type: ignore[attr-defined, no-any-return]

    def collate(self, layout: tuple[Any, ...], rows: Sequence[Row]) -> Conditioning:
        """Rows of one layout as a conditioning."""
        return RowsConditioning.of(layout, rows, self.ragged, pads=self.pads)

    def noise(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
        """Standard normal fp32, a CPU generator per seed; the same numbers as the stock pipeline's."""
        size = self.size(prompts[0])
        shape = (1, *self.latent_shape(size))
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return self.pack(torch.cat(drawn), size)

    def times(self, steps: int, prompt: Prompt | None = None) -> Tensor:
        """The sigmas of the model's own scheduler, its shift for this size applied: [steps + 1], 1 down to 0."""
        size = self.size_of(prompt)
        scheduler = self.folder.scheduler()
        with np.errstate(invalid="ignore"):  # said below, in words
            self.set_times(scheduler, steps, self.tokens(size))
        sigmas: Tensor = scheduler.sigmas.float().cpu()
        if not bool(sigmas.isfinite().all()):
            raise VelaturaError(
                f"The scheduler of {self.folder.path} has no time grid of {steps} step(s): with `shift_terminal` it "
                "needs two or more. Raise `sampling.steps`."
            )
        return sigmas

    def tokens(self, size: Size) -> int:
        """Image tokens of a picture, on which the shift of its time grid depends: N of a packed x [B N C]; of another
        one a token per `multiple` x `multiple` pixels."""
        packed = self.pack(torch.empty(1, *self.latent_shape(size)), size)
        return packed.shape[1] if packed.ndim == 3 else math.prod(side // self.multiple for side in size)

    def set_times(self, scheduler: Any, steps: int, tokens: int) -> None:
        """Linearly spaced sigmas, shifted as the scheduler's configuration says for a picture of `tokens` tokens."""
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift_of(scheduler.config, tokens))

    def fingerprint(self) -> str:
        """A hash of the transformer's files."""
        return weights_hash(self.folder.path / "transformer", self._hashes)

    def describe(self) -> Mapping[str, Any]:
        """Parameters, picture size, classes, and where the weights come from."""
        facts = self.folder.facts()
        return {
            "pipeline": self.folder.pipeline_class,
            "parameters": facts.parameters,
            "trainable parameters": facts.trainable(self.options.lora_rank, self.options.lora_targets),
            "image size": f"{self.options.width} x {self.options.height}",
            "weights": str(self.folder.path),
        }

    def footprint(self, prompt: Prompt) -> Footprint | None:
        """From the folder's configurations. Encoders that are small are tried; with large ones a prompt's row has the
        shapes that its family's rows have. None for a family whose rows are not known."""
        return footprint_of(self, prompt)

    def without_moving(self, vae: nn.Module) -> Self:
        """This adapter over another autoencoder, which stays where it is."""
        still = type(self)(self.options)
        still._context, still._still = self._context, True
        still.__dict__["pipe"] = SimpleNamespace(vae=vae, components={})
        return still

    def export(self, net: nn.Module, folder: Path, *, info: Mapping[str, Any]) -> None:
        """A complete pipeline folder with the trained weights merged in, and beside them, in `lora`, the LoRA weights
        alone as diffusers loads them; `info` is written to `velatura.json`."""
        write_pipeline(net, folder, self.folder, info)

    # Shared parts

    @cached_property
    def folder(self) -> ModelFolder:
        """The model folder, found and checked.

        Raises:
            VelaturaError: there is none, or it is of another family.
        """
        return open_folder(self.options.path, self.options.revision, self._context, self.name, self.pipelines)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self._context.device if self._context else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the network, the text encoders and the VAE."""
        bf16 = self._context is not None and self._context.precision == "bf16"
        return torch.bfloat16 if bf16 else torch.float32

    @cached_property
    def pipe(self) -> Any:
        """The stock pipeline without its transformer, on the CPU."""
        return self.folder.pipeline(self.dtype)

    @contextmanager
    def on_device(self, *parts: str) -> Any:
        """Frozen parts of the pipeline on the device for as long as they are used; it is the network's otherwise."""
        modules = [getattr(self.pipe, part) for part in parts]
        if self._still:
            yield modules[0] if len(modules) == 1 else modules
            return
        visit = self._staying or Visit(self.device)
        try:
            for module in modules:
                visit.bring(module)
            yield modules[0] if len(modules) == 1 else modules
        finally:
            if not self._staying:
                visit.leave(modules)

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Frozen parts that come to the device stay there until the end of this."""
        self._staying = Visit(self.device)
        try:
            yield
        finally:
            staying, self._staying = self._staying, None
            if "pipe" in self.__dict__:
                staying.leave([part for part in self.pipe.components.values() if isinstance(part, nn.Module)])

    def size_of(self, prompt: Prompt | None) -> Size:
        """`size`, or the configured one where no prompt is known."""
        return self.size(prompt if prompt is not None else Prompt(id="", text="", task="t2i"))

    def size(self, prompt: Prompt) -> Size:
        """Height and width of the picture for a prompt: its own, the shape of its last source at the configured area,
        or the configured ones. With buckets the first two are those of the bucket that is nearest in shape.

        Raises:
            VelaturaError: the prompt or the options ask for a size that the network cannot draw.
        """
        multiple, configured = self.multiple, (self.options.height, self.options.width)
        drawable(configured, multiple, "The adapter's `height` and `width` ask for", self.name)
        shape = prompt.size or (shape_of(prompt.sources[-1]) if prompt.sources else None)
        if shape is None:
            return configured
        if self._buckets:
            return nearest(self._buckets, shape)
        if prompt.size is not None:
            return drawable(prompt.size, multiple, f"{called(prompt)} asks for", self.name)
        width, height = sides(configured[0] * configured[1], shape[1] / shape[0])
        return max(multiple, height // multiple * multiple), max(multiple, width // multiple * multiple)

    @cached_property
    def _buckets(self) -> tuple[Size, ...]:
        """The sizes that pictures with a shape of their own get; empty where they keep it."""
        options = self.options
        given = options.buckets
        return buckets_of(given, options.height * options.width, self.multiple, self.name) if given else ()

    def _source_shape(self, source: Tensor) -> Size:
        """Height and width at which a source is handed to the family: its own, or those of its bucket, enlarged where
        the family looks at more pixels than it draws."""
        if not self._buckets:
            return shape_of(source)
        height, width = nearest(self._buckets, shape_of(source))
        area = getattr(self.options, "source_area", None) or height * width
        scale = max(1.0, math.sqrt(area / (height * width)))
        return round(height * scale), round(width * scale)

    def bucketed(self, prompt: Prompt) -> Prompt:
        """The prompt with its sources in the shapes of their buckets; its picture keeps the size it has."""
        if not self._buckets or not prompt.sources:
            return prompt
        sources = tuple(stretched(source, self._source_shape(source)) for source in prompt.sources)
        return replace(prompt, sources=sources, size=self.size(prompt))

    def _rows(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Conditioning:
        layouts = {self.layout(prompt) for prompt in prompts}
        if len(layouts) > 1:
            raise VelaturaError(f"'{self.name}' takes batches of one layout; these prompts have {len(layouts)}.")
        for prompt in prompts:
            self.check_sources(prompt)
        with torch.no_grad(), self.staying():
            rows = [self.cached_row(self.bucketed(prompt), text) for prompt, text in zip(prompts, texts, strict=True)]
        return self.collate(layouts.pop(), rows)

    def layout(self, prompt: Prompt) -> tuple[Any, ...]:
        """Height and width of the picture, then those of its sources."""
        return (self.size(prompt), *(self._source_shape(source) for source in prompt.sources))

    def check_sources(self, prompt: Prompt) -> None:
        """Asked before a prompt is encoded, and by `velatura check`.

        Raises:
            VelaturaError: it has more source images than the family takes, or too few.
        """
        check_count(prompt, self.name, self.sources)

    def cached_row(self, prompt: Prompt, text: str) -> Row:
        """`row`, from the disk where it is there; `text` stands in for the prompt's own."""
        size = self.size(prompt)
        if not self.options.cache or self._context is None:
            return self.row(prompt, text, size)
        cache = ConditioningCache(self._context.cache / "conditionings")
        key = row_key(prompt, text, self._depends() | {"size": size})
        row: Row | None = cache.get(key)
        if row is None:
            row = self.row(prompt, text, size)
            cache.put(key, row)
        return row

    def _depends(self) -> dict[str, Any]:
        """What rows depend on beside their prompt: encoders, options, version."""
        trained = {"lora_rank", "lora_alpha", "lora_targets", "seed", "negative_prompt", "path", "revision", "cache",
                   "buckets", "gradient_checkpointing", "attention", "compile", *self.beside_rows}  # fmt: skip
        return {
            "family": self.name,
            "template": [self.template, *map(version, ("diffusers", "transformers"))],  # which write the stock ones
            "dtype": str(self.dtype),
            "options": self.options.model_dump(mode="json", exclude=trained),
            "encoders": self._encoder_hashes,
        }

    @cached_property
    def _encoder_hashes(self) -> dict[str, str]:
        parts = {*self.encoders, *(part for part in self.folder.index if part.startswith(("tokenizer", "processor")))}
        parts |= {"vae"} if self.sources != 0 else set()
        return {part: weights_hash(self.folder.path / part, self._hashes) for part in sorted(parts)}

    @property
    def _hashes(self) -> Path:
        """Where hashes of large files are remembered."""
        return (self._context.cache if self._context else Path.home() / ".cache" / "velatura") / "hashes"
