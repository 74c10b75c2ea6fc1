"""A process that cannot import Velatura draws, from what was exported, the picture that Velatura draws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from velatura.api import Prompt
from velatura.core.rollout import Sampler, rollout
from velatura.plugins.adapters.pictures import to_pil
from velatura.plugins.guidance.policies import RolloutOnly, ScaleOptions
from velatura.schedulers.kernels import Ode

STEPS, SCALE, SEED = 3, 2.0, 5
TEXT = "a red fox"
COMMON = {"prompt": TEXT, "num_inference_steps": STEPS}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen-image-21": ("qwen_image_21", {"true_cfg_scale": SCALE, "negative_prompt": "", "height": 64, "width": 96}),
    "qwen-image-21, edit": ("qwen_image_21", {"true_cfg_scale": SCALE, "negative_prompt": "", "output_resolution": 64}),
    "sd3": ("sd3", {"guidance_scale": SCALE, "height": 32, "width": 48}),
    "flux": ("flux", {"true_cfg_scale": SCALE, "negative_prompt": "", "guidance_scale": 2.5, "height": 64, "width": 96,
                      "max_sequence_length": 64}),
}  # fmt: skip
"""Case -> its family, and what the stock pipeline is asked for."""
OPTIONS = {"qwen-image-21, edit": {"height": 64, "width": 64}}
"""What the adapter is asked for beside the options of the family, where that differs."""

STOCK = '''
import importlib.abc, json, sys

class NotHere(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "velatura":
            raise ImportError("velatura is not installed here")

sys.meta_path.insert(0, NotHere())
try:
    import velatura
except ImportError:
    pass
else:
    sys.exit("velatura can be imported")

import diffusers, torch, transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.processing_utils import ProcessorMixin

class WithoutVideos(transformers.Qwen3VLProcessor):
    """The stock class wants torchvision, for videos."""
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **ignored):
        for part, token in (("image", "<|image_pad|>"), ("video", "<|video_pad|>"),
                            ("vision_start", "<|vision_start|>"), ("vision_end", "<|vision_end|>")):
            setattr(self, part + "_token", token)
            setattr(self, part + "_token_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

def opened(folder):
    kind = json.load(open(folder + "/model_index.json"))["_class_name"]
    own = {"processor": WithoutVideos.from_pretrained(folder + "/processor")} if kind == "QwenImage21Pipeline" else {}
    pipe = getattr(diffusers, kind).from_pretrained(folder, **own)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def drawn(pipe, job):
    asked = dict(job["asked"])
    if job["source"]:
        asked["image"] = [Image.open(job["source"])]
    noise = load_file(job["noise"])["noise"]
    with torch.no_grad():
        return pipe(**asked, latents=noise, output_type="pt").images[0].contiguous()

for job in json.load(open(sys.argv[1])):
    base = opened(job["base"])
    pictures = {"base": drawn(base, job), "merged": drawn(opened(job["export"]), job)}
    base.load_lora_weights(job["export"] + "/lora")
    pictures["lora"] = drawn(base, job)
    save_file(pictures, job["out"])
assert not any(name.startswith("velatura") for name in sys.modules)
'''


def trained(adapter: Any) -> nn.Module:
    """The network with LoRA weights that do something."""
    net: nn.Module = adapter.load(torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.8 * torch.randn(p.shape, generator=draw))
    return net


def prepared(case: str, opened: Callable[..., Any], base: Path, place: Path) -> tuple[dict[str, Any], Tensor]:
    """What a stock process is asked to draw, and Velatura's own picture [3 H W]."""
    family, asked = CASES[case]
    adapter = opened(family, lora_rank=2, lora_alpha=4, **OPTIONS.get(case, {}))
    net, edits = trained(adapter), case.endswith("edit")
    source = (torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)) * 255).round() / 255
    prompt = Prompt(id="p", text=TEXT, task="edit" if edits else "t2i", sources=(source,) if edits else ())
    place.mkdir()
    to_pil(source).save(place / "source.png")
    save_file({"noise": adapter.noise([prompt], [SEED]).contiguous()}, place / "noise.safetensors")
    adapter.export(net, place / "export", info={"guidance_scale": SCALE})
    guidance = RolloutOnly(ScaleOptions(scale=SCALE))
    sampler = Sampler(adapter=adapter, guidance=guidance, kernel=Ode(), steps=STEPS, batch=2)
    ((sample,),) = [chunk.samples for chunk in rollout(net, sampler, [prompt], [[SEED]])]
    job = {"base": base, "export": place / "export", "noise": place / "noise.safetensors", "out": place / "drawn"}
    job["source"] = place / "source.png" if edits else ""
    return {**{name: str(path) for name, path in job.items()}, "asked": {**COMMON, **asked}}, sample.image


@pytest.fixture
def pictures(tiny: Callable[[str], Path], opened: Callable[..., Any], tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    """Case -> the pictures of one stock process, from the same noise, and `ours`."""
    jobs, ours = {}, {}
    for number, case in enumerate(CASES):
        jobs[case], ours[case] = prepared(case, opened, tiny(CASES[case][0]), tmp_path / str(number))
    (tmp_path / "jobs.json").write_text(json.dumps(list(jobs.values())))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-W", "ignore", "-c", STOCK, str(tmp_path / "jobs.json")]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return {case: {name: on_white(picture) for name, picture in load_file(job["out"]).items()} | {"ours": ours[case]}
            for case, job in jobs.items()}  # fmt: skip


def on_white(picture: Tensor) -> Tensor:
    """`3 H W`: what a picture with a fourth channel leaves transparent lies on white, as it does in Velatura."""
    return picture if len(picture) == 3 else picture[:3] * picture[3:] + 1 - picture[3:]


def levels(first: Tensor, second: Tensor) -> int:
    """The largest difference of two pictures as files have them, 0 to 255."""
    return int(((first * 255).round() - (second * 255).round()).abs().max())


def test_merged_weights_and_lora_weights_draw_without_velatura_the_picture_that_velatura_draws(
    pictures: dict[str, dict[str, Tensor]],
) -> None:
    for case, drawn in pictures.items():
        ours = drawn["ours"]
        print(case, {name: float((picture - ours).abs().max()) for name, picture in drawn.items()}, float(ours.std()))
        assert drawn["merged"].shape == drawn["lora"].shape == ours.shape
        assert levels(drawn["base"], ours) > 5, case
        torch.testing.assert_close(drawn["lora"], ours, rtol=0, atol=1e-5, msg=case)
        torch.testing.assert_close(drawn["merged"], ours, rtol=0, atol=1e-4, msg=case)  # sums in another order
        assert max(levels(drawn[name], ours) for name in ("lora", "merged")) <= 1, case
