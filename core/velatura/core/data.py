"""Which prompts a step sees: a function of (seed, epoch, position), held by torchdata's stateful loader."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from velatura.core.errors import RecipeError
from velatura.core.seeds import generator
from velatura.core.types import Prompt


class _Prompts(Dataset[Prompt]):
    """Prompts by index."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def __len__(self) -> int:
        return len(self.prompts)


class EpochSampler(Sampler[int]):
    """Endless indices: epoch e is a permutation drawn from (seed, e), less the remainder that fills no batch.

    No batch straddles two epochs, so no prompt comes twice in a step.
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self.position = 0
        """Indices given out so far."""

    def __iter__(self) -> Iterator[int]:
        per_epoch = self.count // self.batch * self.batch
        while True:
            epoch, offset = divmod(self.position, per_epoch)
            order = torch.randperm(self.count, generator=generator(self.seed, "epoch", epoch))
            for index in order[offset:per_epoch].tolist():
                self.position += 1
                yield index

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.position = int(state["position"])


class PromptStream:
    """Batches of prompts for ever; step s sees the same prompts whatever happened before."""

    def __init__(self, prompts: Sequence[Prompt], batch: int, *, seed: int, at: str, start: int = 0) -> None:
        if len(prompts) < batch:
            raise RecipeError(
                f"{at}: {batch} prompts a step were asked for, but there are only {len(prompts)}. Lower "
                f"`prompts_per_step`, raise the task's prompt count, or let the prompt filter keep more."
            )
        sampler = EpochSampler(len(prompts), batch, seed)
        sampler.position = start * batch
        with warnings.catch_warnings():  # torchdata calls torch.set_vital, which torch 2.13 deprecates
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            self.loader = StatefulDataLoader(
                _Prompts(prompts), batch_size=batch, sampler=sampler, collate_fn=list, num_workers=0, drop_last=True
            )
        self._batches = iter(self.loader)

    def __next__(self) -> list[Prompt]:
        batch: list[Prompt] = next(self._batches)
        return batch
