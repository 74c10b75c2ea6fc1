"""Checks of adapters. What the family's stock pipeline draws is compared by `difference_to_pipeline`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from velatura.core.components import ModelAdapter
from velatura.core.errors import VelaturaError
from velatura.core.types import Conditioning, Prompt
from velatura.testing.kit import Subject, check, require, require_close, require_finite

STEPS = 4


@dataclass(frozen=True, slots=True)
class _Loaded:
    adapter: ModelAdapter[Any]
    net: nn.Module
    prompts: tuple[Prompt, ...]
    """Of one layout."""
    x: Tensor

    def velocity(self, rows: list[int], cond: Conditioning | None = None) -> Tensor:
        """At the states of these rows, each with its own prompt, at times of their own."""
        if cond is None:
            cond = self.adapter.prepare(self.net, self.adapter.encode(self.prompts))
        t = torch.linspace(0.9, 0.4, len(self.prompts))[rows]
        with torch.no_grad():
            return self.adapter.velocity(self.net, self.x[rows], t, cond, torch.tensor(rows))


def _loaded(subject: Subject) -> _Loaded:
    """The network on the CPU, its weights moved a little (fresh ones may answer zero to everything)."""
    adapter: ModelAdapter[Any] = subject.ready()
    net = adapter.load(torch.device("cpu"))
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=draw).to(weight.dtype))
    asked = subject.asked()
    prompts = tuple(prompt for prompt in asked if adapter.layout(prompt) == adapter.layout(asked[0]))
    return _Loaded(adapter, net, prompts, adapter.noise(prompts, range(len(prompts))))


@check("adapter")
def times_run_from_one_to_zero(subject: Subject) -> None:
    """[steps + 1] fp32, falling. A single step may be refused, in words."""
    adapter = subject.ready()
    for steps in (1, 4, 20):
        try:
            t = adapter.times(steps, subject.asked()[0])
        except VelaturaError as refusal:
            require(steps == 1, f"a grid of {steps} steps is refused: {refusal}")
            continue
        require(t.shape == (steps + 1,), f"the grid of {steps} steps has shape {list(t.shape)}")
        require(t.dtype == torch.float32, f"times are {t.dtype}")
        require(float(t[0]) == 1 and float(t[-1]) == 0, f"times run from {float(t[0]):g} to {float(t[-1]):g}")
        require(bool((t.diff() < 0).all()), f"times do not fall: {t.tolist()}")


@check("adapter")
def noise_depends_on_its_own_seed_alone(subject: Subject) -> None:
    """Row b is drawn from seeds[b], in fp32: pictures of one seed are paired across models and batches."""
    adapter = subject.ready()
    prompt = subject.asked()[0]
    together = adapter.noise([prompt] * 3, [5, 6, 5])
    require(together.dtype == torch.float32, f"noise is {together.dtype}")
    require(torch.equal(adapter.noise([prompt], [6])[0], together[1]), "noise of a seed changes with the batch")
    require(torch.equal(together[0], together[2]), "noise of one seed differs from row to row")
    require(not torch.equal(together[0], together[1]), "two seeds give one noise")


@check("adapter")
def something_is_trained(subject: Subject) -> None:
    """`load` marks what is trained, and the velocity carries a gradient to it."""
    loaded = _loaded(subject)
    trained = [weight for weight in loaded.net.parameters() if weight.requires_grad]
    require(trained, "no parameter of the network has `requires_grad`")
    cond = loaded.adapter.prepare(loaded.net, loaded.adapter.encode(loaded.prompts))
    rows = torch.arange(len(loaded.prompts))
    t = torch.full((len(rows),), 0.5)
    loaded.adapter.velocity(loaded.net, loaded.x, t, cond, rows).square().sum().backward()  # type: ignore[no-untyped-call]
    moved = [w.grad is not None and bool(w.grad.any()) for w in trained]
    require(any(moved), "the velocity carries no gradient to any trained parameter")


@check("adapter")
def velocity_keeps_the_shape(subject: Subject) -> None:
    """[N ...] like the states, and finite."""
    loaded = _loaded(subject)
    v = loaded.velocity(list(range(len(loaded.prompts))))
    require(v.shape == loaded.x.shape, f"velocity has shape {list(v.shape)} at states {list(loaded.x.shape)}")
    require_finite(v, "the velocity")


@check("adapter")
def velocity_does_not_depend_on_the_batch(subject: Subject) -> None:
    """A state has its velocity alone and among others, up to the rounding of sums."""
    loaded = _loaded(subject)
    together = loaded.velocity(list(range(len(loaded.prompts))))
    for row in range(len(loaded.prompts)):
        require_close(loaded.velocity([row])[0], together[row], f"state {row} has another velocity alone", 1e-3)


@check("adapter")
def encoding_is_deterministic(subject: Subject) -> None:
    """The same prompts twice give the same velocity, and a gradient-free conditioning for each.

    A network that is distilled to do without guidance may refuse `null`, in words.
    """
    loaded = _loaded(subject)
    rows = list(range(len(loaded.prompts)))
    require(len(loaded.adapter.encode(loaded.prompts)) == len(rows), "`encode` gives another number of rows")
    with suppress(VelaturaError):
        require(len(loaded.adapter.null(loaded.prompts)) == len(rows), "`null` gives another number of rows")
    require_close(loaded.velocity(rows), loaded.velocity(rows), "the same prompts, encoded twice, draw otherwise", 0.0)


@check("adapter")
def selected_rows_stay_with_their_prompts(subject: Subject) -> None:
    """`Conditioning.select` turns rows round, and velocities with them."""
    loaded = _loaded(subject)
    rows = list(range(len(loaded.prompts)))
    around = torch.tensor(rows[::-1])
    turned = loaded.adapter.encode(loaded.prompts).select(around)
    right = loaded.velocity(rows)
    mixed_up = loaded.velocity(rows, loaded.adapter.prepare(loaded.net, turned))
    back = loaded.velocity(rows, loaded.adapter.prepare(loaded.net, turned.select(around)))
    effect = float((mixed_up - right).abs().max())
    require(effect > 0, "the velocity does not depend on the prompt")
    gap = float((back - right).abs().max())
    require(gap <= 0.01 * effect, f"rows selected twice are not those they were: velocities differ by {gap:.3g}")


@check("adapter")
def pictures_lie_between_zero_and_one(subject: Subject) -> None:
    """`decode` of anything, noise too, is [B 3 H W] in [0, 1]; `latents` leads back to the latents' shape."""
    adapter = subject.ready()
    prompt = subject.asked()[0]
    x = adapter.noise([prompt] * 2, [1, 2])
    with torch.no_grad():
        images = adapter.decode(x, prompt)
        back = adapter.latents(images)
    require(images.ndim == 4 and images.shape[:2] == (2, 3), f"`decode` gives {list(images.shape)} for 2 pictures")
    require_finite(images, "a picture")
    require(float(images.min()) >= 0 and float(images.max()) <= 1, "pixels of decoded noise lie outside [0, 1]")
    require(back.shape == x.shape, f"`latents` of decoded latents {list(x.shape)} has shape {list(back.shape)}")


@check("adapter")
def guidance_of_scale_one_is_the_conditional_branch(subject: Subject) -> None:
    """And equal branches are what they are at every scale."""
    adapter, draw = subject.ready(), torch.Generator().manual_seed(9)
    shape = adapter.noise([subject.asked()[0]] * 3, [0, 1, 2]).shape
    cond, null = torch.randn(2, *shape, generator=draw)
    require_close(adapter.guide(cond, null, torch.ones(3)), cond, "scale 1 is not the conditional branch", 1e-5)
    same = adapter.guide(cond, cond, torch.tensor([0.5, 1.0, 4.0]))
    require_close(same, cond, "two equal branches guide to something else", 1e-5)
