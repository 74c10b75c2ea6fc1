"""Several rubrics as one score, over a real socket."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_server as serving
import pytest
import torch
from chat_server import Question, Raw, scored
from pydantic import ValidationError

from velatura.api import Context, Status, Usage
from velatura.core.base_settings import Ref
from velatura.core.cards.identity import differences, identity_of
from velatura.core.registry import Registry
from velatura.rewards.judge.parts import VlmParts, VlmPartsOptions
from velatura.rewards.judge.rubric import load_rubric, shipped_rubric

Make = Callable[..., Any]


def is_about_looks(question: Question) -> bool:
    return load_rubric(shipped_rubric("aesthetics")).criteria[0] in question.parts[0]["text"]


def says(alignment: str, aesthetics: str) -> Callable[[Question], Raw]:
    """Whatever the picture, one level for each of two rubrics."""

    def answer(question: Question) -> Raw:
        return scored({aesthetics if is_about_looks(question) else alignment: 1.0})

    return answer


def options(server: Any = None, **given: Any) -> VlmPartsOptions:
    judge = {"model": serving.MODEL, "server": server.address if server else "http://localhost:1/v1", "retries": 0}
    parts = [{"rubric": "alignment", "weight": 3.0}, {"rubric": "aesthetics"}]
    return VlmPartsOptions.model_validate({"parts": parts, "judge": judge} | given)


@pytest.fixture
def parts(context: Context) -> Make:
    def make(server: Any, **given: Any) -> VlmParts:
        made = VlmParts(options(server, **given))
        made.setup(context)
        return made

    return make


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("geometric", 0.75**0.75 * 0.01**0.25), ("mean", 0.75 * 0.75), ("soft-minimum", 0.3118)],
)
def test_parts_become_one_score(combine: str, expected: float, serve: Make, parts: Make, pictures: Make) -> None:
    """Levels 4 and 1 are 0.75 and 0; -(1 / 4) log(.75 exp(-3) + .25) = .3118."""
    made = parts(serve(says("4", "1")), combine=combine).score(pictures([0.2, 0.8]))
    assert made.status == (Status.OK, Status.OK)
    torch.testing.assert_close(made.values, torch.full((2,), expected), atol=2e-3, rtol=0)
    assert "alignment:" in made.notes[0] and "aesthetics:" in made.notes[0]


@pytest.mark.parametrize(
    ("said", "known"), [({}, None), ({"prompt_tokens": 9, "completion_tokens": 2}, Usage(prompt=18, completion=4))]
)
def test_tokens_are_those_of_all_parts_or_not_known(
    said: dict[str, int], known: Usage | None, serve: Make, parts: Make, pictures: Make
) -> None:
    counted = json.dumps(json.loads(scored({"4": 1.0}).body) | {"usage": said}).encode()
    made = parts(serve(lambda question: Raw(counted)))
    before = made.usage() or Usage()
    assert made.score(pictures([0.2])).status == (Status.OK,)
    assert made.usage() == (None if known is None else before + known)


def test_a_part_that_fails_fails_the_picture_and_says_which(serve: Make, parts: Make, pictures: Make) -> None:
    server = serve(says("4", "4"))
    reward = parts(server)
    good = server.behaviour

    def partly(question: Question) -> Raw:
        made: Raw = good(question)
        dark = question.pictures[-1].mean() < 128
        return Raw(b"gone", status=400) if dark and is_about_looks(question) else made

    server.behaviour = partly
    made = reward.score(pictures([0.2, 0.8]))
    assert made.status[0] is Status.FAILED and "status 400: gone" in made.reasons[0]
    assert made.reasons[0].startswith("aesthetics:") and made.status[1] is Status.OK


def test_a_rubric_that_is_not_for_the_prompt_is_left_out(serve: Make, parts: Make, pictures: Make) -> None:
    own = [{"rubric": "alignment"}, {"rubric": "edit-quality"}]
    reward = parts(serve(says("4", "4")), parts=own)
    samples = pictures([0.2])
    assert reward.applies(samples[0].prompt)
    made = reward.score(samples)
    assert made.status == (Status.OK,) and float(made.values[0]) == pytest.approx(0.75, abs=1e-3)


def test_a_picture_cannot_get_rid_of_a_part_by_an_answer_of_not_applicable(
    serve: Make, parts: Make, pictures: Make
) -> None:
    """The dark picture's portrait part says N/A: it has no score, and not that of the other part."""

    def answer(question: Question) -> Raw:
        about_faces = load_rubric(shipped_rubric("portrait")).criteria[0] in question.parts[0]["text"]
        return scored({"N/A" if about_faces and question.pictures[-1].mean() < 128 else "4": 1.0})

    own = [{"rubric": "edit-quality"}, {"rubric": "alignment"}, {"rubric": "portrait"}]
    made = parts(serve(answer), parts=own).score(pictures([0.2, 0.8]))
    assert made.status == (Status.NOT_APPLICABLE, Status.OK)
    assert made.reasons == ("portrait: the judge answered N/A", "")
    assert made.values.tolist() == pytest.approx([0.0, 0.75], abs=1e-3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"parts": [{"rubric": "alignment"}]}, "at least 2 items"),
        ({"judge": {"model": "m", "rubric": "alignment"}}, "rubric belongs to the parts"),
        ({"judge": {"model": "m", "sever": "http://x"}}, "judge.sever: no such option. Did you mean 'server'"),
        ({"judge": {}}, "judge: model missing: give both"),
    ],
)
def test_options_that_make_no_judge(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        options(**given)


def test_what_a_card_and_a_cache_know_it_by_has_every_rubric() -> None:
    """Two parts with other rubrics are another reward, and the content of shipped rubrics counts."""
    one, other = (
        VlmParts(options(parts=[{"rubric": "alignment"}, {"rubric": rubric}])) for rubric in ("portrait", "aesthetics")
    )
    context = Context(device=torch.device("cpu"), cache=Path(), seed=0, base=Path())
    assert one.needs_card()
    assert sorted(one.identity()) == ["part 1, rubric content", "part 2, rubric content"]
    assert one.identity() != other.identity()
    assert one.fingerprint(context) != other.fingerprint(context)


def known_by(tmp_path: Path, **judge: Any) -> dict[str, str]:
    """What a card knows it by: a rubric that ships, one of the user's own, and options of the judge."""
    given = {"parts": [{"rubric": "alignment"}, {"rubric": "mine.yaml", "weight": 2}], "judge": {"model": "m"} | judge}
    return identity_of(Registry.discover(), Ref.model_validate({"use": "vlm-parts", "with": given}), tmp_path)


def test_a_card_holds_when_the_server_moves_and_falls_with_a_rubric_or_a_model(tmp_path: Path) -> None:
    rubric, model = tmp_path / "mine.yaml", tmp_path / "folder"
    rubric.write_text(shipped_rubric("aesthetics").read_text())
    before = known_by(tmp_path, server="http://a:1/v1", timeout=3)
    assert known_by(tmp_path, server="http://b:2/v1", timeout=9, concurrency=4) == before
    assert known_by(tmp_path, server="http://a:1/v1", samples=2) != before
    rubric.write_text(shipped_rubric("portrait").read_text())
    assert [said.split(" was ")[0] for said in differences(before, known_by(tmp_path, server="http://a:1/v1"))] == [
        "option parts.2.rubric"
    ]
    model.mkdir()
    (model / "config.json").write_text("{}")
    before = known_by(tmp_path, model="folder", batch_size=2)
    assert known_by(tmp_path, model="./folder", device="cuda:1") == before
    (model / "config.json").write_text('{"layers": 2}')
    assert [said.split(" was ")[0] for said in differences(before, known_by(tmp_path, model="folder"))] == [
        "option judge.model"
    ]


def test_how_patiently_it_is_asked_changes_no_kept_score(context: Context) -> None:
    judge = {"model": "m", "server": "http://a:1/v1"}
    patient, quick = (VlmParts(options(judge=judge | own)) for own in ({"timeout": 99, "concurrency": 2}, {}))
    assert patient.fingerprint(context) == quick.fingerprint(context)
    other = VlmParts(options(judge=judge | {"samples": 2}))
    assert other.fingerprint(context) != quick.fingerprint(context)
    weighted = VlmParts(options(judge=judge, parts=[{"rubric": "alignment"}, {"rubric": "aesthetics"}]))
    assert weighted.fingerprint(context) != quick.fingerprint(context)
