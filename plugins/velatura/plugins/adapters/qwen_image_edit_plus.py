"""Qwen-Image-Edit-Plus (2509 and later): edits one or more source images by an instruction."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from velatura.api import Conditioning, Prompt, VelaturaError
from velatura.plugins.adapters.conditioning import Row, RowsConditioning
from velatura.plugins.adapters.diffusers_base import DiffusersOptions
from velatura.plugins.adapters.pictures import to_pil
from velatura.plugins.adapters.qwen_image import QwenImageLatents, encode, grid, token_velocity
from velatura.plugins.adapters.sizes import Size, shape_of, sides
from velatura.plugins.adapters.sources import called


class QwenImageEditPlusOptions(DiffusersOptions):
    """Options of `qwen-image-edit-plus`."""

    negative_prompt: str = Field(" ", description="The text of the unconditional branch; the model card has a space.")
    source_area: int = Field(
        1024 * 1024, ge=32 * 32, description="Pixels of a source image as the network attends to it; its shape is kept."
    )
    encoder_area: int = Field(
        384 * 384, ge=32 * 32, description="Pixels of a source image as the text encoder sees it; its shape is kept."
    )


class QwenImageEditPlus(QwenImageLatents[QwenImageEditPlusOptions]):
    """Qwen-Image-Edit-Plus, edits of any number of source images, at least one.

    Latents are [B h*w 4C], a token per 2 x 2 latent pixels; the sources' tokens follow the target's in the network.
    The picture has the shape of the last source. Guidance is null + scale (cond - null), each token of it rescaled to
    the length it has in cond; null keeps the sources.
    """

    name = "qwen-image-edit-plus"
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImageEditPlusPipeline",)
    beside_rows: ClassVar[tuple[str, ...]] = ("height", "width")
    ragged: ClassVar[tuple[str, ...]] = ("text",)
    sources = None
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "processor")

    def row(self, prompt: Prompt, text: str, size: Size) -> Row:
        """The last hidden states [L D] of the text encoder, which sees the sources, and the sources' tokens."""
        with self.on_device("text_encoder", "vae"):
            seen = [self._resized(source, self.options.encoder_area) for source in prompt.sources]
            embeds, _ = self.pipe.encode_prompt(text, image=seen, device=self.device)
            return {"text": embeds[0], "sources": torch.cat([self._tokens(source) for source in prompt.sources])}

    def check_sources(self, prompt: Prompt) -> None:
        """There is nothing but edits.

        Raises:
            VelaturaError: the prompt has no source image.
        """
        if not prompt.sources:
            raise VelaturaError(
                f"{called(prompt)} has no source image, and '{self.name}' only edits. Give it one in `sources`, or "
                "take a model that draws from text, such as 'qwen-image'."
            )

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, rows: Tensor) -> Tensor:
        """dx/dt [N h*w 4C] at x [N h*w 4C], t [N]."""
        told = cast("RowsConditioning", cond)
        size, *sources = cast("tuple[Size, ...]", told.layout)
        sizes = (size, *(_resized_size(source, self.options.source_area) for source in sources))
        return token_velocity(net, x, t, told, rows, tuple(grid(each, self.multiple) for each in sizes))

    def _resized(self, image: Tensor, area: int) -> Image.Image:
        height, width = _resized_size(shape_of(image), area)
        return cast("Image.Image", self.pipe.image_processor.resize(to_pil(image), height, width))

    def _tokens(self, source: Tensor) -> Tensor:
        """[h*w 4C]."""
        signed = self.pipe.image_processor.preprocess(self._resized(source, self.options.source_area))
        return encode(self.pipe.vae, signed)[0]


def _resized_size(size: Size, area: int) -> Size:
    """Height and width of a source image of `size` that is resized to `area`."""
    width, height = sides(area, size[1] / size[0])
    return height, width
