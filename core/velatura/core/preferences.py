"""Budgets from people: which rewards explain what they prefer, by category, and whether that holds elsewhere."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from velatura.core.calibration import Floats
from velatura.core.errors import RecipeError, suggest
from velatura.core.jsonl import parse_line
from velatura.core.statistics import paired

if TYPE_CHECKING:
    from torch import Tensor

OVERALL, OWN = (0.1, 1.0, 10.0), (0.1, 1.0, 10.0, 100.0)
"""Penalties that are tried on all categories together, and on how far each may differ from them."""
LIKE = '{"prompt": "id", "a": "0.png", "b": "1.png", "preferred": "a"}'
"""A line of a file of pairs."""
FOLDS = 5
FEWEST = 4 * FOLDS
"""Prompts with fewer cannot be split so that a held-out part says anything."""


class PairLine(BaseModel):
    """One line of a file of preferences."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(min_length=1, description="Id of the prompt among those of the stage.")
    a: str = Field(description="A picture for it; the path is seen from the file.")
    b: str = Field(description="Another.")
    preferred: Literal["a", "b", "tie"] = Field(description="Which people preferred.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """n comparisons of two pictures of one prompt by people."""

    difference: Floats
    """[n K] standardised score of a less that of b; 0 where a reward does not apply."""
    preferred: Floats
    """[n] 1 where a was preferred, 0 where b was, 1/2 for a tie."""
    shares: Floats
    """[n C] membership of the prompt."""
    prompts: tuple[str, ...]
    """[n] ids."""

    def only(self, rows: NDArray[np.bool_]) -> Pairs:
        """Some of them."""
        kept = tuple(p for p, keep in zip(self.prompts, rows.tolist(), strict=True) if keep)
        return Pairs(
            difference=self.difference[rows], preferred=self.preferred[rows], shares=self.shares[rows], prompts=kept
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Utilities that explain preferences, and how well they do on prompts they were not fitted to."""

    utilities: Floats
    """[C K], not negative."""
    accuracy: float
    """Share of held-out pairs, ties left out, that it decides as people did."""
    equal: float
    """The same with equal weights."""
    single: float
    """The same with the reward that was best on the other prompts."""
    gain: float
    """`accuracy - equal`, averaged over prompts."""
    low: float
    """Lower end of the 95 % interval of the gain over prompts."""
    high: float
    pairs: int
    prompts: int
    refused: str
    """Why budgets stay as they are written; empty where the fit is to be used."""


def read_pairs(path: Path, known: Sequence[str]) -> list[PairLine]:
    """The lines of a file of preferences; the first thing wrong is an error with its line number.

    Raises:
        RecipeError: the file is missing, a line is none, names no prompt of the stage or a picture that is not there.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"human_pairs: cannot read {path}: {error}. Paths start at the folder of the recipe."
        ) from error
    lines = list(_lines(path, text, frozenset(known)))
    if not lines:
        raise RecipeError(f"{path}: there is no pair in it; write lines like {LIKE}")
    return lines


def read_picture(path: Path) -> Tensor:
    """A picture as RGB in [0, 1], `3 H W`."""
    import torch

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except OSError as error:
        raise RecipeError(f"human_pairs: cannot read the picture {path}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _lines(path: Path, text: str, known: frozenset[str]) -> Iterator[PairLine]:
    for number, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        at = f"{path}:{number}"
        line = parse_line(at, raw, PairLine, LIKE)
        if line.prompt not in known:
            raise RecipeError(f"{at}: no prompt of this stage has the id {line.prompt!r}.{_near(line.prompt, known)}")
        for picture in (line.a, line.b):
            if not (path.parent / picture).is_file():
                raise RecipeError(f"{at}: there is no picture {picture!r} in {path.parent}")
        yield line


def _near(name: str, known: Collection[str]) -> str:
    """The nearest id, or what ids look like: a stage may have thousands."""
    hint = suggest(name, known)
    return hint if "Did you mean" in hint else f" Ids there are like {min(known)!r}."


def fit(pairs: Pairs, *, bootstrap: int, seed: int) -> Fit:
    """Non-negative Bradley-Terry with a utility for each category, drawn to what all have in common.

    P(a over b | c) = sigmoid(sum_k u_ck (x_ak - x_bk)), u_c = u_0 + d_c >= 0, u_0 >= 0;
    min NLL + lam_0 |u_0|^2 + lam_1 sum_c |d_c|^2, the penalties by cross-validation over prompts. A tie counts as half
    a preference each way. Accuracy is held out: penalties are chosen anew without each part. Refused where the 95 %
    interval of the gain over equal weights does not lie above 0.
    """
    count = len(set(pairs.prompts))
    decided = pairs.preferred != 0.5
    if count < FEWEST or not decided.any():
        nan, short = math.nan, f"{count} prompts with pairs are too few; {FEWEST} are needed"
        return Fit(utilities=np.zeros((pairs.shares.shape[1], pairs.difference.shape[1])), accuracy=nan, equal=nan,
                   single=nan, gain=nan, low=nan, high=nan, pairs=len(pairs.prompts), prompts=count,
                   refused=short if count < FEWEST else "every pair is a tie")  # fmt: skip
    right = _held_out(pairs, seed)
    known = [p for p, keep in zip(pairs.prompts, decided.tolist(), strict=True) if keep]
    found = paired(right[decided, 0], right[decided, 1], known, bootstrap=bootstrap, seed=seed)
    refused = "" if found.low > 0 else (
        f"on prompts it was not fitted to it is right {right[decided, 0].mean():.1%} of the time and equal weights "
        f"{right[decided, 1].mean():.1%}: the gain, [{found.low:+.3f}, {found.high:+.3f}], may be nothing"
    )  # fmt: skip
    mean = right[decided].mean(0)
    return Fit(
        utilities=utilities(pairs, *_penalties(pairs, seed)), accuracy=float(mean[0]), equal=float(mean[1]),
        single=float(mean[2]), gain=found.difference, low=found.low, high=found.high, pairs=len(pairs.prompts),
        prompts=count, refused=refused,
    )  # fmt: skip


def utilities(pairs: Pairs, overall: float, own: float) -> Floats:
    """[C K] of the penalised likelihood, by L-BFGS-B; gradient in closed form."""
    categories, rewards = pairs.shares.shape[1], pairs.difference.shape[1]

    def loss(flat: Floats) -> tuple[float, Floats]:
        common, each = flat[:rewards], flat[rewards:].reshape(categories, rewards)
        logit = np.einsum("nc,ck,nk->n", pairs.shares, each, pairs.difference)
        value = np.logaddexp(0, logit).sum() - pairs.preferred @ logit
        gap = each - common
        slope = 1 / (1 + np.exp(-np.clip(logit, -500, 500))) - pairs.preferred
        pull = np.einsum("n,nc,nk->ck", slope, pairs.shares, pairs.difference) + 2 * own * gap
        total = value + overall * common @ common + own * (gap**2).sum()
        return float(total), np.concatenate([2 * overall * common - 2 * own * gap.sum(0), pull.ravel()])

    from scipy import optimize

    start = np.full(rewards * (1 + categories), 0.1)
    solved = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(start))
    return np.asarray(solved.x[rewards:].reshape(categories, rewards))


def budgets_of(utility: Floats, sigma: Floats) -> Floats:
    """[K] b_k = u_k (Sigma u)_k / (u' Sigma u); a negative share, of a reward that the others outweigh, becomes 0."""
    shares = np.clip(utility * (sigma @ utility), 0, None)
    return np.asarray(shares / shares.sum())


def folds(prompts: Sequence[str], seed: int) -> NDArray[np.int64]:
    """[n] part of each pair; all pairs of a prompt are in the same."""
    names = sorted(set(prompts))
    order = np.random.default_rng(seed).permutation(len(names))
    part = {name: int(place) % FOLDS for name, place in zip(names, order, strict=True)}
    return np.array([part[name] for name in prompts])


def _penalties(pairs: Pairs, seed: int) -> tuple[float, float]:
    """Those under which prompts that were left out are most likely."""
    part = folds(pairs.prompts, seed)

    def unlikely(overall: float, own: float) -> float:
        total = 0.0
        for fold in range(FOLDS):
            rest, held = pairs.only(part != fold), pairs.only(part == fold)
            logit = _logits(held, utilities(rest, overall, own))
            total += float(np.logaddexp(0, logit).sum() - held.preferred @ logit)
        return total

    return min(product(OVERALL, OWN), key=lambda choice: unlikely(*choice))


def _held_out(pairs: Pairs, seed: int) -> Floats:
    """[n 3] whether the fit, equal weights and the best single reward are right about pairs of other prompts."""
    part, right = folds(pairs.prompts, seed + 1), np.zeros((len(pairs.prompts), 3))
    rewards = pairs.difference.shape[1]
    for fold in range(FOLDS):
        rest, held, rows = pairs.only(part != fold), pairs.only(part == fold), part == fold
        fitted = _logits(held, utilities(rest, *_penalties(rest, seed)))
        decided = rest.preferred != 0.5
        singles = [_right(rest.difference[decided, k], rest.preferred[decided]).mean() for k in range(rewards)]
        guesses = (fitted, held.difference.mean(1), held.difference[:, int(np.argmax(singles))])
        right[rows] = np.stack([_right(guess, held.preferred) for guess in guesses], 1)
    return right


def _logits(pairs: Pairs, utility: Floats) -> Floats:
    return np.asarray(np.einsum("nc,ck,nk->n", pairs.shares, utility, pairs.difference))


def _right(guess: Floats, preferred: Floats) -> Floats:
    """1 where the sign is that of the preference, 1/2 where nothing was said."""
    return np.asarray((1 + np.sign(guess) * np.sign(preferred - 0.5)) / 2)


def summary(found: Fit) -> Mapping[str, float | int | str | None]:
    """Everything but the utilities, as plain data; null where there is no number."""
    names = ("accuracy", "equal", "single", "gain", "low", "high")
    numbers = {name: float(getattr(found, name)) for name in names}
    plain = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {**plain, "pairs": found.pairs, "prompts": found.prompts, "refused": found.refused}
