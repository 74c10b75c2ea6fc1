"""Every built-in is held to the checks that plugins from outside are held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from velatura.api import Prompt
from velatura.core.registry import Registry
from velatura.plugins.tinyworld.task import TinyWorld, TinyWorldOptions
from velatura.testing import Check, NotChecked, plugin_checks
from velatura.testing.conformance import ids
from velatura.testing.kit import STATEMENTS

PLUGINS = ("plugins", "rewards", "schedulers")
COMMON = {statement.__name__ for statement in STATEMENTS[""]}
NEED_WEIGHTS = {
    *("aesthetic", "brisque", "clip-score", "edit-preservation", "editreward", "editscore", "hpsv2", "hpsv3"),
    *("image-reward", "ocr", "pickscore", "q-judger", "siglip-score", "unified-reward"),
    *("vlm", "vlm-judge", "vlm-pairs", "vlm-parts", "face-identity", "portrait-checks"),
    *(
        "diffusers-flow",
        "flux",
        "flux2",
        "qwen-image",
        "qwen-image-21",
        "qwen-image-edit-plus",
        "sana",
        "sd3",
        "z-image",
    ),
}
"""Weights, or faces to look at. What they say is tested beside them; here only what is said of every component."""
REGULARISERS = {"anchor", "ema-kl", "kernel-kl", "norm-hinge", "velocity-kl"}
MAY_BE_SKIPPED = {
    *(*NEED_WEIGHTS, *REGULARISERS, "function", "http", "prompts", "sft", "flow-grpo", "grpo-guard", "rwr", "cps")
}
"""Those, what needs a file or a server, an objective without advantages or contrast, ratios, whose points have no
target, and a kernel that says that it keeps no marginals."""


def world_prompts() -> Sequence[Prompt]:
    """Prompts of the embedded world, text-to-image and edits of every category, at its size."""
    prompts = TinyWorld(TinyWorldOptions(task="both", eval_count=24)).prompts("eval")
    return [replace(prompts[i], size=(24, 24)) for i in range(24)]


def builtin_checks() -> Sequence[Check]:
    prompts = world_prompts()
    found = [check for plugin in PLUGINS for check in plugin_checks(plugin, prompts=prompts)]
    return [check for check in found if check.component not in NEED_WEIGHTS or check.name in COMMON]


CHECKS = builtin_checks()


@pytest.mark.parametrize(
    "check", [pytest.param(check, id=name) for check, name in zip(CHECKS, ids(CHECKS), strict=True)]
)
def test_every_built_in_passes(check: Check) -> None:
    try:
        check()
    except NotChecked as why:  # no built-in slips through
        assert check.component in MAY_BE_SKIPPED or check.name == "options_survive_a_round_trip", why
        pytest.skip(str(why))


def test_every_installed_built_in_is_among_them() -> None:
    installed = {(i.kind, i.name) for i in Registry.discover().list() if i.distribution == "velatura"}
    assert installed == {(check.kind, check.component) for check in CHECKS if check.kind}
