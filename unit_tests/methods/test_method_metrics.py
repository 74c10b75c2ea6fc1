"""What objectives and distillers log: every number is what docs/metrics.md says, and none is missing there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from velatura.api import Loss, Points, PolicyObjective, Role
from velatura.core.build import build
from velatura.core.recipe import Ref
from velatura.core.registry import Registry
from velatura.core.summed import Summed, Term
from velatura.plugins.distillers.step_match import OPDKL, OPDPG, OPDPGOptions
from velatura.plugins.objectives.awm import AWM, AWMOptions
from velatura.plugins.objectives.dgpo import DGPO, DGPOOptions
from velatura.plugins.objectives.flow_grpo import FlowGRPO, FlowGRPOOptions
from velatura.plugins.objectives.grpo_guard import GRPOGuard, GRPOGuardOptions
from velatura.plugins.objectives.nft import NFT, NFTOptions
from velatura.plugins.objectives.ratio import transition
from velatura.schedulers.stochastic import DanceSde

N, D, CLIP = 6, 5, 0.01
PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
ALL: list[tuple[str, str, dict[str, Any]]] = [
    ("objective", "nft", {}),
    ("objective", "awm", {"clip_range": CLIP}),
    ("objective", "dgpo", {"clip_range": CLIP}),
    ("objective", "rwr", {}),
    ("objective", "sft", {}),
    ("objective", "flow-grpo", {"kl": 0.1}),
    ("objective", "grpo-guard", {"kl": 0.1}),
    ("objective", "velocity-kl", {}),
    ("objective", "kernel-kl", {}),
    ("objective", "ema-kl", {}),
    ("objective", "anchor", {}),
    ("objective", "norm-hinge", {}),
    ("distiller", "velocity-match", {}),
    ("distiller", "opd-kl", {}),
    ("distiller", "opd-pg", {}),
]
"""Kind, name, and options under which it logs all that it can."""


def random(seed: int) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def velocities() -> dict[Role, Tensor]:
    base = random(0)
    return {role: base + 0.3 * random(1 + i) for i, role in enumerate(Role)}


def points(v_old: Tensor) -> Points:
    """Re-noised samples that are also steps of a rollout, one of each in a group, weighing unequally."""
    x0, eps, t = random(20), random(21), torch.tensor([0.9, 0.9, 0.9, 0.4, 0.4, 0.4]).double()
    bare = Points(
        x=(1 - t[:, None]) * x0 + t[:, None] * eps, t=t, t_next=t - 0.2, x0=x0, target=eps - x0, kernel=DanceSde(),
        x_next=torch.zeros(N, D).double(), group=torch.tensor([0, 0, 0, 1, 1, 1]),
        advantage=torch.tensor([-9.0, 1.0, 2.0, 0.5, -1.0, 0.5]).double(),
        weight=torch.tensor([0.1, 0.1, 0.2, 0.1, 0.2, 0.1]).double(),
    )  # fmt: skip
    drawn = transition(bare, v_old)
    x_next = drawn.mean + drawn.std * random(22)
    return replace(bare, x_next=x_next, log_prob=DanceSde().log_prob(x_next, drawn) + 0.25)


def loss_of(objective: PolicyObjective[Any]) -> tuple[Loss, Points, dict[Role, Tensor]]:
    velocity = velocities()
    where = points(velocity[Role.OLD])
    return objective.loss(where, velocity), where, velocity


def mean(values: Tensor, where: Points) -> Tensor:
    return (values * where.weight).sum() / where.weight.sum()


def squared(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(1)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), atol=1e-12, rtol=1e-9)


def sizes(velocity: dict[Role, Tensor], where: Points, role: Role) -> Tensor:
    return mean(velocity[Role.CURRENT].norm(dim=1) / velocity[role].norm(dim=1), where)


def test_what_nft_logs() -> None:
    found, where, v = loss_of(NFT(NFTOptions(normalise="none", kl=0.5)))
    assert where.target is not None
    r = (where.advantage / 10 + 0.5).clamp(0, 1)
    ahead, behind = v[Role.CURRENT], 2 * v[Role.OLD] - v[Role.CURRENT]
    close(found.metrics["positive"], mean(squared(ahead, where.target), where))
    close(found.metrics["negative"], mean(squared(behind, where.target), where))
    close(found.metrics["contrast"], mean((2 * r - 1).abs(), where))
    close(found.metrics["distance_to_old"], mean(squared(ahead, v[Role.OLD]), where))
    close(found.metrics["kl"], mean(squared(ahead, v[Role.REFERENCE]), where))
    close(found.metrics["norm_ratio"], sizes(v, where, Role.REFERENCE))
    close(found.value, (found.metrics["policy"] + 0.5 * found.metrics["kl"]) * where.weight.sum())


def test_what_awm_logs() -> None:
    found, where, v = loss_of(AWM(AWMOptions(clip_range=CLIP)))
    assert where.target is not None
    log_p, log_old = (-squared(v[role], where.target) for role in (Role.CURRENT, Role.OLD))
    a, ratio = where.advantage.clamp(-5, 5) / 5, (log_p - log_old).exp()
    held = ((a > 0) & (ratio > 1 + CLIP)) | ((a < 0) & (ratio < 1 - CLIP))
    assert held.any() and not held.all()
    close(found.metrics["advantage"], mean(a.abs(), where))
    close(found.metrics["log_likelihood"], mean(log_p, where))
    close(found.metrics["ratio"], mean(ratio, where))
    close(found.metrics["log_ratio"], mean(log_p - log_old, where))
    close(found.metrics["clipped"], mean(held.double(), where))
    close(found.metrics["ema_kl"], mean(squared(v[Role.CURRENT], v[Role.OLD]), where))
    close(found.metrics["kl"], mean(squared(v[Role.CURRENT], v[Role.REFERENCE]), where))
    close(found.metrics["norm_ratio"], sizes(v, where, Role.REFERENCE))


def test_what_dgpo_logs_and_that_its_kl_has_its_coefficient() -> None:
    found, where, v = loss_of(DGPO(DGPOOptions(clip_range=CLIP, beta=2.0, kl=0.3)))
    assert where.target is not None and where.group is not None
    d, old, ref = (squared(v[role], where.target) for role in (Role.CURRENT, Role.OLD, Role.REFERENCE))
    a, ratio = where.advantage.clamp(-5, 5), (old - d).exp()
    group = torch.stack([(a * (d - ref))[where.group == g].mean() for g in where.group.tolist()])
    free, tight = -a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP)
    close(found.metrics["preference"], mean((2 * group).sigmoid(), where))
    close(found.metrics["gained"], mean(a * (ref - d), where))
    close(found.metrics["ratio"], mean(ratio, where))
    close(found.metrics["clipped"], mean((tight > free).double(), where))
    close(found.metrics["policy"], mean((2 * group).sigmoid() * torch.maximum(free, tight), where))
    close(found.metrics["norm_ratio"], sizes(v, where, Role.REFERENCE))
    close(found.value, (found.metrics["policy"] + 0.3 * found.metrics["kl"]) * where.weight.sum())


@pytest.mark.parametrize("guard", [False, True], ids=["flow-grpo", "grpo-guard"])
def test_what_objectives_with_a_ratio_log_and_that_their_kl_is_added(guard: bool) -> None:
    plain = FlowGRPO(FlowGRPOOptions(clip_range=CLIP, kl=0.3))
    objective = GRPOGuard(GRPOGuardOptions(clip_range=CLIP, kl=0.3)) if guard else plain
    found, where, v = loss_of(objective)
    assert where.x_next is not None and where.t_next is not None
    step, old, ref = (transition(where, v[role]) for role in (Role.CURRENT, Role.OLD, Role.REFERENCE))
    delta, eps = step.mean - old.mean, (where.x_next - old.mean) / old.std
    log_ratio = (delta * eps - (not guard) * delta.square() / (2 * old.std)).mean(1)
    log_ratio = log_ratio if guard else log_ratio / old.std[:, 0]
    a, ratio = where.advantage.clamp(-5, 5), log_ratio.exp()
    held = ((a > 0) & (ratio > 1 + CLIP)) | ((a < 0) & (ratio < 1 - CLIP))
    assert held.any() and not held.all()
    close(found.metrics["ratio"], mean(ratio, where))
    close(found.metrics["log_ratio"], mean(log_ratio, where))
    close(found.metrics["clipped"], mean(held.double(), where))
    close(found.metrics["rollout_gap"], torch.tensor(0.25))
    close(found.metrics["kl"], mean(squared(step.mean, ref.mean) / (2 * old.std[:, 0] ** 2), where))
    close(found.metrics["norm_ratio"], sizes(v, where, Role.REFERENCE))
    close(found.by_time["ratio"], ratio)
    close(found.by_time["clipped"], held.double())
    close(found.value, (found.metrics["policy"] + 0.3 * found.metrics["kl"]) * where.weight.sum())


def test_the_policy_gradient_of_a_distiller_clips_its_reward() -> None:
    found, where, v = loss_of(OPDPG(OPDPGOptions(clip_range=CLIP, max_advantage=0.05)))
    assert where.x_next is not None
    steps = {role: transition(where, v[role]) for role in Role}
    log_p = {role: DanceSde().log_prob(where.x_next, step) for role, step in steps.items()}
    reward = log_p[Role.TEACHER] - log_p[Role.OLD]
    a, ratio = reward.clamp(-0.05, 0.05), (log_p[Role.CURRENT] - log_p[Role.OLD]).exp()
    assert (reward.abs() > 0.05).any() and (reward.abs() < 0.05).any()
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP))
    close(found.value, (loss * where.weight).sum())
    close(found.metrics["step_reward"], mean(reward, where))
    close(found.metrics["distance"], mean(squared(v[Role.CURRENT], v[Role.TEACHER]), where))
    close(found.metrics["norm_ratio"], sizes(v, where, Role.TEACHER))


def test_the_divergence_of_a_distiller_is_logged_as_it_is() -> None:
    found, where, v = loss_of(OPDKL())
    student, teacher = transition(where, v[Role.CURRENT]), transition(where, v[Role.TEACHER])
    close(found.metrics["kl"], mean(squared(student.mean, teacher.mean) / (2 * student.std[:, 0] ** 2), where))
    close(found.value, found.metrics["kl"] * where.weight.sum())


def made(kind: str, name: str, options: dict[str, Any]) -> PolicyObjective[Any]:
    return build(Registry.discover(), kind, Ref.model_validate({"use": name, "with": options}))  # type: ignore[return-value]


def rows() -> list[tuple[set[str], set[str]]]:
    """Of each row of the page on losses: the numbers that it names, and the components that it says log them, all
    where it names none. Every row says what is healthy."""
    found, components = [], {name for _, name, _ in ALL}
    for line in PAGE.split("## Loss and policy")[1].split("\n## ")[0].splitlines():
        if line.startswith("| `"):
            first, where, meaning, healthy = line.strip("|").split("|")
            assert len(meaning) > 20 and healthy.strip(), line
            found.append((set(re.findall(r"`([^`]+)`", first)), set(re.findall(r"`([\w-]+)`", where)) & components))
    return found


@pytest.mark.parametrize(("kind", "name", "options"), ALL, ids=[name for _, name, _ in ALL])
def test_every_number_that_is_logged_is_explained(kind: str, name: str, options: dict[str, Any]) -> None:
    """In a row that names the component, or in one that names none; and what a row says of it is logged."""
    found, *_ = loss_of(made(kind, name, options))
    logged = set(found.metrics) | {f"{metric}/<time>" for metric in found.by_time}
    said = {number for numbers, components in rows() if name in components or not components for number in numbers}
    assert logged - said == set()
    timed = {metric.removesuffix("/<time>") for metric in logged}
    for numbers, components in rows():
        if name in components:
            assert {number.removesuffix("/<time>") for number in numbers} & timed, (name, numbers)


def test_every_built_in_objective_and_distiller_is_looked_at() -> None:
    listed = [i for i in Registry.discover().list() if i.distribution == "velatura"]
    there = {(info.kind, info.name) for info in listed if info.kind in ("objective", "distiller")}
    assert there == {(kind, name) for kind, name, _ in ALL}


def test_of_a_sum_the_parts_stand_behind_its_name() -> None:
    summed = Summed(NFT(), [Term(objective=made("objective", "norm-hinge", {}), weight=0.1, at="plus.0")])
    found, *_ = loss_of(summed)
    assert {"plus/norm-hinge", "plus/norm-hinge/above"} <= set(found.metrics)
    assert "`plus/<name>`" in PAGE
