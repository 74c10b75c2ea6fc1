"""One of two ranks: takes updates on this rank and leaves, beside what was estimated, the bytes that were counted.

Usage: memory_worker.py FOLDER. Rank r writes FOLDER/rank-r.json: case -> quantity -> [estimate, counted].
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from velatura.api import Context
from velatura.core.footprint import Batch
from velatura.core.memory import MemoryPlan, Part, Sharding, engine_parts, set_parts
from velatura.plugins.adapters.qwen_image_21 import QwenImage21, QwenImage21Options
from velatura.plugins.guidance.policies import NoGuidance
from velatura.plugins.objectives.nft import NFT

CASES = [(1, "fp32", None), (2, "fp32", None), (1, "bf16", 4), (2, "bf16", None)]
"""ZeRO stage, precision, LoRA rank."""


def module(path: Path) -> ModuleType:
    """What one process is measured with."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made
    spec.loader.exec_module(made)
    return made


def measured(one: ModuleType, adapter: Any, zero: int, precision: str) -> dict[str, tuple[int, int]]:
    """Estimates for two processes, and what this one of them counted."""
    rehearsal = one.rehearsal_of(adapter, precision)
    run = one.real(adapter, precision, kind="deepspeed", zero_stage=zero, threads=1)
    world, engine = run.learner.engine.world_size, run.learner.engine
    sharding = Sharding(kind="deepspeed", zero_stage=zero, world_size=world, precision=precision)
    trained = sum(rehearsal.trained.values())
    forwards = rehearsal.update(Batch(points=one.N, prompts=one.P, limit=2 * one.N), NoGuidance(), NFT())
    plan = MemoryPlan.of([
        *engine_parts(rehearsal.net, rehearsal.weights, sharding, "adamw"),
        Part(name="forwards", size=forwards, phases=("update",)),
    ])  # fmt: skip
    roles = set_parts(trained, rehearsal.loaded, {"old": True, "reference": False}, [], whole=False)
    sets = sum(part.size or 0 for part in roles if part.name.startswith("weights of role"))
    gc.collect()
    rest = run.live.now
    with run.live:
        began = run.live.begin()
        run.learner.learn([run.micro_batch() for _ in range(2)])
        most = run.live.peak - began
    owner = engine._engine.optimizer
    whole = zero == 1 and precision == "bf16"
    masters = owner.fp32_groups_flat_partition if whole else owner.single_partition_of_fp32_groups
    moments = [t for state in owner.optimizer.state.values() for t in state.values()]
    return {
        "at rest": (plan.during("encode") + sets, rest),
        "beyond that in an update": (max(map(plan.during, ("update", "step"))) - plan.during("encode"), most),
        "masters": (plan.part("masters in fp32").size or 0, one.counted(masters)),
        "moments": (plan.part("moments of adamw").size or 0, one.counted(moments)),
    }


def main(folder: Path) -> None:
    tests = Path(__file__).parents[1] / "unit_tests" / "loop" / "test_memory.py"
    one, results = module(tests), {}
    for zero, precision, rank in CASES:
        torch.manual_seed(0)  # the micro-batches of a test draw from it
        adapter = QwenImage21(QwenImage21Options(path=str(folder / "model"), height=128, width=128, lora_rank=rank))
        context = Context(device=torch.device("cpu"), cache=folder / "cache", seed=0, base=folder, precision=precision)  # type: ignore[arg-type]
        adapter.setup(context)
        results[f"zero {zero}, {precision}, lora {rank}"] = measured(one, adapter, zero, precision)
    number = torch.distributed.get_rank()
    (folder / f"rank-{number}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
