"""Converts the published weights for faces to the two files beside `velatura.rewards.faces`.

    npm pack @vladmandic/face-api@1.7.15
    pip download --no-deps facenet-pytorch==2.6.0
    python tools/convert_face_weights.py vladmandic-face-api-1.7.15.tgz facenet_pytorch-2.6.0-py3-none-any.whl

Nothing of the packages is run. What is read from them has to have the SHA-256 below; the SHA-256 of what is written is
printed, and belongs into `velatura.rewards.faces.weights`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "package/model/face_recognition_model-weights_manifest.json"
RECOGNITION = {
    MANIFEST: "cbaffa501b0b9275a12b63357a6843e7e30c054e1c9151e1a5f879b26e32986b",
    "package/model/face_recognition_model.bin": "b413e420d6840b2775fba32008db6f3cddb07d485967fb42cfcf379c16a8c589",
}
"""Members of @vladmandic/face-api 1.7.15."""
DETECTION = {
    "facenet_pytorch/data/pnet.pt": "a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f",
    "facenet_pytorch/data/rnet.pt": "bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86",
    "facenet_pytorch/data/onet.pt": "165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d",
}
"""Members of facenet-pytorch 2.6.0."""
FOLDER = Path(__file__).parents[1] / "rewards" / "velatura" / "rewards" / "faces"
FLATTENED = {"rnet.dense4.weight": 3, "onet.dense5.weight": 3}
"""Layers that read a map flattened as [width height channel], and its side."""


def checked(name: str, data: bytes, digest: str) -> bytes:
    """`data`, when it has the SHA-256 `digest`."""
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise SystemExit(f"{name} has SHA-256 {found}, and {digest} was published. Fetch the version named above.")
    return data


def recognition(archive: Path) -> dict[str, Tensor]:
    """Tensors of the recogniser as stored: bytes with their `/range` [scale, least], or fp32; convolutions OIHW."""
    with tarfile.open(archive) as files:
        members = {}
        for name, digest in RECOGNITION.items():
            member = files.extractfile(name)
            if member is None:
                raise SystemExit(f"{archive} holds no {name}.")
            members[name] = checked(name, member.read(), digest)
    manifest, data = members.values()
    found, place = {}, 0
    for entry in (entry for group in json.loads(manifest) for entry in group["weights"]):
        values, size = read(entry, data, place)
        place += size
        found[entry["name"]] = values.permute(3, 2, 0, 1).contiguous() if values.ndim == 4 else values
        if "quantization" in entry:
            coding = entry["quantization"]
            found[entry["name"] + "/range"] = torch.tensor([coding["scale"], coding["min"]], dtype=torch.float64)
    if place != len(data):
        raise SystemExit(f"The manifest describes {place} bytes, and the file has {len(data)}.")
    return found


def read(entry: dict[str, Any], data: bytes, place: int) -> tuple[Tensor, int]:
    """One tensor that begins at byte `place`, and its size in bytes."""
    coding = entry.get("quantization", {"dtype": "float32"})["dtype"]
    kind = {"uint8": torch.uint8, "float32": torch.float32}[coding]
    shape = torch.Size(entry["shape"])
    size = shape.numel() * kind.itemsize
    return torch.frombuffer(bytearray(data[place : place + size]), dtype=kind).reshape(shape), size


def detection(archive: Path) -> dict[str, Tensor]:
    """Tensors of the three detectors, `pnet.`, `rnet.`, `onet.`; maps are flattened as [channel height width]."""
    found: dict[str, Tensor] = {}
    with zipfile.ZipFile(archive) as files:
        for name, digest in DETECTION.items():
            data = io.BytesIO(checked(name, files.read(name), digest))
            for key, values in torch.load(data, map_location="cpu", weights_only=True).items():
                found[f"{Path(name).stem}.{key}"] = values.float().contiguous()
    for key, side in FLATTENED.items():
        outputs = len(found[key])
        found[key] = found[key].reshape(outputs, side, side, -1).permute(0, 3, 2, 1).reshape(outputs, -1).contiguous()
    return found


def main() -> None:
    """Convert both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("face_api", type=Path, help="vladmandic-face-api-1.7.15.tgz")
    parser.add_argument("facenet", type=Path, help="facenet_pytorch-2.6.0-py3-none-any.whl")
    parser.add_argument("--to", type=Path, default=FOLDER, help="the folder to write to")
    asked = parser.parse_args()
    made = {"recognition": recognition(asked.face_api), "detection": detection(asked.facenet)}
    for name, tensors in made.items():
        path = asked.to / f"{name}.safetensors"
        save_file(tensors, path)
        print(f"{path.name}: {path.stat().st_size:,} bytes, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
