"""Tiny vision networks with random weights that see 96 x 96 pixels."""

from __future__ import annotations

from pathlib import Path

import torch


def dino(folder: Path) -> Path:
    """A DINOv2."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=96, patch_size=8
    )).save_pretrained(folder)  # fmt: skip
    BitImageProcessorPil().save_pretrained(folder)
    return folder


def resnet(folder: Path) -> Path:
    """A ResNet."""
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetModel

    torch.manual_seed(1)
    ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ).save_pretrained(folder)
    ConvNextImageProcessorPil().save_pretrained(folder)
    return folder
