"""The back-end `insightface`: the real library on tiny networks that this file makes, of the forms it knows by."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from loguru import logger
from people import context, noise, photo, sample, tensor

from velatura.api import Status, VelaturaError
from velatura.rewards.faces.identity import FaceIdentity, IdentityOptions

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("insightface") is None, reason='not installed: pip install "velatura[insightface]"'
    ),
    pytest.mark.filterwarnings("ignore:.*estimate.*:FutureWarning"),  # its own calls of scikit-image
]
ANCHOR = (16, 16)
"""Row and column, of stride 16, where the detector sees a face: at (256, 256) of its 640 x 640 pixels."""
POINTS = ((-3.0, -3.0), (3.0, -3.0), (0.0, 0.0), (-2.5, 3.0), (2.5, 3.0))
"""Of that face, in strides around the anchor."""


def detector(path: Path) -> None:
    """Nine outputs as SCRFD has them: one face in the middle of the upper left, whatever it is shown."""
    from onnx import TensorProto, helper, numpy_helper, save

    values: list[np.ndarray] = []
    for width in (1, 4, 10):
        for stride in (8, 16, 32):
            rows = (640 // stride) ** 2 * 2
            values.append(np.zeros((rows, width), dtype=np.float32))
    row = (ANCHOR[0] * 40 + ANCHOR[1]) * 2
    values[1][row] = 0.9
    values[4][row] = 6
    values[7][row] = np.array(POINTS).ravel()
    names = [f"out{i}" for i in range(9)]
    nodes = [
        helper.make_node("ReduceMean", ["shown"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["no"]),
    ]
    nodes += [helper.make_node("Add", [f"v{i}", "no"], [name]) for i, name in enumerate(names)]
    constants = [numpy_helper.from_array(value, f"v{i}") for i, value in enumerate(values)]
    constants.append(numpy_helper.from_array(np.zeros((), dtype=np.float32), "zero"))
    shown = helper.make_tensor_value_info("shown", TensorProto.FLOAT, [1, 3, "H", "W"])
    outputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, list(v.shape)) for n, v in zip(names, values, strict=True)
    ]
    save(model(helper.make_graph(nodes, "detector", [shown], outputs, constants)), path)


def recogniser(path: Path) -> None:
    """A random linear map of a picture of 112 x 112 pixels, pooled to 16 x 16, to 512 numbers."""
    from onnx import TensorProto, helper, numpy_helper, save

    weight = np.random.default_rng(0).normal(size=(3 * 16 * 16, 512)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["shown"], ["pooled"], kernel_shape=[7, 7], strides=[7, 7]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["embedding"]),
    ]
    shown = helper.make_tensor_value_info("shown", TensorProto.FLOAT, [1, 3, 112, 112])
    output = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 512])
    graph = helper.make_graph(nodes, "recogniser", [shown], [output], [numpy_helper.from_array(weight, "weight")])
    save(model(graph), path)


def model(graph):
    from onnx import helper

    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp("insight")
    folder = root / "models" / "tiny"
    folder.mkdir(parents=True)
    detector(folder / "det.onnx")
    recogniser(folder / "rec.onnx")
    return root


def made(base, root, model="tiny"):
    reward = FaceIdentity(
        IdentityOptions(
            backend="insightface", insightface_root=str(root), insightface_model=model, accept_non_commercial=True
        )
    )
    reward.setup(context(base))
    return reward


def test_its_licence_is_said_aloud_and_faces_are_compared_by_its_networks(weights, tmp_path):
    said = []
    handler = logger.add(lambda message: said.append(str(message)), level="WARNING", format="{message}")
    try:
        reward = made(tmp_path, weights)
    finally:
        logger.remove(handler)
    assert len(said) == 1
    assert "non-commercial research only" in said[0]
    astronaut = photo("astronaut", 640)
    shown = [sample(astronaut, astronaut, "make it warmer"), sample(noise(640), astronaut, "make it warmer")]
    scores = reward.score(shown)
    assert scores.status == (Status.OK, Status.OK)
    assert float(scores.values[0]) == pytest.approx(1)
    assert float(scores.values[1]) < float(scores.values[0])
    faces = reward._reader.read([tensor(astronaut)], 24, True)[0]
    assert faces.boxes.tolist() == [[160.0, 160.0, 352.0, 352.0]]
    assert faces.points[0].tolist() == [[256 + 16 * x, 256 + 16 * y] for x, y in POINTS]
    torch.testing.assert_close(faces.embeddings.norm(dim=1), torch.ones(1))
    assert len(reward._reader.read([tensor(astronaut)], 300, True)[0]) == 0


def test_weights_that_are_not_there_are_not_fetched(weights, tmp_path):
    with pytest.raises(
        VelaturaError, match=r"InsightFace weights 'other' in .*models/other, which holds no .onnx file"
    ):
        made(tmp_path, weights, model="other")
    for network, lacking in ((recogniser, "detection"), (detector, "recognition")):
        folder = weights / "models" / f"no-{lacking}"
        folder.mkdir()
        network(folder / "one.onnx")
        with pytest.raises(VelaturaError, match=f"have no {lacking}"):
            made(tmp_path, weights, model=folder.name)
