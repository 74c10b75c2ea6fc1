"""The judge model `vlm` on tiny random networks: what is trained, what is saved, and what `vlm-judge` makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from pydantic import ValidationError

from velatura.api import Context, Prompt, Rated, Sample, Status, VelaturaError
from velatura.core.fingerprint import reward_fingerprint
from velatura.core.registry import Registry
from velatura.core.reward_settings import RewardRef
from velatura.rewards.judge.fresh import Fresh, fresh_model
from velatura.rewards.judge.options import VlmJudgeOptions
from velatura.rewards.judge.pairs import VlmPairsOptions
from velatura.rewards.judge.reward import VlmJudge
from velatura.rewards.judge.vlm import Vlm, VlmOptions

CPU = torch.device("cpu")
SMALL = {"width": 32, "vision_width": 32, "layers": 1, "vision_layers": 1, "patch": 4}


def made(context: Context, **options: Any) -> Vlm:
    model = Vlm(VlmOptions.model_validate({"rubric": "alignment", "min_mass": 0.0, **options}))
    model.setup(context)
    return model


def rated(count: int = 4, rationale: str = "") -> list[Rated]:
    """Grey pictures, the lighter the better."""
    prompts = [Prompt(id=str(i // 2), text=f"wall {i // 2}", task="t2i") for i in range(count)]
    return [
        Rated(
            sample=Sample(prompt=prompts[i], image=torch.full((3, 24, 24), i / count), seed=i),
            ratings=(1 + 4 * i / count, 1.0 + i % 5), rationale=rationale,
        )
        for i in range(count)
    ]  # fmt: skip


def train(model: Vlm, net: torch.nn.Module, rows: list[Rated], steps: int) -> list[float]:
    """Losses of plain gradient descent with Adam."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=3e-3)
    seen = []
    for _ in range(steps):
        loss = model.loss(net, rows)
        loss.value.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(loss.value.detach()))
    return seen


def test_the_loss_reads_the_score_that_the_judge_gives(context: Context) -> None:
    """With the expectation alone the loss is the mean squared distance of the marks from the ratings."""
    model = made(context, fresh=SMALL, losses={"expectation": 1, "cross_entropy": 0})
    net, rows = model.load(CPU), rated()
    marks = model.mark(net, [row.sample for row in rows]).values
    by_hand = (marks - torch.tensor([row.mean for row in rows])).square().mean()
    torch.testing.assert_close(model.loss(net, rows).value.detach(), by_hand, rtol=1e-4, atol=1e-5)


def test_training_makes_marks_follow_ratings(context: Context) -> None:
    model = made(context, fresh=SMALL, losses={"soft": 0.1, "pairs": 0.1})
    net = model.load(CPU)
    seen = train(model, net, rated(), 40)
    assert sum(seen[-5:]) < 0.5 * sum(seen[:5])


def test_what_was_saved_marks_as_the_network_in_training_did(context: Context, tmp_path: Path) -> None:
    model = made(context, fresh=SMALL)
    net, rows = model.load(CPU), rated()
    train(model, net, rows, 3)
    marks = model.mark(net, [row.sample for row in rows])
    model.save(net, tmp_path / "judge", {"dimension": "alignment"})
    judge = VlmJudge(VlmJudgeOptions.model_validate({"path": "judge"}))
    judge.setup(context)
    scores = judge.score([row.sample for row in rows])
    torch.testing.assert_close(scores.values, marks.values, rtol=0, atol=1e-5)
    facts = json.loads((tmp_path / "judge" / "judge.json").read_text())
    assert facts["rubric"] == model.rubric.digest == judge.rubric.digest
    assert (facts["dimension"], facts["reasoning_tokens"]) == ("alignment", 0)
    assert judge.options.reasoning_tokens == 0  # not the 256 of a judge that nobody fitted


def test_a_judge_is_known_by_what_is_in_its_folder_and_not_by_where_that_lies(context: Context, tmp_path: Path) -> None:
    """Before `setup`, which is when a run asks, and after it; a move changes nothing, another fit does."""
    model = made(context, fresh=SMALL)
    net = model.load(CPU)
    model.save(net, tmp_path / "judge", {})
    judge = VlmJudge(VlmJudgeOptions(path="judge"))
    before = judge.fingerprint(context)
    judge.setup(context)
    assert judge.fingerprint(context) == before
    shutil.copytree(tmp_path / "judge", tmp_path / "elsewhere" / "other")
    assert VlmJudge(VlmJudgeOptions(path="elsewhere/other")).fingerprint(context) == before
    absolute = str(tmp_path / "elsewhere" / "other")
    assert VlmJudge(VlmJudgeOptions(path=absolute, batch_size=2)).fingerprint(context) == before
    train(model, net, rated(), 1)
    model.save(net, tmp_path / "judge", {})
    assert VlmJudge(VlmJudgeOptions(path="judge")).fingerprint(context) != before


def test_a_run_asks_for_the_fingerprint_of_a_judge_by_its_folder(context: Context, tmp_path: Path) -> None:
    model = made(context, fresh=SMALL)
    model.save(model.load(CPU), tmp_path / "judge", {})
    ref = RewardRef.model_validate({"use": "vlm-judge", "with": {"path": "judge"}})
    assert reward_fingerprint(Registry.discover(), ref, context)


def test_before_setup_nobody_knows_the_rubric_of_a_folder(context: Context) -> None:
    for options in (VlmJudgeOptions(path="judge"), VlmJudgeOptions(rubric="mine.yaml", model="m")):
        with pytest.raises(VelaturaError, match=r"the rubric of (judge|mine\.yaml) is read by `setup`"):
            VlmJudge(options).applies(Prompt(id="p", text="a wall", task="t2i"))


@pytest.mark.parametrize("family", ["qwen3-vl", "qwen2.5-vl"])
def test_lora_trains_little_and_is_folded_in(context: Context, tmp_path: Path, family: str) -> None:
    folder = tiny_models.save_model(tmp_path / family, family)
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    model = made(context, model=family, lora_rank=2)
    net, rows = model.load(CPU), rated()
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    start = model.mark(net, [row.sample for row in rows]).values
    train(model, net, rows, 5)
    marks = model.mark(net, [row.sample for row in rows]).values
    assert (marks - start).abs().max() > 1e-3
    model.save(net, tmp_path / "judge", {})
    judge = VlmJudge(VlmJudgeOptions.model_validate({"path": "judge"}))
    judge.setup(context)
    torch.testing.assert_close(judge.score([row.sample for row in rows]).values, marks, rtol=0, atol=1e-3)
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == before


def test_the_vision_tower_can_stay_as_it_is(context: Context, tmp_path: Path) -> None:
    tiny_models.save_model(tmp_path / "tiny", "qwen3-vl")
    net = made(context, model="tiny", train_vision=False).load(CPU)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained
    assert not any(".visual." in name for name in trained)


def test_a_judge_learns_to_write_its_reasons_before_its_score(context: Context) -> None:
    losses = {"expectation": 0, "cross_entropy": 0.1, "rationale": 1}
    model = made(context, fresh={**SMALL, "words": ["grey", "walls"]}, reasoning_tokens=12, losses=losses)
    net = model.load(CPU)
    rows = rated(rationale="grey walls")
    seen = train(model, net, rows, 120)
    assert seen[-1] < 0.1 * seen[0]
    notes = model.mark(net, [row.sample for row in rows]).notes
    assert all(note.startswith("grey walls\n[score") for note in notes)
    with pytest.raises(VelaturaError, match="'wall 0' has no rationale"):
        model.loss(net, rated())


def test_a_judge_that_would_say_something_else_gives_no_mark(context: Context) -> None:
    """A random network spreads its probability over all tokens; training brings it to the levels."""
    model = made(context, fresh=SMALL, min_mass=0.5, losses={"cross_entropy": 1})
    net, rows = model.load(CPU), rated()
    samples = [row.sample for row in rows]
    assert model.mark(net, samples).status == (Status.FAILED,) * len(rows)
    train(model, net, rows, 40)
    assert model.mark(net, samples).status == (Status.OK,) * len(rows)


def test_a_fresh_model_is_a_function_of_its_options() -> None:
    (net, processor), (again, _) = (fresh_model(Fresh(**SMALL), "Look at the picture.\nScore: [") for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))
    assert processor.tokenizer.tokenize("Look at the picture.") == ["Look at the picture."]
    assert processor.tokenizer.decode(processor.tokenizer.encode("zebra äß 12")) == "zebra äß 12"


@pytest.mark.parametrize("part", ["rubric", "weights"])
def test_a_judge_whose_parts_changed_is_refused(context: Context, tmp_path: Path, part: str) -> None:
    model = made(context, fresh=SMALL)
    model.save(model.load(CPU), tmp_path / "judge", {})
    if part == "rubric":
        path = tmp_path / "judge" / "rubric.yaml"
        path.write_text(path.read_text().replace("literal", "generous"))
    else:
        path = tmp_path / "judge" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(VelaturaError, match=f"the {part} in .* changed since the judge was fitted"):
        VlmJudge(VlmJudgeOptions(path="judge")).setup(context)


def test_a_folder_without_a_judge_is_said(context: Context) -> None:
    with pytest.raises(VelaturaError, match=r"there is no fine-tuned judge in .*judge\.json is missing"):
        VlmJudge(VlmJudgeOptions(path="nowhere")).setup(context)


def test_another_length_of_reasoning_than_it_learnt_is_refused(context: Context, tmp_path: Path) -> None:
    model = made(context, fresh=SMALL)
    model.save(model.load(CPU), tmp_path / "judge", {})
    with pytest.raises(VelaturaError, match=r"reasoning_tokens is 256, and the judge .* was fitted with 0"):
        VlmJudge(VlmJudgeOptions(path="judge", reasoning_tokens=256)).setup(context)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fresh": SMALL, "model": "x"}, "either `model` .* or `fresh`"),
        ({}, "either `model` .* or `fresh`"),
        ({"fresh": SMALL, "lora_rank": 2}, "leave lora_rank out"),
        ({"fresh": SMALL, "reasoning_tokens": 5}, "set both `reasoning_tokens` and `losses.rationale`"),
        ({"fresh": SMALL, "rubric": "alignmant"}, "Did you mean 'alignment'"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VlmOptions.model_validate({"rubric": "alignment", **options})


def test_a_judge_is_named_once() -> None:
    with pytest.raises(ValidationError, match="model is given, too"):
        VlmJudgeOptions(path="judge", model="x")
    with pytest.raises(ValidationError, match="rubric and model missing"):
        VlmJudgeOptions.model_validate({})
    with pytest.raises(ValidationError, match="learnt to mark pictures, not to compare"):
        VlmPairsOptions(path="judge")
