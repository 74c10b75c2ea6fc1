"""The same few prompts and seeds, drawn again and again: what a run looks like while it runs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor

from velatura.core.checkpoint import write_json_atomic
from velatura.core.pictures import overview, save_png
from velatura.core.policy import CURRENT, Policy
from velatura.core.rollout import Sampler, rollout
from velatura.core.seeds import derive
from velatura.core.stages.common import StageRun
from velatura.core.types import Prompt

PROMPTS, SEEDS = 6, 6


class Showcase:
    """Draws a grid, one row a prompt (its source first, for edits), into `pictures/step-000040.png`."""

    def __init__(
        self, stage: StageRun, policy: Policy, sampler: Sampler, prompts: Sequence[Prompt], label: str = ""
    ) -> None:
        self.label = f"{label}-" if label else ""
        self.stage, self.policy, self.sampler = stage, policy, sampler
        stride = max(1, len(prompts) // PROMPTS)
        self.prompts = _spread([prompts[i] for i in range(0, min(len(prompts), 40 * stride), stride)])
        self.folder = stage.folder / "pictures"

    def draw(self, step: int) -> None:
        """Sample with the current weights and write the grid; captions go to `captions.json`. Collective."""
        with self.policy.gathered():
            if self.stage.ranks.first:
                self._draw(step)

    def _draw(self, step: int) -> None:
        seeds = [[derive(self.stage.seed, "showcase", p.id, j) for j in range(SEEDS)] for p in self.prompts]
        rows: list[list[Tensor]] = [list(p.sources) for p in self.prompts]
        with self.policy.wearing(CURRENT) as net:
            for chunk in rollout(net, self.sampler, self.prompts, seeds):
                for sample in chunk.samples:
                    rows[sample.group].append(sample.image)
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.label}step-{step:06d}.png"
        save_png(self.folder / name, overview(rows))
        path = self.folder / "captions.json"
        captions = json.loads(path.read_text()) if path.exists() else {}
        captions[name] = f"after {step} steps: " + " · ".join(p.text for p in self.prompts)
        write_json_atomic(path, captions)


def _spread(prompts: Sequence[Prompt]) -> list[Prompt]:
    """A few prompts from as many categories as there are."""
    chosen: list[Prompt] = []
    for prompt in prompts:
        if prompt.category not in {p.category for p in chosen}:
            chosen.append(prompt)
    ids = {p.id for p in chosen}
    rest = [p for p in prompts if p.id not in ids] if len(chosen) < PROMPTS else []
    return (chosen + rest)[:PROMPTS]
