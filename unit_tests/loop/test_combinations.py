"""What does not go together is refused when the recipe is read, with the reason and the nearest valid choice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from velatura.api import (
    Distiller,
    GuidancePolicy,
    Kernel,
    Loss,
    NoOptions,
    Points,
    PolicyObjective,
    Requirements,
    Role,
    hookimpl,
)
from velatura.core.build import build
from velatura.core.check import check_combinations
from velatura.core.errors import RecipeError
from velatura.core.learning_checks import objective_at
from velatura.core.recipe import Ref, load_recipe
from velatura.core.registry import Registry

TINY = Path(__file__).parents[2] / "integration_tests" / "recipes" / "tiny.yaml"
T, S = "stages.teacher_t2i", "stages.student"
NOISY = (f"{T}.kernel=flow-sde", f"{T}.guidance=both")


class Once(PolicyObjective[NoOptions]):
    """A plain policy gradient: right for the first update of a round."""

    name = "once"
    requires = Requirements(advantage=True, several_updates=False)

    def loss(self, points: Points, velocity: dict[Role, torch.Tensor]) -> Loss:  # type: ignore[override]
        return Loss(value=(points.weight * points.advantage * velocity[Role.CURRENT].flatten(1).mean(1)).sum())


class Half(GuidancePolicy[NoOptions]):
    """Guides what draws and what learns, and not the old policy."""

    name = "half"

    def scale(self, role: Role, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(t, 2.0 if role in (Role.ROLLOUT, Role.CURRENT) else 1.0)


class Afresh(Distiller[NoOptions]):
    """Asks the teacher at finished pictures that are re-noised, which a student does not visit."""

    name = "afresh"
    requires = Requirements(roles=frozenset({Role.CURRENT, Role.TEACHER}), advantage=False)

    def loss(self, points: Points, velocity: dict[Role, torch.Tensor]) -> Loss:  # type: ignore[override]
        return Loss(value=(points.weight * (velocity[Role.CURRENT] - velocity[Role.TEACHER]).flatten(1).mean(1)).sum())


class Plugin:
    """All of them."""

    @staticmethod
    @hookimpl
    def velatura_objective() -> list[type[Once]]:
        return [Once]

    @staticmethod
    @hookimpl
    def velatura_guidance() -> list[type[Half]]:
        return [Half]

    @staticmethod
    @hookimpl
    def velatura_distiller() -> list[type[Afresh]]:
        return [Afresh]


@pytest.fixture(scope="module")
def registry() -> Registry:
    found = Registry.discover()
    found.add(Plugin, "odd")
    return found


REFUSED = [
    ((f"{T}.objective=flow-grpo",), "needs stochastic steps, but kernel 'ode' has none.*'flow-sde'.*'nft'"),
    ((f"{T}.objective=dgpo", f"{T}.micro_batch=7"), "4 samples at 2 step.* are 8 points.*micro_batch to 8 or more"),
    ((f"{T}.objective=dgpo", f"{T}.share_noise=false"), "comparable under the same noise alone. Leave share_noise out"),
    ((f"{T}.objective=odd/once",), "the first of the 2 updates of a round only. Set updates_per_step to 1"),
    ((f"{T}.plus=[{{use: anchor}}]",), "'nft . anchor' pulls to an anchor, and the stage names none.*velocity-kl"),
    ((f"{T}.anchor=warm",), r"'warm' is named as the anchor, but nothing pulls to it. Add plus: \[{use: anchor"),
    ((f"{T}.anchor=nobody",), "no stage is called 'nobody'"),
    ((f"{T}.plus=[{{use: nft}}]",), "plus.0: objective 'nft' is there already"),
    ((f"{T}.plus=[{{use: velocity-kl, weight: -1}}]",), "plus.0.weight: give 0 or more .got -1"),
    ((f"{T}.plus=[{{use: awm}}]",), "'nft' and 'awm' let the old policy follow the current one at different paces"),
    ((f"{T}.plus=[{{use: kernel-kl}}]",), "'nft' learns from finished samples that are re-noised, 'kernel-kl' from"),
    ((f"{T}.plus=[{{use: velocity-kll}}]",), "no objective is called 'velocity-kll'. Did you mean 'velocity-kl'"),
    ((f"{T}.objective={{use: nft, with: {{beta: -1}}}}",), "beta: give more than 0 .got -1"),
    ((f"{T}.step_weight=kl",), "'kl' is made of the noise of a step, and kernel 'ode' draws none.*'dt'"),
    ((f"{T}.step_weight=ghuber",), "'ghuber' weighs a point by its own error.*weighting: ghuber"),
    ((f"{T}.solver=heun",), "kernel 'ode' draws no noise, so it takes every step itself. Name 'heun' as the kernel"),
    ((*NOISY, f"{T}.objective=flow-grpo", f"{T}.solver=cps"), "'cps' draws noise, and a solver takes the steps on"),
    ((*NOISY, f"{T}.objective=flow-grpo", f"{T}.solver=heun", f"{T}.timesteps={{use: window, with: {{width: 1, "
      "every: 2}}"), "'heun' is of higher order, and in round 2 step 1 draws noise behind steps that do not.*'ode'"),
    ((f"{T}.timesteps={{use: window, with: {{width: 4}}}}",), "a window of 4 step.* does not fit on the grid of 3"),
    ((f"{T}.timesteps={{use: stratified, with: {{within: 0.2}}}}",), "within 0.2 of 3 step.* leaves none"),
    ((f"{T}.timesteps=uniform", f"{T}.sampling.steps=1"), "timesteps: a grid of one step leaves none .*drop_first"),
    ((*NOISY, f"{T}.kernel=cps", f"{T}.objective=flow-grpo", f"{T}.timesteps={{use: window, with: {{width: 1, every: "
      "2}}"), r"timesteps: in round 4 the trained step.s. \[2\] draw no noise, so none has a likelihood.*but \[2\]"),
    ((f"{T}.kernel=cps", f"{T}.step_weight=kl", f"{T}.timesteps={{use: window, with: {{width: 1, start: 2}}}}"),
     r"timesteps: in round 0 .*\[2\] draw no noise, so step_weight 'kl' weighs all of them 0.*'flow-sde'"),
    ((f"{S}.kernel=cps", f"{S}.distiller=opd-kl", f"{S}.timesteps={{use: uniform, with: {{count: 1}}}}"),
     r"student.timesteps: in round . the trained step.s. \[2\] draw no noise"),
    ((f"{S}.step_weight=sigma-sqrt-dt",), "student.step_weight: 'sigma-sqrt-dt' is made of the noise"),
    ((f"{T}.kernel=flow-sde", f"{T}.guidance=odd/half", f"{T}.objective=flow-grpo"),
     "guidance 'half' draws samples under another guidance than it trains under.*'both' or 'none'"),
    ((f"{S}.distiller=opd-kl",), "'opd-kl' needs stochastic steps, but kernel 'ode' has none.*'velocity-match'.*dt2"),
    ((f"{S}.distiller=odd/afresh",), "'afresh' learns from re-noised pictures, and a student from.*velocity-match"),
    ((f"{S}.distiller={{use: velocity-match, with: {{route: category}}}}",),
     r"student.teachers: .* sends prompts of route '\w+' to teacher '\w+', which is not configured. There is: t2i"),
    ((f"{S}.prompts={{t2i: curate_t2i}}", f"{S}.tasks={{t2i: tinyworld}}"), "'t2i' has both 'prompts' and 'tasks'"),
    ((f"{S}.plus=[{{use: nft}}]",), "visited: they have no state in common"),
    ((f"{S}.kernel=flow-sde", f"{S}.plus=[{{use: flow-grpo}}]"), "'flow-grpo' learns from rewards, which a distill"),
    ((f"{S}.teachers={{t2i: teacher_t2i, edit: teacher_edit, hair: teacher_edit}}",),
     "teachers.hair: teacher 'hair' has no task: distiller 'velocity-match' sends no prompt to it. Prompts ask"),
    ((f"{S}.teachers={{t2i: [teacher_t2i, warm], edit: teacher_edit}}",), "'t2i' has 2 teachers without weights"),
    ((f"{S}.teachers={{t2i: {{}}, edit: teacher_edit}}",), "the teachers of 't2i': nobody is named"),
    ((f"{S}.teachers={{t2i: [warm], edit: teacher_edit}}",), "'t2i' has a list of 1 teacher.*Write t2i: STAGE"),
    ((f"{S}.teachers={{t2i: {{teacher_t2i: 0.5, warm: 0.6}}, edit: teacher_edit}}",),
     "the teachers of 't2i': the weights sum to 1.1 and not to 1. In these proportions: {teacher_t2i: 0.4545"),
    ((f"{S}.teachers={{t2i: {{teacher_t2i: 1.5, warm: -0.5}}, edit: teacher_edit}}",), "weight of 'warm' is -0.5"),
    ((f"{S}.teachers={{t2i: {{teacher_t2i: 0.5, wrm: 0.5}}, edit: teacher_edit}}",), "'wrm'.*Did you mean 'warm'"),
    (("stages.start={stage: merge, models: {teacher_t2i: 0.5, teacher_edit: 0.6}}",),
     "models: the weights sum to 1.1 and not to 1"),
    (("stages.start={stage: merge, models: {teacher_t2i: 0.5, student: 0.5}}",),
     "guidance folded in at different scales .'teacher_t2i' 1, 'student' 2"),
    (("stages.start={stage: merge, models: {teacher_t2i: 0, warm: 0}, how: add}",),
     "every weight is 0, which leaves the base"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "said"), REFUSED, ids=[said[:40] for _, said in REFUSED])
def test_what_does_not_go_together_is_refused(overrides: tuple[str, ...], said: str, registry: Registry) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        check_combinations(load_recipe(TINY, overrides), registry)
    assert str(caught.value).count("\n") == int("options of" in str(caught.value))  # one line, or one beneath


ALLOWED = [
    (f"{T}.objective=dgpo", f"{T}.micro_batch=8"),
    (*NOISY, f"{T}.objective=flow-grpo", f"{T}.plus=[{{use: kernel-kl, weight: 0.04}}, {{use: ema-kl}}]"),
    (*NOISY, f"{T}.objective=flow-grpo", f"{T}.solver=heun", f"{T}.timesteps={{use: window, with: {{width: 1, "
     "place: fixed}}"),
    (f"{T}.kernel=heun", f"{T}.plus=[{{use: norm-hinge}}, {{use: anchor, weight: 0.04}}]", f"{T}.anchor=warm"),
    (f"{T}.plus=[{{use: nft, weight: 0}}]",),
    (*NOISY, f"{T}.kernel=cps", f"{T}.objective=flow-grpo", f"{T}.timesteps={{use: window, with: {{width: 2}}}}"),
    (f"{S}.kernel=cps", f"{S}.distiller=opd-pg", f"{S}.plus=[{{use: anchor}}]", f"{S}.anchor=teacher_t2i"),
    (f"{S}.teachers={{t2i: {{teacher_t2i: 0.5, warm: 0.5}}, edit: teacher_edit}}", f"{S}.step_weight=dt"),
]  # fmt: skip


@pytest.mark.parametrize("overrides", ALLOWED, ids=[str(i) for i in range(len(ALLOWED))])
def test_what_goes_together_is_accepted(overrides: tuple[str, ...], registry: Registry) -> None:
    check_combinations(load_recipe(TINY, overrides), registry)


def test_a_sum_needs_what_any_of_its_objectives_needs(registry: Registry) -> None:
    plus = "[{use: velocity-kl, weight: 0.5}, {use: ema-kl}, {use: anchor, weight: 2}, {use: norm-hinge, weight: 0}]"
    found = objective_at(load_recipe(TINY, [f"{T}.objective=dgpo", f"{T}.plus={plus}"]), registry, "teacher_t2i")
    assert found.name == "dgpo + velocity-kl + ema-kl + anchor"
    assert found.roles() == {Role.CURRENT, Role.REFERENCE, Role.EMA, Role.ANCHOR}
    needs = found.requires
    assert (needs.points, needs.advantage, needs.whole_group, needs.contrast) == ("forward", True, True, False)
    assert (found.old_decay(500), found.ema_decay(100)) == (0.0, 0.1)
    assert needs.shared_noise and needs.several_updates and not needs.stochastic_steps
    once = load_recipe(TINY, [f"{T}.objective=odd/once", f"{T}.plus=[{{use: velocity-kl}}]"])
    assert not objective_at(once, registry, "teacher_t2i").requires.several_updates
    noisy = objective_at(
        load_recipe(TINY, [*NOISY, f"{T}.objective=flow-grpo", f"{T}.plus=[{{use: velocity-kl}}]"]), registry,
        "teacher_t2i",
    )  # fmt: skip
    assert noisy.requires.stochastic_steps and noisy.requires.rollout_role is Role.OLD


def test_a_sum_is_the_sum_of_losses_and_of_gradients(registry: Registry) -> None:
    plus = "[{use: velocity-kl, weight: 0.5}, {use: anchor, weight: 2}]"
    found = objective_at(load_recipe(TINY, [f"{T}.plus={plus}"]), registry, "teacher_t2i")
    draw = torch.Generator().manual_seed(0)
    velocity = {role: torch.randn(4, 5, generator=draw).double() for role in Role}
    where = Points(
        x=velocity[Role.TEACHER], t=torch.tensor([0.1, 0.3, 0.6, 1.0]).double(), target=velocity[Role.ROLLOUT],
        advantage=torch.randn(4, generator=draw).double(), weight=torch.tensor([0.1, 0.2, 0.1, 0.1]).double(),
    )  # fmt: skip
    current = velocity[Role.CURRENT].requires_grad_()
    whole = found.loss(where, velocity)
    parts = []
    for name, weight in (("nft", 1.0), ("velocity-kl", 0.5), ("anchor", 2.0)):
        own = build(registry, "objective", Ref(use=name))
        parts.append(weight * own.loss(where, velocity).value)  # type: ignore[attr-defined]
    torch.testing.assert_close(whole.value, torch.stack(parts).sum())
    (together,), (apart,) = (torch.autograd.grad(v, current) for v in (whole.value, torch.stack(parts).sum()))
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(whole.metrics["plus/anchor"], (parts[2] / 2 / 0.5).detach())
    assert {"kl", "plus/velocity-kl/kl", "plus/anchor/norm_ratio"} <= set(whole.metrics)
    assert set(whole.by_time) == {"plus/velocity-kl/kl", "plus/anchor/kl"}


def test_every_built_in_kernel_says_how_often_it_asks(registry: Registry) -> None:
    asked = {}
    for info in registry.list():
        if info.kind == "kernel" and info.distribution == "velatura":
            kernel: Kernel = build(registry, "kernel", Ref(use=info.name))  # type: ignore[type-arg, assignment]
            asked[info.name] = kernel.evaluations
    assert asked == {"ode": 1, "heun": 2, "dpm2": 2, "flow-sde": 1, "dance-sde": 1, "cps": 1}
