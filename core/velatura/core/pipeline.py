"""Which stages of a recipe are missing, and running them in order. Finished stages whose inputs did not change stay."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from loguru import logger
from rich.console import Console

from velatura.core import __version__
from velatura.core.build import open_registry, resolve_options
from velatura.core.checkpoint import write_json_atomic, write_text_atomic
from velatura.core.environment import environment as environment
from velatura.core.errors import CheckpointError, RecipeError, Stopped, VelaturaError
from velatura.core.fingerprint import file_hash
from velatura.core.inputs import difference, file_inputs, lasting, prompt_tasks
from velatura.core.interruption import INTERRUPTION
from velatura.core.pulse import alive
from velatura.core.ranks import FailedElsewhere, Ranks, join, threads_of_process
from velatura.core.recipe import Recipe, content_hash, load_recipe
from velatura.core.registry import Registry
from velatura.core.watch import watched

RESULTS = (
    *("weights.safetensors", "kept.json", "ledger.parquet", "ratings.jsonl", "samples.parquet", "calibration.json"),
    *("judge/judge.json", "judge/rubric.yaml"),
)
"""Files whose content is a stage's result, for the stages that build on it."""
EXPORTED = "model/**/*.safetensors"
WATCHING = (
    *("observers", "checkpoint_every", "pictures_every", "keep_checkpoints", "keep_every"),
    *("max_failed", "max_skipped", "probe_every", "probe_prompts"),
)
"""Options of a stage that its result does not depend on."""
SPREAD = ("threads", "timeout", "zero_stage", "offload_optimizer", "offload_weights")
"""Options of the engine that results do not depend on, or by rounding alone: a run goes on with other ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would do."""

    recipe: Recipe
    registry: Registry
    folder: Path
    base: Path
    resolved: Mapping[str, Any]


def plan_run(recipe_path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read and resolve a recipe; nothing runs.

    Raises:
        RecipeError: anything in the recipe that is wrong.
    """
    recipe = load_recipe(recipe_path, overrides)
    registry = open_registry(recipe)
    base = recipe_path.resolve().parent
    resolved = resolve_options(registry, recipe)
    folder = run_folder(recipe, recipe_path)
    return Plan(recipe=recipe, registry=registry, folder=folder, base=base, resolved=resolved)


def run_folder(recipe: Recipe, path: Path) -> Path:
    """Where the results of a recipe go."""
    return Path(recipe.output) if recipe.output else Path("runs") / path.stem


def run_pipeline(
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    only: str | None = None,
    fresh: bool = False,
    console: Console | None = None,
    remember: bool = True,
) -> Path:
    """Run every stage that is missing; returns the run folder.

    A stage whose inputs changed is put aside under `replaced/`, never deleted, and done again. `remember`: whether
    `overrides` become those that later verbs open the run with.

    Raises:
        VelaturaError: with one message; earlier results stay as they are.
    """
    from velatura.core.check import check_combinations

    plan, since = plan_run(recipe_path, overrides), time.time()
    for warning in check_combinations(plan.recipe, plan.registry):
        logger.warning(warning)
    ranks = join(plan.recipe.engine.device, plan.recipe.engine.timeout)
    order = [name for name in plan.recipe.order() if only is None or name == only]
    if only is not None and not order:
        raise RecipeError(f"the recipe has no stage '{only}'. There is: {', '.join(plan.recipe.order())}.")

    def begin() -> None:
        if only is not None:
            _require_current(plan, only)
        _claim(plan, recipe_path, overrides, remember=remember)
        if fresh:
            _put_aside(plan.folder, [name for name in order if (plan.folder / name).exists()])

    logs = plan.folder / "logs"
    with watched(ranks, plan.recipe.engine.timeout, logs, partial(close_cut_off, plan.folder, since)):
        ranks.from_first(begin)
        if not ranks.first:
            logger.add(logs / f"process-{ranks.rank}.log", level="DEBUG")
        for number, name in enumerate(order, start=1):
            if asked := next(filter(None, ranks.gather(INTERRUPTION.signal)), None):
                raise Stopped(f"{asked}: the stages before '{name}' are finished")
            _run_stage(plan, ranks, name, console, label=f"{number}/{len(order)}")
    return plan.folder


def stage_inputs(plan: Plan, name: str) -> dict[str, str]:
    """What a stage's result depends on, hashed one by one, so that a change can be named."""
    recipe = plan.recipe
    options = {key: value for key, value in plan.resolved["stages"][name].items() if key not in WATCHING}
    inputs = {f"option {key}": content_hash(lasting(plan.registry, key, value)) for key, value in options.items()}
    inputs["seed"] = content_hash(recipe.seed)
    counted = {k: v for k, v in plan.resolved["engine"].items() if k not in SPREAD}
    inputs["engine"] = content_hash(counted | {"zero_stage": 1})  # as it was hashed when stages were told apart
    inputs["velatura"] = content_hash(__version__)
    for dependency in recipe.dependencies(name):
        inputs[f"result of {dependency}"] = result_hash(plan.folder / dependency)
    inputs["prompts"] = content_hash(prompt_tasks(plan, name))
    used = {
        plan.registry.info(kind, ref.use).distribution
        for (_, stage, slot, *_), kind, ref in recipe.references()
        if stage == name and slot not in WATCHING
    }
    for path in recipe.plugins:
        if str((plan.base / path).resolve()) in used:
            inputs[f"plugin {path}"] = file_hash(plan.base / path)
    return inputs | file_inputs(plan, name)


def result_hash(folder: Path) -> str:
    """Hash of what a finished stage leaves for others; empty while there is nothing."""
    found = [file_hash(path) for path in _results(folder)]
    return content_hash(found) if found else ""


def _results(folder: Path) -> list[Path]:
    """Those of a stage's files that are its result; of an exported model, all weights."""
    return [folder / name for name in RESULTS if (folder / name).exists()] + sorted(folder.glob(EXPORTED))


def _require_current(plan: Plan, only: str) -> None:
    """One stage alone must not build on results that its recipe would not make."""
    needed: set[str] = set()
    waiting = [only]
    while waiting:
        new = set(plan.recipe.dependencies(waiting.pop())) - needed
        needed |= new
        waiting += new
    for name in plan.recipe.order():
        path = plan.folder / name / "manifest.json"
        if name not in needed or not path.exists():
            continue
        manifest = json.loads(path.read_text())
        if manifest["status"] == "finished":
            _require_untouched(plan.folder / name, manifest)
        changed = difference(manifest["inputs"], stage_inputs(plan, name))
        if changed:
            raise RecipeError(
                f"stage '{only}' builds on '{name}', which was made with another {', '.join(changed)}. Run '{name}' "
                f"first, or leave --stage out."
            )


def _claim(plan: Plan, recipe_path: Path, overrides: Sequence[str], *, remember: bool) -> None:
    """Make the run folder this recipe's own, or say whose it is."""
    from velatura.core.cards.required import as_data
    from velatura.core.check import used_components

    folder, marker = plan.folder, plan.folder / "run.json"
    if marker.exists():
        owner = json.loads(marker.read_text())
        if owner["recipe"] != recipe_path.stem:
            raise RecipeError(
                f"{folder} belongs to recipe '{owner['recipe']}', not to '{recipe_path.stem}'. Choose another folder: "
                f"velatura run {recipe_path} output=runs/{recipe_path.stem}"
            )
        moved_together = owner.get("relative") == os.path.relpath(recipe_path, folder)
        if not moved_together and _is_another(Path(owner["path"]), recipe_path):
            raise RecipeError(
                f"{folder} belongs to another recipe of that name, {owner['path']}. Choose another folder: velatura "
                f"run {recipe_path} output=runs/another-{recipe_path.stem}"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"{folder} exists, is not empty, and is not a run of Velatura. Choose another `output`.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"cannot make the run folder {folder}: {error}. Choose another `output`.") from error
    if remember or not marker.exists():
        mark(folder, recipe_path, overrides)
    write_text_atomic(folder / "recipe.yaml", recipe_path.read_text())
    write_json_atomic(folder / "resolved.json", {
        "recipe": plan.resolved,
        "plugins": [vars_of(info) for info in used_components(plan.recipe, plan.registry)],
        "environment": environment(plan.base),
        "cards": as_data(plan.recipe, plan.registry),
    })  # fmt: skip


def mark(folder: Path, recipe_path: Path, overrides: Sequence[str]) -> None:
    """Say in a run folder whose it is."""
    write_json_atomic(folder / "run.json", {
        "recipe": recipe_path.stem, "path": str(recipe_path.resolve()),
        "relative": os.path.relpath(recipe_path, folder), "overrides": list(overrides),
    })  # fmt: skip


def _is_another(owner: Path, recipe: Path) -> bool:
    """Two recipes of one name; a file that was moved or copied is still the same recipe."""
    return owner.exists() and not owner.samefile(recipe) and owner.read_bytes() != recipe.read_bytes()


def vars_of(info: Any) -> dict[str, Any]:
    """A component's provenance as plain data."""
    return {key: getattr(info, key) for key in ("kind", "name", "plugin", "distribution", "version")}


def _put_aside(folder: Path, stages: Sequence[str]) -> None:
    for name in stages:
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S.%f")
        target = folder / "replaced" / f"{name}-{stamp}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / name, target)
        logger.info("{}: the earlier result is kept in {}", name, target)


def _begin_stage(plan: Plan, name: str, label: str) -> dict[str, Any] | None:
    """The manifest of a stage that is to be run or resumed; None where it is done."""
    from velatura.core.cards.required import check_cards

    check_cards(plan.recipe, plan.registry, name)  # once more: a judge may have been made since the run began
    folder = plan.folder / name
    inputs = stage_inputs(plan, name)
    manifest_path = folder / "manifest.json"
    if manifest_path.exists():
        manifest = json.loads(manifest_path.read_text())
        changed = difference(manifest["inputs"], inputs)
        if not changed and manifest["status"] == "finished":
            _require_untouched(folder, manifest)
            logger.info("[{}] {}: finished before and unchanged", label, name)
            return None
        if changed:
            logger.info("[{}] {}: done again, because this changed: {}", label, name, ", ".join(changed))
            _put_aside(plan.folder, [name])
    folder.mkdir(parents=True, exist_ok=True)
    config = plan.recipe.stage(name)
    manifest = {
        "stage": name,
        "kind": config.stage,
        "status": "running",
        "inputs": inputs,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": _seconds(manifest_path),
        "result": {},
    }
    write_json_atomic(manifest_path, manifest)
    logger.info("[{}] {}: {}", label, name, config.stage)
    return manifest


def _run_stage(plan: Plan, ranks: Ranks, name: str, console: Console | None, *, label: str) -> None:
    """Skip, resume or run one stage."""
    manifest = ranks.from_first(lambda: _begin_stage(plan, name, label))
    if manifest is None:
        return
    if not ranks.first:
        logger.info("[{}] {}: {}", label, name, manifest["kind"])  # into this process's log
    folder = plan.folder / name
    begin = time.perf_counter()
    try:
        result = _execute(plan, ranks, name, console)
    except BaseException as error:
        if _close_early(folder / "manifest.json", manifest, begin, error) and not isinstance(error, VelaturaError):
            raise FailedElsewhere("another process says what is wrong") from error
        if _is_full(error):
            free = shutil.disk_usage(plan.folder).free
            raise VelaturaError(
                f"stage '{name}' cannot write below {folder}: {error}. The file system has {free} bytes free. What was "
                f"saved before is intact; make room and run the same command again."
            ) from error
        raise
    if ranks.first:
        _close(folder / "manifest.json", manifest, begin, {
            "status": "finished", "result": result, "output": result_hash(folder)
        })  # fmt: skip
    ranks.barrier()


def _require_untouched(folder: Path, manifest: Mapping[str, Any]) -> None:
    """A result that others build on has to be what its stage wrote."""
    if manifest.get("output", "") != result_hash(folder):
        names = " or ".join(str(path.relative_to(folder)) for path in _results(folder)) or "what it wrote"
        raise CheckpointError(
            f"{folder}: {names} is not what the stage left; it was changed, cut off or removed since. Put it back, or "
            f"do the stage again: velatura run RECIPE --stage {folder.name} --fresh"
        )


def _is_full(error: BaseException) -> bool:
    """Whether the file system took no more, also where a library wraps that in an error of its own."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, VelaturaError):
        return False
    return getattr(error, "errno", None) in codes or any(f"(os error {code})" in str(error) for code in codes)


def _close_early(path: Path, manifest: Mapping[str, Any], begin: float, error: BaseException) -> bool:
    """Say why a stage ended, unless another process has. The first to fail knows; what the others see of it is that
    somebody is gone."""
    if json.loads(path.read_text())["status"] != "running":
        return True
    if not isinstance(error, FailedElsewhere):
        stopped = isinstance(error, Stopped) or not isinstance(error, Exception)
        status = "interrupted" if stopped else "failed"
        _close(path, manifest, begin, {"status": status, "error": str(error) or type(error).__name__})
    return False


def close_cut_off(folder: Path, since: float, cause: str) -> None:
    """Say in a run folder why the stages that were under way ended, of processes that could not say it themselves.

    `since`: time from which on they were; what was closed before stays.
    """
    for path in folder.glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        if manifest["status"] != "finished" and path.stat().st_mtime >= since:
            write_json_atomic(path, {**manifest, "status": "interrupted", "error": cause})


def _close(path: Path, manifest: Mapping[str, Any], begin: float, ending: Mapping[str, Any]) -> None:
    seconds = round(manifest["seconds"] + time.perf_counter() - begin, 2)
    write_json_atomic(path, {**manifest, "seconds": seconds, **ending})


def _seconds(path: Path) -> float:
    """Time that earlier, cut-off attempts at this stage took."""
    return float(json.loads(path.read_text())["seconds"]) if path.exists() else 0.0


def _execute(plan: Plan, ranks: Ranks, name: str, console: Console | None) -> dict[str, Any]:
    import torch

    from velatura.core.allocator import keep_freed_memory
    from velatura.core.engine.local import choose_device
    from velatura.core.stages.common import StageRun

    keep_freed_memory()

    config = plan.recipe.stage(name)
    alive(f"the start of stage '{name}'")
    module = import_module(f"velatura.core.stages.{config.stage.replace('-', '_')}")
    engine = plan.recipe.engine
    if threads := threads_of_process(engine.threads):
        torch.set_num_threads(threads)
    run = StageRun(
        name=name,
        config=config,
        recipe=plan.recipe,
        registry=plan.registry,
        folder=plan.folder / name,
        run_folder=plan.folder,
        seed=plan.recipe.seed,
        device=choose_device(engine.device),
        base=plan.base,
        console=console,
        ranks=ranks,
    )
    watching = getattr(config, "observers", []) if ranks.first else []
    run.observers += [run.build("observer", ref, f"observers.{i}") for i, ref in enumerate(watching)]
    return dict(module.run(run))
