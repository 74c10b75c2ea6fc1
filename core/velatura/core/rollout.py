"""Prompts to pictures: K steps of the sampler under a guidance policy, the prompt's prefix computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from velatura.core.components import GuidancePolicy, Kernel, ModelAdapter
from velatura.core.encoding import Encoder
from velatura.core.pulse import alive
from velatura.core.seeds import generator
from velatura.core.types import Conditioning, Prompt, Role, Sample, StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How pictures are made, apart from the weights that make them."""

    adapter: ModelAdapter  # type: ignore[type-arg]
    guidance: GuidancePolicy  # type: ignore[type-arg]
    kernel: Kernel  # type: ignore[type-arg]
    steps: int
    """Solver steps K."""
    batch: int
    """Most transformer rows in one forward; a guided sample has two, which go through together."""
    role: Role = Role.ROLLOUT
    solver: Kernel | None = None  # type: ignore[type-arg]
    """Takes the steps of a kernel that draws on which nothing is drawn; Euler's step unless given."""

    def needs_null(self, times: Tensor) -> bool:
        """Whether any step of the grid evaluates the unconditional branch."""
        return bool((self.guidance.scale(self.role, times[:-1]) != 1).any())


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The finished samples of a few prompts."""

    rows: Tensor
    """[B'] row of the prompt, in the order of the prompts asked for."""
    samples: tuple[Sample, ...]
    latents: Tensor
    """[B' ...]."""
    trajectory: Tensor | None
    """[T B' ...] when it was asked for."""
    network_rows: int
    """Rows that went through the transformer, branches counted singly."""
    log_prob: Tensor | None = None
    """[K B'] with the trajectory of a kernel that draws: likelihood of each step, NaN where nothing was drawn."""


def by_layout(
    adapter: ModelAdapter,  # type: ignore[type-arg]
    prompts: Sequence[Prompt],
    rows: Sequence[int] | None = None,
) -> list[list[int]]:
    """`rows` (all of them, unless given) by the layout of their prompts, in the order in which layouts first occur."""
    found: dict[Hashable, list[int]] = {}
    for row in range(len(prompts)) if rows is None else rows:
        found.setdefault(adapter.layout(prompts[row]), []).append(row)
    return list(found.values())


def rollout(
    net: nn.Module,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    seeds: Sequence[Sequence[int]],
    plan: StepPlan | None = None,
    *,
    keep_trajectory: bool = False,
    encoder: Encoder | None = None,
) -> Iterator[Chunk]:
    """Sample each prompt with each of its seeds; yields whole groups of one layout, to be judged meanwhile.

    Row b depends on its prompt and its seed alone, up to the rounding of batched arithmetic. `encoder` keeps the
    prompts' conditionings for whoever asks next.
    """
    group = max(len(own) for own in seeds)
    encoder = encoder or Encoder(sampler.adapter, next(net.parameters()).device)
    for alike in by_layout(sampler.adapter, prompts):
        encoder.cond([prompts[row] for row in alike])
        guided = sampler.needs_null(sampler.adapter.times(sampler.steps, prompts[alike[0]]))
        size = max(1, sampler.batch // (2 * group if guided else group))
        null: Conditioning | None = None
        for piece in (alike[i : i + size] for i in range(0, len(alike), size)):
            own = [prompts[row] for row in piece]
            with torch.no_grad():
                cond = sampler.adapter.prepare(net, encoder.cond(own))
                null = _null(net, encoder, own, null) if guided else None
                rows = torch.tensor([i for i, row in enumerate(piece) for _ in seeds[row]])
                flat = [seed for row in piece for seed in seeds[row]]
                yield _integrate(net, sampler, own, rows, flat, cond, null, plan, keep_trajectory, offset=piece)


def _null(net: nn.Module, encoder: Encoder, prompts: Sequence[Prompt], known: Conditioning | None) -> Conditioning:
    """The prepared unconditional branch; for prompts without sources it is the same for all, and prepared once."""
    if prompts[0].sources or known is None:
        return encoder.adapter.prepare(net, encoder.null(prompts))
    return known.select(torch.zeros(len(prompts), dtype=torch.int64, device=encoder.device))


def _integrate(
    net: nn.Module,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    rows: Tensor,
    seeds: Sequence[int],
    cond: Conditioning,
    null: Conditioning | None,
    plan: StepPlan | None,
    keep_trajectory: bool,
    *,
    offset: Sequence[int],
) -> Chunk:
    adapter = sampler.adapter
    times = adapter.times(sampler.steps, prompts[0])
    x = adapter.noise([prompts[row] for row in rows.tolist()], seeds).to(next(net.parameters()).device)
    times, rows_on = times.to(x.device), rows.to(x.device)
    states, likelihoods, network_rows = [x], [], 0
    asked = partial(_velocity, net, sampler, cond, null, rows_on)
    for k in range(sampler.steps):
        alive(f"drawing, solver step {k + 1} of {sampler.steps}")
        x, log_prob, used = _advance(sampler, asked, x, times[k], times[k + 1], k, seeds, plan)
        network_rows += used
        if keep_trajectory:
            states.append(x)
            likelihoods.append(log_prob)
    alive("decoding")
    images = adapter.decode(x, prompts[0]).cpu()
    samples = tuple(
        Sample(prompt=prompts[row], image=image, seed=seed, group=offset[row])
        for row, image, seed in zip(rows.tolist(), images, seeds, strict=True)
    )
    return Chunk(
        rows=torch.tensor([offset[row] for row in rows.tolist()]),
        samples=samples,
        latents=x,
        trajectory=torch.stack(states) if keep_trajectory else None,
        log_prob=torch.stack(likelihoods) if keep_trajectory and sampler.kernel.stochastic else None,
        network_rows=network_rows,
    )


def _velocity(
    net: nn.Module, sampler: Sampler, cond: Conditioning, null: Conditioning | None, rows: Tensor, x: Tensor, t: Tensor
) -> tuple[Tensor, int]:
    """Velocity [B ...] of the sampler's role at one time, and the transformer rows it took."""
    return guided_velocity(
        net, sampler.adapter, sampler.guidance, x, t.expand(len(x)), cond, null, rows, role=sampler.role,
        limit=sampler.batch,
    )  # fmt: skip


def _advance(
    sampler: Sampler,
    asked: Callable[[Tensor, Tensor], tuple[Tensor, int]],
    x: Tensor,
    t: Tensor,
    t_next: Tensor,
    k: int,
    seeds: Sequence[int],
    plan: StepPlan | None,
) -> tuple[Tensor, Tensor, int]:
    """x at t_next, the log-likelihood [B] of having drawn it (NaN where nothing was), and the transformer rows.

    Noise of a stochastic step comes from the sample's own stream; a step of a stochastic kernel that is to draw none is
    the ODE's.
    """
    kernel = sampler.kernel
    v, used = asked(x, t)
    if not (kernel.stochastic and plan is not None and bool(plan.stochastic[k])):
        solver = sampler.solver if kernel.stochastic else kernel
        x_next, more = _deterministic(solver, asked, v, x, t, t_next)
        return x_next, x.new_full((len(x),), torch.nan), used + more
    transition = kernel.step(v, x, t, t_next)
    noise = torch.stack([torch.randn(x.shape[1:], generator=generator(seed, "kernel", k)) for seed in seeds])
    x_next = transition.mean + transition.std * noise.to(x)
    return x_next, kernel.log_prob(x_next, transition), used


def _deterministic(
    solver: Kernel | None,  # type: ignore[type-arg]
    asked: Callable[[Tensor, Tensor], tuple[Tensor, int]],
    v: Tensor,
    x: Tensor,
    t: Tensor,
    t_next: Tensor,
) -> tuple[Tensor, int]:
    """x at t_next by a solver, Euler's where none is given, and the rows of a second velocity."""
    if solver is None:
        return x + (t_next - t) * v, 0
    midway = solver.midway(v, x, t, t_next)
    if midway is None:
        return solver.step(v, x, t, t_next).mean, 0
    second, used = asked(midway.x, midway.t)
    return solver.corrected(v, second, x, t, t_next), used


def guided_velocity(
    net: nn.Module,
    adapter: ModelAdapter,  # type: ignore[type-arg]
    guidance: GuidancePolicy,  # type: ignore[type-arg]
    x: Tensor,
    t: Tensor,
    cond: Conditioning,
    null: Conditioning | None,
    rows: Tensor,
    *,
    role: Role,
    limit: int,
) -> tuple[Tensor, int]:
    """Velocity [N ...] of a role under its guidance, and the transformer rows it took.

    Both branches go through in one forward when they are at most `limit` rows and the adapter can join them; a scale
    of 1 never evaluates the null branch.
    """
    if len(x) > limit:  # a single group that is larger than the batch
        parts = [
            guided_velocity(net, adapter, guidance, x[i], t[i], cond, null, rows[i], role=role, limit=limit)
            for i in torch.split(torch.arange(len(x), device=x.device), limit)
        ]
        return torch.cat([v for v, _ in parts]), sum(used for _, used in parts)
    scale = guidance.scale(role, t)
    if null is None or bool((scale == 1).all()):
        return adapter.velocity(net, x, t, cond, rows), len(x)
    joint = cond.join(null) if 2 * len(x) <= limit else None
    if joint is not None:
        both = adapter.velocity(net, torch.cat([x, x]), torch.cat([t, t]), joint, torch.cat([rows, rows + len(cond)]))
        v_cond, v_null = both.chunk(2)
    else:
        v_cond = adapter.velocity(net, x, t, cond, rows)
        v_null = adapter.velocity(net, x, t, null, rows)
    if guidance.detach_null:
        v_null = v_null.detach()
    return adapter.guide(v_cond, v_null, scale), 2 * len(x)
