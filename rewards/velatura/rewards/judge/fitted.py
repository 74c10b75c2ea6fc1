"""A fine-tuned judge is a folder: weights, processor, its rubric, and `judge.json`, which says what goes together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from velatura.api import Context, VelaturaError
from velatura.core.fingerprint import files_hash
from velatura.rewards.judge.options import VlmJudgeOptions
from velatura.rewards.judge.rubric import load_rubric

JUDGE_FILE = "judge.json"
RUBRIC_FILE = "rubric.yaml"
FORMAT = 1
"""Of `judge.json`."""
BROUGHT = ("reasoning_tokens", "max_pixels", "min_mass")
"""Options of `vlm-judge` that a fitted judge brings along."""


def settled(options: VlmJudgeOptions, context: Context) -> VlmJudgeOptions:
    """The options with what the judge behind `path` brings along; as they are where there is no `path`.

    `path` stays, so that what made the rubric and the model can be told; settled twice they are the same.

    Raises:
        VelaturaError: there is no judge, or its parts do not belong together.
    """
    if options.path is None:
        return options
    folder = context.resolve(options.path)
    facts = judge_facts(folder)
    own = {name: facts[name] for name in ("reasoning_tokens", "max_pixels")}
    odd = [name for name in own if name in options.model_fields_set and getattr(options, name) != own[name]]
    if odd:
        raise VelaturaError(
            f"{odd[0]} is {getattr(options, odd[0])}, and the judge in {folder} was fitted with {own[odd[0]]}. Its "
            f"scores would mean something else: leave the option out."
        )
    brought = {"rubric": str(folder / RUBRIC_FILE), "model": str(folder), **own}
    if "min_mass" not in options.model_fields_set:
        brought["min_mass"] = facts["min_mass"]
    return options.model_copy(update=brought)


def judge_facts(folder: Path) -> dict[str, Any]:
    """What `judge.json` says, after comparing rubric and weights with it.

    Raises:
        VelaturaError: there is none, it is broken, or rubric or weights are others than those it was fitted with.
    """
    path = folder / JUDGE_FILE
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        wanted = {name: facts[name] for name in ("format", "rubric", "weights", *BROUGHT)}
    except FileNotFoundError as error:
        raise VelaturaError(
            f"there is no fine-tuned judge in {folder}: {JUDGE_FILE} is missing. Name the folder `judge` of a finished "
            f"judge-fit stage."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise VelaturaError(f"{path} is not what a judge-fit stage wrote ({error!r}). Run the stage again.") from error
    if wanted["format"] != FORMAT:
        raise VelaturaError(f"{path} has format {wanted['format']}; this Velatura reads format {FORMAT}.")
    found = {"rubric": load_rubric(folder / RUBRIC_FILE).digest, "weights": weights_digest(folder)}
    for name, digest in found.items():
        if digest != wanted[name]:
            raise VelaturaError(
                f"the {name} in {folder} changed since the judge was fitted ({digest} instead of {wanted[name]}). Put "
                f"back what was there, or fit a judge again."
            )
    return facts


def weights_digest(folder: Path) -> str:
    """Of all safetensors files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode() + bytes.fromhex(files_hash(path)))
    return digest.hexdigest()[:16]
