"""Two photographs in the public domain, what can be done to them, and prompts about them."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from velatura.api import Context, Prompt, Sample

FILES = {
    "astronaut": Path(__file__).with_name("astronaut.jpg"),
    "hopper": Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
}
CROPS = {"astronaut": (0, 0, 256, 256), "hopper": (90, 40, 450, 400)}


def photo(name, side=256):
    """A square photograph with one face, of about half its height."""
    picture = Image.open(FILES[name]).convert("RGB").crop(CROPS[name])
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def tensor(picture):
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255


def compressed(picture, quality):
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=quality)
    return Image.open(file).convert("RGB")


def noisy(picture, deviation):
    pixels = np.asarray(picture).astype(float)
    drawn = np.random.default_rng(0).normal(size=pixels.shape) * deviation
    return Image.fromarray(np.clip(pixels + drawn, 0, 255).astype("uint8"))


def blurred(picture, radius):
    return picture.filter(ImageFilter.GaussianBlur(radius))


def distorted(picture):
    """What leaves a person recognisable, by name."""
    return {
        "jpeg": compressed(picture, 20),
        "noise": noisy(picture, 15),
        "blur": blurred(picture, 1),
        "darker": ImageEnhance.Brightness(picture).enhance(0.6),
        "brighter": ImageEnhance.Brightness(picture).enhance(1.3),
        "flat": ImageEnhance.Contrast(picture).enhance(0.6),
        "grey": picture.convert("L").convert("RGB"),
        "turned": picture.rotate(12, Image.Resampling.BICUBIC),
        "mirrored": picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "smaller": picture.resize((160, 160), Image.Resampling.LANCZOS),
    }


def beside(*pictures):
    """One picture of several, from left to right."""
    whole = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width
    return whole


def noise(side=256, seed=0):
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))


def sample(image, source=None, text="a portrait", name=None, category="portrait", **metadata):
    """A picture, tensor or Pillow's, for a prompt; an edit when there is a source."""
    image, sources = as_tensor(image), () if source is None else tuple(as_tensor(s) for s in listed(source))
    prompt = Prompt(
        id=name or text,
        text=text,
        task="edit" if sources else "t2i",
        sources=sources,
        category=category,
        metadata=metadata,
    )
    return Sample(prompt=prompt, image=image, seed=0)


def listed(source):
    return source if isinstance(source, list) else [source]


def as_tensor(picture):
    return tensor(picture) if isinstance(picture, Image.Image) else picture


def context(base):
    return Context(device=torch.device("cpu"), cache=base, seed=0, base=base)
