"""The network of the embedded world: a small `QwenImage21Transformer2DModel` that draws and edits 24 x 24 pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from velatura.api import Conditioning, Context, ModelAdapter, Options, Prompt, VelaturaError
from velatura.core.footprint import Footprint
from velatura.plugins.adapters.lora import add_lora
from velatura.plugins.adapters.qwen_image_21_network import (
    Grid,
    Layout,
    QwenImage21Conditioning,
    prepare,
    velocity,
)
from velatura.plugins.adapters.tinyworld_export import write_export
from velatura.plugins.tinyworld import vae, words

HOME = Path(words.__file__).parent
BUILTIN = {"builtin-6": HOME / "base.safetensors", "builtin-4": HOME / "base-4.safetensors"}
"""The checkpoints that ship with the package; the number is the side of a patch."""

PIXELS = vae.PIXELS


class TinyWorldAdapterOptions(Options):
    """Which weights, how big, and what is trained."""

    weights: str | None = Field(
        "builtin",
        description="`builtin` is the checkpoint in the package for this `patch`, `builtin-6` and `builtin-4` that for "
        "another, whose blocks fit; a path is a safetensors file or an exported folder, seen from the recipe; null "
        "starts from scratch.",
    )
    seed: int = Field(0, ge=0, description="Draws fresh weights, and the fresh half of LoRA weights.")
    patch: Literal[6, 4] = Field(
        6,
        description="Pixels of a token's side: 6 makes 16 tokens of a picture, 4 makes 36, which costs about twice as "
        "much and leaves more room between layout and texture. Each has a `builtin` checkpoint, for text-to-image "
        "alone where it is 4.",
    )
    width: int = Field(96, ge=16, description="Channels of a token; a multiple of 16 per head.")
    layers: int = Field(6, ge=1, description="Transformer blocks.")
    heads: int = Field(3, ge=1, description="Attention heads.")
    lora_rank: int | None = Field(
        None, ge=1, description="Train LoRA weights of this rank on the attention; null trains all weights."
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="LoRA weights count alpha / rank times; null means alpha = rank."
    )
    shift: float = Field(
        2.0, gt=0, description="Static shift s of the time grid, t' = s t / (1 + (s - 1) t): above 1 favours noise."
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TinyWorldAdapterOptions:
        if self.width % (16 * self.heads):
            raise ValueError(f"width {self.width} is not a multiple of 16 for each of {self.heads} heads.")
        return self


class TinyWorldAdapter(ModelAdapter[TinyWorldAdapterOptions]):
    """Text to image, and edits through the condition-image tokens, in one network.

    Latents are [B T 48]: a 4 x 4 grid of 6 x 6 pixel patches (T = 16), or 6 x 6 of 4 x 4 (T = 36). Before them come
    as many tokens of the source image, if any, and 12 words.
    """

    name = "tinyworld"

    def __init__(self, options: TinyWorldAdapterOptions | None = None) -> None:
        """No options are the shipped checkpoint, all weights trainable."""
        super().__init__(options)
        self._context: Context | None = None
        self._vae = vae.load_vae(self.options.patch)
        self._target = Grid(1, PIXELS // self.options.patch, PIXELS // self.options.patch)

    def setup(self, context: Context) -> None:
        """Remember where the recipe is: a relative path in `weights` starts there."""
        self._context = context

    def load(self, device: torch.device) -> nn.Module:
        """The network in fp32, weights as asked for; trainable are all weights, or the LoRA weights alone."""
        options = self.options
        net = _fresh(options)
        if options.weights is not None:
            _read_weights(net, self._weights_file(options.weights))
        if options.lora_rank is not None:
            add_lora(net, options.lora_rank, options.lora_alpha or options.lora_rank, seed=options.seed)
        return net.to(device)

    def encode(self, prompts: Sequence[Prompt]) -> QwenImage21Conditioning:
        """P stored rows; all prompts must have a source image, or none may."""
        return self._conditioning([prompt.text for prompt in prompts], _source_images(prompts))

    def null(self, prompts: Sequence[Prompt]) -> QwenImage21Conditioning:
        """The empty text. Without sources it is one stored row for all P prompts; an edit keeps its source image."""
        sources = _source_images(prompts)
        if sources is None:
            return self._conditioning([""], None).expand(len(prompts))
        return self._conditioning([""] * len(prompts), sources)

    def prepare(self, net: nn.Module, cond: Conditioning) -> QwenImage21Conditioning:
        """`cond` with the keys and values of its distinct rows; with gradient where gradients are enabled."""
        return prepare(net, _own(cond))

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, rows: Tensor) -> Tensor:
        """dx/dt [N T 48] at x [N T 48], t [N]; point n belongs to row rows[n] of `cond`, prepared or not."""
        return velocity(net, x, t, _own(cond), rows)

    def noise(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
        """[B T 48] fp32 standard normal, a generator per seed."""
        shape = (self._target.tokens, vae.CHANNELS)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def times(self, steps: int, prompt: Prompt | None = None) -> Tensor:
        """[steps + 1] from 1 to 0: the sigmas of a `FlowMatchEulerDiscreteScheduler` with this static shift."""
        even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).float()
        shifted = self.options.shift * even / (1 + (self.options.shift - 1) * even)
        shifted[0] = 1  # exactly, whatever the shift rounds to
        return torch.cat([shifted, torch.zeros(1)])

    def decode(self, x: Tensor, prompt: Prompt | None = None) -> Tensor:
        """Latents [B T 48] to images [B 3 24 24], RGB in [0, 1]."""
        return self._vae.to(x.device).decode(x)

    def latents(self, images: Tensor) -> Tensor:
        """Images [B 3 24 24] to x_0 [B T 48]."""
        return self._vae.to(images.device).encode(images)

    def export(self, net: nn.Module, folder: Path, *, info: Mapping[str, Any]) -> None:
        """Write a diffusers folder and a `sample.py` that draws from it without Velatura.

        `info["guidance_scale"]` is the scale that `sample.py` uses (1 where it is not given), `info["steps"]` its
        number of steps (20); everything in `info` is written to `velatura.json`.
        """
        write_export(net, folder, autoencoder=self._vae, shift=self.options.shift, info=info)

    def describe(self) -> Mapping[str, Any]:
        """Parameters, tokens of a sample, image size, and the source of the weights."""
        options, tokens = self.options, self._target.tokens
        net = _fresh(options)
        total = sum(weight.numel() for weight in net.parameters())
        if options.lora_rank is not None:
            add_lora(net, options.lora_rank, options.lora_alpha or options.lora_rank)
        source = f"fresh, seed {options.seed}" if options.weights is None else str(self._weights_file(options.weights))
        return {
            "parameters": total,
            "trainable parameters": sum(weight.numel() for weight in net.parameters() if weight.requires_grad),
            "tokens per sample": f"{words.LENGTH} text (+ {tokens} source) | {tokens} target",
            "image size": f"{PIXELS} x {PIXELS}",
            "weights": source,
        }

    def footprint(self, prompt: Prompt) -> Footprint:
        """The network's shapes, and the prompt itself."""
        options = self.options
        with torch.device("meta"):
            net = _sized(options)
            if options.lora_rank is not None:
                add_lora(net, options.lora_rank, options.lora_alpha or options.lora_rank)
        return Footprint(
            net=net,
            cond=lambda count: self.encode([prompt] * count),
            null=lambda count: self.null([prompt] * count),
            frozen={},
        )

    def _conditioning(self, texts: Sequence[str], sources: Tensor | None) -> QwenImage21Conditioning:
        # Padding is read, not masked: a constant length is part of this network's definition. It costs nothing here,
        # keeps every attention call without a mask, and gives the causal text tokens room that has read all of it.
        text, _ = words.encode(texts)
        if sources is None:
            return QwenImage21Conditioning.of(text, _layout(self._target, edits=False))
        slots = text.new_zeros(len(text), self._target.tokens // 4, text.shape[2])
        text = torch.cat([slots, text], dim=1)
        return QwenImage21Conditioning.of(text, _layout(self._target, edits=True), sources=self.latents(sources))

    def _weights_file(self, weights: str) -> Path:
        if weights == "builtin":
            weights = f"builtin-{self.options.patch}"
        if weights in BUILTIN:
            return BUILTIN[weights]
        path = Path(weights) if self._context is None else self._context.resolve(weights)
        return path / "transformer" / "diffusion_pytorch_model.safetensors" if path.is_dir() else path


def _layout(target: Grid, *, edits: bool) -> Layout:
    """The source image comes before the text, as in the large model, so that the instruction can look at it."""
    slots = (True,) * (target.tokens // 4 if edits else 0) + (False,) * words.LENGTH
    return Layout(slots=slots, sources=(target,) if edits else (), target=target)


def _own(cond: Conditioning) -> QwenImage21Conditioning:
    return cast("QwenImage21Conditioning", cond)


def _source_images(prompts: Sequence[Prompt]) -> Tensor | None:
    """[P 3 24 24], or None for text to image."""
    counts = {len(prompt.sources) for prompt in prompts}
    if counts <= {0}:
        return None
    if counts != {1}:
        odd = next(prompt for prompt in prompts if len(prompt.sources) != 1)
        raise VelaturaError(
            f"Prompt {odd.id!r} has {len(odd.sources)} source images beside prompts that have {max(counts)}. The tiny "
            "world takes batches of edits with one source image each, or of text-to-image prompts: batch them by task."
        )
    for prompt in prompts:
        if tuple(prompt.sources[0].shape) != (3, PIXELS, PIXELS):
            raise VelaturaError(
                f"The source image of prompt {prompt.id!r} is {tuple(prompt.sources[0].shape)}; the tiny world draws "
                f"(3, {PIXELS}, {PIXELS}). Resize it first."
            )
    return torch.stack([prompt.sources[0] for prompt in prompts])


def _fresh(options: TinyWorldAdapterOptions) -> nn.Module:
    """A network that starts as the zero velocity with every block switched off, which trains much better."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)  # the stock class draws from the global generator
        net: Any = _sized(options)
    for weight in (net.proj_out.weight, net.modulation[1].weight, net.norm_out.linear.weight):
        nn.init.zeros_(weight)
    return cast("nn.Module", net)


def _sized(options: TinyWorldAdapterOptions) -> nn.Module:
    """The stock class in the size that is asked for."""
    from diffusers import QwenImage21Transformer2DModel

    head = options.width // options.heads
    net = QwenImage21Transformer2DModel(
        in_channels=vae.CHANNELS,
        out_channels=vae.CHANNELS,
        num_layers=options.layers,
        num_attention_heads=options.heads,
        attention_head_dim=head,
        context_in_dim=words.WIDTH,
        axes_dims_rope=(head // 4, 3 * head // 8, 3 * head // 8),
    )
    return cast("nn.Module", net)


def _read_weights(net: nn.Module, file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        present = sorted(path.name for path in file.parent.glob("*.safetensors")) if file.parent.is_dir() else []
        raise VelaturaError(
            f"There is no checkpoint {file}. Beside it there is: {', '.join(present) or 'none'}. Set `weights` to a "
            "safetensors file, to an exported folder, to 'builtin', or to null for fresh weights."
        )
    try:
        found = load_file(file)
    except SafetensorError as error:
        raise VelaturaError(f"{file} is not a safetensors file ({error}). Was it written to the end?") from error
    expected = net.state_dict()
    for name in [*expected, *found]:
        wanted, got = _shape(expected, name), _shape(found, name)
        if wanted != got:
            raise VelaturaError(
                f"{file} does not fit: tensor {name!r} should be {wanted} and is {got}. {_remedy(found)}"
            )
    net.load_state_dict({name: tensor.float() for name, tensor in found.items()})


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "absent"


def _remedy(found: Mapping[str, Tensor]) -> str:
    blocks = {name.split(".")[1] for name in found if name.startswith("transformer_blocks.")}
    if "img_in.weight" not in found or "transformer_blocks.0.attn.norm_q.weight" not in found:
        return "It is not a checkpoint of this network; export one with `velatura`, or set `weights` to 'builtin'."
    width, head = found["img_in.weight"].shape[0], found["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    return f"It was made with width {width}, layers {len(blocks)}, heads {width // head}: set these, or another file."
