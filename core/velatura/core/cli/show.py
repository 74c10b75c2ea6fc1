"""One component on the screen: what it is, what can be set on it, and how a recipe says so."""

from __future__ import annotations

import inspect
import json
import types
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from rich.console import Console

    from velatura.core.components import Component
    from velatura.core.registry import ComponentInfo

BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "max_length": "length <="}


def show(info: ComponentInfo, component: type[Component[Any]], console: Console) -> None:
    """Print everything a user needs to know of one component."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    package = f"{info.distribution} {info.version}".strip()
    console.print(f"{info.kind} {info.name}", style="bold")
    console.print(f"plugin {info.plugin}" + (f" from {package}" if package else ""))
    console.print(f"source {inspect.getsourcefile(component)}", soft_wrap=True, markup=False)
    console.print(
        f"\n{inspect.cleandoc(component.__doc__ or 'This component is not documented.')}\n",
        soft_wrap=True,
        markup=False,
    )
    fields = component.options_class.model_fields
    if fields:
        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("option", "type", "default", "what it does"):
            table.add_column(heading, overflow="fold", no_wrap=heading == "option")
        for name, field in fields.items():
            row = (field.alias or name, _type(field), _default(field), field.description or "")
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    else:
        console.print("It has no options.\n")
    console.print(example(info.kind, info.name, component), soft_wrap=True, markup=False)
    console.print()


def example(kind: str, name: str, component: type[Component[Any]]) -> str:
    """YAML that uses a component with its defaults; what must be given is in angle brackets."""
    import yaml

    from velatura.core.recipe import SLOTS

    slot = next(slot for slot, of in SLOTS.items() if of == kind)
    fields = component.options_class.model_fields
    values = {f.alias or n: f"<{_type(f)}>" if f.is_required() else _plain(f) for n, f in fields.items()}
    ref: dict[str, Any] = {"use": name, **({"with": values} if values else {})}
    value = [ref] if slot in ("rewards", "evaluators", "observers") else ref
    return yaml.safe_dump({slot: value}, sort_keys=False, default_flow_style=None, width=100).rstrip()


def _plain(field: FieldInfo) -> Any:
    """A default as YAML can write it."""
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(field.get_default(call_default_factory=True, validated_data={}))


def _default(field: FieldInfo) -> str:
    """The default in a table."""
    if field.is_required():
        return "(required)"
    value = _plain(field)
    return value if isinstance(value, str) else json.dumps(value)


def _type(field: FieldInfo) -> str:
    """`int >= 1`."""
    bounds = [f"{sign} {getattr(m, name)}" for name, sign in BOUNDS.items() for m in field.metadata if hasattr(m, name)]
    plain, *null = _spelled(field.annotation).split(" | null")
    return f"{plain} {', '.join(bounds)}".strip().replace(" length >= 1", ", not empty") + " | null" * bool(null)


def _spelled(annotation: Any) -> str:
    """A type as a person writes it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None):
        return "null"
    if origin is Annotated:
        return _spelled(arguments[0])
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_spelled(argument) for argument in arguments)
    if origin is tuple:
        inside = ", ".join(_spelled(argument) for argument in arguments if argument is not ...)
        return f"list[{inside}]" if ... in arguments else f"[{inside}]"
    if origin is not None:
        inside = ", ".join("..." if argument is ... else _spelled(argument) for argument in arguments)
        return f"{getattr(origin, '__name__', origin)}[{inside}]"
    return getattr(annotation, "__name__", str(annotation))
