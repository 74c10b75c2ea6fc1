"""What the reward and the evaluator say of pictures whose answer is known, and that they keep their contracts."""

import math

import pytest
import torch
from coloraide import Color
from pydantic import ValidationError
from velatura_palette.evaluator import Colour
from velatura_palette.oklab import oklab, parsed
from velatura_palette.reward import KeepsTo, KeepsToOptions

from velatura.api import Prompt, Sample, Status
from velatura.testing import make_prompts, parametrize_with_checks

HALVES = torch.zeros(3, 8, 8)
HALVES[:, :, 4:] = 1.0


@parametrize_with_checks("palette", prompts=make_prompts(4))
def test_conformance(check):
    check()


def sample(image, **metadata):
    return Sample(prompt=Prompt(id="p", text="a flag", task="t2i", metadata=metadata), image=image, seed=0)


def score(image, palette, **options):
    scores = KeepsTo(KeepsToOptions(palette=palette, **options)).score([sample(image)])
    assert scores.status == (Status.OK,)
    return float(scores.values[0])


def test_colours_are_those_of_the_library():
    for name in ("white", "tomato", "navy", "#7fb069"):
        srgb = torch.tensor(Color(name).convert("srgb").coords())
        expected = torch.tensor(Color(name).convert("oklab").coords(nans=False))
        assert torch.allclose(oklab(srgb[:, None, None])[0], expected, atol=1e-3)


def test_a_picture_of_the_palette_scores_one():
    assert score(HALVES, ["black", "white"]) == pytest.approx(1, abs=1e-5)


def test_a_blank_picture_in_one_colour_of_two_scores_a_half():
    assert score(torch.ones(3, 8, 8), ["black", "white"]) == pytest.approx(0.5, abs=1e-5)


def test_distance_is_counted_by_the_tolerance():
    """A grey of OKLab lightness 0.9 is 0.1 from white."""
    srgb = torch.tensor(Color("oklab", [0.9, 0, 0]).convert("srgb").coords())
    image = srgb[:, None, None].expand(3, 4, 4)
    assert score(image, ["white"], share=0.01) == pytest.approx(math.exp(-1), abs=2e-3)
    assert score(image, ["white"], share=0.01, tolerance=0.2) == pytest.approx(math.exp(-0.25), abs=2e-3)


def test_a_prompt_may_bring_its_own_palette_and_without_any_the_reward_does_not_apply():
    reward = KeepsTo(KeepsToOptions())
    own = sample(HALVES, palette=["black", "white"])
    assert reward.applies(own.prompt)
    assert not reward.applies(sample(HALVES).prompt)
    assert float(reward.score([own]).values[0]) == pytest.approx(1, abs=1e-5)


def test_what_is_no_colour_is_said():
    with pytest.raises(ValidationError, match="'blurple' is no colour"):
        KeepsToOptions(palette=["blurple"])
    scores = KeepsTo().score([sample(HALVES, palette=["blurple"])])
    assert scores.status == (Status.FAILED,)
    assert "metadata `palette`: 'blurple' is no colour" in scores.reasons[0]


def test_a_grey_picture_is_not_colourful_and_black_and_white_have_the_most_contrast():
    found = Colour().evaluate([sample(HALVES), sample(torch.full((3, 8, 8), 0.5)), sample(HALVES * torch.nan)])
    assert found["colourfulness"] == [0, 0, None]
    assert found["contrast"] == pytest.approx([0.5, 0, None], abs=1e-3)
    assert parsed(["white"])[0, 0] == pytest.approx(1)


def test_colourfulness_of_a_picture_half_red_half_green_by_hand():
    """rg is 255 and -255, yb 127.5 throughout: sqrt(255^2) + 0.3 * 127.5."""
    image = torch.zeros(3, 2, 2)
    image[0, :, 0] = image[1, :, 1] = 1
    assert Colour().evaluate([sample(image)])["colourfulness"][0] == pytest.approx(255 + 0.3 * 127.5)
