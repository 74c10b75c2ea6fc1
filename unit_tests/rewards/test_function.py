"""A reward that is a function in a file: what it is shown, what its answers are worth, what is said at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from velatura.api import Context, Prompt, Sample, Status, VelaturaError
from velatura.core.judge import Judge, WeightedReward
from velatura.rewards.function import Function, FunctionOptions

Make = Callable[..., Any]
CODE = """
import math

import numpy as np
import torch

calls = []


def redness(image, prompt):
    return image[0].mean() - image[1:].mean()


def batched(images, prompts, gain=1.0):
    calls.append(len(images))
    return torch.stack([gain * image[0].mean() for image in images])


def odd(image, prompt):
    return {
        "none": None, "nan": math.nan, "inf": math.inf, "huge": 1e39, "text": "0.5", "bool": True, "list": [0.5],
        "whole": 3, "numpy": np.float32(0.25), "complex": 1j, "tensor": torch.tensor([0.75]), "two": torch.zeros(2),
    }[prompt.id]


def picky(images, prompts):
    if any(prompt.id == "bad" for prompt in prompts):
        raise ValueError("cannot read this one")
    return [0.5] * len(images)


def short(images, prompts):
    return [0.5] * max(1, len(images) - 1)


def pair(images, prompts):
    return [0.5, 0.5]


def spoils(image, prompt):
    image.fill_(7)
    return 1.0


def alone(image):
    return 1.0


LIMIT = 3
"""


@pytest.fixture
def made(tmp_path: Path) -> Make:
    """The reward of a function of CODE, set up."""
    (tmp_path / "redness.py").write_text(CODE)
    context = Context(device=torch.device("cpu"), cache=tmp_path, seed=0, base=tmp_path)

    def make(call: str, **options: Any) -> Function:
        reward = Function(FunctionOptions(**{"file": "./redness.py", "call": call} | options))
        reward.setup(context)
        return reward

    return make


def samples(*ids: str, red: float = 0.75) -> list[Sample]:
    image = torch.tensor([red, 0.25, 0.5])[:, None, None].expand(3, 4, 6).contiguous()
    return [Sample(prompt=Prompt(id=i, text="a wall", task="t2i"), image=image.clone(), seed=0) for i in ids]


def test_a_function_is_shown_picture_and_prompt(made: Make) -> None:
    scores = made("redness").score([*samples("a"), *samples("b", red=0.0)])
    assert scores.status == (Status.OK, Status.OK)
    torch.testing.assert_close(scores.values, torch.tensor([0.375, -0.375]))


def test_a_batch_is_one_call_and_takes_further_arguments(made: Make) -> None:
    reward = made("batched", batch=True, arguments={"gain": 2.0})
    scores = reward.score(samples("a", "b", "c"))
    assert reward._function.__globals__["calls"] == [3]
    torch.testing.assert_close(scores.values, torch.full((3,), 1.5))


@pytest.mark.parametrize(("answer", "value"), [("whole", 3.0), ("numpy", 0.25), ("tensor", 0.75)])
def test_numbers_of_python_numpy_and_torch_are_scores(made: Make, answer: str, value: float) -> None:
    scores = made("odd").score(samples(answer))
    assert (scores.status, scores.values.tolist()) == ((Status.OK,), [value])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("nan", "nan, which is not a finite number"), ("inf", "inf, which is not a finite number"),
        ("huge", "1e+39, which is not a finite number"), ("text", "str ('0.5')"), ("bool", "bool (True)"),
        ("list", "list ([0.5])"), ("complex", "complex"), ("two", "Tensor"), ("unknown", "KeyError: 'unknown'"),
    ],
)  # fmt: skip
def test_what_is_no_number_is_a_failure_with_its_reason_and_harms_no_other(
    made: Make, answer: str, reason: str
) -> None:
    scores = made("odd").score(samples("whole", answer))
    assert scores.status == (Status.OK, Status.FAILED)
    assert reason in scores.reasons[1]


def test_none_is_not_applicable(made: Make) -> None:
    assert made("odd").score(samples("none")).status == (Status.NOT_APPLICABLE,)


def test_an_exception_names_the_line_of_the_file(made: Make) -> None:
    (reason,) = made("picky", batch=True).score(samples("bad")).reasons
    line = next(i for i, text in enumerate(CODE.splitlines(), start=1) if "cannot read" in text)
    assert reason == f"ValueError: cannot read this one (redness.py, line {line})"


def test_a_bad_picture_spoils_no_other_of_its_batch(made: Make) -> None:
    scores = made("picky", batch=True).score(samples("a", "bad", "c"))
    assert scores.status == (Status.OK, Status.FAILED, Status.OK)
    assert scores.values[[0, 2]].tolist() == [0.5, 0.5]


def test_scores_that_are_not_as_many_as_the_pictures_are_given_to_none_of_them(made: Make) -> None:
    scores = made("short", batch=True).score(samples("a", "b"))
    assert scores.status == (Status.OK, Status.OK)  # each alone gets its own
    scores = made("pair", batch=True).score(samples("a", "b", "c"))
    assert scores.status == (Status.FAILED,) * 3
    assert "ValueError: it returned 2 scores for 1 pictures" in scores.reasons[0]


def test_a_function_for_many_is_not_called_for_none(made: Make) -> None:
    """All pictures of the call are broken: a sum, or a stack, of nothing would be another mistake than theirs."""
    broken = [Sample(prompt=s.prompt, image=s.image * torch.nan, seed=0) for s in samples("a", "b")]
    scores = made("batched", batch=True).score(broken)
    assert scores.status == (Status.FAILED,) * 2
    assert set(scores.reasons) == {"the picture holds values that are not finite"}


def test_a_picture_that_is_not_finite_is_not_shown(made: Make) -> None:
    bad = samples("a", "b")
    bad[0].image[0, 0, 0] = torch.nan
    scores = made("batched", batch=True).score(bad)
    assert scores.status == (Status.FAILED, Status.OK)
    assert "not finite" in scores.reasons[0]


def test_a_function_cannot_change_the_picture(made: Make) -> None:
    shown = samples("a")
    before = shown[0].image.clone()
    made("spoils").score(shown)
    assert torch.equal(shown[0].image, before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"file": "./rednes.py"}, "there is no file .*Did you mean 'redness.py'"),
        ({"file": "gone/redness.py"}, "There is no folder"),
        (
            {"call": "rednes"},
            "there is no 'rednes' in .*It defines: alone, batched, odd, pair, .*Did you mean 'redness'",
        ),
        ({"call": "LIMIT"}, "'LIMIT' is no function but int"),
        ({"call": "alone"}, r"is called as alone\(image, prompt\), but takes \(image\)"),
        ({"arguments": {"gian": 1}}, r"redness\(image, prompt, gian=...\), but takes \(image, prompt\)"),
        ({"file": "./broken.py"}, "does not import: SyntaxError"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_before_the_first_picture(
    made: Make, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    (tmp_path / "broken.py").write_text("def redness(:\n")
    with pytest.raises(VelaturaError, match=said):
        made(**({"call": "redness"} | options))


def test_failures_of_a_function_are_counted_by_the_judge(made: Make) -> None:
    reward = WeightedReward(label="odd", at="rewards.0", model=made("odd"))
    shown = samples("whole", "nan", "none")
    with Judge([reward], max_failed=1.0) as judge:
        judge.submit(shown)
        report = judge.report([s.prompt for s in shown])
    assert report.status[:, 0].tolist() == [Status.OK, Status.FAILED, Status.NOT_APPLICABLE]
    assert dict(judge.failures) == {("odd", "failed"): 1}
