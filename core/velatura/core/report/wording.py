"""Sentences and numbers in words: every claim is computed from an interval, and what one leaves open is called so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Tone = Literal["good", "bad", "open"]
MINUS = "\N{MINUS SIGN}"
NO_BREAK = "\N{NO-BREAK SPACE}"
SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One statement about a run."""

    text: str
    tone: Tone
    """good: an improvement beyond doubt; bad: a loss beyond doubt; open: not settled."""
    route: str
    subject: Literal["primary", "share", "rest", "warning"]
    """What it is about: the primary metric, the share of a teacher's gain, other metrics, a warning."""


def metric_name(metric: str) -> str:
    """`gold/strict` is `strict`; `reward/strict` is `strict (reward)`."""
    prefix, _, name = metric.partition("/")
    return f"{name} (reward)" if prefix == "reward" else name or metric


def signed(value: float, digits: int = 3) -> str:
    """With its sign, and a real minus; what rounds to zero has none."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else MINUS) + text


def percent(ratio: float) -> str:
    """A share in whole percent."""
    return f"{ratio * 100:.0f} %".replace("-", MINUS)


def probability(p: float) -> str:
    """A p value, as small as is worth telling."""
    return ("p < 0.001" if p < 0.001 else f"p = {p:.3f}").replace(" ", NO_BREAK)


def interval(cell: Mapping[str, Any]) -> str:
    """`+0.071 [+0.040, +0.102]`."""
    if cell["low"] is None:
        return f"{signed(cell['difference'])} (one prompt: no interval)"
    return f"{signed(cell['difference'])} [{signed(cell['low'])}, {signed(cell['high'])}]"


def direction(cell: Mapping[str, Any]) -> Tone:
    """Which side of 0 the interval of a difference lies on."""
    if cell.get("low") is None:
        return "open"
    return "good" if cell["low"] > 0 else "bad" if cell["high"] < 0 else "open"


def sentences(summary: Mapping[str, Any]) -> list[Sentence]:
    """What an evaluation showed, route by route: the primary metric, what the student kept, what else moved."""
    found: list[Sentence] = []
    for route, facts in summary["routes"].items():
        if not facts["headline"]:
            continue
        for model, own in facts["models"].items():
            if own[facts["headline"][0]]["overall"].get("difference") is not None:
                found += _of_model(summary, route, model)
    return found


def _of_model(summary: Mapping[str, Any], route: str, model: str) -> Iterator[Sentence]:
    facts = summary["routes"][route]
    own = facts["models"][model]
    primary, *others = facts["headline"]
    yield _main(summary["baseline"], route, model, primary, own[primary]["overall"])
    if model in facts["retained"]:
        yield _share(summary, route, model, primary)
    if others:
        yield _rest(route, model, {name: own[name]["overall"] for name in others})
    rewards = {name: own[name]["overall"] for name in facts["metrics"] if name.startswith("reward/")}
    risen = [name for name, cell in rewards.items() if direction(cell) == "good"]
    if risen and direction(own[primary]["overall"]) == "bad" and not primary.startswith("reward/"):
        names = _listed([metric_name(name) for name in risen])
        yield Sentence(
            text=f"Look for reward hacking in {model}: {names} went up while {metric_name(primary)} went down.",
            tone="bad", route=route, subject="warning",
        )  # fmt: skip


def _main(baseline: str, route: str, model: str, metric: str, cell: Mapping[str, Any]) -> Sentence:
    name, numbers, tone = metric_name(metric), interval(cell), direction(cell)
    prompts = f"{cell['n_pairs']} prompts"
    if tone == "open":
        text = f"Whether {model} changes {name} on {route} is not settled: {numbers} against {baseline} over {prompts}."
        if cell["minimum_detectable"]:
            text += f" So many prompts show a difference of {cell['minimum_detectable']:.3f} four times out of five."
        return Sentence(text=text, tone=tone, route=route, subject="primary")
    verb = "raises" if tone == "good" else "lowers"
    text = f"{model} {verb} {name} on {route}: {numbers} against {baseline} over {prompts}"
    p = cell["p_holm"]
    if p is not None and p >= SIGNIFICANT:
        text += f", but after correction for all comparisons of {route} this may be chance ({probability(p)})."
        return Sentence(text=text, tone="open", route=route, subject="primary")
    return Sentence(
        text=text + (f", {probability(p)}." if p is not None else "."), tone=tone, route=route, subject="primary"
    )


def _share(summary: Mapping[str, Any], route: str, model: str, metric: str) -> Sentence:
    kept = summary["routes"][route]["retained"][model]
    share, name = kept["metrics"][metric], metric_name(metric)
    if not share["is_meaningful"]:
        text = f"How much of its teacher's gain {model} keeps on {route} cannot be said: the gain of {kept['teacher']} "
        return Sentence(
            text=text + f"in {name} is itself not clearly above 0.", tone="open", route=route, subject="share"
        )
    text = (
        f"{model} keeps {percent(share['ratio'])} [{percent(share['low'])}, {percent(share['high'])}] of the gain of "
    )
    text += f"{kept['teacher']} in {name}"
    guidance = summary["models"].get(model, {}).get("guidance")
    if isinstance(guidance, int | float):
        text += f", sampling at guidance {guidance:g}"
    return Sentence(text=text + ".", tone="good" if share["low"] > 0 else "open", route=route, subject="share")


def _rest(route: str, model: str, cells: Mapping[str, Mapping[str, Any]]) -> Sentence:
    """The other headline metrics: which moved beyond their interval."""
    up = [name for name, cell in cells.items() if direction(cell) == "good"]
    down = [name for name, cell in cells.items() if direction(cell) == "bad"]
    rest = len(cells) - len(up) - len(down)
    clauses = [
        f"{verb} for {_listed([f'{metric_name(n)} {interval(cells[n])}' for n in names])}"
        for verb, names in (("up", up), ("down", down))
        if names
    ]
    if rest:
        clauses.append(f"{'not settled' if clauses else 'nothing settled'} for {rest}")
    text = f"Other metrics of {model} on {route}: {'; '.join(clauses)}."
    return Sentence(text=text, tone="bad" if down else "good" if up else "open", route=route, subject="rest")


def _listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def unvalidated(resolved: Mapping[str, Any]) -> list[str]:
    """Rewards that a policy was trained on although no card says that people share their opinion, one sentence each."""
    return [
        f"{found['stage']} was trained on '{found['reward']}' ({found['use']}) without a passing reward card: "
        f"{found['why']}."
        for found in resolved.get("cards") or ()
        if not found.get("passes")
    ]
