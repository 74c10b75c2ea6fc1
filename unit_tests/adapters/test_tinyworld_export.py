"""What is exported draws, without Velatura, what Velatura drew."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from velatura.api import Prompt, VelaturaError
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter, TinyWorldAdapterOptions

CPU = torch.device("cpu")
STEPS, SCALE, SEED = 6, 2.5, 3


def trained(rank: int | None, patch: Literal[6, 4] = 6) -> tuple[TinyWorldAdapter, nn.Module]:
    """A network with weights that are all different from their start, LoRA included."""
    options = TinyWorldAdapterOptions(weights=None, patch=patch, width=32, heads=2, layers=2, shift=3.0, lora_rank=rank)
    model, draw = TinyWorldAdapter(options), torch.Generator().manual_seed(0)
    net = model.load(CPU)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
    return model, net


@torch.no_grad()
def rollout(model: TinyWorldAdapter, net: nn.Module, prompt: Prompt) -> Tensor:
    """The guided picture [3 24 24] of `SEED`."""
    cond, null = (model.prepare(net, part) for part in (model.encode([prompt]), model.null([prompt])))
    x, times, row = model.noise([prompt], [SEED]), model.times(STEPS), torch.zeros(1, dtype=torch.int64)
    for t, t_next in pairwise(times):
        branches = [model.velocity(net, x, t.expand(1), part, row) for part in (cond, null)]
        x = x + (t_next - t) * model.guide(*branches, torch.full((1,), SCALE))
    return model.decode(x)[0]


def pixels(image: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def test_the_exported_script_draws_and_edits_what_the_rollout_did_without_velatura(tmp_path: Path) -> None:
    made = {"coarse": trained(rank=2), "fine": trained(rank=None, patch=4)}
    source = (torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(1)) * 255).round() / 255
    Image.fromarray(pixels(source)).save(tmp_path / "in.png")
    drawing = Prompt(id="d", text="a red circle on white", task="t2i")
    edit = Prompt(id="e", text="make the circle blue", task="edit", sources=(source,))
    runs = []
    for name, (model, net) in made.items():
        model.export(net, tmp_path / name, info={"guidance_scale": SCALE, "steps": STEPS})
        runs += [
            [f"{name}/sample.py", drawing.text, f"{name}-d.png", "--seed", str(SEED)],
            [f"{name}/sample.py", edit.text, f"{name}-e.png", "--seed", str(SEED), "--source", "in.png"],
        ]
    program = (
        "import json, runpy, sys\n"  # one interpreter for all runs: importing diffusers is most of the time
        "for run in json.loads(sys.argv[1]):\n"
        "    sys.argv = run\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert 'velatura' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, json.dumps(runs)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    for name, prompt in product(made, (drawing, edit)):
        drawn = np.asarray(Image.open(tmp_path / f"{name}-{prompt.id}.png")).astype(int)
        mine = pixels(rollout(*made[name], prompt)).astype(int)
        assert np.abs(drawn - mine).max() <= 1  # fp32 rounding may fall on the other side of half a level
        assert mine.std() > 20


def drawn(folder: Path, *arguments: str) -> tuple[str, str]:
    """What the exported script says, and how many rows its forwards had."""
    program = (
        "import runpy, sys\n"
        "from diffusers import QwenImage21Transformer2DModel as Net\n"
        "plain, rows = Net.forward, []\n"
        "def forward(net, x, *rest, **named):\n"
        "    rows.append(len(x))\n"
        "    return plain(net, x, *rest, **named)\n"
        "Net.forward = forward\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print(rows)\n"
    )
    command = [sys.executable, "-c", program, "model/sample.py", "a red circle on white", *arguments]
    done = subprocess.run(command, cwd=folder, check=True, timeout=120, capture_output=True, text=True)
    return done.stdout.strip(), done.stderr


def test_a_model_with_guidance_folded_in_draws_with_one_branch_and_warns_of_a_second_guidance(tmp_path: Path) -> None:
    model, net = trained(rank=None)
    model.export(net, tmp_path / "model", info={"guidance_scale": 1.0, "guidance_folded": True, "steps": 3})
    rows, said = drawn(tmp_path, "one.png")
    assert rows == "[1, 1, 1]"
    assert "warning" not in said
    rows, said = drawn(tmp_path, "two.png", "--guidance", "2")
    assert rows == "[2, 2, 2]"
    assert "warning: guidance is folded into this model; guiding it again at 2 compounds both" in said
    one, two = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("one", "two"))
    assert np.abs(one - two).max() > 1


def test_an_exported_folder_can_be_loaded_and_trained_on(tmp_path: Path) -> None:
    model, net = trained(rank=2)
    model.export(net, tmp_path / "model", info={})
    options = model.options.model_copy(update={"weights": str(tmp_path / "model"), "lora_rank": None})
    again = TinyWorldAdapter(options)
    prompt = Prompt(id="d", text="a red circle on white", task="t2i")
    image = rollout(again, again.load(CPU), prompt)
    assert (image - rollout(model, net, prompt)).abs().max() < 1e-4  # LoRA folded in: one more rounding per weight


def test_the_folder_says_how_to_sample(tmp_path: Path) -> None:
    model, net = trained(rank=None)
    model.export(net, tmp_path / "model", info={"guidance_scale": SCALE, "folded": False, "lineage": ["base", "nft"]})
    facts = json.loads((tmp_path / "model" / "velatura.json").read_text())
    assert facts["guidance_scale"] == SCALE
    assert facts["lineage"] == ["base", "nft"]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "model" / "scheduler")
    assert scheduler.config.shift == 3.0
    classes = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert classes["transformer"] == ["diffusers", "QwenImage21Transformer2DModel"]


def test_without_a_scale_the_script_uses_the_network_alone(tmp_path: Path) -> None:
    model, net = trained(rank=None)
    model.export(net, tmp_path / "model", info={"guidance_scale": None})
    assert json.loads((tmp_path / "model" / "velatura.json").read_text())["guidance_scale"] == 1.0


def test_exporting_again_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    model, net = trained(rank=None)
    for scale in (1.0, 2.0):
        model.export(net, tmp_path / "model", info={"guidance_scale": scale})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert json.loads((tmp_path / "model" / "velatura.json").read_text())["guidance_scale"] == 2.0


def test_an_export_that_fails_leaves_the_former_one(tmp_path: Path) -> None:
    model, net = trained(rank=None)
    model.export(net, tmp_path / "model", info={"guidance_scale": 1.0})
    with pytest.raises(TypeError):
        model.export(net, tmp_path / "model", info={("not", "json"): 1})  # type: ignore[dict-item]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "transformer" / "config.json").is_file()


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    model, net = trained(rank=None)
    with pytest.raises(VelaturaError, match=r"no velatura\.json.*another folder"):
        model.export(net, tmp_path, info={})
    assert (tmp_path / "thesis.txt").exists()
