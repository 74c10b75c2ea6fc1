"""Known transformations are found again, and chips do not depend on how a face lies in its picture."""

from __future__ import annotations

import math

import pytest
import torch
from people import blurred, noise, photo, tensor
from PIL import Image

from velatura.rewards.faces import geometry
from velatura.rewards.faces.geometry import chip, poses, sharpness, similarity, template


def turned(points, degrees, scale, shift):
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    return scale * points @ turn.T + torch.tensor(shift, dtype=torch.float64)


@pytest.mark.parametrize(("degrees", "scale", "shift"), [(0, 1, (0, 0)), (30, 0.5, (7, -3)), (170, 4, (-100, 20))])
def test_a_similarity_is_found_again(degrees, scale, shift):
    found = similarity(template(), turned(template(), degrees, scale, shift))
    expected = torch.cat([turned(torch.eye(2).double(), degrees, scale, (0, 0)).T, torch.tensor([shift]).double().T], 1)
    torch.testing.assert_close(found, expected)


def test_the_similarity_is_the_best_one_and_never_mirrors():
    generator = torch.Generator().manual_seed(0)
    target = template() + 10 * torch.randn(5, 2, generator=generator, dtype=torch.float64)

    def error(matrix, goal):
        return float((template() @ matrix[:, :2].T + matrix[:, 2] - goal).square().sum())

    best = similarity(template(), target)
    for _ in range(50):
        other = similarity(template(), target + torch.randn(5, 2, generator=generator, dtype=torch.float64))
        assert error(best, target) <= error(other, target) + 1e-9
    mirrored = similarity(template(), template() * torch.tensor([-1.0, 1.0]))
    assert torch.linalg.det(mirrored[:, :2]) > 0
    assert similarity(torch.ones(5, 2), template())[:, :2].abs().max() == 0


def test_a_chip_of_a_chip_is_itself():
    image = tensor(photo("astronaut", 150))
    torch.testing.assert_close(chip(image, template()), image, atol=1e-5, rtol=0)


def test_chips_do_not_depend_on_size_and_turn(own):
    picture = photo("astronaut", 512)
    (points,) = own.detector(tensor(picture)[None], smallest=48)[0].points
    here = chip(tensor(picture), points)
    large = picture.resize((1024, 1024), Image.Resampling.BICUBIC)
    assert (chip(tensor(large), points * 2) - here).abs().mean() < 0.01
    turned_picture = picture.rotate(90)
    moved = torch.stack([points[:, 1], 512 - points[:, 0]], 1)
    assert (chip(tensor(turned_picture), moved) - here).abs().mean() < 0.002


def test_large_faces_are_averaged_and_not_skipped():
    """A pattern finer than the chip becomes its mean."""
    stripes = (torch.arange(1200) % 2).float().expand(3, 1200, 1200)
    drawn = chip(stripes, template() * 8)
    assert float((drawn - 0.5).abs().max()) < 0.02


@pytest.mark.parametrize(("yaw", "pitch"), [(0, 0), (45, 0), (-60, 10), (20, -20)])
def test_the_pose_of_a_turned_face_is_found_whatever_its_place(yaw, pitch):
    angles, shapes = geometry.turned_templates()
    (row,) = torch.nonzero((angles[:, 0] == yaw) & (angles[:, 1] == pitch)).flatten().tolist()
    points = torch.stack([shapes[row].real, shapes[row].imag], -1)
    found = poses(turned(points, 25, 40, (300, 100))[None])
    assert (float(found.yaw), float(found.pitch)) == (yaw, pitch)
    assert float(found.misfit) == pytest.approx(0, abs=1e-6)


def test_misplaced_points_misfit_by_their_distance():
    """Far from any face when eyes and mouth change places, by little when a point is a little off."""
    upside = template()[[3, 4, 2, 0, 1]]
    near = template() + torch.tensor([[0, 0], [0, 0], [0, 0], [0, 0], [0.0, 5.3]]).double()
    found = poses(torch.stack([template(), near, upside]))
    assert float(found.misfit[0]) == pytest.approx(0, abs=1e-6)
    assert 0 < float(found.misfit[1]) < 0.1 / math.sqrt(5)
    assert float(found.misfit[2]) > 0.3


def test_photographed_faces_have_the_shape_of_a_face(own):
    for name in ("astronaut", "hopper"):
        found = poses(own.detector(tensor(photo(name))[None], smallest=48)[0].points)
        assert float(found.misfit) < 0.12
        assert abs(float(found.yaw)) <= 15


def test_sharpness_is_one_for_noise_and_falls_with_blur():
    picture = photo("hopper", 64)
    rows = [
        noise(64),
        tensor(picture),
        *(tensor(blurred(picture, radius)) for radius in (1, 2, 4)),
        torch.ones(3, 64, 64),
    ]
    found = sharpness(torch.stack(rows)).tolist()
    assert found[0] == pytest.approx(1, abs=0.02)
    assert found[1:] == sorted(found[1:], reverse=True)
    assert found[-1] == pytest.approx(0, abs=1e-3)
