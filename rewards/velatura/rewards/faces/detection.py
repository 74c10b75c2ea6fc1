"""Where the faces of pictures are: MTCNN, three small networks in a cascade, in torch and in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, linear, max_pool2d, prelu

from velatura.rewards.faces.weights import read

CELL = 12
"""Pixels of a window of the first network."""
STRIDE = 2
SHRINK = 0.709
"""From one size of the pyramid to the next: half the area."""
THRESHOLDS = (0.6, 0.7, 0.7)
"""Least probability of a face for each of the three networks, as published."""
UPSCALED = 192
"""Pixels of the shorter side that pictures are enlarged to before they are searched."""
AT_ONCE = 2048
"""Windows in one forward of the second and third network."""


@dataclass(frozen=True, slots=True)
class Found:
    """N faces of one picture, the surest first, on the CPU."""

    boxes: Tensor
    """[N 4] left, top, right, bottom in pixels; may reach beyond the picture."""
    points: Tensor
    """[N 5 2] as in `geometry`."""
    confidence: Tensor
    """[N] in [0, 1]."""

    def __len__(self) -> int:
        return len(self.confidence)


class Detector(nn.Module):
    """Faces by MTCNN (Zhang et al., IEEE SPL 23, 2016): proposals at every place and size, refined twice."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """`weights`: as `weights.read` returns them."""
        super().__init__()
        for name, values in weights.items():
            self.register_buffer(name.replace(".", "_"), values)

    @classmethod
    def load(cls, device: torch.device) -> Detector:
        """With the published weights.

        Raises:
            VelaturaError: they are missing or others.
        """
        return cls(read("detection.safetensors")).to(device)

    @torch.no_grad()
    def forward(self, images: Tensor, smallest: float) -> list[Found]:
        """The faces of pictures [B 3 H W] in [0, 1] that are at least `smallest` pixels high, for each picture."""
        images = images.float()
        enlarged = max(1.0, UPSCALED / min(images.shape[-2:]))
        if enlarged > 1:
            images = interpolate(images, scale_factor=enlarged, mode="bilinear", align_corners=False)
        sums = integral(images)
        windows = self._proposed(shifted(images), smallest * enlarged)
        windows = self._refined(sums, windows)
        return [
            Found(
                boxes=found[:, :4] / enlarged, points=found[:, 5:].reshape(-1, 5, 2) / enlarged, confidence=found[:, 4]
            )
            for found in self._finished(sums, windows)
        ]

    def _of(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def _map(self, net: str, layer: int, x: Tensor) -> Tensor:
        """A convolution and its rectifier."""
        y = conv2d(x, self._of(f"{net}_conv{layer}_weight"), self._of(f"{net}_conv{layer}_bias"))
        return prelu(y, self._of(f"{net}_prelu{layer}_weight"))

    def _dense(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self._of(f"{name}_weight"), self._of(f"{name}_bias"))

    def _proposed(self, images: Tensor, smallest: float) -> list[Tensor]:
        """[K 4] windows of each picture, square, from all sizes."""
        sizes: list[list[Tensor]] = [[] for _ in images]
        scale = CELL / smallest
        while min(images.shape[-2:]) * scale >= CELL:
            size = [max(CELL, round(side * scale)) for side in images.shape[-2:]]
            x = max_pool2d(self._map("pnet", 1, interpolate(images, size=size, mode="area")), 2, 2, ceil_mode=True)
            x = self._map("pnet", 3, self._map("pnet", 2, x))
            face = conv2d(x, self._of("pnet_conv4_1_weight"), self._of("pnet_conv4_1_bias")).softmax(1)[:, 1]
            moves = conv2d(x, self._of("pnet_conv4_2_weight"), self._of("pnet_conv4_2_bias"))
            for kept, one, move in zip(sizes, face, moves, strict=True):
                kept.append(
                    proposals(one, move, [side / image for side, image in zip(size, images.shape[-2:], strict=True)])
                )
            scale *= SHRINK
        empty = images.new_zeros(0, 9)
        joined = (torch.cat([empty, *(one[distinct(one, 0.5)] for one in kept)]) for kept in sizes)
        return [squared(moved(one[distinct(one, 0.7)])) for one in joined]

    def _refined(self, sums: Tensor, windows: Sequence[Tensor]) -> list[Tensor]:
        """[K 4] the windows that the second network believes in, moved and square."""
        answers = self._asked(self._second, sums, windows, 24)
        kept = []
        for window, answer in zip(windows, answers, strict=True):
            rows = torch.cat([window, answer], 1)[answer[:, 0] >= THRESHOLDS[1]]
            kept.append(squared(moved(rows[distinct(rows, 0.7)])))
        return kept

    def _finished(self, sums: Tensor, windows: Sequence[Tensor]) -> list[Tensor]:
        """[N 15] box, confidence, and five points of what the third network believes in, the surest first."""
        answers = self._asked(self._third, sums, windows, 48)
        found = []
        for window, answer in zip(windows, answers, strict=True):
            sure = answer[:, 0] >= THRESHOLDS[2]
            rows, shares = torch.cat([window, answer[:, :5]], 1)[sure], answer[sure, 5:].reshape(-1, 2, 5)
            sides = rows[:, 2:4] - rows[:, :2]
            points = rows[:, :2, None] + sides[..., None] * shares
            boxes = torch.cat([moved(rows), rows[:, 4:5], points.transpose(1, 2).flatten(1)], 1)
            found.append(boxes[distinct(boxes, 0.7, of_smaller=True)].cpu())
        return found

    def _asked(self, net: Any, sums: Tensor, windows: Sequence[Tensor], side: int) -> list[Tensor]:
        """What `net` says of the windows of each picture, shown to it at `side` pixels."""
        shown = torch.cat([crops(one, window, side) for one, window in zip(sums, windows, strict=True)])
        answers = torch.cat([net(part) for part in torch.split(shown, AT_ONCE)])
        return list(torch.split(answers, [len(window) for window in windows]))

    def _second(self, x: Tensor) -> Tensor:
        """[K 3 24 24] to [K 5]: probability of a face, and how to move each side of the window."""
        x = max_pool2d(self._map("rnet", 1, x), 3, 2, ceil_mode=True)
        x = max_pool2d(self._map("rnet", 2, x), 3, 2, ceil_mode=True)
        x = prelu(self._dense("rnet_dense4", self._map("rnet", 3, x).flatten(1)), self._of("rnet_prelu4_weight"))
        return torch.cat([self._dense("rnet_dense5_1", x).softmax(1)[:, 1:], self._dense("rnet_dense5_2", x)], 1)

    def _third(self, x: Tensor) -> Tensor:
        """[K 3 48 48] to [K 15]: the same, and x, then y of five points as shares of the window."""
        x = max_pool2d(self._map("onet", 1, x), 3, 2, ceil_mode=True)
        x = max_pool2d(self._map("onet", 2, x), 3, 2, ceil_mode=True)
        x = self._map("onet", 4, max_pool2d(self._map("onet", 3, x), 2, 2, ceil_mode=True))
        x = prelu(self._dense("onet_dense5", x.flatten(1)), self._of("onet_prelu5_weight"))
        heads = [self._dense(f"onet_dense6_{head}", x) for head in (1, 2, 3)]
        return torch.cat([heads[0].softmax(1)[:, 1:], *heads[1:]], 1)


def shifted(pixels: Tensor) -> Tensor:
    """[0, 1] to what the networks were trained on, (byte - 127.5) / 128."""
    return (pixels * 255 - 127.5) / 128


def proposals(face: Tensor, moves: Tensor, scale: Sequence[float]) -> Tensor:
    """[K 9] window, probability and moves of the places [H W] where the first network sees a face.

    `moves`: [4 H W]; `scale`: of the rows and columns that it saw, relative to the picture.
    """
    rows, columns = torch.nonzero(face >= THRESHOLDS[0], as_tuple=True)
    corners = torch.stack([columns, rows], 1) * float(STRIDE)
    factor = corners.new_tensor([scale[1], scale[0]])
    windows = torch.cat([corners / factor, (corners + CELL) / factor], 1)
    return torch.cat([windows, face[rows, columns, None], moves[:, rows, columns].T], 1)


def moved(rows: Tensor) -> Tensor:
    """[K 4]: each side of the window of [K 9+] moved by its share of the window's size."""
    sides = (rows[:, 2:4] - rows[:, :2]).repeat(1, 2)
    return rows[:, :4] + sides * rows[:, 5:9]


def squared(boxes: Tensor) -> Tensor:
    """[K 4]: the squares around the same middle, as large as the longer side."""
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) / 2
    return torch.cat([middle - half, middle + half], 1)


def integral(images: Tensor) -> Tensor:
    """[B 3 H+1 W+1] float64: the sum of all pixels above and to the left."""
    sums = images.new_zeros(*images.shape[:2], images.shape[2] + 1, images.shape[3] + 1, dtype=torch.float64)
    sums[..., 1:, 1:] = images.double().cumsum(2).cumsum(3)
    return sums


def crops(sums: Tensor, boxes: Tensor, side: int) -> Tensor:
    """[K 3 side side]: what is in boxes [K 4] of the picture with the integral [3 H+1 W+1], as the networks see it.

    Exact means over the area of each new pixel: an integral is bilinear between its entries. Black beyond the border.
    """
    height, width = sums.shape[1] - 1, sums.shape[2] - 1
    shares = torch.arange(side + 1, dtype=torch.float64, device=sums.device) / side
    low, high = boxes[:, :2].double(), boxes[:, 2:].double()
    x, y = (low[..., None] + (high - low)[..., None] * shares).unbind(1)
    corners = (lookup(sums, y.clamp(0, height), x.clamp(0, width))).diff(dim=2).diff(dim=3)
    area = (high - low).prod(1).clamp_min(1e-12) / side**2
    return shifted((corners / area[:, None, None, None]).float())


def lookup(sums: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """[K 3 S S] values of [3 H+1 W+1] at the rows y [K S] and columns x [K S], linear in between."""
    top, left = (place.floor().long().clamp_max(limit - 2) for place, limit in ((y, sums.shape[1]), (x, sums.shape[2])))
    down, across = (y - top)[:, :, None], (x - left)[:, None, :]

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        return sums[:, rows[:, :, None], columns[:, None, :]]

    upper = torch.lerp(at(top, left), at(top, left + 1), across)
    return torch.lerp(upper, torch.lerp(at(top + 1, left), at(top + 1, left + 1), across), down).transpose(0, 1)


def overlaps(one: Tensor, others: Tensor, of_smaller: bool = False) -> Tensor:
    """[M] of a box [4] with boxes [M 4]: the area of both over that of either, or over the smaller one."""
    size = (torch.minimum(one[2:], others[:, 2:]) - torch.maximum(one[:2], others[:, :2])).clamp_min(0)
    both = size.prod(-1)
    own, theirs = (one[2:] - one[:2]).prod(-1), (others[:, 2:] - others[:, :2]).prod(-1)
    whole = torch.minimum(own, theirs) if of_smaller else own + theirs - both
    return both / whole.clamp_min(1e-12)


def distinct(rows: Tensor, limit: float, of_smaller: bool = False) -> Tensor:
    """Indices of windows [K 5+], the surest first, without those that overlap a surer one by more than `limit`."""
    boxes = rows[:, :4].cpu()
    left = rows[:, 4].cpu().argsort(descending=True, stable=True)
    kept = []
    while len(left):
        kept.append(int(left[0]))
        left = left[1:][overlaps(boxes[left[0]], boxes[left[1:]], of_smaller) <= limit]
    return torch.tensor(kept, dtype=torch.long, device=rows.device)
