"""Grids of pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from velatura.core.pictures import GAP, PAPER, grid, overview, png_bytes, save_png, to_pixels


def test_every_pixel_becomes_a_square_without_blur():
    image = torch.zeros(3, 2, 2)
    image[0, 0, 1] = 1.0
    drawn = np.asarray(grid([[image]], scale=5))[GAP : GAP + 10, GAP : GAP + 10]
    assert (drawn[:5, 5:] == [255, 0, 0]).all()
    assert drawn.sum() == 25 * 255


def test_tensors_and_arrays_and_bytes_draw_the_same():
    image = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    as_bytes = (image * 255).round().byte().numpy()
    assert (to_pixels(image) == to_pixels(image.numpy())).all()
    assert (to_pixels(image) == to_pixels(as_bytes)).all()


def test_values_outside_the_range_are_clipped_and_broken_ones_grey():
    image = torch.tensor([-1.0, 2.0, float("nan")]).reshape(3, 1, 1)
    assert to_pixels(image).ravel().tolist() == [0, 255, 128]


def test_rows_may_differ_in_length_and_the_rest_is_paper():
    white = torch.ones(3, 3, 3)
    drawn = grid([[white, white], [white]], scale=1)
    assert drawn.size == (GAP + 2 * (3 + GAP), GAP + 2 * (3 + GAP))
    assert drawn.getpixel((GAP + 3 + GAP + 1, GAP + 3 + GAP + 1)) == PAPER


def test_labels_make_room_for_themselves():
    image = torch.zeros(3, 8, 8)
    plain = grid([[image, image]], scale=4)
    labelled = grid([[image, image]], scale=4, row_labels=["a red circle"], column_labels=["base", "a very long name"])
    assert labelled.width > plain.width + 50
    assert labelled.height > plain.height + 10


def test_a_picture_of_another_layout_is_refused():
    with pytest.raises(ValueError, match="3 H W, not 8 8 3"):
        grid([[np.zeros((8, 8, 3))]], scale=1)


def test_an_empty_grid_is_refused():
    with pytest.raises(ValueError, match="at least one picture"):
        grid([[]], scale=1)


def test_a_png_is_written_whole_and_leaves_nothing_else(tmp_path: Path):
    target = tmp_path / "deep" / "grid.png"
    image = grid([[torch.rand(3, 4, 4)]], scale=2)
    save_png(target, image)
    assert list(target.parent.iterdir()) == [target]
    assert target.read_bytes() == png_bytes(image)
    assert Image.open(io.BytesIO(target.read_bytes())).size == image.size


def test_an_overview_of_large_pictures_stays_small_enough_to_be_opened(tmp_path):
    large, small = torch.rand(3, 1024, 768), torch.rand(3, 24, 24)
    drawn = overview([[large, small]] * 6)
    assert drawn.height == GAP + 6 * (256 + GAP)
    assert drawn.width == GAP + 2 * (192 + GAP)
    save_png(tmp_path / "overview.png", drawn)
    with Image.open(tmp_path / "overview.png") as read:
        assert read.size == drawn.size


def test_an_overview_enlarges_tiny_pictures_three_times_and_leaves_others_as_they_are():
    tiny, middle = torch.rand(3, 24, 24), torch.rand(3, 128, 128)
    assert np.array_equal(np.asarray(overview([[tiny]])), np.asarray(grid([[tiny]], scale=3)))
    assert np.array_equal(np.asarray(overview([[middle]])), np.asarray(grid([[middle]], scale=1)))
