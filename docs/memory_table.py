"""Prints the table of docs/models.md: what a GPU needs to train each family. python docs/memory_table.py [NAME]"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml

from velatura.api import Prompt
from velatura.core.build import open_registry
from velatura.core.check import ready
from velatura.core.placement import Placement
from velatura.core.recipe import load_recipe

KL: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
SD35: dict[str, Any] = {
    "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
Part = tuple[str, dict[str, Any]]
"""Class, and what its published configuration has in place of the class's defaults."""
FAMILIES: dict[str, tuple[str, str, Part, Part]] = {
    "qwen-image-21": ("Qwen-Image 2.1", "QwenImage21Pipeline", ("QwenImage21Transformer2DModel", {}),
                      ("AutoencoderKLQwenImage21", {})),
    "qwen-image": ("Qwen-Image", "QwenImagePipeline", ("QwenImageTransformer2DModel", {}),
                   ("AutoencoderKLQwenImage", {})),
    "qwen-image-edit-plus": ("Qwen-Image-Edit-Plus, one source", "QwenImageEditPlusPipeline",
                             ("QwenImageTransformer2DModel", {"zero_cond_t": True}), ("AutoencoderKLQwenImage", {})),
    "sd3": ("SD 3.5 medium", "StableDiffusion3Pipeline", ("SD3Transformer2DModel", SD35), ("AutoencoderKL", KL)),
    "flux": ("FLUX.1 dev", "FluxPipeline", ("FluxTransformer2DModel", {"guidance_embeds": True}),
             ("AutoencoderKL", KL)),
    "flux2": ("FLUX.2 dev", "Flux2Pipeline", ("Flux2Transformer2DModel", {}), ("AutoencoderKLFlux2", {})),
    "z-image": ("Z-Image", "ZImagePipeline", ("ZImageTransformer2DModel", {}), ("AutoencoderKL", KL)),
    "sana": ("Sana 1.6B", "SanaPipeline", ("SanaTransformer2DModel", {}), ("AutoencoderDC", {})),
}  # fmt: skip
"""Adapter -> what it is called, and its pipeline's parts."""
DISTILLED = ("flux", "flux2")
"""Guidance is a number that the network is told."""
EDITS = ("qwen-image-edit-plus",)
"""They draw nothing without a source image."""
GPUS = 8
PROMPT = Prompt(id="p", text="a red fox in the snow beside a wooden sign that says hello", task="t2i")
EDIT = replace(PROMPT, task="edit", sources=(torch.zeros(3, 1024, 1024),))
HEAD = (
    "| model | parameters | LoRA 32: ZeRO 1 | 2 | 3 | all weights: ZeRO 1 | 2 | 3 |\n|---|---|---|---|---|---|---|---|"
)


def folder(place: Path, adapter: str) -> Path:
    """A model folder without weights."""
    _, pipeline, transformer, vae = FAMILIES[adapter]
    shift = ("diffusers", "FlowMatchEulerDiscreteScheduler")
    index = {"_class_name": pipeline, "transformer": ["diffusers", transformer[0]], "vae": ["diffusers", vae[0]],
             "scheduler": shift}  # fmt: skip
    for part, (name, changes) in (("transformer", transformer), ("vae", vae)):
        _write(place / part / "config.json", {**_defaults(getattr(diffusers, name)), **changes})
    _write(place / "scheduler" / "scheduler_config.json", {"use_dynamic_shifting": adapter not in ("sd3", "sana")})
    _write(place / "model_index.json", index)
    return place


def _defaults(found: Any) -> dict[str, Any]:
    import inspect

    parameters = inspect.signature(found.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def recipe(place: Path, adapter: str, lora: int | None) -> Path:
    """One stage of reinforcement learning."""
    options = {"path": str(place / "model"), "lora_rank": lora, "gradient_checkpointing": True}
    stage = {
        "stage": "rl", "group_size": 4, "prompts_per_step": 8, "micro_batch": 1,
        "task": {"use": "prompts", "with": {"file": "prompts.jsonl"}},
        "adapter": {"use": adapter, "with": options}, "sampling": {"batch": 4},
        "timesteps": {"use": "high-noise", "with": {"count": 1}}, "rewards": ["tinyworld-sharpness"],
        "guidance": "none" if adapter in DISTILLED else "rollout-only",
    }  # fmt: skip
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump({"engine": {"precision": "bf16", "device": "cuda"}, "stages": {"teacher": stage}}))
    return path


def row(adapter: str) -> str:
    """One line of the table."""
    cells, parameters, prompt = [], 0.0, EDIT if adapter in EDITS else PROMPT
    for lora in (32, None):
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            folder(place / "model", adapter)
            read = load_recipe(recipe(place, adapter, lora))
            registry = open_registry(read)
            stage: Any = read.stage("teacher")
            made: Any = ready(read, registry, "adapter", stage.adapter)
            placement = Placement(read, registry, GPUS)
            for zero in (1, 2, 3):
                placement.sharding = replace(placement.sharding, kind="deepspeed", zero_stage=zero)
                plan = placement.plan("teacher", made, lambda ref, split: [prompt])
                if plan is None:
                    raise SystemExit(f"The footprint of {adapter} is not known.")
                cells.append(f"{plan.peak / 1e9:.0f} ({plan.phase})")
                if "--parts" in sys.argv:
                    print(adapter, lora, zero, [(p.name, round((p.size or 0) / 1e9, 2), p.phases) for p in plan.parts])
            parameters = made.describe()["parameters"] / 1e9
    return f"| {FAMILIES[adapter][0]} | {parameters:.1f} B | {' | '.join(cells)} |"


def main() -> None:
    """Print the rows that are asked for, or all."""
    print(HEAD)
    for adapter in [name for name in sys.argv[1:] if name in FAMILIES] or FAMILIES:
        print(row(adapter), flush=True)


if __name__ == "__main__":
    main()
