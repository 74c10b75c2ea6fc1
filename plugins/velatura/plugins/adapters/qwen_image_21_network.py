"""What every adapter of diffusers' `QwenImage21Transformer2DModel` shares: the prompt's prefix, computed once.

The network reads one sequence, [text and source images | target image]. Everything before the target is modulated
from t = 0 and attends only to itself, so its keys and values depend neither on the step nor on the sample. `prepare`
computes them once per prompt; `velocity` then runs the target's tokens alone. The forward of the stock class is what
runs in both, so that hooks of training engines fire and checkpoints stay interchangeable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from velatura.api import Conditioning, VelaturaError
from velatura.plugins.adapters.lora import merged_state, unwrap


class Grid(NamedTuple):
    """An image as the network counts it, in latent tokens."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """How many tokens the image takes."""
        return self.frames * self.height * self.width

    @property
    def advance(self) -> int:
        """By how much the image moves the frame position of whatever follows it."""
        return max(self.height, self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the tokens of one sample follow each other; all samples of a batch share it."""

    slots: tuple[bool, ...]
    """[L] positions of the text sequence that stand for 2 x 2 tokens of a source image."""
    sources: tuple[Grid, ...]
    """Source images, in the order of their slots."""
    target: Grid
    """The image to be drawn; it follows the text."""

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the target."""
        return self.slots.count(False) + sum(grid.tokens for grid in self.sources)

    @property
    def frame(self) -> int:
        """Rotary position of the target on the frame axis."""
        return self.slots.count(False) + sum(grid.advance for grid in self.sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """Keys (after the rotary embedding) and values of everything before the target: U distinct prompts."""

    keys: tuple[Tensor, ...]
    """Per layer [U S heads head_dim]."""
    values: tuple[Tensor, ...]
    """Per layer [U S heads head_dim]."""

    def map(self, change: Any) -> Prefix:
        """The same prefix with `change` applied to every tensor."""
        return Prefix(keys=tuple(map(change, self.keys)), values=tuple(map(change, self.values)))

    def join(self, other: Prefix) -> Prefix:
        """The prompts of `self`, then those of `other`."""
        keys, values = (zip(*pair, strict=True) for pair in ((self.keys, other.keys), (self.values, other.values)))
        return Prefix(keys=tuple(map(torch.cat, keys)), values=tuple(map(torch.cat, values)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QwenImage21Conditioning(Conditioning):
    """P prompts over U <= P distinct stored rows: what the text encoder and the VAE said of them."""

    layout: Layout
    text: Tensor
    """[U L C] text embeddings; the values at image slots are ignored."""
    index: Tensor
    """[P] int64: the stored row of each prompt."""
    mask: Tensor | None = None
    """[U L] bool, False at right padding; None where every position is meant to be read."""
    sources: Tensor | None = None
    """[U S C'] latents of the source images, one after the other."""
    prefix: Prefix | None = None
    """Set by `prepare`; belongs to the weights it was computed with."""

    @classmethod
    def of(
        cls, text: Tensor, layout: Layout, *, mask: Tensor | None = None, sources: Tensor | None = None
    ) -> QwenImage21Conditioning:
        """One stored row per prompt, checked against its layout. A mask that masks nothing is dropped."""
        expected = sum(grid.tokens for grid in layout.sources)
        found = 0 if sources is None else sources.shape[1]
        if expected != found or 4 * sum(layout.slots) != found or len(layout.slots) != text.shape[1]:
            raise VelaturaError(
                f"The layout has {len(layout.slots)} positions, {sum(layout.slots)} of them image slots of 4 tokens, "
                f"and {expected} source tokens; given are {text.shape[1]} embeddings and {found} source tokens."
            )
        if mask is not None and bool(mask.all()):
            mask = None
        index = torch.arange(len(text), device=text.device)
        return cls(layout=layout, text=text, index=index, mask=mask, sources=sources)

    def __len__(self) -> int:
        """P."""
        return len(self.index)

    def expand(self, count: int) -> Self:
        """The single stored row as the conditioning of `count` prompts, without copying it."""
        return replace(self, index=self.index.new_zeros(count))

    def select(self, rows: Tensor) -> Self:
        """The conditioning of the prompts `rows` [P'], storing only the distinct rows they use."""
        stored, index = torch.unique(self.index[rows.to(self.index.device)], return_inverse=True)
        if len(stored) == len(self.text):  # `unique` sorts: these are all rows, in their order
            return replace(self, index=index)
        return replace(self._map(lambda tensor: tensor.index_select(0, stored)), index=index)

    def to(self, device: torch.device) -> Self:
        """A copy on `device`."""
        return replace(self._map(lambda tensor: tensor.to(device)), index=self.index.to(device))

    def join(self, other: Conditioning) -> QwenImage21Conditioning | None:
        """Rows of `self`, then rows of `other`; None unless both have one layout and both, or neither, are prepared."""
        if not isinstance(other, QwenImage21Conditioning) or self.layout != other.layout:
            return None
        if (self.prefix is None) != (other.prefix is None):
            return None
        return replace(
            self,
            text=torch.cat([self.text, other.text]),
            index=torch.cat([self.index, other.index + len(self.text)]),
            mask=_join_masks(self, other),
            sources=None if self.sources is None else torch.cat([self.sources, cast("Tensor", other.sources)]),
            prefix=None if self.prefix is None else self.prefix.join(cast("Prefix", other.prefix)),
        )

    def _map(self, change: Any) -> Self:
        return replace(
            self,
            text=change(self.text),
            mask=None if self.mask is None else change(self.mask),
            sources=None if self.sources is None else change(self.sources),
            prefix=None if self.prefix is None else self.prefix.map(change),
        )


def _join_masks(first: QwenImage21Conditioning, second: QwenImage21Conditioning) -> Tensor | None:
    if first.mask is None and second.mask is None:
        return None
    masks = [torch.ones_like(c.text[..., 0], dtype=torch.bool) if c.mask is None else c.mask for c in (first, second)]
    return torch.cat(masks)


@dataclass(frozen=True, slots=True)
class _LayerRows:
    """One layer of a prefix, repeated for N points only when the layer asks, so one layer's copy lives at a time."""

    keys: Tensor
    values: Tensor
    rows: Tensor

    def get(self) -> tuple[Tensor, Tensor]:
        return self.keys.index_select(0, self.rows), self.values.index_select(0, self.rows)


@dataclass(frozen=True, slots=True)
class _PrefixRows:
    """What the network's `cached` mode needs of a key-value cache: point n reads stored row rows[n]."""

    prefix: Prefix
    rows: Tensor

    def get_layer(self, layer_idx: int) -> _LayerRows:
        return _LayerRows(self.prefix.keys[layer_idx], self.prefix.values[layer_idx], self.rows)


def prepare(net: nn.Module, cond: QwenImage21Conditioning) -> QwenImage21Conditioning:
    """`cond` with the prefix of its distinct rows, computed with the weights of now.

    Differentiable when gradients are enabled. Call it again whenever the weights change.
    """
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    network = unwrap(net)
    text = cond.text.to(network.dtype)
    # The stock forward always has a target, in whole slots of 2 x 2 tokens. One blank slot is the least; the prefix
    # cannot see what follows it, so neither its content nor its place matters.
    blank = text.new_zeros(len(text), 4, network.config.in_channels)
    hidden = blank if cond.sources is None else torch.cat([cond.sources.to(network.dtype), blank], dim=1)
    cache = QwenImage21KVCache(len(network.transformer_blocks))
    net(
        hidden_states=hidden,
        encoder_hidden_states=text,
        timestep=text.new_zeros(len(text)),
        img_shapes=[[*cond.layout.sources, Grid(1, 2, 2)]],
        img_mask=_image_slots(cond.layout.slots, 1, text.device),
        encoder_hidden_states_mask=cond.mask,
        kv_cache=cache,
        kv_cache_mode="extract",
        return_dict=False,
    )
    layers = [layer.get() for layer in cache.layer_caches]
    keys = tuple(key for key, _ in layers)
    if cond.mask is not None:
        keys = _close_gap(network, keys, padding=(~cond.mask).sum(1))
    return replace(cond, prefix=Prefix(keys=keys, values=tuple(value for _, value in layers)))


def velocity(net: nn.Module, x: Tensor, t: Tensor, cond: QwenImage21Conditioning, rows: Tensor) -> Tensor:
    """dx/dt = eps - x_0 [N h*w C], fp32, at x [N h*w C] and t [N] in [0, 1]; point n belongs to prompt rows[n].

    Without a prepared prefix, that of the distinct rows is computed here, with gradient when gradients are enabled.
    """
    if cond.prefix is None:
        distinct, rows = torch.unique(rows, return_inverse=True)
        cond = prepare(net, cond.select(distinct))
    network, stored = unwrap(net), cond.index[rows.to(cond.index.device)]
    blanks = _blank_prefix(network, cond, stored)
    output = net(
        hidden_states=torch.cat([blanks.sources, x.to(network.dtype)], dim=1),
        encoder_hidden_states=blanks.text,
        timestep=t,
        img_shapes=[[*blanks.grids, cond.layout.target]],
        img_mask=_image_slots(blanks.slots, cond.layout.target.tokens // 4, x.device),
        encoder_hidden_states_mask=blanks.mask,
        kv_cache=_PrefixRows(cast("Prefix", cond.prefix), stored),
        kv_cache_mode="cached",
        return_dict=False,
    )[0]
    return cast("Tensor", output.float())


class _BlankPrefix(NamedTuple):
    """Stands in for the prefix in a cached forward, which reads its length, positions and mask but no values."""

    text: Tensor
    sources: Tensor
    grids: Sequence[Grid]
    slots: tuple[bool, ...]
    mask: Tensor | None


def _blank_prefix(network: Any, cond: QwenImage21Conditioning, stored: Tensor) -> _BlankPrefix:
    count, channels, layout = len(stored), network.config.in_channels, cond.layout
    width = network.config.context_in_dim
    kind = {"dtype": network.dtype, "device": stored.device}
    if cond.mask is None:
        # An image of `frame` rows and no columns: no tokens to embed and throw away, yet it moves the target to the
        # frame position that it has behind the true prefix.
        text, sources = torch.zeros(count, 0, width, **kind), torch.zeros(count, 0, channels, **kind)
        return _BlankPrefix(text, sources, [Grid(1, layout.frame, 0)], (), None)
    # The key mask has one entry per prefix token, so the tokens have to be there.
    length = sum(grid.tokens for grid in layout.sources)
    text, sources = torch.zeros(count, len(layout.slots), width, **kind), torch.zeros(count, length, channels, **kind)
    return _BlankPrefix(text, sources, layout.sources, layout.slots, cond.mask.index_select(0, stored))


def _image_slots(slots: tuple[bool, ...], target: int, device: torch.device) -> Tensor:
    """[1 L + target] bool; the network reads the layout off the first row."""
    return torch.tensor([*slots, *[True] * target], device=device)[None]


def _close_gap(network: Any, keys: tuple[Tensor, ...], *, padding: Tensor) -> tuple[Tensor, ...]:
    """Rotate the keys [U S heads head_dim] of a prompt forward by its `padding` [U], on the frame axis.

    The target stands behind the longest prompt of the batch, `padding` frames further from the tokens of a shorter one
    than if that prompt were alone. Rotary attention sees differences of positions only, so moving the keys instead
    gives each prompt exactly what it gets alone: the result does not depend on its neighbours.
    """
    table = network.pos_embed.freqs[0]
    turn = table[padding.to(table.device)].to(padding.device)[:, None, None]
    width = 2 * table.shape[1]

    def rotate(key: Tensor) -> Tensor:
        pairs = torch.view_as_complex(key[..., :width].float().reshape(*key.shape[:-1], -1, 2))
        return torch.cat([torch.view_as_real(pairs * turn).flatten(-2).type_as(key), key[..., width:]], dim=-1)

    return tuple(rotate(key) for key in keys)


def export_transformer(net: nn.Module, folder: Path) -> None:
    """Write `config.json` and safetensors that `QwenImage21Transformer2DModel.from_pretrained` reads."""
    from diffusers import QwenImage21Transformer2DModel

    with torch.device("meta"):
        plain = QwenImage21Transformer2DModel.from_config(unwrap(net).config)
    plain.load_state_dict({name: tensor.cpu().contiguous() for name, tensor in merged_state(net).items()}, assign=True)
    plain.save_pretrained(folder, safe_serialization=True)
