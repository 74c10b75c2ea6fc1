"""The checks of a plugin: as tests of pytest, and as outcomes for a table."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from velatura.core.components import Component
from velatura.core.errors import VelaturaError
from velatura.core.registry import ComponentInfo, Registry
from velatura.core.types import Prompt
from velatura.testing import (  # noqa: F401  each of them registers its checks
    adapter_checks,
    advantage_checks,
    common_checks,
    objective_checks,
    reward_checks,
    sampling_checks,
    watching_checks,
)
from velatura.testing.kit import STATEMENTS, Check, NotChecked, Statement, Subject, Trial, require

HEAVY = ("deepspeed", "diffusers", "torch", "transformers")
"""What importing a plugin must not import: seconds, for everybody who lists plugins."""


def plugin_checks(plugin: str, *, registry: Registry | None = None, prompts: Sequence[Prompt] = ()) -> Sequence[Check]:
    """Every check of every component of a plugin.

    Args:
        plugin: name of an installed plugin, or of one in `registry`.
        registry: where to look; by default what is installed.
        prompts: what its rewards, evaluators and adapters are asked about; by default plain ones.

    Raises:
        PluginError: there is no such plugin, it is broken, or it offers nothing.
    """
    registry = Registry.discover() if registry is None else registry
    infos = registry.components_of(plugin)
    found = [_import_check(plugin, registry)]
    for info in infos:
        found += component_checks(info, registry.get(info.kind, info.name), prompts)
    return found


def component_checks(
    info: ComponentInfo, component: type[Component[Any]], prompts: Sequence[Prompt] = ()
) -> Iterator[Check]:
    """The checks of one component: those of all kinds, then those of its own."""
    for statement in (*STATEMENTS[""], *STATEMENTS.get(info.kind, ())):
        run = partial(_hold, statement, component, tuple(prompts))
        yield Check(component=info.name, kind=info.kind, name=statement.__name__, run=run)


def _hold(
    statement: Statement, component: type[Component[Any]], prompts: Sequence[Prompt], trial: Trial | None
) -> None:
    """Hold a component to a statement; `prompts` are asked about where the trial has neither prompts nor pictures."""
    trial = Trial() if trial is None else trial
    if not trial.prompts and not trial.samples:
        trial = replace(trial, prompts=prompts)
    statement(Subject(component=component, trial=trial))


def _import_check(plugin: str, registry: Registry) -> Check:
    return Check(
        component=plugin,
        kind="",
        name="importing_it_is_quick",
        run=partial(_importing_it_is_quick, registry.module_of(plugin)),
    )


def _importing_it_is_quick(module: str | None, _: Trial | None = None) -> None:
    """Listing plugins imports them; what is slow belongs into functions."""
    if module is None:
        raise NotChecked("it is no installed module, so it cannot be imported in a process of its own")
    code = f"import sys, {module}; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    require(done.returncode == 0, f"importing {module} in a fresh process fails:\n{done.stderr}")
    slow = ", ".join(done.stdout.split())
    require(not slow, f"importing {module} imports {slow}; import it in `setup`, or name components by string")


def parametrize_with_checks(
    plugin: str, *, registry: Registry | None = None, prompts: Sequence[Prompt] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test function with the one argument `check` a test of every component and check of a plugin.

    Arguments and errors are those of `plugin_checks`. What cannot be checked is skipped, with the reason.

    Example::

        @parametrize_with_checks("acme")
        def test_conformance(check):
            check()

    Where a component needs weights, a file, a server or pictures of its own, a fixture gives them::

        @parametrize_with_checks("acme")
        def test_conformance(check, tiny_weights):
            trials = {"acme/learned": Trial(options={"path": str(tiny_weights)})}
            check(trials.get(check.component))
    """
    import pytest

    checks = plugin_checks(plugin, registry=registry, prompts=prompts)
    return pytest.mark.parametrize(
        "check",
        [
            pytest.param(replace(check, run=partial(_skipping, check)), id=name)
            for check, name in zip(checks, ids(checks), strict=True)
        ],
    )


def ids(checks: Sequence[Check]) -> list[str]:
    """`acme/redness-one_score_per_sample`; with the kind where two kinds have a component of this name."""
    kinds = Counter(component for component, _ in {(check.component, check.kind) for check in checks})
    return [
        f"{check.component}{f'({check.kind})' if kinds[check.component] > 1 and check.kind else ''}-{check.name}"
        for check in checks
    ]


def _skipping(check: Check, trial: Trial | None) -> None:
    import pytest

    try:
        check(trial)
    except NotChecked as why:
        pytest.skip(str(why))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one check outside pytest."""

    check: Check
    status: Literal["passed", "failed", "not checked"]
    reason: str = ""
    """Why it failed, or could not be made."""


def outcome_of(check: Check) -> Outcome:
    """Make a check; whatever a component raises is a failure."""
    try:
        check()
    except NotChecked as why:
        return Outcome(check=check, status="not checked", reason=str(why))
    except (AssertionError, VelaturaError) as error:
        return Outcome(check=check, status="failed", reason=str(error))
    except Exception as error:
        return Outcome(check=check, status="failed", reason=f"{type(error).__name__}: {error}")
    return Outcome(check=check, status="passed")
