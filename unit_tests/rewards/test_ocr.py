"""The real weights read letters that Pillow draws with the fonts of matplotlib."""

from __future__ import annotations

import importlib.util
import math
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from loguru import logger
from PIL import Image, ImageDraw, ImageFont

from velatura.api import Context, Prompt, Sample, Status, VelaturaError
from velatura.rewards import ocr
from velatura.rewards.ocr import Ocr, OcrOptions

ROOT = Path(__file__).parents[2]
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("rapidocr") is None, reason=f"the extra `ocr` is not installed: {ocr.INSTALL}"
)


def picture(lines, side=256, points=32, font="DejaVuSans"):
    """[3 side side]: lines of text below each other, dark on light."""
    canvas = Image.new("RGB", (side, side), (240, 240, 235))
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    drawn = ImageFont.truetype(str(file), points)
    for row, line in enumerate(lines):
        ImageDraw.Draw(canvas).text((6, 10 + 1.5 * points * row), line, font=drawn, fill=(20, 30, 60))
    return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1).float() / 255


def sample(image, words=("OPEN",)):
    return Sample(prompt=Prompt(id="0", text="a sign", task="t2i", metadata={"text": list(words)}), image=image, seed=0)


def ready(base, **options):
    reward = Ocr(OcrOptions(threads=1, **options))
    reward.setup(Context(device=torch.device("cpu"), cache=base, seed=0, base=base))
    return reward


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return ready(tmp_path_factory.mktemp("ocr"))


def value(reward, image, words=("OPEN",)):
    scores = reward.score([sample(image, words)])
    assert scores.status == (Status.OK,)
    return float(scores.values[0])


@needs_weights
@pytest.mark.parametrize(
    ("words", "side", "points", "font"),
    [
        (["OPEN"], 64, 18, "DejaVuSans"),
        (["OPEN"], 128, 28, "DejaVuSerif-Bold"),
        (["Hello, World!"], 256, 32, "DejaVuSans-Oblique"),
        (["Hello, World!"], 512, 64, "DejaVuSansMono"),
        (["FLOW MATCHING", "2026"], 256, 28, "DejaVuSans"),
        (["Grüße, naïve café"], 320, 30, "DejaVuSerif"),
    ],
)
def test_what_is_written_is_read(reward, words, side, points, font):
    assert value(reward, picture(words, side, points, font), words) == 1
    assert value(reward, picture(words, side, points, font), [" ".join(words)]) == 1


@needs_weights
def test_wrong_missing_and_unreadable_words_have_the_scores_of_the_formula(reward):
    assert value(reward, picture(["OPAN"])) == pytest.approx(3 / 4)
    assert value(reward, picture(["OPENING"])) == pytest.approx(4 / 7)
    assert value(reward, picture(["SHUT"])) == 0
    assert value(reward, picture([])) == 0
    assert value(reward, torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))) == 0
    faint = 0.94 + 0.001 * picture(["OPEN"])
    assert value(reward, faint) == 0


@needs_weights
def test_flooding_is_worth_less(reward, tmp_path):
    flood = picture(["OPEN"] * 5, points=28)
    assert value(reward, flood) == pytest.approx(4 / 20)
    assert value(ready(tmp_path, extra=0), flood) == 1
    assert value(ready(tmp_path, extra=0.25), flood) == pytest.approx(4 / 8)


@needs_weights
def test_scores_do_not_depend_on_company_and_say_what_was_read(reward):
    shown = [sample(picture(["OPEN"])), sample(picture(["Flow", "2026"]), ["Flow"]), sample(picture(["OPAN"]))]
    together = reward.score(shown)
    alone = torch.cat([reward.score([one]).values for one in shown])
    assert torch.equal(together.values, alone)
    assert torch.equal(together.values, reward.score(shown[::-1]).values.flip(0))
    assert together.notes == ("read: OPEN", "read: Flow | 2026", "read: OPAN")
    assert together.values.tolist() == pytest.approx([1, 1 / 2, 3 / 4])


@needs_weights
def test_what_cannot_be_judged_has_a_status(reward):
    shown = [
        sample(torch.full((3, 64, 64), math.nan)),
        sample(picture(["OPEN"]), []),
        sample(picture(["OPEN"]), ["Привет"]),
        sample(picture(["OPEN"])),
    ]
    said = []
    handler = logger.add(lambda message: said.append(str(message)), level="WARNING", format="{message}")
    try:
        scores = reward.score(shown + shown)
    finally:
        logger.remove(handler)
    status = (Status.FAILED, Status.NOT_APPLICABLE, Status.NOT_APPLICABLE, Status.OK)
    assert scores.status == status + status
    assert "not finite" in scores.reasons[0]
    assert "asks for no words" in scores.reasons[1]
    assert "cannot read 'веипрт'" in scores.reasons[2]
    assert len(said) == 1


@needs_weights
def test_a_reader_that_breaks_fails_its_picture_only(reward, monkeypatch, tmp_path):
    broken = ready(tmp_path)
    calls = iter([None, RuntimeError("no memory left")])
    real = broken._reader

    def reader(pixels):
        if error := next(calls):
            raise error
        return real(pixels)

    monkeypatch.setattr(broken, "_reader", reader)
    scores = broken.score([sample(picture(["OPEN"])), sample(picture(["OPEN"]))])
    assert scores.status == (Status.OK, Status.FAILED)
    assert scores.reasons[1] == "rapidocr: no memory left"


@needs_weights
def test_no_network_is_asked(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert value(ready(tmp_path), picture(["OPEN"])) == 1


@needs_weights
def test_other_weights_are_refused(monkeypatch, tmp_path):
    models = ocr.folder_of_models()
    for name, _ in ocr.WEIGHTS.values():
        shutil.copy(models / name, tmp_path)
    spoilt = tmp_path / "PP-OCRv6_rec_small.onnx"
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"!")
    monkeypatch.setattr(ocr, "folder_of_models", lambda: tmp_path)
    with pytest.raises(VelaturaError, match=r"PP-OCRv6_rec_small.onnx of SHA-256 6f327246b503…, and .* pip install"):
        ready(tmp_path)
    spoilt.unlink()
    with pytest.raises(VelaturaError, match="no file"):
        ready(tmp_path)


def test_a_missing_extra_is_one_message_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VelaturaError) as caught:
        ready(tmp_path)
    command = 'pip install "rapidocr==3.10.0" "onnxruntime>=1.20,<2"'
    assert str(caught.value) == f"'ocr' needs rapidocr and onnxruntime. Install it: {command}"


def test_the_command_installs_what_the_extra_does():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert tuple(extras["ocr"]) == ocr.PACKAGES


def test_making_the_reward_imports_neither_package():
    code = (
        "import sys; from velatura.rewards.ocr import Ocr; Ocr(); "
        "assert not {'rapidocr', 'onnxruntime', 'cv2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
