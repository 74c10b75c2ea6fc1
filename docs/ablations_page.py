"""Write docs/ablations.md from recipes/ablations and docs/ablations: python docs/ablations_page.py [--check]."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from textwrap import wrap

from velatura.core.ablation.results import FAILS, HOLDS, OPEN
from velatura.core.ablation.settings import Ablation, load_ablation

HERE = Path(__file__).parent
PAGE = HERE / "ablations.md"
FILES = sorted((HERE.parent / "recipes" / "ablations").glob("*.yaml"), key=lambda path: path.stem)

HEAD = """\
# The claims of the papers, put to the test

<!-- Written by docs/ablations_page.py from recipes/ablations and docs/ablations. -->

Each file in [recipes/ablations](../recipes/ablations) asks one question of one recipe on the embedded world: a few
variants ("arms"), each trained with several seeds, measured on held-out prompts with the same noises, and compared.
The claim is *reproduced* when every prediction it makes has its 95 % interval above 0, and *not reproduced* otherwise:
`opposite` means that the interval lies below 0, `open` that 0 is in it, so that three seeds cannot tell. Intervals are
over training seeds and prompts together (two crossed sources of chance); with three seeds they are wide where seeds
disagree, and that is what three seeds are worth. The world has pictures of 24 by 24 pixels and a transformer of 0.8
million parameters: what is found here says how the method behaves in this code and this world, not what a large model
does. Files that end in `-fine` ask again in a finer world: 36 tokens of a picture in place of 16, so that a token
decides less of layout and texture at once, with a base of its own (`recipes/tinyworld-pretrain-fine.yaml`).

<!-- parsed: hours -->
```sh
velatura ablate recipes/ablations/guidance.yaml --jobs 2
```

does the missing runs side by side, one for each core, with progress; stop it and the same command goes on. Arms share
the stages that are the same in them, those of other files with the same `--output` included. A run takes about three
minutes on one core for the files about one teacher, twice as long in the finer world, and a quarter of an hour for
those about two teachers and a student. Results go to `runs/ablations/NAME`: `verdict.md`, `figure.svg`, `results.json`,
and every run as `velatura run` leaves it. To ask a question of your own, write such a file about your own recipe.

"""

REPORT = """\
## The claims of the Qwen-Image-2.0-RL report, one by one

What arXiv:2606.27608 says it found, and what this world says of it. *Not testable here*: that needs people, a model of
full size, or weights that are not public.

| claim of the report | here | evidence |
|---|---|---|
"""
CLAIMS = (
    ("Reinforcement learning on composite rewards makes the base better, for text-to-image and for edits", "reproduced",
     "both teachers in three seeds, [results](results.md)"),
    ("Guidance in rollout and loss is unstable; without any, what is not rewarded is lost; hybrid guidance is neither",
     ("guidance", "guidance-fine", "guidance-strict"), ""),
    ("Training on all steps invites reward hacking, steps of high noise do not", ("timesteps", "timesteps-fine"),
     ""),
    ("Prompts whose samples differ in reward are the ones to train on", "curation", ""),
    ("Weights by category keep one style from taking over", "category-weights", ""),
    ("A student distilled on its own trajectories keeps what both teachers learned", "reproduced",
     "92 to 106 % of their gain in alignment in three seeds, [results](results.md)"),
    ("Training on mixed rewards, or other ways to one model, keep less", "merging", ""),
    ("The teacher's guidance folds into the student, which then samples without", "reproduced",
     "the same students, who are sampled at guidance 1, [results](results.md)"),
    ("Guiding such a student once more spoils its pictures", "reguided", ""),
    ("Rewards behind servers cost no time while the next pictures are drawn", "reproduced",
     "91 % of the time of a judge is hidden, [benchmarks](../benchmarks/README.md)"),
    ("Judges trained on marks agree with people better than those trained on pairs", "not testable here",
     "a question to people; both losses are there, [judges](judges.md)"),
    ("A layered alignment judge, and one for portraits, see what people see", "not testable here",
     "their weights are not public; how to find out for a judge of yours: [reward cards](reward-cards.md)"),
    ("Higher on Qwen-Image-Bench, in every pillar, and preferred by people in the arena", "not testable here",
     "neither the model nor its rewards are public"),
)  # fmt: skip
"""Claim, the ablations of ours or a verdict, and where the evidence is if there is no ablation."""
NOTES = {
    "guidance-fine": "Hybrid is ahead of both others in every seed. Strict alignment, for which nothing was predicted, "
    "differs more: +.11 for hybrid, +.04 for guidance in both, +.00 for none; guidance-strict asks about it.",
    "guidance-strict": "Hybrid learns more than no guidance. Its lead over guidance in both was +.046 in the seeds "
    "that suggested the question and is +.010 in these: what is noticed afterwards has to be asked again.",
    "merging": "The student is sampled at guidance 1, with half the rows of the others, which are sampled at 2. The "
    "teachers hardly get in each other's way here: each leaves the other's task about as the base has it, or better, "
    "so an average has little to lose.",
    "negatives": "Without its negative part what is left is imitation of the network's own samples, and it ends far "
    "below the base (alignment .70 against .90). Leaving bad samples out is milder, and learns a little.",
    "objectives": "Strict alignment: nft .71, awm .71, dgpo .71, flow-grpo .62, grpo-guard .60, the base .57, rwr .52. "
    "A ratio learns from the one step of each rollout that drew noise, which is what the same rows buy; with rows to "
    "spare it may catch up. Learning rates were chosen in 24 steps of another seed.",
    "reguided": "Edits are worse for it in every seed. Text-to-image is not: there a second guidance gains what the "
    "student was short of its teacher.",
    "states": "Dense states taught as much with a quarter of the rollouts, which is the claim; the predictions, "
    "written down before, ask for more than one query taught. That is open, as is a difference of a few hundredths.",
    "timesteps": "In a world of 16 tokens the steps of high noise decide texture, too: trained alone they raise the "
    "reward most and cost alignment most, steps of low noise least.",
    "timesteps-fine": "As in the world as shipped: steps of high noise raise the reward most and cost alignment and "
    "identity most, steps of low noise least. How much fine detail there is, is decided early here.",
}
"""What the figure shows beside the predictions."""


def page() -> str:
    """The whole page."""
    loaded = {path.stem: load_ablation(path) for path in FILES}
    found = {name: _results(name) for name in loaded}
    rows = ["| question | claim | verdict |", "|---|---|---|"]
    for name, ablation in loaded.items():
        rows.append(f"| [{ablation.question}](#{name}) | {ablation.claim} | {_verdict(found[name])} |")
    claims = [_claim(claim, verdict, evidence, found) for claim, verdict, evidence in CLAIMS]
    sections = [_section(name, ablation, found[name]) for name, ablation in loaded.items()]
    return HEAD + "\n".join(rows) + "\n\n" + REPORT + "\n".join(claims) + "\n\n" + "\n".join(sections)


def _verdict(found: dict[str, object]) -> str:
    """With how many predictions were shown, are open, or came out the opposite way."""
    if not found:
        return "not run yet"
    outcomes = Counter(test["outcome"] for test in found["tested"])  # type: ignore[attr-defined]
    counted = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in (HOLDS, OPEN, FAILS) if outcomes[outcome])
    return f"{found['verdict']} ({counted})"


def _claim(claim: str, verdict: str | tuple[str, ...], evidence: str, found: dict[str, dict[str, object]]) -> str:
    names = (verdict,) if isinstance(verdict, str) else verdict
    if names[0] not in found:
        return f"| {claim} | {verdict} | {evidence} |"
    verdicts = [_verdict(found[name]) for name in names]
    each = "; ".join(f"{name}: {one}" for name, one in zip(names, verdicts, strict=True))
    said = verdicts[0] if len(set(verdicts)) == 1 else each
    return f"| {claim} | {said} | {', '.join(f'[{name}](#{name})' for name in names)} |"


def _results(name: str) -> dict[str, object]:
    path = HERE / "ablations" / f"{name}.json"
    loaded: dict[str, object] = json.loads(path.read_text()) if path.exists() else {}
    return loaded


def _section(name: str, ablation: Ablation, found: dict[str, object]) -> str:
    lines = [f"## {name}", "", f"{ablation.question}", "", f"Claim: {ablation.claim} ({ablation.source})", ""]
    if not found:
        return "\n".join([*lines, f"Not run yet: `velatura ablate recipes/ablations/{name}.yaml`.", ""])
    seeds = ", ".join(str(seed) for seed in found["seeds"])  # type: ignore[attr-defined]
    lines += [f"**{str(found['verdict']).capitalize()}** (seeds {seeds}).", ""]
    for test in found["tested"]:  # type: ignore[attr-defined]
        where = f" ({test['route']}{', ' + test['category'] if test['category'] else ''})"
        lines.append(
            f"- {test['metric']}{where}: {test['more']} minus {test['than']} {test['value']:+.3f} "
            f"[{test['low']:+.3f}, {test['high']:+.3f}], seeds {' '.join(f'{v:+.3f}' for v in test['by_seed'])}: "
            f"{test['outcome']}"
        )
    if name in NOTES:
        lines += ["", *wrap(NOTES[name], 120)]
    return "\n".join([*lines, "", f"![{ablation.question}](ablations/{name}.svg)", ""])


if __name__ == "__main__":
    if "--check" in sys.argv and PAGE.read_text() != page():
        sys.exit("docs/ablations.md is not what docs/ablations_page.py writes; run it")
    PAGE.write_text(page())
