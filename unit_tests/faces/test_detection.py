"""MTCNN with the weights that ship finds the faces of photographs, at every size and place, and no others."""

from __future__ import annotations

import pytest
import torch
from people import beside, noise, photo, tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

from velatura.rewards.faces import detection
from velatura.rewards.faces.detection import crops, distinct, integral, overlaps, shifted

EYES = {"astronaut": ((108, 101), (151, 103)), "hopper": (((221 - 90) / 1.406, (193 - 40) / 1.406), (154.5, 105.3))}
"""In the photograph at 256 pixels, to a few pixels."""


@pytest.mark.parametrize("name", ["astronaut", "hopper"])
@pytest.mark.parametrize("side", [384, 256, 128, 96])
def test_a_face_is_found_once_and_in_its_place(own, name, side):
    (found,) = own.detector(tensor(photo(name, side))[None], smallest=24)
    assert len(found) == 1
    assert found.confidence[0] > 0.95
    eyes = torch.tensor(EYES[name]) * side / 256
    assert (found.points[0, :2] - eyes).abs().max() < 0.03 * side
    left, top, right, bottom = found.boxes[0].tolist()
    assert (found.points[0, :, 0] > left).all() and (found.points[0, :, 0] < right).all()
    assert (found.points[0, :, 1] > top).all() and (found.points[0, :, 1] < bottom).all()


def test_there_is_no_face_in_noise_in_colour_and_in_the_smallest_pictures(own):
    flat = torch.full((3, 256, 256), 0.5)
    ramp = torch.linspace(0, 1, 256).expand(3, 256, 256)
    for found in own.detector(torch.stack([flat, ramp, noise(seed=0), noise(seed=1)]), smallest=24):
        assert len(found) == 0
        assert found.boxes.shape == (0, 4)
        assert found.points.shape == (0, 5, 2)
    (found,) = own.detector(torch.rand(1, 3, 9, 31), smallest=24)
    assert len(found) == 0


def test_what_is_found_does_not_depend_on_company(own):
    shown = torch.stack([tensor(photo("astronaut")), noise(), tensor(photo("hopper")), tensor(photo("hopper")).flip(2)])
    together = own.detector(shown, smallest=24)
    assert [len(found) for found in together] == [1, 0, 1, 1]
    for image, found in zip(shown, together, strict=True):
        (alone,) = own.detector(image[None], smallest=24)
        torch.testing.assert_close(alone.boxes, found.boxes, atol=1e-2, rtol=0)
        torch.testing.assert_close(alone.points, found.points, atol=1e-2, rtol=0)
        torch.testing.assert_close(alone.confidence, found.confidence, atol=1e-4, rtol=0)


def test_a_face_that_moves_is_found_where_it_went(own):
    image = tensor(photo("astronaut"))
    here, there = (own.detector(one[None], smallest=24)[0] for one in (image, pad(image, (64, 0, 32, 0))))
    moved = there.points[0] - here.points[0]
    assert (moved - torch.tensor([64.0, 32.0])).abs().max() < 4


def test_faces_below_the_smallest_are_not_looked_for(own):
    image = tensor(beside(photo("hopper", 256), photo("astronaut", 64)))[None]
    assert len(own.detector(image, smallest=16)[0]) == 2
    assert len(own.detector(image, smallest=60)[0]) == 1


@pytest.mark.parametrize("side", [24, 48])
def test_crops_are_the_means_of_the_pixels_below(side):
    """Against pooling, where boxes lie on pixels; black beyond the border; and linear in between."""
    image = torch.rand(3, 200, 160, generator=torch.Generator().manual_seed(0))
    sums = integral(image[None])[0]
    boxes = torch.tensor([[0.0, 0.0, 96.0, 96.0], [40.0, 100.0, 88.0, 148.0]])
    expected = [adaptive_avg_pool2d(image[:, :96, :96], side), adaptive_avg_pool2d(image[:, 100:148, 40:88], side)]
    torch.testing.assert_close(crops(sums, boxes, side), shifted(torch.stack(expected)))
    outside = crops(sums, torch.tensor([[-300.0, -300.0, -100.0, -100.0]]), side)
    torch.testing.assert_close(outside, torch.full_like(outside, -127.5 / 128))
    half = crops(sums, torch.tensor([[0.5, 0.0, side + 0.5, float(side)]]), side)[0]
    torch.testing.assert_close(half, shifted((image[:, :side, :side] + image[:, :side, 1 : side + 1]) / 2))


def test_of_windows_that_overlap_the_surest_stays():
    rows = torch.tensor([[0, 0, 10, 10, 0.7], [1, 0, 11, 10, 0.9], [20, 0, 30, 10, 0.8], [22, 2, 26, 6, 0.6]])
    assert overlaps(rows[0, :4], rows[1:2, :4]).tolist() == pytest.approx([90 / 110])
    assert distinct(rows, 0.5).tolist() == [1, 2, 3]
    assert distinct(rows, 0.5, of_smaller=True).tolist() == [1, 2]
    assert distinct(rows, 0.9).tolist() == [1, 2, 0, 3]
    assert distinct(rows[:0], 0.5).tolist() == []


def test_a_window_is_moved_by_shares_of_its_size():
    rows = torch.tensor([[10.0, 20.0, 30.0, 60.0, 0.9, 0.1, -0.1, 0.5, 0.25]])
    assert detection.moved(rows).tolist() == [[12.0, 16.0, 40.0, 70.0]]
    assert detection.squared(detection.moved(rows)).tolist() == [[-1.0, 16.0, 53.0, 70.0]]
