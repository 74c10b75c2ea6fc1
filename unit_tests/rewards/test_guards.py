from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from velatura.api import Prompt, Sample, Status
from velatura.rewards.guards import ROUNDING, Saturation, SaturationOptions, Spectrum, SpectrumOptions, fine_share


def sample(image):
    return Sample(prompt=Prompt(id="0", text="a fox", task="t2i"), image=image, seed=0)


def scores(reward, *images):
    found = reward.score([sample(image) for image in images])
    assert set(found.status) == {Status.OK}
    return found.values.tolist()


def grating(cycles, height=64, width=96, amplitude=0.2, middle=0.5):
    """[3 H W] grey waves with (down, across) whole cycles."""
    down, across = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    wave = amplitude * torch.cos(2 * math.pi * (cycles[0] * down + cycles[1] * across))
    return (middle + wave).expand(3, -1, -1).clone()


def checkerboard(side=64):
    return (torch.arange(side)[:, None] + torch.arange(side)).remainder(2).float().expand(3, -1, -1)


def gradient(side=64):
    return torch.linspace(0, 1, side).expand(3, side, -1)


def flat(value=0.5, side=64):
    return torch.full((3, side, side), value)


def test_waves_have_the_share_of_their_energies():
    coarse, fine = grating((3, 4)), grating((0, 40), amplitude=0.1, middle=0.0)
    energies = 0.2**2 / 2, 0.1**2 / 2
    expected = energies[1] / (sum(energies) + ROUNDING)
    assert fine_share(coarse + fine, 0.25) == pytest.approx(expected, rel=1e-5)
    assert fine_share(coarse, 0.25) < 1e-9
    assert fine_share(grating((0, 40)), 0.25) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("cycles", "frequency"), [((0, 24), 0.25), ((24, 0), 0.375), ((8, 12), math.hypot(1, 1) / 8)])
def test_frequencies_are_cycles_a_pixel_in_any_direction(cycles, frequency):
    wave = grating(cycles)
    assert fine_share(wave, frequency - 0.05) > 0.99
    assert fine_share(wave, frequency + 0.05) < 0.01


def test_extremes_of_the_spectrum():
    board, ramp, plain = scores(Spectrum(), checkerboard(), gradient(), flat())
    assert board == pytest.approx(math.log10(0.2), abs=1e-3)
    assert plain == pytest.approx(-3)
    assert -3 <= ramp < -1
    assert scores(Spectrum(SpectrumOptions(low=1e-6)), gradient(), flat()) == pytest.approx([0, 0], abs=1e-6)


def test_the_range_decides_and_distance_is_in_decades():
    mixed = grating((3, 4)) + grating((0, 40), amplitude=0.1, middle=0.0)
    share = fine_share(mixed, 0.25)
    assert share == pytest.approx(0.2, rel=1e-2)

    def at(low, high):
        return scores(Spectrum(SpectrumOptions(low=low, high=high)), mixed)[0]

    assert at(share / 2, share * 2) == 0
    assert at(share / 100, share / 10) == pytest.approx(-1, abs=1e-6)
    assert at(min(1, share * 4), 1) == pytest.approx(-math.log10(4), abs=1e-6)
    assert at(share * 2, share * 2) == pytest.approx(-math.log10(2), abs=1e-6)


def test_grain_and_blur_are_seen_at_the_resolution_of_the_picture():
    generator = torch.Generator().manual_seed(0)
    scene = torch.rand(3, 32, 32, generator=generator)
    scene = torch.nn.functional.interpolate(scene[None], size=(256, 256), mode="bicubic", antialias=True)[0].clamp(0, 1)
    grain = (scene + 0.2 * torch.randn(3, 256, 256, generator=generator)).clamp(0, 1)
    smooth = torch.nn.functional.avg_pool2d(scene[None], 9, stride=1, padding=4)[0]
    shares = [fine_share(one, 0.25) for one in (smooth, scene, grain)]
    assert shares == sorted(shares)
    assert shares[2] > 10 * shares[1]
    thumbnails = [torch.nn.functional.avg_pool2d(one[None], 4)[0] for one in (scene, grain)]
    assert fine_share(thumbnails[1], 0.25) < 3 * fine_share(thumbnails[0], 0.25)


def test_the_share_stands_in_the_notes():
    found = Spectrum().score([sample(checkerboard()), sample(flat())])
    assert found.notes == ("fine share 1", "fine share 0")


@pytest.mark.parametrize(
    ("colour", "counts"),
    [
        ((0.5, 0.5, 0.5), False),
        ((1.0, 1.0, 1.0), True),
        ((0.0, 0.0, 0.0), True),
        ((1.0, 0.5, 0.5), True),
        ((0.0, 0.5, 0.5), False),
        ((254 / 255, 0.5, 0.5), False),
        ((0.95, 0.04, 0.3), True),
        ((0.95, 0.06, 0.3), False),
    ],
)
def test_which_colours_are_clipped_or_too_strong(colour, counts):
    image = torch.tensor(colour)[:, None, None].expand(3, 8, 8)
    options = SaturationOptions(high=0, margin=0.003)
    assert scores(Saturation(options), image) == [-1.0 if counts else 0.0]


def test_the_share_above_the_threshold_is_what_is_lost():
    image = flat(side=10)
    image[:, :4] = 1.0
    image[0, 4:6], image[1:, 4:6] = 0.97, 0.02
    assert scores(Saturation(SaturationOptions(high=0)), image) == pytest.approx([-0.6])
    assert scores(Saturation(SaturationOptions(high=0.2)), image) == pytest.approx([-0.4 / 0.8])
    assert scores(Saturation(SaturationOptions(high=0.6)), image) == pytest.approx([0], abs=1e-6)
    assert Saturation().score([sample(image)]).notes == ("clipped 0.4, vivid 0.2",)


def test_extremes_of_saturation():
    found = scores(Saturation(), checkerboard(), gradient(100), flat())
    assert found == pytest.approx([-1, 0, 0], abs=1e-6)
    assert scores(Saturation(SaturationOptions(high=0)), gradient(100)) == pytest.approx([-0.02])


@pytest.mark.parametrize("reward", [Spectrum(), Saturation(SaturationOptions(high=0, vivid=0.5))])
def test_scores_do_not_depend_on_company(reward):
    generator = torch.Generator().manual_seed(1)
    shown = [
        torch.rand(3, 48, 64, generator=generator),
        checkerboard(32),
        grating((3, 30)) * 0.9,
        gradient(50),
    ]
    together = scores(reward, *shown)
    assert together == [scores(reward, one)[0] for one in shown]
    assert together == scores(reward, *shown[::-1])[::-1]
    assert len(set(together)) > 2


def test_what_cannot_be_measured_fails():
    broken = torch.full((3, 32, 32), math.nan)
    for reward in (Spectrum(), Saturation()):
        assert reward.score([sample(broken), sample(flat())]).status == (Status.FAILED, Status.OK)
    found = Spectrum().score([sample(torch.rand(3, 15, 64))])
    assert found.status == (Status.FAILED,)
    assert "15 x 64 pixels" in found.reasons[0]


def test_a_range_upside_down_is_refused():
    with pytest.raises(ValidationError, match=r"`low` \(0.5\) is above `high` \(0.1\): exchange them"):
        SpectrumOptions(low=0.5, high=0.1)
