"""Pictures leave and enter the autoencoder one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from velatura.api import ModelAdapter, Prompt, VelaturaError

PROMPT = Prompt(id="p", text="a red fox", task="t2i")


@pytest.mark.parametrize("family", ["qwen_image_21", "qwen_image", "sd3", "flux", "flux2", "z_image", "sana"])
def test_a_batch_is_decoded_one_by_one(family: str, opened: Callable[..., ModelAdapter[Any]]) -> None:
    adapter: Any = opened(family)
    sizes = []
    decoder = adapter.pipe.vae.decoder
    decoder.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    x = adapter.noise([PROMPT] * 3, [0, 1, 2])
    pictures = adapter.decode(x, PROMPT)
    assert set(sizes) == {1}
    assert pictures.shape == (3, 3, *adapter.size(PROMPT))
    alone = torch.cat([adapter.decode(x[i : i + 1], PROMPT) for i in range(3)])
    torch.testing.assert_close(pictures, alone, rtol=0, atol=1e-5)


def test_a_picture_beyond_the_positions_of_sd3_is_refused(opened: Callable[..., ModelAdapter[Any]]) -> None:
    adapter: Any = opened("sd3")
    limit = adapter.folder.config("transformer")["pos_embed_max_size"] * adapter.multiple
    large = Prompt(id="p", text="a red fox", task="t2i", size=(limit + adapter.multiple, limit))
    with pytest.raises(VelaturaError, match=rf"positions end at {limit} pixels a side"):
        adapter.size(large)
    assert adapter.size(Prompt(id="p", text="a red fox", task="t2i", size=(limit, limit))) == (limit, limit)
