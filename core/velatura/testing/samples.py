"""Prompts, pictures and reports to try components on. All of them are drawn, from fixed seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from velatura.core.types import Prompt, RewardReport, Sample, Status

SIDE = 64
"""Pixels of a picture whose prompt asks for no size."""


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = seed * 1009 + number
    return torch.Generator().manual_seed(seed)


def _picture(height: int, width: int, *numbers: int) -> Tensor:
    """`3 H W`: a coloured gradient with a disc and a little grain, in [0, 1]."""
    draw = _generator(*numbers)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    corners = torch.rand(3, 3, generator=draw)
    picture = corners[0, :, None, None] * rows + corners[1, :, None, None] * columns
    middle, radius = torch.rand(2, generator=draw) * 0.6 + 0.2, float(torch.rand((), generator=draw)) * 0.2 + 0.1
    disc = (rows - middle[0]).square() + (columns - middle[1]).square() < radius**2
    picture = torch.where(disc, corners[2, :, None, None], picture / 2)
    return (picture + 0.02 * torch.randn(3, height, width, generator=draw)).clamp(0, 1)


def make_prompts(count: int = 4, *, task: str = "t2i", side: int = SIDE) -> tuple[Prompt, ...]:
    """`count` prompts; the first two share a text and not an id. Edits (`task="edit"`) have a source picture."""
    colours = ("red", "green", "blue", "yellow", "black", "white")
    texts = [f"a {colours[max(i - 1, 0) % 6]} circle" for i in range(count)]
    return tuple(
        Prompt(
            id=f"{task}/{i}",
            text=f"make it {text}" if task == "edit" else text,
            task=task,
            category=("shapes", "colours")[i % 2],
            sources=(_picture(side, side, 7, i),) if task == "edit" else (),
        )
        for i, text in enumerate(texts)
    )


def make_samples(prompts: Sequence[Prompt] | None = None, *, per_prompt: int = 3, seed: int = 0) -> list[Sample]:
    """`per_prompt` pictures for each prompt, prompt-major, as large as the prompt asks for or as its source is."""
    samples = []
    for row, prompt in enumerate(make_prompts() if prompts is None else prompts):
        if prompt.size is not None:
            height, width = prompt.size
        else:
            height, width = prompt.sources[0].shape[-2:] if prompt.sources else (SIDE, SIDE)
        for j in range(per_prompt):
            picture = _picture(height, width, seed, row, j)
            samples.append(Sample(prompt=prompt, image=picture, seed=j, group=row))
    return samples


def make_report(
    scores: Tensor | None = None, *, per_prompt: int = 4, missing: Mapping[int, Status] | None = None
) -> RewardReport:
    """A report on [B R] scores, B a multiple of `per_prompt`; by default random ones of six prompts and two rewards.

    Rewards are called `reward-0`, `reward-1` and so on.

    `missing`: row -> status of all its scores.
    """
    if scores is None:
        scores = torch.rand(6 * per_prompt, 2, generator=_generator(5)).float()
    status = torch.full(scores.shape, int(Status.OK))
    for row, why in (missing or {}).items():
        status[row] = int(why)
    count = len(scores) // per_prompt
    return RewardReport(
        names=tuple(f"reward-{r}" for r in range(scores.shape[1])),
        scores=scores,
        status=status,
        weight=torch.ones_like(scores),
        group=torch.arange(count).repeat_interleave(per_prompt),
        prompts=make_prompts(count),
    )
