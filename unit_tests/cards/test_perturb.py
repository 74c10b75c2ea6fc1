"""The perturbations themselves: what each does to a picture, and what is expected of it."""

from __future__ import annotations

import pytest
import torch

from velatura.api import Prompt
from velatura.core.cards.perturb import ANY, BATTERY, EXPECTED, FALLS, NO_GAIN, expected, perturbed, preserving

SIDE = (48, 64)


def picture(seed: int) -> torch.Tensor:
    """Soft colours, like a photograph out of focus."""
    coarse = torch.rand((1, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    return 0.2 + 0.6 * torch.nn.functional.interpolate(coarse, SIDE, mode="bilinear")[0]


IMAGE, SOURCE = picture(0), picture(1)
EDIT = Prompt(id="p", text="make the sky green", task="edit", sources=(SOURCE,))


def after(name: str, seed: int = 0) -> torch.Tensor:
    return perturbed(BATTERY[name], IMAGE, EDIT, torch.Generator().manual_seed(seed))


def gradient(image: torch.Tensor) -> float:
    return float(image.diff(dim=1).abs().mean() + image.diff(dim=2).abs().mean())


def spread(image: torch.Tensor) -> float:
    """Mean distance of the strongest to the weakest channel."""
    return float((image.amax(0) - image.amin(0)).mean())


@pytest.mark.parametrize("name", BATTERY)
def test_each_is_a_picture_of_the_same_size_that_is_another_and_the_same_again(name):
    made = after(name)
    assert made.shape == IMAGE.shape
    assert made.dtype == torch.float32
    assert made.min() >= 0 and made.max() <= 1
    assert (made - IMAGE).abs().max() > 0.02
    assert torch.equal(made, after(name))
    assert torch.equal(IMAGE, picture(0))  # the picture itself is left alone


def test_grain_edges_and_grids_are_fine_and_a_thumbnail_is_not():
    plain = gradient(IMAGE)
    assert gradient(after("grain")) > 3 * plain
    assert gradient(after("oversharpened")) > 1.05 * plain
    assert gradient(after("thumbnail")) < plain
    change = after("grid-8") - IMAGE
    assert (change[:, 8, :] > 0.05).all()
    assert (change[:, 1:8, 1:8].abs() < 1e-6).all()
    assert (change[:, :, 16] > 0.05).all()
    assert (after("grid-16") - IMAGE)[:, 8, 1:16].abs().max() < 1e-6


def test_colours_are_stronger_and_corners_darker():
    assert spread(after("saturated")) == pytest.approx(1.5 * spread(IMAGE), rel=0.1)  # some are cut off at the ends
    dark = after("vignette") / IMAGE
    assert dark[:, 0, 0].max() == pytest.approx(0.4, abs=1e-4)
    assert dark[:, 24, 32].min() > 0.99


def test_letters_are_somewhere_and_not_everywhere():
    for name, row in (("rating-text", 24), ("watermark", 41), ("caption", 43)):
        moved = (after(name) - IMAGE).abs().amax(0) > 0.03
        assert 0.005 < moved.float().mean() < 0.4
        assert moved[row - 6 : row + 6].float().mean() > 3 * moved[:12].float().mean()


def test_edits_get_their_source_the_middle_of_it_or_something_else():
    assert torch.equal(after("source-copied"), SOURCE)
    assert 0.02 < (after("source-filtered") - SOURCE).abs().mean() < 0.2
    pasted = after("source-pasted")
    assert (pasted[:, 24, 32] - SOURCE[:, 24, 32]).abs().max() < 0.1
    assert torch.equal(pasted[:, :4], IMAGE[:, :4])
    assert (after("unrelated") - SOURCE).abs().mean() > 0.1


def test_a_source_of_another_size_is_fitted():
    small = Prompt(id="p", text="t", task="edit", sources=(SOURCE[:, ::2, ::2],))
    made = perturbed(BATTERY["source-copied"], IMAGE, small, torch.Generator())
    assert made.shape == IMAGE.shape
    assert (made - SOURCE).abs().mean() < 0.05


def test_expectations_follow_the_dimension_and_can_be_said_otherwise():
    assert all(set(signs) <= set(BATTERY) for signs in EXPECTED.values())
    edit = expected("edit-instruction", {})
    assert (edit["source-copied"], edit["blank"], edit["saturated"]) == (FALLS, FALLS, NO_GAIN)
    assert expected("preservation", {})["source-copied"] == ANY
    assert expected("a word of its own", {"grain": FALLS})["grain"] == FALLS
    assert set(expected("alignment", {})) == set(BATTERY)


def test_what_keeps_the_content_is_nearly_the_picture():
    ways = preserving(torch.nn.functional.interpolate(IMAGE[None], (192, 256), mode="bilinear")[0])
    assert len(ways) == 4
    large = torch.nn.functional.interpolate(IMAGE[None], (192, 256), mode="bilinear")[0]
    for made in ways:
        assert made.shape == large.shape
        assert 1e-5 < (made - large).abs().mean() < 0.03
