"""The network that tells faces apart: dlib's residual network of 29 convolutions, in torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d, pad, relu

from velatura.rewards.faces.weights import read

SIDE = 150
"""Pixels of a chip."""
MEAN = (122.782, 117.001, 104.298)
BLOCKS = (
    *("conv32_1", "conv32_2", "conv32_3"),
    *("conv64_down", "conv64_1", "conv64_2", "conv64_3"),
    *("conv128_down", "conv128_1", "conv128_2"),
    *("conv256_down", "conv256_1", "conv256_2", "conv256_down_out"),
)
"""In order; those with `down` halve the map."""
SIZE = 128
"""Numbers of an embedding."""


class Recogniser(nn.Module):
    """Chips [N 3 150 150] in [0, 1] to embeddings [N 128]: the nearer, the more alike; one person's are within .6.

    dlib's face recognition network (King 2017, a ResNet of 29 convolutions), with the batch normalisations folded into
    one scale and bias a channel.
    """

    mean: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """`weights`: as `weights.read` returns them."""
        super().__init__()
        for name, values in weights.items():
            self.register_buffer(key(name), values)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])

    @classmethod
    def load(cls, device: torch.device) -> Recogniser:
        """With the published weights.

        Raises:
            VelaturaError: they are missing or others.
        """
        return cls(read("recognition.safetensors")).to(device)

    @torch.no_grad()
    def forward(self, chips: Tensor) -> Tensor:
        """[N 3 150 150] in [0, 1] to [N 128]."""
        x = (chips.float() * 255 - self.mean) / 256
        x = max_pool2d(relu(self._scaled("conv32_down", x, stride=2)), 3, 2)
        for block in BLOCKS:
            x = self._halved(block, x) if "_down" in block else self._kept(block, x)
        return x.mean((2, 3)) @ self._of("fc")

    def _of(self, name: str) -> Tensor:
        return self.get_buffer(key(name))

    def _scaled(self, layer: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        """A convolution, and one scale and bias a channel."""
        y: Tensor = conv2d(x, self._of(f"{layer}/conv/filters"), self._of(f"{layer}/conv/bias"), stride, padding)
        return y * self._of(f"{layer}/scale/weights")[:, None, None] + self._of(f"{layer}/scale/biases")[:, None, None]

    def _kept(self, block: str, x: Tensor) -> Tensor:
        inner = relu(self._scaled(f"{block}/conv1", x, padding=1))
        return relu(self._scaled(f"{block}/conv2", inner, padding=1) + x)

    def _halved(self, block: str, x: Tensor) -> Tensor:
        """Half the side; the shortcut is averaged, and the smaller of both is filled with zeros."""
        inner = relu(self._scaled(f"{block}/conv1", x, stride=2))
        main, short = self._scaled(f"{block}/conv2", inner, padding=1), avg_pool2d(x, 2)
        rows, columns = (short.shape[axis] - main.shape[axis] for axis in (2, 3))
        main = pad(main, (0, columns, 0, rows))
        return relu(main + pad(short, (0, 0, 0, 0, 0, main.shape[1] - short.shape[1])))


def key(name: str) -> str:
    """The name of a stored tensor as that of a buffer."""
    return name.replace("/", "_")
