"""A training stage whose reward weights follow its policy: from groups to new weights, their ledger and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loguru import logger

from velatura.core.components import AdvantageEstimator
from velatura.core.errors import CheckpointError
from velatura.core.judge import Judge
from velatura.core.recalibration import Recalibrator, Version
from velatura.core.stages.calibrate import described
from velatura.core.stages.common import StageRun
from velatura.core.stages.training import Training
from velatura.core.types import RewardReport
from velatura.core.weighing import Rules
from velatura.core.weight_ledger import Origin, ledger_rows, read_calibration, read_ledger, write_ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class Reweighing:
    """What follows new weights."""

    stage: StageRun
    judge: Judge
    advantage: AdvantageEstimator[Any]
    recalibrator: Recalibrator

    def after(self, step: int, report: RewardReport) -> dict[str, float]:
        """Look at the groups of a step; new weights count from the next one on. The same on every rank."""
        self.recalibrator.observe(step, report)
        versions = self.recalibrator.decide(step)
        if versions:
            self.apply()
            self._write(step, versions)
        return {"weights/version": float(self.recalibrator.version)}

    def apply(self) -> None:
        """Judge and advantage go by the weights as they are now."""
        self.judge.reweigh(self.recalibrator.weights)
        self.advantage.calibrate(self.recalibrator.calibration)

    def _write(self, step: int, versions: Sequence[Version]) -> None:
        names, count = self.recalibrator.calibration.names, self.recalibrator.rules.rewards
        roles = ["reward"] * count + ["guard"] * (len(names) - count)
        for version in versions:
            logger.info("{}: weights {}: {}", self.stage.name, version.number, described(names, version.weighed))
        if self.stage.ranks.first:
            rows = read_ledger(self.stage.folder)
            for version in versions:
                origin = Origin(model=self.stage.name, step=step + 1, version=version.number)
                rows += ledger_rows(names, roles, version.found, version.weighed, origin)
            write_ledger(self.stage.folder, rows)


def follow_policy(
    stage: StageRun, training: Training, judge: Judge, advantage: AdvantageEstimator[Any]
) -> Reweighing | None:
    """Where the stage recalibrates; what is remembered is part of checkpoints, and a resumed stage goes on with the
    weights of its last one.

    Raises:
        CheckpointError: the calibration is from before budgets were kept with it.
    """
    config = stage.config
    if config.recalibrate is None:
        return None
    calibration = read_calibration(stage.run_folder, config.weights_from)
    source: Any = stage.recipe.stage(config.weights_from)
    if not all(calibration.budgets.get(category) for category in calibration.weights):
        raise CheckpointError(
            f"{stage.at('recalibrate')}: the calibration of '{config.weights_from}' is from an earlier version and "
            f"lacks its budgets. Do it again: velatura run RECIPE --stage {config.weights_from} --fresh"
        )
    rules = Rules(
        rewards=len(source.rewards), prior=source.prior_groups, kappa=source.kappa,
        bootstrap=config.recalibrate.bootstrap, seed=stage.seed,
    )  # fmt: skip
    recalibrator = Recalibrator(
        settings=config.recalibrate, rules=rules, calibration=calibration,
        every=math.ceil(config.recalibrate.every / config.updates_per_step),
    )  # fmt: skip
    training.carry("recalibration", recalibrator)
    made = Reweighing(stage=stage, judge=judge, advantage=advantage, recalibrator=recalibrator)
    made.apply()
    if stage.ranks.first:
        _begin_ledger(stage, training.start)
    return made


def _begin_ledger(stage: StageRun, start: int) -> None:
    """The first version, and those up to the step that is resumed from."""
    before = [{**row, "version": 0} for row in read_ledger(stage.run_folder / stage.config.weights_from)]
    own = [row for row in read_ledger(stage.folder) if row["version"] > 0 and row["policy_step"] <= start]
    write_ledger(stage.folder, [*before, *own])
