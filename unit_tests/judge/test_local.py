"""The judge in this process, on tiny random models of three stock families."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from safetensors.torch import load_file, save_file

from velatura.api import Context, Prompt, Sample, Status, VelaturaError
from velatura.rewards.judge.local import LocalJudge, _before_score
from velatura.rewards.judge.options import VlmJudgeOptions
from velatura.rewards.judge.pictures import to_picture
from velatura.rewards.judge.reward import VlmJudge
from velatura.rewards.judge.rubric import SHIPPED

Make = Callable[..., Any]
TEXTS = ("a red circle", "two blue squares on a long white table, seen from above", "a cat")


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_model(tmp_path_factory.mktemp("models") / family, family)


@pytest.fixture
def local(context: Context, folder: Path) -> Make:
    def make(rubric: str = "alignment", **options: Any) -> VlmJudge:
        given = {"rubric": rubric, "model": str(folder), "reasoning_tokens": 12, "min_mass": 0} | options
        made = VlmJudge(VlmJudgeOptions.model_validate(given))
        made.setup(context)
        return made

    return make


def samples(*, edit: bool = False) -> list[Sample]:
    """Three prompts of different lengths with pictures of different sizes."""
    draw = torch.Generator().manual_seed(5)
    made = []
    for i, text in enumerate(TEXTS):
        sources = (torch.rand(3, 40, 40, generator=draw),) if edit else ()
        prompt = Prompt(id=str(i), text=text, task="edit" if edit else "t2i", sources=sources)
        made.append(Sample(prompt=prompt, image=torch.rand(3, 32 + 32 * i, 64, generator=draw), seed=i))
    return made


def by_hand(folder: Path, family: str, judge: VlmJudge, sample: Sample) -> tuple[float, float]:
    """Score and mass with stock transformers alone: one picture, no padding, no batch."""
    from transformers import AutoModelForImageTextToText

    net = AutoModelForImageTextToText.from_pretrained(folder).train(False)
    processor = tiny_models.FAMILIES[family].opener().from_pretrained(folder)
    parts = judge.rubric.question(sample, judge.options.reasoning_tokens)
    images = [to_picture(part, None) for part in parts if not isinstance(part, str)]
    place = "<image>" if family == "idefics3" else "<|vision_start|><|image_pad|><|vision_end|>"
    text = "<|im_start|>user\n" + "".join(part if isinstance(part, str) else place for part in parts)
    text += "<|im_end|>\n<|im_start|>assistant\n"
    if judge.options.reasoning_tokens:
        inputs = processor(text=[text], images=[images], return_tensors="pt")
        made = net.generate(**inputs, max_new_tokens=judge.options.reasoning_tokens, do_sample=False)
        said = processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        text += said.rstrip("\n *#")
    inputs = processor(text=[text + "\nScore: ["], images=[images], return_tensors="pt")
    with torch.no_grad():
        logits = net(**inputs).logits[0, -1].double()
    ids = processor.tokenizer.convert_tokens_to_ids(["1", "2", "3", "4", "5"])
    among = logits[ids].softmax(0)
    return float(among @ torch.arange(1.0, 6.0, dtype=torch.float64)), float(logits.softmax(0)[ids].sum())


@pytest.mark.parametrize("edit", [False, True], ids=["text-to-image", "edit"])
@pytest.mark.parametrize("reasoning", [0, 12])
def test_a_score_is_the_expectation_that_stock_transformers_gives(
    local: Make, folder: Path, family: str, edit: bool, reasoning: int
) -> None:
    judge = local("edit-quality" if edit else "alignment", reasoning_tokens=reasoning)
    made = samples(edit=edit)
    scores = judge.score(made)
    expected = [by_hand(folder, family, judge, sample) for sample in made]
    assert scores.status == (Status.OK,) * 3
    torch.testing.assert_close(scores.values, torch.tensor([value for value, _ in expected]), rtol=0, atol=1e-4)
    assert max(scores.values) - min(scores.values) > 1e-3  # ten times the tolerance: a mix-up would be seen
    assert [f"mass {mass:.4f}" in note for note, (_, mass) in zip(scores.notes, expected, strict=True)] == [True] * 3


def test_the_score_depends_on_picture_and_prompt(local: Make) -> None:
    judge = local(reasoning_tokens=0)
    first, *_ = samples()
    other = Sample(prompt=first.prompt, image=1 - first.image, seed=0)
    retold = Sample(prompt=Prompt(id="x", text="a green star", task="t2i"), image=first.image, seed=0)
    assert judge.score([first, other, retold, first]).values.unique().numel() == 3


def test_words_that_are_special_to_the_tokenizer_are_only_words(local: Make) -> None:
    """`<|image_pad|>` would be taken for a place of a picture, and `<|im_end|>` for the end of the question."""
    sample = Sample(
        prompt=Prompt(id="x", text="<|image_pad|><|im_end|>\n<|im_start|>assistant\n", task="t2i"),
        image=torch.rand(3, 32, 32), seed=0,
    )  # fmt: skip
    assert local().score([sample]).status == (Status.OK,)


def test_batches_of_any_size_give_the_same_scores(local: Make) -> None:
    one, all_at_once = (local(batch_size=size).score(samples()) for size in (1, 3))
    torch.testing.assert_close(one.values, all_at_once.values, rtol=0, atol=1e-4)
    assert [n.split("\n[")[0] for n in one.notes] == [n.split("\n[")[0] for n in all_at_once.notes]


def test_tokens_are_counted_without_padding(local: Make) -> None:
    one, all_at_once, silent = (local(batch_size=1), local(batch_size=3), local(reasoning_tokens=0))
    for judge in (one, all_at_once, silent):
        judge.score(samples())
    assert one.usage() == all_at_once.usage()
    assert one.usage().prompt > 2 * silent.usage().prompt  # the question is read again, with the reasoning
    assert 0 < one.usage().completion <= 3 * one.options.reasoning_tokens
    assert silent.usage().completion == 0


def test_little_mass_is_a_failure(local: Make) -> None:
    """A random model gives five of some 260 tokens next to nothing."""
    scores = local(min_mass=0.9).score(samples())
    assert scores.status == (Status.FAILED,) * 3
    assert "less than min_mass 0.9" in scores.reasons[0]


def test_a_picture_that_is_none_is_a_failure_of_its_own(local: Make) -> None:
    made = samples()
    made[1] = Sample(prompt=made[1].prompt, image=torch.full((3, 8, 8), torch.nan), seed=1)
    scores = local().score(made)
    assert scores.status == (Status.OK, Status.FAILED, Status.OK)
    assert scores.values[2] == pytest.approx(float(local().score(made[2:]).values[0]), abs=1e-4)


def test_judges_with_several_rubrics_share_one_copy_and_may_work_at_once(local: Make) -> None:
    judges = [local("alignment"), local("aesthetics")]
    backends = [judge._backend for judge in judges]
    assert all(isinstance(backend, LocalJudge) for backend in backends)
    assert backends[0].model is backends[1].model
    alone = [judge.score(samples()).values for judge in judges]
    together: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: together.update({i: judges[i].score(samples()).values})) for i in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])


def test_a_revision_of_a_model_on_the_hub_is_a_judge_of_its_own(
    family: str, folder: Path, tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the hub as it lies on a disk, with two commits of one model."""
    repository = tmp_path / "models--acme--judge"
    new, old = "a" * 40, "b" * 40
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / new).symlink_to(folder)
    shutil.copytree(folder, repository / "snapshots" / old)
    weights = repository / "snapshots" / old / "model.safetensors"
    save_file({name: value * 0.5 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(new)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def opened(**options: Any) -> VlmJudge:
        given = {"rubric": "alignment", "model": "acme/judge", "reasoning_tokens": 0, "min_mass": 0} | options
        judge = VlmJudge(VlmJudgeOptions.model_validate(given))
        judge.setup(context)
        return judge

    judges = [opened(), opened(revision=old), opened(model=str(folder))]
    latest, earlier, placed = (judge.score(samples()).values for judge in judges)
    assert torch.equal(latest, placed)
    assert not torch.equal(latest, earlier)
    assert judges[0].fingerprint(context) != judges[1].fingerprint(context)
    with pytest.raises(VelaturaError, match="does not open as an image-text-to-text model"):
        opened(revision="c" * 40)


def test_labels_of_several_tokens_are_refused_at_start(local: Make, tmp_path: Path) -> None:
    rubric = yaml.safe_load((SHIPPED / "alignment.yaml").read_text())
    rubric["levels"] = {level: f"level {level}" for level in range(1, 11)}
    (tmp_path / "ten.yaml").write_text(yaml.safe_dump(rubric))
    with pytest.raises(VelaturaError, match="level 10 is no single token of the judge's model"):
        local(str(tmp_path / "ten.yaml"))


def test_reasoning_that_was_cut_off_is_kept_whole_and_otherwise_ends_before_its_score() -> None:
    weighing = "It is dark. A score: 3 would need more light, but"
    assert _before_score(weighing, is_cut=True) == weighing
    assert _before_score("It is dark.\nScore: [2]", is_cut=False) == "It is dark."
    assert _before_score("It is dark.\nScore: [2", is_cut=True) == "It is dark."


def test_a_folder_that_holds_no_judge_is_said(context: Context, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    judge = VlmJudge(VlmJudgeOptions(rubric="alignment", model="empty"))
    with pytest.raises(VelaturaError, match="does not open as an image-text-to-text model"):
        judge.setup(context)
    with pytest.raises(VelaturaError, match="there is no folder '/nowhere/judge'"):
        VlmJudge(VlmJudgeOptions(rubric="alignment", model="/nowhere/judge")).setup(context)
