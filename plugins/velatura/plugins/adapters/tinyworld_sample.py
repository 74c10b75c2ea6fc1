"""Draw a picture with an exported tiny world: python sample.py "a red circle on white" out.png --seed 3

An edit takes its source picture with --source in.png. Needs torch, diffusers, safetensors and pillow.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Transformer2DModel
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).parent


def embed(text: str) -> torch.Tensor:
    """[1 12 384]: the vectors of a word and of the five before it, zeros behind the text."""
    known, words = json.loads((HERE / "words.json").read_text()), text.lower().split()
    if foreign := [word for word in words if word not in known["words"]]:
        raise SystemExit(f"The tiny world does not know {foreign[0]!r}. It knows: {', '.join(known['words'])}.")
    rows = [0] * (known["context"] - 1) + [known["words"].index(word) + 1 for word in words] + [0] * known["length"]
    behind = torch.tensor(rows).unfold(0, known["context"], 1)[: known["length"]].flip(1)
    behind[len(words) :] = 0
    return load_file(HERE / "words.safetensors")["table"][behind].flatten(1)[None]


def layout(vae: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Pixels of a patch's side, and how many patches stand side by side in a picture of 24 x 24 pixels."""
    patch = math.isqrt(len(vae["mean"]) // 3)
    return patch, 24 // patch


def read(file: str, vae: dict[str, torch.Tensor]) -> torch.Tensor:
    """[1 T 48] latents of a picture of 24 x 24 pixels, a token per patch."""
    p, n = layout(vae)
    pixels = torch.tensor(list(Image.open(file).convert("RGB").tobytes())).view(n, p, n, p, 3) / 255
    return (pixels.permute(0, 2, 4, 1, 3).reshape(1, n * n, -1) - vae["mean"]) @ vae["basis"] / vae["scale"]


def write(latents: torch.Tensor, vae: dict[str, torch.Tensor], file: str) -> None:
    """The picture of [1 T 48] latents."""
    p, n = layout(vae)
    patches = ((latents[0] * vae["scale"]) @ vae["basis"].T + vae["mean"]).clamp(0, 1).view(n, n, 3, p, p)
    pixels = (patches * 255).round().byte().permute(0, 3, 1, 4, 2).flatten()
    Image.frombytes("RGB", (24, 24), bytes(pixels.tolist())).save(file)


@torch.no_grad()
def main() -> None:
    """Euler steps along the guided velocity, from the noise of the seed."""
    info = json.loads((HERE / "velatura.json").read_text())
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("prompt", "output", "--source"):
        parser.add_argument(name)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=info["steps"])
    parser.add_argument("--guidance", type=float, default=info["guidance_scale"])
    args = parser.parse_args()
    if info.get("guidance_folded") and args.guidance != 1:
        sys.stderr.write(f"warning: guidance is folded into this model; guiding it again at {args.guidance:g} "
                         "compounds both. Leave --guidance out.\n")  # fmt: skip
    net = QwenImage21Transformer2DModel.from_pretrained(HERE / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(HERE / "scheduler")
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / args.steps, args.steps, dtype=torch.float64).tolist())
    vae = load_file(HERE / "vae.safetensors")
    source = read(args.source, vae) if args.source else torch.zeros(1, 0, 48)
    side = layout(vae)[1]
    slots = source.shape[1] // 4  # the source's place, before the words
    branches = [args.prompt] if args.guidance == 1 else [args.prompt, ""]  # second row: unconditional
    text, rows = F.pad(torch.cat([embed(branch) for branch in branches]), (0, 0, slots, 0)), len(branches)
    mask = torch.tensor([[True] * slots + [False] * (text.shape[1] - slots) + [True] * (side**2 // 4)] * rows)
    images = [[(1, side, side)] * (2 if args.source else 1)] * rows
    x = torch.randn(side**2, 48, generator=torch.Generator().manual_seed(args.seed))[None]
    for t, t_next in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        tokens = torch.cat([source, x], dim=1).expand(rows, -1, -1)
        v = net(tokens, text, t.expand(rows), images, mask, return_dict=False)[0][:, -(side**2) :]
        x = x + (t_next - t) * (v[-1:] + args.guidance * (v[:1] - v[-1:]) if rows == 2 else v)
    write(x, vae, args.output)


if __name__ == "__main__":
    main()
