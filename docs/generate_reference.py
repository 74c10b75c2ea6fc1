"""Write docs/recipes.md from the classes that read recipes: python docs/generate_reference.py [--check]."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from velatura.core.base_settings import Ref, Settings
from velatura.core.cli import show
from velatura.core.contracts import CONTRACTS
from velatura.core.judge_settings import RaterRef
from velatura.core.options import Options
from velatura.core.recipe import SLOTS, STAGE_CLASSES, Recipe
from velatura.core.registry import ComponentInfo, Registry
from velatura.core.reward_settings import Breaker, Golden, Recalibrate
from velatura.core.settings import Engine, Optimizer, Sampling

PAGE = Path(__file__).with_name("recipes.md")
SETTINGS: Mapping[str, type[Settings]] = {
    "engine": Engine, "sampling": Sampling, "optimizer": Optimizer, "breaker": Breaker, "golden": Golden,
    "recalibrate": Recalibrate,
}  # fmt: skip
"""Fields that hold settings of their own."""
LISTS = ("rewards", "guards", "raters", "truth", "plus", "evaluators", "observers")
"""Slots that hold several components."""

HEAD = """\
# Recipes: every field, every component

<!-- Written by docs/generate_reference.py from the code; change the descriptions there, then run it again. -->

A recipe is one YAML file: a few settings for the run, and `stages` by name. Slots and settings that stand at the top
are the default of every stage that has them; a stage that gives its own replaces a slot as a whole, and `sampling` and
`optimizer` field by field. Unknown keys are errors. `velatura check RECIPE` finds mistakes without running anything,
`velatura schema` prints the JSON Schema for an editor, and any value can be set on the command line:

<!-- parsed: tutorial.md runs one -->
```sh
velatura check recipes/tinyworld.yaml stages.student.steps=120 sampling.steps=12
```

A component is named with `use`, its options are given in `with`. `{use: nft}` and `nft` mean the same.

```yaml
# fragment
stages:
  teacher_t2i:
    objective: {use: nft, with: {beta: 0.5}}
    timesteps: uniform
```
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, "## The recipe\n", table(Recipe)]
    for name, settings in SETTINGS.items():
        parts += [f"## `{name}`\n", lead(settings), table(settings)]
    parts += ["## References\n", reference_text()]
    for name, stage in STAGE_CLASSES.items():
        parts += [f"## `stage: {name}`\n", lead(stage), table(stage)]
    parts += ["## Components\n", "What `velatura plugins list` shows, with every option.\n", *components()]
    return "\n".join(parts)


def lead(cls: type[Any]) -> str:
    """The first paragraph of a class's documentation."""
    return inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ") + "\n"


def reference_text() -> str:
    """What may stand in a slot."""
    return (
        "What stands in a slot. An objective of `plus` has a `weight`, too.\n\n"
        + table(Ref)
        + "\nA reward has these fields, too; `dimension` is for the raters of a rate stage alone, which need it.\n\n"
        + table(RaterRef, leave_out=tuple(Ref.model_fields))
    )


def table(cls: type[Any], leave_out: tuple[str, ...] = ("stage",)) -> str:
    """A row for every field."""
    rows = ["| field | type | default | what it is |", "|---|---|---|---|"]
    for name, field in cls.model_fields.items():
        if name not in leave_out:
            slot = name in SLOTS and issubclass(cls, Settings)
            kind = slot_type(name) if slot else type_of(name, field)
            about = lead(CONTRACTS[SLOTS[name]]).strip() if slot else meaning(name)
            cells = [f"`{field.alias or name}`", kind, default_of(field, slot), field.description or about]
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def slot_type(name: str) -> str:
    """What stands in a slot."""
    link = f"[{SLOTS[name]}](#{SLOTS[name]})"
    return {"tasks": f"route: {link}"}.get(name, f"list of {link}" if name in LISTS else link)


def type_of(name: str, field: FieldInfo) -> str:
    """In a person's words."""
    if name in SETTINGS:
        return f"[{name}](#{name})"
    if name == "stages":
        return "name: stage"
    return f"`{show._type(field)}`".replace(" | ", " or ").replace("None", "null")


def default_of(field: FieldInfo, slot: bool) -> str:
    """What holds when the field is left out; a slot then holds nothing."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Ref):
        return f"`{value.use}`"
    if isinstance(value, Settings):
        return "its defaults"
    if slot or (value is None and field.annotation in (Sampling | None, Optimizer | None)):
        return "none"
    return f"`{json.dumps(value)}`" if value is None or value in ((), [], {}, "") else f"`{show._default(field)}`"


def meaning(name: str) -> str:
    """What a field without a description is."""
    return lead(SETTINGS[name]).strip() if name in SETTINGS else ""


def components() -> Iterator[str]:
    """Every installed component of this distribution, kind by kind; options that many have, once before them."""
    registry = Registry.discover()
    infos = [info for info in registry.list() if info.distribution == "velatura"]
    for kind, contract in CONTRACTS.items():
        yield f"### {kind}\n\n{lead(contract)}"
        options = {info: registry.get(kind, info.name).options_class for info in infos if info.kind == kind}
        bases = shared(list(options.values()))
        for base in bases:
            users = ", ".join(f"`{info.name}`" for info, cls in options.items() if issubclass(cls, base))
            yield f"#### {title(base)}\n\n{lead(base)}\nOf {users}.\n\n{table(base, leave_out=())}"
        for info, cls in options.items():
            yield component(info, cls, next((base for base in bases if issubclass(cls, base)), None))


def shared(options: Sequence[type[Options]]) -> list[type[Options]]:
    """The classes of at least four options that at least three components have in common."""
    bases = Counter(base for cls in options for base in cls.__mro__ if issubclass(base, Options))
    return [base for base, users in bases.items() if users >= 3 and len(base.model_fields) >= 4]


def title(base: type[Options]) -> str:
    """`DiffusersOptions`: Diffusers options."""
    return " ".join(re.findall("[A-Z][a-z]+", base.__name__)).capitalize()


def component(info: ComponentInfo, options: type[Options], base: type[Options] | None) -> str:
    """One component: its sentence, where the options are that it shares, and those that are its own."""
    text = f"#### `{info.name}`\n\n{info.summary}\n"
    if not options.model_fields:
        return f"{text}\nNo options.\n"
    if base is None:
        return f"{text}\n{table(options, leave_out=())}"
    link = f"[{title(base)}](#{title(base).lower().replace(' ', '-')})"
    common, every = table(base, leave_out=()).splitlines(), table(options, leave_out=()).splitlines()
    rows = [row for row in every if row not in common]
    if not rows:
        return f"{text}\n{link}.\n"
    return f"{text}\n{link}, and:\n\n" + "\n".join([*every[:2], *rows]) + "\n"


def main() -> int:
    """Write the page, or say whether it is current."""
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
