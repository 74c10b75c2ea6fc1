"""Write docs/methods.md from the docstrings of methods: python docs/generate_methods.py [--check]."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from velatura.core.cli import show
from velatura.core.registry import ComponentInfo, Registry

PAGE = Path(__file__).with_name("methods.md")
TEXT = Path(__file__).with_name("methods.in")
"""What is written by hand: everything before and after the components."""
HERE = "<!-- components -->\n"
"""Where the components stand in it."""
KINDS = {
    "objective": "Objectives and regularisers",
    "distiller": "Distillers",
    "kernel": "Kernels and solvers",
    "timesteps": "Timesteps",
    "guidance": "Guidance",
    "advantage": "Advantages",
    "prompt_filter": "Prompt filters",
}
"""Kinds of component that are methods, and their headings."""

SILENT = {
    "nft": "group size, prompts, learning rate for full-parameter training; guidance: the source trains without any.",
    "awm": "why a uniform weight, which is no bound on the likelihood; the released configuration uses `ghuber`.",
    "flow-grpo": "that log-probabilities are means, and that the KL lacks the step size: both are in its code alone.",
    "grpo-guard": "clip ranges for kernels other than `flow-sde`.",
    "dgpo": "whether errors are means or sums, on which `beta` depends; under which licence its code is, so "
    "nothing of it is in ours.",
    "rwr": "the temperature and the cap: none of its sources is about flows.",
    "sft": "nothing: it is the pre-training loss.",
    "velocity-kl": "how its coefficient carries over between objectives: it does not.",
    "kernel-kl": "in the paper: that the published coefficients belong to the released code's convention.",
    "ema-kl": "what it is worth beside an average that draws the samples; that is the source's only use of it.",
    "anchor": "which weight of time goes with 0.04.",
    "norm-hinge": "form, margin and weight.",
    "velocity-match": "how many states, in which mix of tasks; Qwen-Image-2.0-RL and DanceOPD contradict each other on "
    "whether all states are better than one.",
    "opd-kl": "how noise in the rollout was chosen; DiffusionOPD reports the ODE up to five times as sample-efficient.",
    "opd-pg": "why the closed form as a reward teaches anything beyond its clipping.",
    "ode": "nothing.",
    "heun": "how it behaves on flows that are not straight near t = 0; the last step is Euler's in the source, too.",
    "dpm2": "which variable is halved for flows: the source is about diffusions.",
    "flow-sde": "what happens at t = 1, where sigma has a pole; the released code's remedy is taken over.",
    "dance-sde": "why eta is 0.3.",
    "cps": "that it does not keep marginals where v is a mean over pictures (measured here).",
    "high-noise": "count and density: the report says no more than that a subset is weighted to t = 1.",
    "uniform": "nothing to say: a baseline.",
    "all": "nothing to say; the report found it to invite reward hacking.",
    "beta": "whether its density is over times or over steps, on a shifted grid; both are here.",
    "logit-normal": "its parameters for reinforcement learning.",
    "stratified": "how unequal parts are cut.",
    "window": "what a sliding window does at the end of the grid.",
    "rollout-only": "the guidance of the old policy and the reference in the loss, and the scale.",
    "both": "nothing.",
    "none": "nothing.",
    "detached-uncond": "why newer code no longer detaches.",
    "teacher-only": "the scale.",
    "interval": "an interval for flows.",
    "group-z": "what to do where a group hardly varies, or a score is missing.",
    "gdpo": "missing scores.",
    "group-mean-global-std": "several rewards: they are summed before.",
    "pooled-std": "its source has the std of one batch.",
    "rank-normal": "its use for groups of samples, which is ours.",
    "winrate": "ties.",
    "raw-sum": "nothing to say: a baseline.",
    "reliability-z": "it is ours.",
    "range": "the threshold.",
    "zero-variance": "a tolerance.",
    "difficulty-band": "the limits of the band.",
}
"""Component -> what its source does not say."""


def page() -> str:
    """The whole page."""
    before, after = TEXT.read_text().split(HERE)
    return before + "\n".join(components()) + after


def components() -> Iterator[str]:
    """Every method of this distribution, kind by kind."""
    registry = Registry.discover()
    infos = [info for info in registry.list() if info.distribution == "velatura"]
    for kind, heading in KINDS.items():
        yield f"### {heading}\n"
        yield from (component(info, registry) for info in infos if info.kind == kind)


def component(info: ComponentInfo, registry: Registry) -> str:
    """One component: its docstring, its defaults, what its source does not say.

    Raises:
        KeyError: nobody has written what its source does not say.
    """
    cls = registry.get(info.kind, info.name)
    fields = cls.options_class.model_fields
    defaults = ", ".join(f"`{name}` {show._default(field)}" for name, field in fields.items())
    lines = [f"#### {info.kind} `{info.name}`\n", "```text", inspect.cleandoc(cls.__doc__ or ""), "```\n"]
    lines.append(f"Defaults: {defaults}.\n" if defaults else "No options.\n")
    return "\n".join([*lines, f"The source does not say: {SILENT[info.name]}\n"])


def main() -> int:
    """Write the page, or say whether it is current."""
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
