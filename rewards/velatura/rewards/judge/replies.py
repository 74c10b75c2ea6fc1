"""What a server of the OpenAI chat interface answered, and the verdict in it. Pure: bytes in, a verdict out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from velatura.api import Status, Usage, VelaturaError
from velatura.rewards.judge.rubric import Rubric
from velatura.rewards.judge.scoring import (
    NOT_APPLICABLE,
    SCORE,
    Verdict,
    expected,
    failed,
    is_not_applicable,
    last_score,
    not_applicable,
    without_score,
    written,
)


class LabelsError(VelaturaError):
    """The levels are no single tokens of this model, so that no expectation over them can be formed."""


class Malformed(Exception):
    """The server's answer is not what the interface promises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a reply, with those that might have stood in its place."""

    text: str
    logprobs: Mapping[str, float]
    """Text -> log-probability, the token itself among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer of a chat model."""

    text: str
    model: str
    """Which model says that it answered."""
    tokens: tuple[Token, ...] | None = None
    """None where the server gives no probabilities."""
    refusal: str = ""
    """Why the server or its filter refused."""
    usage: Usage | None = None
    """Tokens that it took; None where the server does not say."""
    is_cut: bool = False
    """Whether it ended because it had as many tokens as it may have."""

    @property
    def states_no_score(self) -> bool:
        """Whether it is worth asking for the last line again."""
        without = last_score(self.text, is_cut=self.is_cut) is None
        return not self.refusal and without and without_score(self.text).status is Status.FAILED

    @property
    def from_its_score_on(self) -> Reply:
        """The same; one that begins with its score says it, however long it goes on and wherever it was cut."""
        return replace(self, is_cut=False) if SCORE.match(self.text.lstrip(" \n*#>`-")) else self


def parsed(body: bytes) -> Reply:
    """The one reply in a response body.

    Raises:
        Malformed: it is no JSON, or not the JSON of a chat completion with one choice.
    """
    try:
        content = json.loads(body)
    except ValueError as error:
        raise Malformed(f"the server's answer is no JSON: {body[:80]!r}") from error
    try:
        choices, model = content["choices"], content["model"]
        if len(choices) != 1:
            raise Malformed(f"the server gave {len(choices)} replies where 1 was asked for")
        message = choices[0]["message"]
        text = message.get("content") or ""
        if not isinstance(text, str) or not isinstance(model, str):
            raise Malformed("the server's reply holds something else than text")
        return Reply(
            text=text, model=model, tokens=_tokens(choices[0]), refusal=_refusal(choices[0]), usage=_usage(content),
            is_cut=choices[0].get("finish_reason") == "length",
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise Malformed(f"the server's answer is no chat completion ({type(error).__name__}: {error})") from error


def reading(reply: Reply, rubric: Rubric, min_mass: float) -> Verdict:
    """The verdict at the last score that the reply states, from the probabilities there.

    Raises:
        LabelsError: the level is not a token of its own.
    """
    if reply.refusal:
        return _refused(reply)
    if not reply.text.strip():
        return without_score(reply.text)
    if reply.tokens is None:
        return failed("the reply has no logprobs, and earlier ones had", reply.text)
    text = "".join(token.text for token in reply.tokens)
    found = last_score(text, is_cut=reply.is_cut)
    if found is None:
        return without_score(reply.text, is_cut=reply.is_cut)
    answer, start = found["answer"], found.start("answer")
    token, before = _token_at(reply.tokens, start)
    none = is_not_applicable(answer)
    if before or (not none and token.text.strip() != answer):
        return not_applicable(reply.text) if none else _not_a_token(answer, token, rubric, reply.text)
    if not none and answer not in {str(level) for level in rubric.levels}:
        known = ", ".join(map(str, rubric.levels))
        return failed(f"the judge wrote the score {answer!r}, which is none of {known}", reply.text)
    levels = {level: _logprob(token, lambda said, wanted=str(level): said == wanted) for level in rubric.levels}
    missing = _logprob(token, lambda said: bool(said) and NOT_APPLICABLE.startswith(said.upper()))
    return expected(levels, none=missing, min_mass=min_mass, note=reply.text)


def stated(reply: Reply, rubric: Rubric) -> Verdict:
    """The verdict that a reply states in words, for servers without probabilities."""
    return _refused(reply) if reply.refusal else written(reply.text, tuple(rubric.levels), is_cut=reply.is_cut)


def _refused(reply: Reply) -> Verdict:
    return Verdict(status=Status.REFUSED, reason=reply.refusal, note=reply.text)


def _token_at(tokens: Sequence[Token], position: int) -> tuple[Token, str]:
    """The token that holds a position of the joined text, and what visible text stands in it before."""
    start = 0
    for token in tokens:
        if position < start + len(token.text):
            return token, token.text[: position - start].strip()
        start += len(token.text)
    raise IndexError(position)


def _not_a_token(answer: str, token: Token, rubric: Rubric, text: str) -> Verdict:
    """The answer shares its token with other characters, or takes several."""
    if answer not in {str(level) for level in rubric.levels}:
        return failed(f"the judge wrote the score {answer!r}, which is none of the levels", text)
    raise LabelsError(
        f"level {answer} of rubric '{rubric.name}' is no token of its own for this model: the token there is "
        f"{token.text!r}. Scores are expectations over single tokens; use a rubric whose levels have one digit, or "
        f"another model."
    )


def _logprob(token: Token, wanted: Any) -> float:
    """Log of the summed probability of all alternatives whose visible text is wanted."""
    found = [value for text, value in token.logprobs.items() if wanted(text.strip())]
    if not found:
        return -math.inf
    if any(math.isnan(value) for value in found):
        return math.nan
    highest = max(found)
    return highest if math.isinf(highest) else highest + math.log(sum(math.exp(v - highest) for v in found))


def _tokens(choice: Mapping[str, Any]) -> tuple[Token, ...] | None:
    """Tokens with alternatives; None where there are none or where no token has any."""
    entries = (choice.get("logprobs") or {}).get("content") or []
    if not any(entry.get("top_logprobs") for entry in entries):
        return None
    return tuple(
        Token(
            text=entry["token"],
            logprobs={other["token"]: float(other["logprob"]) for other in [*(entry.get("top_logprobs") or []), entry]},
        )
        for entry in entries
    )


def _usage(content: Mapping[str, Any]) -> Usage | None:
    """Tokens by the server's own count."""
    said = content.get("usage")
    if not isinstance(said, Mapping):
        return None
    prompt, completion = said.get("prompt_tokens"), said.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int or min(prompt, completion) < 0:
        return None
    return Usage(prompt=prompt, completion=completion)


def _refusal(choice: Mapping[str, Any]) -> str:
    said = choice["message"].get("refusal")
    if said:
        return f"the judge refused: {said!r}"
    return "the server's filter withheld the reply" if choice.get("finish_reason") == "content_filter" else ""
