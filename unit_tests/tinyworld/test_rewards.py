from dataclasses import replace

import pytest
import torch

from velatura.api import Prompt, Sample, Status, VelaturaError
from velatura.plugins.evaluators.tinyworld_gold import TinyWorldGold
from velatura.plugins.tinyworld.render import render
from velatura.plugins.tinyworld.scenes import IDENTITIES, request_of
from velatura.plugins.tinyworld.task import TinyWorld, TinyWorldOptions
from velatura.rewards import tinyworld as rewards

ALL = {
    reward.name: reward
    for reward in (
        rewards.Alignment,
        rewards.Aesthetics,
        rewards.Portrait,
        rewards.Instruction,
        rewards.Preservation,
        rewards.IdentityReward,
    )
}
FOREIGN = Prompt(id="elsewhere/0", text="a cat", task="t2i")


def truth(task="both", count=26):
    prompts = TinyWorld(TinyWorldOptions(task=task, eval_count=count, targets=True)).prompts("eval")
    return [Sample(prompt=prompt, image=prompt.target, seed=0) for prompt in prompts]


def by_category(category, task="both"):
    return next(sample for sample in truth(task) if sample.prompt.category == category)


@pytest.mark.parametrize(
    ("category", "names"),
    [
        ("pair", {"alignment", "aesthetics"}),
        ("portrait", {"alignment", "aesthetics", "portrait"}),
        ("recolour", {"aesthetics", "instruction", "preservation"}),
        ("expression", {"aesthetics", "instruction", "preservation", "identity"}),
    ],
)
def test_the_prompt_alone_decides_which_rewards_apply(category, names):
    prompt = by_category(category).prompt
    assert {name for name, reward in ALL.items() if reward().applies(prompt)} == {f"tinyworld-{n}" for n in names}


@pytest.mark.parametrize("reward", ALL.values(), ids=ALL.keys())
def test_the_truth_scores_one(reward):
    samples = [sample for sample in truth() if reward().applies(sample.prompt)]
    scores = reward().score(samples)
    assert set(scores.status) == {Status.OK}
    assert torch.allclose(scores.values, torch.ones(len(samples)), atol=1e-3)


@pytest.mark.parametrize("reward", ALL.values(), ids=ALL.keys())
def test_scores_do_not_depend_on_order_or_company(reward, monkeypatch):
    noise = torch.rand(26, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    samples = [
        Sample(prompt=s.prompt, image=0.7 * s.image + 0.3 * n, seed=0) for s, n in zip(truth(), noise, strict=True)
    ]
    forward = reward().score(samples)
    monkeypatch.setattr(rewards, "JUDGE", rewards.JUDGE.__class__())  # nothing remembered
    backward = reward().score(samples[::-1])
    assert torch.allclose(forward.values, backward.values.flip(0), atol=1e-4)
    assert forward.status == backward.status[::-1]


def test_alignment_does_not_know_names_but_gold_does():
    sample = by_category("portrait")
    request = request_of(sample.prompt)
    stranger = next(identity for identity in IDENTITIES if identity != request.target.face.identity)
    scene = replace(request.target, face=replace(request.target.face, identity=stranger))
    other = replace(sample, image=torch.from_numpy(render(scene)))
    assert rewards.Alignment().score([other]).values.tolist() == pytest.approx([1])
    metrics = TinyWorldGold().evaluate([other])
    assert (metrics["identity"], metrics["strict"]) == ([0], [0])
    assert metrics["alignment"][0] < 1


def test_strict_alignment_is_all_or_nothing():
    sample = by_category("pair")
    dimmed = Sample(prompt=sample.prompt, image=torch.zeros(3, 24, 24), seed=0)
    strict = rewards.Alignment(rewards.AlignmentOptions(strict=True))
    assert strict.score([sample, dimmed]).values.tolist() == [1, 0]


def test_a_prompt_of_another_task_is_not_applicable():
    sample = Sample(prompt=FOREIGN, image=torch.zeros(3, 24, 24), seed=0)
    for reward in ALL.values():
        assert not reward().applies(FOREIGN)
        assert reward().score([sample]).status == (Status.NOT_APPLICABLE,)


@pytest.mark.parametrize("image", [torch.zeros(3, 32, 32), torch.full((3, 24, 24), torch.nan)], ids=["size", "nan"])
def test_a_picture_that_cannot_be_judged_fails_and_spoils_no_other(image):
    good = by_category("pair")
    scores = rewards.Alignment().score([Sample(prompt=good.prompt, image=image, seed=0), good])
    assert scores.status == (Status.FAILED, Status.OK)
    assert scores.reasons[0]
    assert float(scores.values[1]) == 1


def test_no_samples_give_no_scores():
    assert rewards.Alignment().score([]).values.shape == (0,)


def test_rewards_share_one_verification(monkeypatch):
    judge = rewards.JUDGE.__class__()
    monkeypatch.setattr(rewards, "JUDGE", judge)
    samples = truth("edit", 14)
    for reward in ALL.values():
        reward().score(samples)
    assert judge.verified == 14


def test_sharpness_of_a_checkerboard_is_known():
    board = (torch.arange(24)[:, None] + torch.arange(24)) % 2
    image = board.float().expand(3, 24, 24)
    flat = torch.full((3, 24, 24), 0.5)
    scores = rewards.Sharpness().score([Sample(prompt=FOREIGN, image=i, seed=0) for i in (image, flat)])
    assert scores.values.tolist() == pytest.approx([0.99933, 0], abs=1e-5)  # tanh(4)


def test_fine_sharpness_pays_texture_more_than_layout():
    edge = torch.zeros(3, 24, 24)
    edge[:, :, 12:] = 1
    texture = torch.full((3, 24, 24), 0.5) + 0.02174 * ((torch.arange(24) % 2) * 2 - 1)  # same mean gradient
    samples = [Sample(prompt=FOREIGN, image=image, seed=0) for image in (edge, texture)]
    plain = rewards.Sharpness().score(samples).values
    fine = rewards.Sharpness(rewards.SharpnessOptions(band="fine")).score(samples).values
    assert float(plain[0]) == pytest.approx(float(plain[1]), rel=0.01)
    assert float(fine[1] / plain[1]) < float(fine[0] / plain[0])


def test_gold_measures_only_what_applies():
    metrics = TinyWorldGold().evaluate([by_category("pair"), by_category("portrait"), by_category("hair")])
    assert metrics["strict"] == [1, 1, 1]
    assert metrics["identity"] == [None, 1, 1]
    assert metrics["preservation"] == [None, None, 1]
    assert metrics["alignment"] == pytest.approx([1, 1, 1], abs=1e-3)
    assert metrics["cleanliness"] == [1, 1, 1]


def test_gold_says_nothing_about_other_tasks_and_refuses_other_sizes():
    metrics = TinyWorldGold().evaluate([Sample(prompt=FOREIGN, image=torch.zeros(3, 8, 8), seed=0)])
    assert all(values == [None] for values in metrics.values())
    with pytest.raises(VelaturaError, match="24"):
        TinyWorldGold().evaluate([Sample(prompt=by_category("pair").prompt, image=torch.zeros(3, 8, 8), seed=0)])
