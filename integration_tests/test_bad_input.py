"""What is wrong is said once, with its place and its remedy, and nothing that was made before is lost."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from loguru import logger
from safetensors.torch import save_file

from velatura.core.cli import main

Run = Callable[..., subprocess.CompletedProcess[str]]
Capture = pytest.CaptureFixture[str]
Refused = Callable[..., str]
RUN = Path("runs/tiny")
RESULTS = ("weights.safetensors", "kept.json", "ledger.parquet", "samples.parquet", "summary.json", "report.html")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """A verb in this process leaves no log behind that writes to its console."""
    yield
    logger.remove()


def results(folder: Path) -> set[str]:
    """Hashes of all results, wherever they lie: what was put aside is intact too."""
    return {hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.name in RESULTS}


@pytest.fixture
def refused(workspace: Path, capsys: Capture) -> Refused:
    """Runs `velatura`, which must end with status 2, one message and no loss; returns the message."""

    def run(*arguments: str) -> str:
        before = results(workspace)
        assert main(list(arguments)) == 2
        assert before <= results(workspace)
        return only_message(capsys.readouterr().err)

    return run


def only_message(err: str) -> str:
    """The one message on stderr."""
    lines = err.splitlines()
    assert "Traceback" not in err
    assert [line for line in lines if line.startswith("velatura: ")] == lines[:1], err
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("override", "place", "remedy"),
    [
        ("stages.teacher_t2i.objective=nfft", "stages.teacher_t2i.objective", "Did you mean 'nft'?"),
        ("stages.teacher_t2i.rewards.0.use=tinyworld-sharpnes", "rewards.0", "Did you mean 'tinyworld-sharpness'?"),
        ("stages.teacher_t2i.objective.with.bta=0.5", "bta", "Did you mean 'beta'?"),
        ("stages.teacher_t2i.stepz=3", "stages.teacher_t2i.stepz", "Did you mean 'steps'?"),
        ("stages.teacher_t2i.steps=many", "stages.teacher_t2i.steps", "'many'"),
        ("stages.teacher_t2i.objective.with.beta=[1]", "beta", "[1]"),
        ("stages.teacher_t2i.steps=-1", "stages.teacher_t2i.steps", "give 1 or more (got -1)"),
        ("stages.curate_t2i.task.with.count=-5", "count", "give 1 or more (got -5)"),
        ("stages.student.init=compare", "stages.student.init", "comes from a stage of kind"),
        ("stages.student.teachers.t2i=techer_t2i", "stages.student.teachers.t2i", "Did you mean 'teacher_t2i'?"),
        ("stages.warm.init=student", "stages.warm", "stage cycle: warm -> student"),
        ("stages.teacher_t2i.group_size=1", "stages.teacher_t2i.group_size", "Take 2 or more"),
        ("stages.teacher_t2i.prompts_per_step=99", "stages.teacher_t2i", "Lower `prompts_per_step`"),
        ("stages.warm.task.with.targets=false", "stages.warm.task", "Use a task that provides targets"),
        ("stages.student.teachers={t2i: teacher_edit}", "stages.student.teachers", "'edit', which is not configured"),
        ("engine.kind=depspeed", "engine.kind", "'deepspeed'"),
        ("engine.zero_stage=7", "engine.zero_stage", "7"),
        ("stage.warm.steps=2", "stage", "Did you mean 'stages'?"),
        ("stages.nobody.steps=2", "nobody", "There is:"),
    ],
)
def test_a_recipe_that_asks_for_nonsense(override: str, place: str, remedy: str, refused: Refused) -> None:
    message = refused("run", "tiny.yaml", override)
    assert place in message
    assert remedy in message


def rewrite(old: str, new: str) -> None:
    text = Path("tiny.yaml").read_text()
    assert old in text
    Path("tiny.yaml").write_text(text.replace(old, new, 1))


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(Path("tiny.yaml").read_text().splitlines(), 1) if text in line)


def test_what_stands_in_the_file_is_named_with_its_line(refused: Refused) -> None:
    rewrite("updates_per_step: 2", "updates_per_stpe: 2")
    message = refused("run", "tiny.yaml")
    assert f"tiny.yaml:{line_of('updates_per_stpe')}" in message
    assert "Did you mean 'updates_per_step'?" in message


def test_a_stage_that_is_written_twice(refused: Refused) -> None:
    rewrite("  export:\n", "  student:\n    stage: export\n    model: teacher_t2i\n\n  export:\n")
    message = refused("run", "tiny.yaml")
    first, second = line_of("  student:"), line_of("model: teacher_t2i") - 2
    assert message == f"velatura: tiny.yaml:{second}: stages.student is written twice, first on line {first}"


def test_text_that_is_no_yaml(refused: Refused) -> None:
    rewrite("stages:\n", "stages: [\n")
    assert "this is not YAML" in refused("run", "tiny.yaml")


def test_a_recipe_that_is_not_there(refused: Refused) -> None:
    assert "Did you mean 'tiny.yaml'?" in refused("run", "tinny.yaml")


PROMPTS = "stages.curate_t2i.task={use: prompts, with: {file: prompts.jsonl}}"


def test_a_prompt_file_that_is_missing(refused: Refused) -> None:
    Path("prompt.jsonl").write_text('{"prompt": "a red circle"}\n')
    message = refused("run", "tiny.yaml", PROMPTS)
    assert "prompts.jsonl" in message
    assert "Did you mean 'prompt.jsonl'?" in message


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ('{"prompt": "a red circle"', "this is not JSON"),
        ('{"promt": "a red circle"}', "prompt: this key is missing"),
        ('{"prompt": "a red circle", "categry": "x"}', "Did you mean 'category'?"),
        ('{"prompt": 3}', "prompt: "),
        ('{"prompt": "a blue circle"}', "the same prompt as on line 1"),
    ],
)
def test_a_malformed_prompt_file_is_named_with_its_line(line: str, remedy: str, refused: Refused) -> None:
    Path("prompts.jsonl").write_text(f'{{"prompt": "a blue circle"}}\n\n{line}\n')
    message = refused("run", "tiny.yaml", PROMPTS)
    assert "prompts.jsonl:3" in message
    assert remedy in message


OBJECTIVE = """
from velatura.api import Loss, NoOptions, PolicyObjective, Requirements, Role, hookimpl

class Grpo(PolicyObjective[NoOptions]):
    name = "noisy"
    requires = Requirements(stochastic_steps=True, points="trajectory")
    def loss(self, points, velocity):
        return Loss(value=velocity[Role.CURRENT].mean())

@hookimpl
def velatura_objective():
    return [Grpo]
"""


def test_an_objective_that_needs_noise_with_a_kernel_that_draws_none(refused: Refused) -> None:
    Path("mine.py").write_text(OBJECTIVE)
    message = refused("run", "tiny.yaml", "plugins=[./mine.py]", "stages.teacher_t2i.objective=noisy")
    assert "stages.teacher_t2i" in message
    assert "objective 'noisy' needs stochastic steps, but kernel 'ode' has none" in message
    assert "Choose a stochastic kernel" in message


def test_a_plugin_that_does_not_import(refused: Refused) -> None:
    Path("mine.py").write_text("import paddleocr_is_not_here\n")
    message = refused("run", "tiny.yaml", "plugins=[./mine.py]", "stages.teacher_t2i.objective=mine/noisy")
    assert "plugin 'mine'" in message
    assert "does not import, line 1: ModuleNotFoundError" in message
    assert "paddleocr_is_not_here" in message


def test_a_plugin_file_that_is_not_there(refused: Refused) -> None:
    assert "there is no plugin file" in refused("run", "tiny.yaml", "plugins=[./mine.py]")


def test_a_broken_plugin_that_nobody_uses_breaks_nothing(workspace: Path) -> None:
    Path("mine.py").write_text("import paddleocr_is_not_here\n")
    assert main(["run", "tiny.yaml", "plugins=[./mine.py]"]) == 0
    assert not (RUN / "replaced").exists()


REWARD = """
import torch
from velatura.api import NoOptions, RewardModel, Scores, hookimpl

class Mine(RewardModel[NoOptions]):
    name = "mine"
    def score(self, samples):
        ANSWER

@hookimpl
def velatura_reward():
    return [Mine]
"""


@pytest.mark.parametrize("stage", ["teacher_t2i", "curate_t2i"])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ('raise ConnectionError("the judge is down")', "ConnectionError: the judge is down"),
        ('return Scores.of(torch.full((len(samples),), float("nan")))', "score is nan"),
        ("return Scores.of(torch.zeros(len(samples) + 1))", "2 scores and 2 statuses for 1 samples"),
        ("return [0.5] * len(samples)", "returned list instead of Scores"),
    ],
)
def test_a_reward_that_gives_no_scores(stage: str, answer: str, reason: str, refused: Refused) -> None:
    Path("mine.py").write_text(REWARD.replace("ANSWER", answer))
    message = refused("run", "tiny.yaml", "plugins=[./mine.py]", f"stages.{stage}.rewards=[mine]")
    assert f"stages.{stage}.rewards.0: reward 'mine'" in message
    assert reason in message
    assert "Mend the reward and start again" in message
    assert json.loads((RUN / stage / "manifest.json").read_text())["status"] == "failed"


PUSHES = """
import torch
from velatura.api import Loss, NoOptions, PolicyObjective, Requirements, RewardModel, Role, Scores, hookimpl

class Pushes(PolicyObjective[NoOptions]):
    name = "pushes"
    requires = Requirements(roles=frozenset({Role.CURRENT}))
    def loss(self, points, velocity):
        return Loss(value=velocity[Role.CURRENT].mean())

class Late(RewardModel[NoOptions]):
    name = "late"
    calls = 0
    def score(self, samples):
        self.calls += 1
        means = torch.stack([sample.image.mean() for sample in samples])
        return Scores.of(means if self.calls > 1 else torch.zeros(len(samples)))

@hookimpl
def velatura_objective():
    return [Pushes]

@hookimpl
def velatura_reward():
    return [Late]
"""


def test_an_objective_that_would_train_wrongly_is_refused_when_the_first_signal_comes(refused: Refused) -> None:
    """In the first step all samples score alike, so that nothing is learned and nothing can be checked."""
    Path("mine.py").write_text(PUSHES)
    changes = ("stages.teacher_t2i.objective=pushes", "stages.teacher_t2i.rewards=[late]")
    message = refused("run", "tiny.yaml", "plugins=[./mine.py]", *changes, "--stage", "teacher_t2i")
    assert "objective 'pushes' gives gradient norm" in message
    assert (RUN / "teacher_t2i" / "metrics.jsonl").read_text().count("\n") == 1


def test_a_mended_reward_lets_the_run_go_on(refused: Refused) -> None:
    arguments = (
        "run",
        "tiny.yaml",
        "plugins=[./mine.py]",
        "stages.teacher_edit.rewards=[mine]",
        "--stage",
        "teacher_edit",
    )
    Path("mine.py").write_text(REWARD.replace("ANSWER", "raise ValueError"))
    refused(*arguments)
    good = "return Scores.of(torch.stack([s.image.mean() for s in samples]))"
    Path("mine.py").write_text(REWARD.replace("ANSWER", good))
    assert main(list(arguments)) == 0
    assert json.loads((RUN / "teacher_edit" / "manifest.json").read_text())["status"] == "finished"
    assert json.loads((RUN / "warm" / "manifest.json").read_text())["status"] == "finished"


def test_the_output_folder_of_another_recipe(refused: Refused) -> None:
    shutil.copy("tiny.yaml", "other.yaml")
    message = refused("run", "other.yaml", "output=runs/tiny")
    assert "runs/tiny belongs to recipe 'tiny', not to 'other'" in message
    assert "output=runs/other" in message
    assert json.loads((RUN / "run.json").read_text())["recipe"] == "tiny"
    Path("mine").mkdir()
    Path("mine/tiny.yaml").write_text(Path("tiny.yaml").read_text().replace("seed: 5", "seed: 6"))
    message = refused("run", "mine/tiny.yaml")
    assert "runs/tiny belongs to another recipe of that name" in message
    assert "output=runs/another-tiny" in message


def test_an_output_folder_that_is_no_run(refused: Refused) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter.txt").write_text("precious")
    assert "is not a run of Velatura. Choose another `output`" in refused("run", "tiny.yaml", "output=thesis")
    assert [path.name for path in Path("thesis").iterdir()] == ["chapter.txt"]
    assert "cannot make the run folder tiny.yaml" in refused("run", "tiny.yaml", "output=tiny.yaml")
    assert "cannot make the run folder tiny.yaml/run" in refused("run", "tiny.yaml", "output=tiny.yaml/run")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", ["cut", "exchanged", "gone"])
def test_weights_that_are_not_what_a_finished_stage_left(harm: str, refused: Refused, workspace: Path) -> None:
    """The other stages stay where they are: nothing is redone on the strength of a broken file."""
    weights = RUN / "warm" / "weights.safetensors"
    before = {path for path in RUN.rglob("*") if path.is_file()} - {weights}
    if harm == "cut":
        cut(weights)
    elif harm == "gone":
        weights.unlink()
    else:
        shutil.copy(RUN / "student" / "weights.safetensors", weights)
    message = refused("run", "tiny.yaml")
    assert "runs/tiny/warm" in message
    assert "is not what the stage left" in message
    assert "--stage warm --fresh" in message
    assert before <= {path for path in RUN.rglob("*") if path.is_file()}
    if harm == "cut":
        assert "warm: weights.safetensors is not what the stage left" in refused(
            "run", "tiny.yaml", "--stage", "student", "--fresh"
        )
    assert main(["run", "tiny.yaml", "--stage", "warm", "--fresh"]) == 0
    assert main(["run", "tiny.yaml"]) == 0
    assert {path.name.rsplit("-", 2)[0] for path in (RUN / "replaced").iterdir()} <= {"warm", "student"}


def test_an_export_that_is_gone(refused: Refused) -> None:
    shutil.rmtree(RUN / "export" / "model")
    message = refused("run", "tiny.yaml")
    assert "runs/tiny/export: what it wrote is not what the stage left" in message
    assert "--stage export --fresh" in message


def unfinished(stage: str) -> Path:
    """Make a stage look cut off after its last checkpoint but one; the checkpoints."""
    manifest = RUN / stage / "manifest.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**facts, "status": "running"}))
    checkpoints = RUN / stage / "checkpoints"
    shutil.rmtree(max(checkpoints.iterdir()))
    return checkpoints


def test_a_checkpoint_that_is_truncated(refused: Refused) -> None:
    checkpoints = unfinished("teacher_t2i")
    for path in checkpoints.glob("*/policy.safetensors"):
        cut(path)
    message = refused("run", "tiny.yaml")
    assert "policy.safetensors" in message
    assert "bytes" in message
    assert "Delete " in message


def test_an_earlier_checkpoint_is_used_when_the_newest_is_truncated(workspace: Path) -> None:
    expected = (RUN / "teacher_t2i" / "weights.safetensors").read_bytes()
    checkpoints = unfinished("teacher_t2i")
    shutil.copytree(checkpoints / "step-000004", checkpoints / "step-000005")
    cut(checkpoints / "step-000005" / "optimizer.safetensors")
    assert main(["run", "tiny.yaml"]) == 0
    assert (RUN / "teacher_t2i" / "weights.safetensors").read_bytes() == expected
    assert not (RUN / "replaced").exists()


def test_a_checkpoint_of_another_model(refused: Refused) -> None:
    narrower = [f"stages.{stage}.adapter.with.layers=1" for stage in ("teacher_t2i", "teacher_edit", "student")]
    message = refused("run", "tiny.yaml", *narrower)
    assert "warm/weights.safetensors is of another model: first difference 'transformer_blocks.1." in message
    assert "Use the recipe that made it" in message


def test_a_teacher_whose_weights_the_student_cannot_wear(refused: Refused) -> None:
    message = refused("run", "tiny.yaml", "stages.teacher_t2i.adapter.with.layers=1")
    assert "give both the same adapter" in message


@pytest.mark.parametrize("harm", ["cut", "other", "gone"])
def test_base_weights_that_cannot_be_used(harm: str, refused: Refused) -> None:
    file = Path("base.safetensors")
    shutil.copy(RUN / "warm" / "weights.safetensors", file)
    if harm == "cut":
        cut(file)
    elif harm == "other":
        save_file({"weight": torch.zeros(3)}, file)
    else:
        file.unlink()
    message = refused("run", "tiny.yaml", "stages.warm.adapter.with.weights=base.safetensors")
    assert "base.safetensors" in message
    assert "stages.warm.adapter: " in message
    assert {"cut": "not a safetensors file", "other": "does not fit", "gone": "There is no checkpoint"}[harm] in message


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes, which a program sees as it sees a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("stage", "size", "change"),
    [
        ("warm", 1_000, "seed=6"),  # the run's own papers
        ("warm", 100_000, "seed=6"),  # a checkpoint
        ("warm", 100_000, "stages.warm.steps=2"),  # the final weights
        ("curate_t2i", 25_000, "stages.curate_t2i.group_size=3"),  # a picture
        ("compare", 25_000, "stages.compare.bootstrap=100"),  # the images of a model
        ("export", 100_000, "stages.export.model=teacher_t2i"),  # what a library writes
    ],
)
def test_no_disk_space(stage: str, size: int, change: str, refused: Refused) -> None:
    arguments = ("run", "tiny.yaml", change, "--stage", stage)
    with full_at(size):
        message = refused(*arguments)
    assert "File too large" in message
    assert "runs/tiny" in message
    assert "ake room" in message
    assert "intact" in message
    assert main(list(arguments)) == 0
    assert json.loads((RUN / stage / "manifest.json").read_text())["status"] == "finished"


def test_a_real_process_on_a_full_disk_says_one_thing_and_ends_with_2(workspace: Path, console_script: Run) -> None:
    with full_at(100_000):
        done = console_script("run", "tiny.yaml", "seed=6", "--stage", "warm", cwd=workspace, status=2)
    assert "make room" in only_message(done.stderr)
