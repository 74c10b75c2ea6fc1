"""One report out of the reports of all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from velatura.core.ranks import Ranks
from velatura.core.types import Prompt, RewardReport, group_rows


def whole_report(
    ranks: Ranks, own: RewardReport, prompts: Sequence[Prompt], dealt: Sequence[Sequence[int]]
) -> tuple[RewardReport, Tensor]:
    """The report on all `prompts`, of which every rank judged those dealt to it, and the rows [B'] of this rank's.

    Samples stand as one process would have judged them: prompt by prompt. Collective.
    """
    if ranks.size == 1:
        return own, torch.arange(len(own.group))
    parts = ranks.gather(replace(own, prompts=()))
    found = [
        (number, row, rank)
        for rank, part in enumerate(parts)
        for number, rows in zip(dealt[rank], group_rows(part.group, len(dealt[rank])), strict=True)
        for row in rows.tolist()
    ]
    where = [(rank, row) for _, row, rank in sorted(found)]

    def texts(columns: Sequence[tuple[tuple[str, ...], ...]]) -> tuple[tuple[str, ...], ...]:
        if not all(columns):
            return ()
        return tuple(tuple(columns[rank][r][row] for rank, row in where) for r in range(len(own.names)))

    report = RewardReport(
        names=own.names,
        scores=torch.stack([parts[rank].scores[row] for rank, row in where]),
        status=torch.stack([parts[rank].status[row] for rank, row in where]),
        weight=torch.stack([parts[rank].weight[row] for rank, row in where]),
        group=torch.tensor([number for number, *_ in sorted(found)]),
        prompts=tuple(prompts),
        reasons=texts([part.reasons for part in parts]),
        notes=texts([part.notes for part in parts]),
    )
    mine = {row: at for at, (rank, row) in enumerate(where) if rank == ranks.rank}
    return report, torch.tensor([mine[row] for row in range(len(own.group))])
