"""The weights beside this file, checked before they are read. NOTICE.md says where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from velatura.api import VelaturaError

FOLDER = Path(__file__).parent
WEIGHTS: Mapping[str, str] = {
    "detection.safetensors": "0a95d98d016491d291559b717b24809ddf1dc35dbb09d1b6aaa7ffc8cdaebdbb",
    "recognition.safetensors": "5243f5bf4669e4f7ea34499d4e1b59bc4051b88b8efb8af91c5b5c1d1c17403d",
}
"""Files and their SHA-256: MTCNN of facenet-pytorch 2.6.0, and the recogniser of @vladmandic/face-api 1.7.15, as
`tools/convert_face_weights.py` writes them."""
RANGE = "/range"


def read(name: str) -> dict[str, Tensor]:
    """The tensors of the file `name`, fp32; what is stored in bytes is byte * scale + least.

    Raises:
        VelaturaError: the file is missing or another.
    """
    stored = load(checked(FOLDER / name, WEIGHTS[name]))
    found = {}
    for key, values in stored.items():
        if key.endswith(RANGE):
            continue
        scale, least = stored[key + RANGE].tolist() if key + RANGE in stored else (1.0, 0.0)
        found[key] = (values.double() * scale + least).to(torch.float32)
    return found


def checked(path: Path, digest: str) -> bytes:
    """What is in `path`, when it has the SHA-256 `digest`.

    Raises:
        VelaturaError: it is missing or another.
    """
    data = path.read_bytes() if path.is_file() else None
    found = None if data is None else hashlib.sha256(data).hexdigest()
    if data is None or found != digest:
        raise VelaturaError(
            f"Faces are found and recognised with {path.name} of SHA-256 {digest[:12]}…, and {path} "
            f"{'does not exist' if found is None else f'has {found[:12]}…'}. Scores of other weights cannot be "
            "compared. Install velatura again: pip install --force-reinstall --no-deps velatura"
        )
    return data
