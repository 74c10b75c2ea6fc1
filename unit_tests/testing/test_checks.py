"""Every check is shown a component that must fail it, and fails it; what those are made from passes everything."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from velatura.api import Component
from velatura.core.registry import ComponentInfo
from velatura.testing import CheckFailure, NotChecked, make_prompts
from velatura.testing.conformance import component_checks
from velatura.testing.kit import STATEMENTS, Check

SPEC = importlib.util.spec_from_file_location("velatura_wrong", Path(__file__).with_name("wrong.py"))
assert SPEC is not None and SPEC.loader is not None
wrong = importlib.util.module_from_spec(SPEC)
sys.modules["velatura_wrong"] = wrong
SPEC.loader.exec_module(wrong)


def checks_of(component: type[Component[Any]]) -> dict[str, Check]:
    info = ComponentInfo(
        kind=component.kind, name=f"acme/{component.name}", plugin="acme", distribution="", version="", summary=""
    )
    side = 24 if component.kind == "adapter" else 16
    return {check.name: check for check in component_checks(info, component, make_prompts(3, side=side))}


def test_every_check_has_a_component_that_breaks_it() -> None:
    known = {(kind, statement.__name__) for kind, found in STATEMENTS.items() for statement in found}
    assert {name for _, name in known} == {name for name, _ in wrong.WRONG}


@pytest.mark.parametrize(("name", "component"), [pytest.param(*pair, id=pair[0]) for pair in wrong.WRONG])
def test_the_component_that_breaks_a_rule_fails_its_check(name: str, component: type[Component[Any]]) -> None:
    with pytest.raises(CheckFailure) as caught:
        checks_of(component)[name]()
    assert len(str(caught.value)) > 20


@pytest.mark.parametrize("component", wrong.RIGHT, ids=lambda c: c.__name__)
def test_what_they_are_made_from_passes_everything(component: type[Component[Any]]) -> None:
    for check in checks_of(component).values():
        try:
            check()
        except NotChecked as why:
            assert str(why) == "it has no options", (check.name, why)
