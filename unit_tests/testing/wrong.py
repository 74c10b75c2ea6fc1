"""Components that each break one rule, and say which check has to find it. All else about them is right."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import nn

from velatura.api import (
    Admission,
    AdvantageEstimator,
    Advantages,
    Component,
    Conditioning,
    Distiller,
    Evaluator,
    GuidancePolicy,
    JudgeModel,
    Kernel,
    Loss,
    NoOptions,
    Observer,
    Options,
    PolicyObjective,
    Prompt,
    PromptFilter,
    Requirements,
    RewardModel,
    Role,
    Scores,
    State,
    Status,
    StepPlan,
    Task,
    TimestepSampler,
    Transition,
)
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter, TinyWorldAdapterOptions

WRONG: list[tuple[str, type[Component[Any]]]] = []
"""(check, component that must fail it)."""


def breaks(check: str) -> Any:
    """Note that this component has to fail `check`."""

    def note(component: type[Component[Any]]) -> type[Component[Any]]:
        WRONG.append((check, component))
        return component

    return note


class Brightness(RewardModel[NoOptions]):
    """Mean of all pixels."""

    name = "brightness"

    def score(self, samples: Any) -> Scores:
        return Scores.of(torch.stack([s.image.mean() for s in samples]))


@breaks("name_is_lower_case_words_joined_by_dashes")
class Shouting(Brightness):
    """Its name has capitals."""

    name = "Bright_ness"


@breaks("class_is_documented")
class Silent(Brightness):
    pass


class BareOptions(Options):
    gain: float = 1.0


@breaks("every_option_is_described")
class Bare(RewardModel[BareOptions]):
    """Its option has no description."""

    name = "bare"
    score = Brightness.score


class LooseOptions(Options):
    model_config = {"extra": "ignore", "frozen": True}  # noqa: RUF012


@breaks("options_refuse_what_they_do_not_know")
class Loose(RewardModel[LooseOptions]):
    """Takes any key."""

    name = "loose"
    score = Brightness.score


class Part(BaseModel):
    """Equal only to itself."""

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = BaseModel.__hash__


class ForgetfulOptions(Options):
    part: Part = Field(default_factory=Part, description="Not the same after reading.")


@breaks("options_survive_a_round_trip")
class Forgetful(RewardModel[ForgetfulOptions]):
    """Its options are others after they were written."""

    name = "forgetful"
    score = Brightness.score


@breaks("it_can_be_pickled_before_setup")
class Open(Brightness):
    """Holds something open from the beginning."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.client = open(__file__)  # noqa: PTH123, SIM115

    def __del__(self) -> None:
        self.client.close()


@breaks("one_score_per_sample")
class Fewer(Brightness):
    """One score for all."""

    def score(self, samples: Any) -> Scores:
        return Scores.of(super().score(samples).values.mean().reshape(1).repeat(min(2, len(samples) + 1)))


@breaks("scores_that_count_are_finite")
class Dividing(Brightness):
    """NaN, and OK beside it."""

    def score(self, samples: Any) -> Scores:
        return Scores.of(super().score(samples).values / 0 * 0)


@breaks("score_does_not_depend_on_the_batch")
class Centred(Brightness):
    """Less the mean of the batch."""

    def score(self, samples: Any) -> Scores:
        values = super().score(samples).values
        return Scores.of(values - values.mean())


@breaks("score_does_not_depend_on_the_order")
class Ordered(Brightness):
    """The first counts more."""

    scope = "group"

    def score(self, samples: Any) -> Scores:
        values = super().score(samples).values
        return Scores.of(values + torch.arange(len(values)))


@breaks("scoring_leaves_its_input_alone")
class Scribbling(Brightness):
    """Brightens what it judges."""

    def score(self, samples: Any) -> Scores:
        scores = super().score(samples)
        samples[0].image.mul_(0.5)
        return scores


@breaks("scoring_leaves_its_input_alone")
class Clipping(Brightness):
    """Takes extremes out of what it judges: the second time there are none."""

    def score(self, samples: Any) -> Scores:
        samples[0].image.clamp_(0.3, 0.5)
        return super().score(samples)


@breaks("a_picture_that_is_no_picture_gets_no_score")
class Inventing(Brightness):
    """0 for what it cannot see."""

    def score(self, samples: Any) -> Scores:
        return Scores.of(super().score(samples).values.nan_to_num())


class Plain(GuidancePolicy[NoOptions]):
    """1 for all."""

    name = "plain"

    def scale(self, role: Role, t: Any) -> Any:
        return torch.ones_like(t)


@breaks("one_finite_scale_per_time")
class OneForAll(Plain):
    """A scalar."""

    def scale(self, role: Role, t: Any) -> Any:
        return torch.tensor(2.0)


@breaks("scale_does_not_depend_on_the_batch")
class Relative(Plain):
    """Looks at the other times."""

    def scale(self, role: Role, t: Any) -> Any:
        return t / t.max()


@breaks("policies_that_are_compared_are_guided_alike")
class OldOnly(Plain):
    """Guides OLD."""

    def scale(self, role: Role, t: Any) -> Any:
        return torch.full_like(t, 4.0 if role is Role.OLD else 1.0)


class Euler(Kernel[NoOptions]):
    """The ODE."""

    name = "euler"

    def step(self, v: Any, x: Any, t: Any, t_next: Any) -> Transition:
        return Transition(mean=x + (t_next - t) * v, std=torch.zeros(()))


@breaks("a_second_velocity_brings_a_step_nearer")
class Hasty(Euler):
    """Asks twice, and follows the second velocity alone."""

    evaluations = 2

    def midway(self, v: Any, x: Any, t: Any, t_next: Any) -> State:
        return State(x=x + (t_next - t) * v, t=t_next)

    def corrected(self, v: Any, v_midway: Any, x: Any, t: Any, t_next: Any) -> Any:
        return x + (t_next - t) * v_midway


@breaks("a_deterministic_kernel_follows_the_velocity")
class Backwards(Euler):
    """Away from the data."""

    def step(self, v: Any, x: Any, t: Any, t_next: Any) -> Transition:
        return Transition(mean=x - (t_next - t) * v, std=torch.zeros(()))


@breaks("marginals_are_kept")
class OnlyNoise(Euler):
    """Adds noise, and no drift that makes up for it."""

    stochastic = True

    def step(self, v: Any, x: Any, t: Any, t_next: Any) -> Transition:
        return Transition(mean=x + (t_next - t) * v, std=0.7 * (t - t_next).sqrt())


@breaks("a_step_is_pure")
class InPlace(Euler):
    """Overwrites the state."""

    def step(self, v: Any, x: Any, t: Any, t_next: Any) -> Transition:
        return Transition(mean=x.add_((t_next - t) * v), std=torch.zeros(()))


class Every(TimestepSampler[NoOptions]):
    """All steps."""

    name = "every"

    def plan(self, t: Any, generator: torch.Generator) -> StepPlan:
        return StepPlan.training(torch.arange(len(t) - 1), steps=len(t) - 1)


@breaks("trained_steps_are_sorted_distinct_and_there")
class OneTooMany(Every):
    """Counts grid times instead of steps."""

    def plan(self, t: Any, generator: torch.Generator) -> StepPlan:
        steps = len(t) - 1
        none = torch.zeros(steps, dtype=torch.bool)
        return StepPlan(train=torch.arange(len(t)), stochastic=none, weight=torch.ones(steps))


@breaks("noise_and_weights_are_one_per_step")
class ShortWeights(Every):
    """A weight for each trained step only."""

    def plan(self, t: Any, generator: torch.Generator) -> StepPlan:
        steps = len(t) - 1
        return StepPlan(train=torch.arange(2), stochastic=torch.zeros(steps, dtype=torch.bool), weight=torch.ones(2))


@breaks("the_generator_decides")
class Global(Every):
    """Draws from torch's own generator."""

    def plan(self, t: Any, generator: torch.Generator) -> StepPlan:
        return StepPlan.training(torch.randperm(len(t) - 1)[:3].sort().values, steps=len(t) - 1)


class Centre(AdvantageEstimator[NoOptions]):
    """Deviations of the first reward from the group's mean."""

    name = "centre"

    def estimate(self, report: Any) -> Advantages:
        valid = report.valid.all(1)
        values = torch.zeros(len(valid))
        for row in range(len(report.prompts)):
            own = (report.group == row) & valid
            if own.any():
                values[own] = report.scores[own, 0] - report.scores[own, 0].mean()
        return Advantages(values=values, valid=valid)


@breaks("one_finite_advantage_per_sample")
class PerGroup(Centre):
    """One for each prompt."""

    def estimate(self, report: Any) -> Advantages:
        count = len(report.prompts)
        return Advantages(values=torch.ones(count), valid=torch.ones(count, dtype=torch.bool))


@breaks("advantages_of_a_group_sum_to_zero")
class Raw(Centre):
    """The score itself."""

    def estimate(self, report: Any) -> Advantages:
        valid = report.valid.all(1)
        return Advantages(values=report.scores[:, 0] * valid, valid=valid)


@breaks("a_constant_group_has_no_advantages")
class AcrossGroups(Centre):
    """Deviations from the batch's mean."""

    def estimate(self, report: Any) -> Advantages:
        values = report.scores[:, 0] - report.scores[:, 0].mean()
        return Advantages(values=values, valid=report.valid.all(1))


@breaks("a_missing_score_is_no_advantage")
class Trusting(Centre):
    """Takes every number."""

    def estimate(self, report: Any) -> Advantages:
        means = torch.stack([report.scores[report.group == row, 0].mean() for row in range(len(report.prompts))])
        values = report.scores[:, 0] - means[report.group]
        return Advantages(values=values, valid=torch.ones(len(values), dtype=torch.bool))


@breaks("groups_do_not_depend_on_the_order")
class FourAtATime(Centre):
    """Takes samples to come group by group."""

    def estimate(self, report: Any) -> Advantages:
        scores = report.scores[:, 0].reshape(-1, 4)
        return Advantages(values=(scores - scores.mean(1, keepdim=True)).flatten(), valid=report.valid.all(1))


@breaks("what_it_remembers_survives_a_checkpoint")
class Unsaved(Centre):
    """Remembers a scale, and does not save it."""

    scale = 0.0

    def estimate(self, report: Any) -> Advantages:
        found = super().estimate(report)
        self.scale = 0.9 * self.scale + float(found.values.std())
        return Advantages(values=found.values / self.scale, valid=found.valid)


class Spread(PromptFilter[NoOptions]):
    """Keeps prompts whose scores differ."""

    name = "spread"

    def admit(self, report: Any) -> Admission:
        spread = torch.tensor([self.spread(report.composite[report.group == p]) for p in range(len(report.prompts))])
        return Admission(
            keep=spread > 0, reason=tuple("differs" if s > 0 else "flat" for s in spread), statistic=spread
        )

    def spread(self, values: Any) -> float:
        return math.nan if values.isnan().any() else float(values.max() - values.min())


@breaks("one_decision_with_a_reason_per_prompt")
class Wordless(Spread):
    """Gives no reasons."""

    def admit(self, report: Any) -> Admission:
        found = super().admit(report)
        return Admission(keep=found.keep, reason=(), statistic=found.statistic)


@breaks("a_prompt_without_scores_is_not_kept")
class Hopeful(Spread):
    """Takes what failed for what is interesting."""

    def spread(self, values: Any) -> float:
        return 1.0 if values.isnan().any() else super().spread(values)


@breaks("decisions_do_not_depend_on_the_order")
class FirstHalf(Spread):
    """Keeps what comes first."""

    def admit(self, report: Any) -> Admission:
        found = super().admit(report)
        count = len(found.keep)
        return Admission(keep=torch.arange(count) < count // 2, reason=found.reason, statistic=found.statistic)


class Weighted(PolicyObjective[NoOptions]):
    """Advantage-weighted regression to the samples of the current policy."""

    name = "weighted"
    requires = Requirements(roles=frozenset({Role.CURRENT, Role.OLD}))

    def loss(self, points: Any, velocity: Any) -> Loss:
        error = (velocity[Role.CURRENT] - points.target).square().flatten(1).mean(1)
        away = (velocity[Role.CURRENT] - velocity[Role.OLD].detach()).square().flatten(1).mean(1)
        return Loss(value=(points.weight * (points.advantage * error + away)).sum())


@breaks("roles_are_among_those_it_requires")
class Undeclared(Weighted):
    """Asks for a teacher that it does not declare."""

    def roles(self) -> frozenset[Role]:
        return frozenset({Role.CURRENT, Role.TEACHER})


@breaks("only_the_current_policy_gets_a_gradient")
class Leaking(Weighted):
    """Trains the old policy, too."""

    def loss(self, points: Any, velocity: Any) -> Loss:
        error = (velocity[Role.CURRENT] - velocity[Role.OLD]).square().flatten(1).mean(1)
        return Loss(value=(points.weight * points.advantage * error).sum())


@breaks("losses_of_micro_batches_add_up")
class Normalised(Weighted):
    """Divides by the advantages of the micro-batch."""

    def loss(self, points: Any, velocity: Any) -> Loss:
        return Loss(value=super().loss(points, velocity).value / points.advantage.abs().mean())


@breaks("loss_is_proportional_to_the_weights")
class Unweighted(Weighted):
    """A sum of its own."""

    def loss(self, points: Any, velocity: Any) -> Loss:
        error = (velocity[Role.CURRENT] - points.target).square().flatten(1).mean(1)
        return Loss(value=(points.advantage * error).sum())


@breaks("loss_is_finite_at_both_ends_of_time")
class Singular(Weighted):
    """Divides by 1 - t."""

    def loss(self, points: Any, velocity: Any) -> Loss:
        error = (velocity[Role.CURRENT] - points.target).square().flatten(1).mean(1)
        return Loss(value=(points.weight * points.advantage * error / (1 - points.t)).sum())


@breaks("zero_advantage_gives_no_gradient")
class Regressing(Weighted):
    """Pulls to every sample, whatever its advantage."""

    def loss(self, points: Any, velocity: Any) -> Loss:
        error = (velocity[Role.CURRENT] - points.target).square().flatten(1).mean(1)
        return Loss(value=(points.weight * (1 + points.advantage) * error).sum())


@breaks("better_samples_attract_and_worse_ones_repel")
class Reversed(Weighted):
    """Has the sign wrong."""

    def loss(self, points: Any, velocity: Any) -> Loss:
        return Loss(value=-super().loss(points, velocity).value)


class Match(Distiller[NoOptions]):
    """Squared distance to the teacher."""

    name = "match"
    requires = Requirements(points="trajectory", roles=frozenset({Role.CURRENT, Role.TEACHER}), advantage=False)

    def loss(self, points: Any, velocity: Any) -> Loss:
        error = (velocity[Role.CURRENT] - velocity[Role.TEACHER].detach()).square().flatten(1).mean(1)
        return Loss(value=(points.weight * error).sum())


@breaks("a_student_like_its_teacher_has_nothing_to_learn")
class Shrinking(Match):
    """Pulls to half the teacher's velocity."""

    def loss(self, points: Any, velocity: Any) -> Loss:
        error = (velocity[Role.CURRENT] - velocity[Role.TEACHER].detach() / 2).square().flatten(1).mean(1)
        return Loss(value=(points.weight * error).sum())


@breaks("every_prompt_has_one_teacher")
class Routeless(Match):
    """Knows no teacher for edits."""

    def teacher(self, prompt: Prompt) -> str:
        return {"t2i": "drawing"}.get(prompt.task, "")


class World(TinyWorldAdapter):
    """The embedded world, freshly drawn and small."""

    name = "world"

    @classmethod
    def example(cls) -> World:
        return cls(TinyWorldAdapterOptions.model_validate({"weights": None, "width": 48, "heads": 3, "layers": 1}))


@breaks("times_run_from_one_to_zero")
class Endless(World):
    """Stops before 0."""

    def times(self, steps: int, prompt: Any = None) -> Any:
        return torch.linspace(1, 0.1, steps + 1)


@breaks("noise_depends_on_its_own_seed_alone")
class SharedNoise(World):
    """Draws all rows from the first seed."""

    def noise(self, prompts: Any, seeds: Any) -> Any:
        draw = torch.Generator().manual_seed(seeds[0])
        return torch.randn(len(seeds), 16, 48, generator=draw)


@breaks("something_is_trained")
class Frozen(World):
    """Trains nothing."""

    def load(self, device: torch.device) -> nn.Module:
        return super().load(device).requires_grad_(False)


@breaks("velocity_keeps_the_shape")
class Flat(World):
    """Flattens."""

    def velocity(self, *arguments: Any) -> Any:
        return super().velocity(*arguments).flatten(1)


@breaks("velocity_does_not_depend_on_the_batch")
class Mixing(World):
    """Takes the batch's mean away."""

    def velocity(self, *arguments: Any) -> Any:
        v = super().velocity(*arguments)
        return v - v.mean(0)


@breaks("encoding_is_deterministic")
class Dropping(World):
    """Leaves dropout on."""

    def velocity(self, *arguments: Any) -> Any:
        return torch.nn.functional.dropout(super().velocity(*arguments), 0.5)


class Stuck(Conditioning):
    """Always selects the first of the rows asked for."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def select(self, rows: Any) -> Any:
        return Stuck(self.inner.select(rows[:1].repeat(len(rows))))


@breaks("selected_rows_stay_with_their_prompts")
class Unselected(World):
    """Its conditioning forgets to turn round."""

    def encode(self, prompts: Any) -> Any:
        return Stuck(super().encode(prompts))

    def prepare(self, net: Any, cond: Any) -> Any:
        return super().prepare(net, cond.inner)


@breaks("pictures_lie_between_zero_and_one")
class Unclamped(World):
    """Decodes to [-1, 1]."""

    def decode(self, x: Any, prompt: Any = None) -> Any:
        return super().decode(x, prompt) * 2 - 1


@breaks("guidance_of_scale_one_is_the_conditional_branch")
class OffByOne(World):
    """Takes scale 0 for no guidance."""

    def guide(self, cond: Any, null: Any, scale: Any) -> Any:
        return super().guide(cond, null, scale + 1)


class Few(Task[NoOptions]):
    """Three prompts."""

    name = "few"

    def prompts(self, split: Any) -> Any:
        return [Prompt(id=f"{split}/{i}", text="a circle", task="t2i") for i in range(3)]


@breaks("every_prompt_has_an_id_of_its_own")
class Twins(Few):
    """Names prompts by their text."""

    def prompts(self, split: Any) -> Any:
        return [Prompt(id=p.text, text=p.text, task=p.task) for p in super().prompts(split)]


@breaks("prompts_are_always_the_same")
class Counting(Few):
    """Goes on counting."""

    count = 0

    def prompts(self, split: Any) -> Any:
        Counting.count += 1
        return [Prompt(id=f"{split}/{i}/{Counting.count}", text="a circle", task="t2i") for i in range(3)]


@breaks("sources_are_pictures")
class Bytes(Few):
    """Pixels from 0 to 255."""

    def prompts(self, split: Any) -> Any:
        picture = torch.full((3, 8, 8), 255.0)
        return [Prompt(id=split, text="make it red", task="edit", sources=(picture,))]


class Measure(Evaluator[NoOptions]):
    """Mean of all pixels."""

    name = "measure"

    def evaluate(self, samples: Any) -> Any:
        return {"brightness": [float(sample.image.mean()) for sample in samples]}


@breaks("one_value_per_metric_and_sample")
class Averaging(Measure):
    """One value for all."""

    def evaluate(self, samples: Any) -> Any:
        return {"brightness": [sum(super().evaluate(samples)["brightness"]) / len(samples)]}


@breaks("values_do_not_depend_on_the_order")
class Trend(Measure):
    """Less that of the sample before."""

    def evaluate(self, samples: Any) -> Any:
        values = super().evaluate(samples)["brightness"]
        return {"trend": [b - a for a, b in zip([0.0, *values], values, strict=False)]}


@breaks("no_event_raises_or_is_changed")
class Strict(Observer[NoOptions]):
    """Wants a report."""

    name = "strict"

    def rollout_done(self, event: Any) -> None:
        assert event.report.scores is not None


@breaks("it_survives_a_stage_that_fails")
class Cheerful(Observer[NoOptions]):
    """Takes every end for a good one."""

    name = "cheerful"

    def run_end(self, event: Any) -> None:
        assert event.error is None, "this was not supposed to happen"


class Linear(JudgeModel[NoOptions]):
    """A line through the mean brightness."""

    name = "linear"
    levels = (1, 2, 3)

    def load(self, device: torch.device) -> nn.Module:
        return nn.Linear(1, 1)

    def raw(self, net: Any, samples: Any) -> Any:
        return 1 + 2 * net(torch.stack([s.image.mean() for s in samples])[:, None])[:, 0].sigmoid()

    def loss(self, net: Any, rated: Any) -> Loss:
        means = torch.tensor([r.mean for r in rated])
        return Loss(value=(self.raw(net, [r.sample for r in rated]) - means).square().mean())

    def mark(self, net: Any, samples: Any) -> Scores:
        return Scores.of(self.raw(net, samples))

    def save(self, net: Any, folder: Any, info: Any) -> None:
        torch.save(net.state_dict(), folder / "linear.pt")


@breaks("levels_rise_in_steps_of_one")
class Falling(Linear):
    """The best first."""

    levels = (3, 2, 1)


@breaks("it_learns_from_ratings")
class Constant(Linear):
    """Its loss knows no network."""

    def loss(self, net: Any, rated: Any) -> Loss:
        return Loss(value=super().loss(net, rated).value * 0)


@breaks("one_mark_per_sample_on_the_levels")
class Percent(Linear):
    """Marks out of a hundred."""

    def mark(self, net: Any, samples: Any) -> Scores:
        values = 100 * self.raw(net, samples)
        return Scores(values=values.detach(), status=(Status.OK,) * len(samples))


RIGHT = (Brightness, Plain, Euler, Every, Centre, Spread, Weighted, Match, World, Few, Measure, Linear)
"""What the wrong ones are made from: all of these pass everything."""
