"""Each of two processes makes an engine and its roles as a stage does, counts what is there, and asks the plan of
`check`.

plan_worker.py RECIPE FOLDER STAGE ...: each process writes FOLDER/RANK.json, ZeRO stage -> part -> [bytes that
the plan says, bytes found].
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from velatura.core.build import build
from velatura.core.check import set_up
from velatura.core.encoding import Encoder
from velatura.core.engine import EngineConfig, OptimizerConfig, make_engine
from velatura.core.learner import SET_OF, Learner, sets_for
from velatura.core.pipeline import plan_run
from velatura.core.placement import Placement
from velatura.core.points import MicroBatch
from velatura.core.policy import Policy
from velatura.core.ranks import join, leave
from velatura.core.types import Points, Prompt, Role


def counted(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def micro_batch(stage: Any, adapter: Any, prompts: list[Prompt], points: int) -> MicroBatch:
    """The largest that the stage makes: one with all its prompts' samples."""
    count = stage.prompts_per_step * stage.group_size * points
    shape = tuple(adapter.noise([prompts[0]], [0]).shape[1:])
    x, x0, target = (torch.randn(count, *shape) for _ in range(3))
    even = torch.ones(count) / count
    state = Points(x=x, t=torch.full((count,), 0.5), advantage=even, weight=even, x0=x0, target=target)
    return MicroBatch(prompts=tuple(prompts), rows=torch.arange(count) * len(prompts) // count, points=state)


def compared(recipe: Path, zero: int) -> dict[str, tuple[int, int]]:
    """Part -> bytes planned and found in this process."""
    run = plan_run(recipe, [f"engine.zero_stage={zero}"])
    stage: Any = run.recipe.stage("teacher")
    adapter, task = set_up(run, "adapter", stage.adapter), set_up(run, "task", stage.task)
    prompts = list(task.prompts("train"))[: stage.prompts_per_step]
    plan = Placement(run.recipe, run.registry, 2).plan("teacher", adapter, lambda ref, split: prompts)
    assert plan is not None
    objective: Any = build(run.registry, "objective", stage.objective)
    guidance: Any = build(run.registry, "guidance", stage.guidance)
    net = adapter.load(torch.device("cpu"))
    policy = Policy(net)
    config = EngineConfig(kind="deepspeed", zero_stage=zero, device="cpu", threads=1)  # type: ignore[arg-type]
    engine = make_engine(net, config, OptimizerConfig(lr=1e-3))
    for name in sorted(sets_for(objective)):
        policy.remember(name, follows=name == SET_OF[Role.OLD])
    learner = Learner(
        engine=engine, policy=policy, adapter=adapter, guidance=guidance, objective=objective,
        encoder=Encoder(adapter, engine.device),
    )  # fmt: skip
    batch = micro_batch(stage, adapter, prompts, 2)
    learner.learn([batch, batch])
    owner = engine._engine.optimizer  # type: ignore[attr-defined]
    found = {
        "transformer weights": counted([*net.parameters(), *net.buffers()]),
        "masters in fp32": counted(owner.single_partition_of_fp32_groups),
        "moments of adamw": counted(t for state in owner.optimizer.state.values() for t in state.values()),
        **{f"weights of role {name}": counted(own.values()) for name, own in policy.sets.items()},
    }
    return {name: (plan.part(name).size or 0, size) for name, size in found.items()}


def main() -> None:
    """This process's part."""
    recipe, folder, stages = Path(sys.argv[1]), Path(sys.argv[2]), [int(stage) for stage in sys.argv[3:]]
    torch.set_num_threads(1)
    ranks = join("cpu", 120.0)
    (folder / f"{ranks.rank}.json").write_text(json.dumps({zero: compared(recipe, zero) for zero in stages}))
    leave()


if __name__ == "__main__":
    main()
