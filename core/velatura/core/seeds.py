"""Named random streams: one seed per run, and a path per draw, so that a result depends on nothing but its name.

>>> derive(7, "rollout", 3, "a-red-cube", 0) == derive(7, "rollout", 3, "a-red-cube", 0)
True
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *path: str | int) -> int:
    """The seed of the stream `path` of the run `seed`: 63 bits of BLAKE2b over an injective encoding of both.

    Order and type matter: ("a", 1), (1, "a") and ("a", "1") are three streams. No two paths encode alike, so two
    streams share a seed only if BLAKE2b collides on 63 bits.
    """
    digest = hashlib.blake2b(b"".join(map(_encode, (seed, *path))), digest_size=8, person=b"velatura").digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *path: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh generator at the start of the stream `path`.

    torch's CPU generator reads the low 32 bits of a seed only. Two of a million streams may therefore draw the same
    numbers; two samples of one prompt do so once in 4e9.
    """
    return torch.Generator(device=device).manual_seed(derive(seed, *path))


def _encode(part: str | int) -> bytes:
    """Type, length, content: no concatenation of parts reads as another."""
    content = str(part).encode()
    return b"%c%d:%s" % (b"s" if isinstance(part, str) else b"i", len(content), content)
