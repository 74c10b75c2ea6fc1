"""Faces by InsightFace, the library and its weights. The weights are for non-commercial research only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from velatura.api import VelaturaError
from velatura.rewards.dual_encoder import to_bytes
from velatura.rewards.faces.detection import Found
from velatura.rewards.faces.reading import Faces, described

LOOKED_AT = (640, 640)
"""Pixels that pictures are resized to for detection, as by default there."""
LEAST = 0.5
"""Confidence of faces that are looked at."""


class InsightReader:
    """SCRFD finds, ArcFace recognises: embeddings of length 1, with distance sqrt(2 - 2 cos).

    Pictures go through one by one. Full marks from cos .6 and none below .1 are common for ArcFace. SCRFD is less
    sure of a plain face than MTCNN is: it names faces from .5, and what is above .6 is taken for one.
    """

    sure, confidence = 0.6, (LEAST, 0.75)
    full, none = (2 - 2 * 0.6) ** 0.5, (2 - 2 * 0.1) ** 0.5

    def __init__(self, user: str, root: Path, model: str, device: torch.device) -> None:
        """`root`/models/`model` holds the weights; nothing is fetched.

        Raises:
            VelaturaError: they are not there, or lack detection or recognition.
        """
        folder = root / "models" / model
        if not any(folder.glob("*.onnx")):
            raise VelaturaError(
                f"'{user}' looks for the InsightFace weights {model!r} in {folder}, which holds no .onnx file. Fetch "
                f"{model}.zip from the releases of deepinsight/insightface and unpack it there, or name its place in "
                "`insightface_root`."
            )
        from insightface.app import FaceAnalysis

        on_cuda = device.type == "cuda"
        providers = (["CUDAExecutionProvider"] if on_cuda else []) + ["CPUExecutionProvider"]
        try:
            self._app: Any = FaceAnalysis(
                name=model, root=str(root), allowed_modules=["detection", "recognition"], providers=providers
            )
        except AssertionError:
            raise VelaturaError(f"'{user}': the InsightFace weights in {folder} have no detection.") from None
        if "recognition" not in self._app.models:
            raise VelaturaError(f"'{user}': the InsightFace weights in {folder} have no recognition.")
        self._app.prepare(ctx_id=(device.index or 0) if on_cuda else -1, det_thresh=LEAST, det_size=LOOKED_AT)

    def read(self, images: Sequence[Tensor], smallest: float, recognise: bool) -> list[Faces]:
        """The faces of pictures [3 H W] that are at least `smallest` pixels high."""
        return [self._read(image, smallest) for image in images]

    def _read(self, image: Tensor, smallest: float) -> Faces:
        found = self._app.get(np.ascontiguousarray(to_bytes(image)[:, :, ::-1]))
        kept = [face for face in found if face.bbox[3] - face.bbox[1] >= smallest]
        kept.sort(key=lambda face: -face.det_score)
        boxes, points, embeddings = (
            torch.from_numpy(np.array([np.asarray(face[key], dtype=np.float32) for face in kept]).reshape(-1, *shape))
            for key, shape in (("bbox", (4,)), ("kps", (5, 2)), ("embedding", (512,)))
        )
        confidence = torch.tensor([float(face.det_score) for face in kept])
        return described(image, Found(boxes, points, confidence), torch.nn.functional.normalize(embeddings, dim=1))
