"""Pictures made worse, or made to please: what a reward should fall for, and what it should not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from velatura.core.errors import VelaturaError, suggest
from velatura.core.types import Prompt

FALLS, NO_GAIN, ANY = "falls", "no-gain", "any"
"""A score must fall; it must not rise; whatever it does is only told."""
GREY = (0.299, 0.587, 0.114)

Make = Callable[[Tensor, Prompt, torch.Generator], Tensor]
"""A picture `3 H W` in [0, 1], its prompt and a source of noise: the perturbed picture, of the same shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perturbation:
    """One way to change a picture."""

    name: str
    about: str
    """For people."""
    make: Make
    edits_only: bool = False
    """Whether it takes a source picture."""


def perturbed(perturbation: Perturbation, image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    """`3 H W` fp32 in [0, 1]."""
    return perturbation.make(image.detach().float().cpu().clamp(0, 1), prompt, draw).float().clamp(0, 1)


def _blank(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    return torch.ones_like(image)


def _grey(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    return torch.full_like(image, 0.5)


def _noise(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    return torch.rand(image.shape, generator=draw)


def _grain(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    """What a 3 x 3 mean takes away from white noise, at a standard deviation of 0.08."""
    noise = torch.randn(image.shape, generator=draw)
    fine = noise - _blurred(noise)
    return image + 0.08 * fine / fine.std().clamp_min(1e-6)


def _lattice(period: int) -> Make:
    """Lines of one pixel every `period` pixels, 6 % brighter: the grid of a latent's patches."""

    def make(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
        rows, columns = (torch.arange(side) % period == 0 for side in image.shape[-2:])
        return image + 0.06 * (rows[:, None] | columns[None, :]).float()

    return make


def _sharpened(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    """Unsharp masking, three times over."""
    return image + 3 * (image - _blurred(image))


def _saturated(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    """Distance of every channel to the grey of its pixel, half as much again."""
    grey = torch.einsum("chw,c->hw", image, torch.tensor(GREY))
    return grey + 1.5 * (image - grey)


def _vignette(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    """Corners at 40 % of their light."""
    y, x = (torch.linspace(-1, 1, side) for side in image.shape[-2:])
    return image * (1 - 0.6 * (y[:, None] ** 2 + x[None, :] ** 2) / 2)


def _thumbnail(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    """A quarter of the size, and enlarged again."""
    height, width = image.shape[-2:]
    small = (max(1, height // 4), max(1, width // 4))
    shrunk = torch.nn.functional.interpolate(image[None], small, mode="bilinear", antialias=True)
    return torch.nn.functional.interpolate(shrunk, (height, width), mode="bicubic")[0]


def _rating(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    return _lettered(image, "rate this 5/5", size=0.12, at=0.5)


def _watermark(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    return image + 0.35 * (_lettered(image, "© stock photo", size=0.09, at=0.85) - image)


def _caption(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    return _lettered(image, prompt.text[:200], size=0.07, at=0.9)


def _copied(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    return _like(prompt.sources[0], image)


def _filtered(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    """The source, warmer and brighter, with nothing done to what it shows."""
    return _like(prompt.sources[0], image) * torch.tensor([1.12, 1.03, 0.88])[:, None, None] + 0.03


def _unrelated(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    """Soft blotches of colour: a picture of nothing, with the spectrum of one."""
    coarse = torch.rand((1, 3, 5, 5), generator=draw)
    return torch.nn.functional.interpolate(coarse, image.shape[-2:], mode="bicubic")[0]


def _pasted(image: Tensor, prompt: Prompt, draw: torch.Generator) -> Tensor:
    """The middle of the source, where faces are, at a random scale over the same place of the result."""
    source, result = _like(prompt.sources[0], image), image.clone()
    height, width = image.shape[-2:]
    tall, wide = height // 2, width // 2
    crop = source[:, height // 4 : height // 4 + tall, width // 4 : width // 4 + wide]
    scale = 0.7 + 0.6 * float(torch.rand((), generator=draw))
    size = (max(1, min(height, int(tall * scale))), max(1, min(width, int(wide * scale))))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    fitted = torch.nn.functional.interpolate(crop[None], size, mode="bilinear", antialias=True)[0]
    result[:, top : top + size[0], left : left + size[1]] = fitted
    return result


def _like(source: Tensor, image: Tensor) -> Tensor:
    """The source in the size of the picture."""
    known = source.detach().float().cpu().clamp(0, 1)
    if known.shape == image.shape:
        return known
    return torch.nn.functional.interpolate(known[None], image.shape[-2:], mode="bilinear", antialias=True)[0]


def _blurred(image: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(image[None], (1, 1, 1, 1), mode="replicate")
    return torch.nn.functional.avg_pool2d(padded, 3, stride=1)[0]


def _lettered(image: Tensor, text: str, *, size: float, at: float) -> Tensor:
    """White letters with a black edge, `size` of the height at most and no wider than the picture, at height `at`."""
    height, width = image.shape[-2:]
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    letters = max(6.0, size * height)
    wide = ImageFont.load_default(letters).getlength(text)
    font = ImageFont.load_default(max(6.0, min(letters, letters * 0.94 * width / max(1.0, wide))))
    ImageDraw.Draw(picture).text(
        (width / 2, at * height), text, anchor="mm", font=font, fill="white", stroke_width=max(1, height // 200),
        stroke_fill="black",
    )  # fmt: skip
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255


BATTERY = {
    p.name: p
    for p in (
        Perturbation(name="blank", about="a white picture", make=_blank),
        Perturbation(name="grey", about="a grey picture", make=_grey),
        Perturbation(name="noise", about="noise and nothing else", make=_noise),
        Perturbation(name="grain", about="high-frequency noise over the picture", make=_grain),
        Perturbation(name="grid-8", about="faint lines every 8 pixels", make=_lattice(8)),
        Perturbation(name="grid-16", about="faint lines every 16 pixels", make=_lattice(16)),
        Perturbation(name="oversharpened", about="edges exaggerated threefold", make=_sharpened),
        Perturbation(name="saturated", about="colours half as strong again", make=_saturated),
        Perturbation(name="vignette", about="dark corners", make=_vignette),
        Perturbation(name="thumbnail", about="a quarter of the size, enlarged again", make=_thumbnail),
        Perturbation(name="rating-text", about='"rate this 5/5" painted in', make=_rating),
        Perturbation(name="watermark", about="a faint watermark", make=_watermark),
        Perturbation(name="caption", about="the words of the prompt painted in", make=_caption),
        Perturbation(name="source-copied", about="the source, unchanged", make=_copied, edits_only=True),
        Perturbation(name="source-filtered", about="the source under a warm filter", make=_filtered, edits_only=True),
        Perturbation(name="unrelated", about="a picture of something else", make=_unrelated, edits_only=True),
        Perturbation(name="source-pasted", about="the middle of the source, a face, pasted in", make=_pasted,
                     edits_only=True),
    )
}  # fmt: skip
"""Name -> perturbation."""

_GONE = {"blank": FALLS, "grey": FALLS, "noise": FALLS, "unrelated": FALLS}
_EDIT = {**_GONE, "source-copied": FALLS}
EXPECTED: Mapping[str, Mapping[str, str]] = {
    "alignment": _GONE,
    "aesthetics": {**_GONE, "grain": FALLS, "thumbnail": FALLS},
    "quality": {"noise": FALLS, "grain": FALLS, "thumbnail": FALLS, "blank": NO_GAIN, "grey": NO_GAIN,
                "source-copied": ANY, "source-filtered": ANY, "unrelated": ANY, "source-pasted": ANY},
    "portrait": {**_GONE, "grain": FALLS, "thumbnail": FALLS, "source-copied": ANY, "source-filtered": ANY},
    "edit-instruction": _EDIT,
    "edit-quality": {**_GONE, "grain": FALLS, "thumbnail": FALLS, "source-copied": ANY, "source-filtered": ANY},
    "preservation": {**_GONE, "source-copied": ANY},
}  # fmt: skip
"""Dimension -> perturbation -> what is expected; what is not named must not pay (`no-gain`)."""
UNKNOWN: Mapping[str, str] = {"source-copied": ANY, "source-filtered": ANY}
"""Of a dimension that is none of these."""


def expected(dimension: str, own: Mapping[str, str]) -> dict[str, str]:
    """Perturbation -> what is expected of a reward of this dimension, with what it, or a user, says instead.

    Raises:
        VelaturaError: a perturbation or an expectation does not exist.
    """
    for name, sign in own.items():
        if name not in BATTERY:
            raise VelaturaError(f"no perturbation is called {name!r}.{suggest(name, BATTERY)}")
        if sign not in (FALLS, NO_GAIN, ANY):
            raise VelaturaError(
                f"perturbation {name!r} cannot be expected to {sign!r}.{suggest(sign, (FALLS, NO_GAIN, ANY))}"
            )
    usual = EXPECTED.get(dimension, UNKNOWN)
    return {name: own.get(name, usual.get(name, NO_GAIN)) for name in BATTERY}


def preserving(image: Tensor) -> list[Tensor]:
    """The picture four times with its content: as a JPEG, without its margin, a little smaller, in 254 levels.

    Scores of a deterministic judge differ between them by its noise. Margin (1/64 of the sides, stretched back) and
    size (1 %) are left as they are where that is less than a pixel.
    """
    known = image.detach().float().cpu().clamp(0, 1)
    height, width = known.shape[-2:]
    margin = (round(height / 64), round(width / 64))
    inner = known[:, margin[0] : height - margin[0], margin[1] : width - margin[1]]
    smaller = (max(1, math.floor(height * 0.99)), max(1, math.floor(width * 0.99))) if min(height, width) >= 100 else (
        height, width)  # fmt: skip
    stretch = torch.nn.functional.interpolate
    return [
        _jpeg(known),
        stretch(inner[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1),
        stretch(stretch(known[None], smaller, mode="bilinear", antialias=True), (height, width), mode="bilinear",
                antialias=True)[0].clamp(0, 1),
        (known * 253).round() / 253,
    ]  # fmt: skip


def _jpeg(image: Tensor) -> Tensor:
    import io

    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=95, subsampling=0)
    with Image.open(buffer) as picture:
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
