"""Every built-in of every kind keeps every rule that plugins from outside are held to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from velatura.api import Prompt, Status
from velatura.core.registry import Registry
from velatura.plugins.tinyworld.task import TinyWorld, TinyWorldOptions
from velatura.testing import Check, NotChecked, plugin_checks
from velatura.testing.conformance import ids
from velatura.testing.kit import STATEMENTS, Subject
from velatura.testing.reward_checks import scored

sys.path.insert(0, str(Path(__file__).parent))
import trials

PLUGINS = ("plugins", "rewards", "schedulers")


def world_prompts() -> Sequence[Prompt]:
    """Prompts of the embedded world, text-to-image and edits of every category, at its size."""
    prompts = TinyWorld(TinyWorldOptions(task="both", eval_count=24)).prompts("eval")
    return [replace(prompts[i], size=(24, 24)) for i in range(24)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> Iterator[trials.Workshop]:
    made = trials.Workshop(root=tmp_path_factory.mktemp("trials"), tiny=tiny)
    with made.servers:
        yield made


ADVANTAGE_CHECKS = ("zero_advantage_gives_no_gradient", "better_samples_attract_and_worse_ones_repel")
BARE = (
    *(("guidance", "none"), ("objective", "anchor"), ("objective", "sft"), ("objective", "velocity-kl")),
    *(("evaluator", "tinyworld-gold"), ("reward", "brisque")),
    *(
        ("reward", f"tinyworld-{name}")
        for name in ("aesthetics", "identity", "instruction", "portrait", "preservation")
    ),
    *(("kernel", name) for name in ("dpm2", "heun", "ode")),
)
REGULARISERS = ("anchor", "ema-kl", "kernel-kl", "norm-hinge", "velocity-kl")
NOT_APPLICABLE: dict[tuple[str, str, str], str] = {
    **{(kind, name, "options_survive_a_round_trip"): "it has no options" for kind, name in BARE},
    **{("objective", n, check): "it needs no advantages" for n in (*REGULARISERS, "sft") for check in ADVANTAGE_CHECKS},
    **{("objective", "rwr", check): "it learns from every sample, from better" for check in ADVANTAGE_CHECKS},
    **{("objective", n, ADVANTAGE_CHECKS[1]): "its points are visited states" for n in ("flow-grpo", "grpo-guard")},
    ("kernel", "cps", "marginals_are_kept"): "it says that it does not keep them",
}
"""(kind, component, check) -> why there is nothing to check."""
CHECKS = [check for plugin in PLUGINS for check in plugin_checks(plugin, prompts=world_prompts())]


@pytest.mark.parametrize(
    "check", [pytest.param(check, id=name) for check, name in zip(CHECKS, ids(CHECKS), strict=True)]
)
def test_every_built_in_passes(check: Check, shop: trials.Workshop) -> None:
    """What could not be checked has not passed."""
    trial = shop.trial(check.kind, check.component)
    reason = NOT_APPLICABLE.get((check.kind, check.component, check.name))
    if reason is None:
        check(trial)
    else:
        with pytest.raises(NotChecked, match=reason):
            check(trial)


@pytest.mark.parametrize("name", sorted(name for kind, name in trials.TRIALS if kind == "reward"))
def test_a_reward_tells_the_pictures_that_it_is_tried_with_apart(name: str, shop: trials.Workshop) -> None:
    """By ten times what the checks tolerate; one that says the same of all says it in any order and batch."""
    trial = shop.trial("reward", name)
    assert trial is not None
    subject = Subject(component=Registry.discover().get("reward", name), trial=trial)
    scores = scored(subject.ready(), subject.pictures())
    assert set(scores.status) == {Status.OK}, scores.reasons
    spread = float(scores.values.max() - scores.values.min())
    assert spread > 1e-3 * max(1.0, float(scores.values.abs().max()))


def test_every_check_of_every_installed_built_in_is_made() -> None:
    installed = {(i.kind, i.name) for i in Registry.discover().list() if i.distribution == "velatura"}
    wanted = {
        (kind, name, statement.__name__)
        for kind, name in installed
        for statement in (*STATEMENTS[""], *STATEMENTS.get(kind, ()))
    }
    made = {(check.kind, check.component, check.name) for check in CHECKS if check.kind}
    assert made == wanted
    assert NOT_APPLICABLE.keys() <= wanted
    assert trials.TRIALS.keys() <= installed
