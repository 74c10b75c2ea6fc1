from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from velatura.core.errors import RecipeError
from velatura.core.recipe import DistillStage, Recipe, Ref, RewardRef, content_hash, load_recipe, recipe_schema
from velatura.core.shipped import find_recipe

Write = Callable[..., str]


def message(name: str, *overrides: str) -> str:
    """What a user reads."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


def test_a_stage_takes_over_what_it_leaves_out(pipeline: str) -> None:
    recipe = load_recipe(pipeline)
    teacher = recipe.stage("teacher")
    assert teacher.adapter == Ref(use="tiny")
    assert teacher.rewards == [RewardRef(use="good", weight=2)]
    assert teacher.objective == Ref(use="nft")
    assert (teacher.sampling.steps, teacher.sampling.batch) == (20, 32)  # settings are merged field by field
    assert recipe.stage("student").distiller == Ref(use="velocity-match")
    assert not hasattr(recipe.stage("out"), "adapter")


def test_a_slot_of_a_stage_replaces_the_one_above_as_a_whole(write: Write) -> None:
    recipe = load_recipe(
        write("""\
        adapter: {use: tiny, with: {width: 8}}
        stages:
          out: {stage: supervised, adapter: {use: big}, task: world}
        """)
    )
    assert recipe.stage("out").adapter == Ref(use="big")


def test_order_and_dependencies_follow_references(write: Write) -> None:
    lines = """\
        adapter: tiny
        rewards: [good]
        stages:
          out: {stage: export, model: student}
          student: {stage: distill, teachers: {t2i: teacher}}
          teacher: {stage: rl, prompts: pick}
          pick: {stage: curate, task: world}
        """
    recipe = load_recipe(write(lines))
    assert recipe.order() == ["pick", "teacher", "student", "out"]
    assert recipe.dependencies("out") == ["student"]
    assert recipe.dependencies("student") == ["teacher", "pick"]  # it trains on its teacher's prompts
    assert recipe.dependencies("pick") == []


def test_the_order_is_that_of_the_recipe_where_it_may_be(pipeline: str) -> None:
    assert load_recipe(pipeline).order() == ["pick", "teacher", "student", "compare", "out"]


def test_an_evaluation_covers_the_tasks_of_the_recipe(pipeline: str) -> None:
    recipe = load_recipe(pipeline)
    assert recipe.tasks_of("compare") == {"t2i": Ref(use="world")}
    assert recipe.tasks_of("student") == {"t2i": Ref(use="world")}
    assert recipe.tasks_of("teacher") == {"teacher": Ref(use="world")}
    assert recipe.tasks_of("out") == {}
    assert recipe.task_of("teacher") == Ref(use="world")


def test_the_output_is_named_after_the_recipe(pipeline: str) -> None:
    assert load_recipe(pipeline).output == "runs/recipe"
    assert load_recipe(pipeline, ["output=elsewhere"]).output == "elsewhere"


def test_a_resolved_recipe_means_the_same(pipeline: str) -> None:
    recipe = load_recipe(pipeline)
    resolved = recipe.resolved()
    assert json.loads(json.dumps(resolved)) == resolved
    assert Recipe.model_validate(resolved).stages == recipe.stages
    assert resolved["stages"]["teacher"]["objective"] == {"use": "nft", "with": {}}


def test_a_recipe_cannot_be_changed(pipeline: str) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(pipeline).seed = 1  # type: ignore[misc]


def test_numbers_in_exponent_form_are_numbers(pipeline: str) -> None:
    recipe = load_recipe(pipeline, ["stages.teacher.objective.with.beta=1e-4", "stages.teacher.optimizer.lr=2E-5"])
    assert recipe.stage("teacher").objective.with_["beta"] == 1e-4
    assert recipe.stage("teacher").optimizer.lr == 2e-5


def test_the_hash_ignores_the_order_of_keys() -> None:
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    assert content_hash({"a": [1, 2]}) != content_hash({"a": [2, 1]})
    assert content_hash({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_an_unknown_key_is_answered_with_the_nearest_and_its_line(write: Write) -> None:
    name = write("""\
        adapter: tiny
        stages:
          out:
            stage: supervised
            task: world
            optimiser: {lr: 1}
        """)
    assert message(name) == "recipe.yaml:6: stages.out.optimiser: no such key. Did you mean 'optimizer'?"


def test_unknown_keys_deeper_down_are_found_too(pipeline: str) -> None:
    assert message(pipeline, "sead=1") == "command line: sead: no such key. Did you mean 'seed'?"
    assert (
        message(pipeline, "engine.zero_stag=1")
        == "command line: engine.zero_stag: no such key. Did you mean 'zero_stage'?"
    )
    assert message(pipeline, "rewards.0.wieght=1") == (
        "command line: rewards.0.wieght: no such key. Did you mean 'weight'?"
    )
    assert message(pipeline, "stages.teacher.kernel={use: ode, wiht: {}}") == (
        "command line: stages.teacher.kernel.wiht: no such key. Did you mean 'with'?"
    )


def test_an_unknown_key_of_a_stage_is_answered_with_the_keys_of_its_kind_each_once(pipeline: str) -> None:
    assert message(pipeline, "stages.out.xyz=1") == "command line: stages.out.xyz: no such key. There is: model, stage."
    (line,) = message(pipeline, "stages.student.xyz=1").splitlines()
    own = line.removeprefix("command line: stages.student.xyz: no such key. There is: ").removesuffix(".").split(", ")
    assert own == sorted(DistillStage.model_fields)
    # what only other kinds have is no suggestion
    assert "Did you mean" not in message(pipeline, "stages.out.reward=1")
    assert message(pipeline, "stages.pick.reward=1").endswith("no such key. Did you mean 'rewards'?")


def test_a_key_of_a_stage_that_stands_at_the_top_says_so(pipeline: str, write: Write) -> None:
    above = "no such key. 'engine' stands at the top of the recipe, for all stages: write engine, not stages"
    assert message(pipeline, "stages.student.engine.kind=local") == (
        f"command line: stages.student.engine: {above}.student.engine"
    )
    assert message(pipeline, "stages.student.engin.kind=local") == (
        f"command line: stages.student.engin: {above}.student.engin"
    )
    name = write("""\
        adapter: tiny
        stages:
          out:
            stage: supervised
            task: world
            engine: {kind: local}
        """)
    assert message(name) == f"recipe.yaml:6: stages.out.engine: {above}.out.engine"


def test_a_key_written_twice_names_both_lines(write: Write) -> None:
    name = write("""\
        adapter: tiny
        stages:
          a: {stage: supervised, task: world}
          b: {stage: supervised, task: world}
          a: {stage: export, model: b}
        """)
    assert message(name) == "recipe.yaml:5: stages.a is written twice, first on line 3"


def test_a_mistake_in_a_default_is_told_once_where_it_was_written(write: Write) -> None:
    name = write("""\
        adapter: {use: tiny}
        sampling:
          steps: 0
        rewards: [good]
        stages:
          a: {stage: curate, task: world}
          b: {stage: rl, task: world}
        """)
    assert message(name) == "recipe.yaml:3: sampling.steps: give 1 or more (got 0)"


def test_a_missing_slot_says_where_it_may_go(write: Write) -> None:
    name = write("stages:\n  a: {stage: export, model: b}\n  b: {stage: supervised, task: world}\n")
    assert message(name) == (
        "recipe.yaml:3: stages.b: 'adapter' is missing; give it here, or once at the top of the recipe for every stage"
    )


def test_missing_keys(write: Write) -> None:
    assert (
        message(write("seed: 1\n"))
        == "recipe.yaml: stages: this key is missing: Name -> stage; an order is found from their references."
    )
    assert (
        message(write("stages:\n  a: {stage: export}\n"))
        == "recipe.yaml:2: stages.a.model: this key is missing: The stage whose model is exported."
    )
    assert message(write("stages:\n  a: {model: b}\n")) == (
        "recipe.yaml:2: stages.a: 'stage' is missing; it says of what kind the stage is: "
        "curate, calibrate, rl, distill, supervised, merge, rate, judge-fit, evaluate, export"
    )


def test_an_unknown_kind_of_stage_is_answered_with_the_nearest(pipeline: str) -> None:
    assert message(pipeline, "stages.student.stage=distil") == (
        "command line: stages.student.stage: no stage is of kind 'distil'. Did you mean 'distill'?"
    )


@pytest.mark.parametrize("value", ["1", "0"])
def test_a_group_of_one_is_refused_with_the_reason(pipeline: str, value: str) -> None:
    assert message(pipeline, f"stages.teacher.group_size={value}") == (
        f"command line: stages.teacher.group_size: a group of {value} teaches nothing: an advantage says how much "
        "better a sample is than the rest of its group. Take 2 or more; 8 to 24 is usual"
    )
    assert message(pipeline, f"stages.pick.group_size={value}") == (
        f"command line: stages.pick.group_size: a group of {value} teaches nothing: curation compares the samples "
        "of a prompt with each other. Take 2 or more; 8 to 24 is usual"
    )


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("stages.teacher.steps=-1", "stages.teacher.steps: give 1 or more (got -1)"),
        ("stages.teacher.steps=ten", "stages.teacher.steps: give a whole number (got 'ten')"),
        ("stages.teacher.steps=true", "stages.teacher.steps: give a whole number (got true, as YAML reads yes and on)"),
        ("stages.teacher.max_failed=2", "stages.teacher.max_failed: give 1 or less (got 2)"),
        ("rewards.0.weight=-1", "rewards.0.weight: give 0 or more (got -1)"),
        ("engine.kind=horovod", "engine.kind: give 'deepspeed' or 'local' (got 'horovod')"),
    ],
)
def test_wrong_values_are_shown(pipeline: str, override: str, complaint: str) -> None:
    assert message(pipeline, override) == f"command line: {complaint}"


def test_bf16_without_zero_is_refused_with_the_reason(pipeline: str) -> None:
    assert message(pipeline, "engine={precision: bf16, zero_stage: 0}") == (
        "command line: engine: precision bf16 does not go with zero_stage 0: there DeepSpeed starts Adam at step 1, "
        "which spoils its bias correction. Use zero_stage 1, or precision fp32"
    )
    assert load_recipe(pipeline, ["engine={precision: bf16}"]).engine.zero_stage == 1


def test_prompts_come_from_one_place(pipeline: str) -> None:
    wanted = "recipe.yaml:9: stages.teacher: give 'prompts' (the name of a curate stage) or 'task' (a component)"
    assert message(pipeline, "stages.teacher.task=world") == f"{wanted}; both are given, leave one out"
    assert message(pipeline, "stages.teacher.prompts=null") == f"{wanted}; neither is given"


def test_a_default_task_yields_to_curated_prompts(pipeline: str) -> None:
    assert load_recipe(pipeline, ["task=other"]).stage("teacher").task is None


def test_references_to_unknown_stages(pipeline: str) -> None:
    assert message(pipeline, "stages.student.teachers.t2i=techer") == (
        "command line: stages.student.teachers.t2i: no stage is called 'techer'. Did you mean 'teacher'?"
    )
    assert message(pipeline, "stages.teacher.prompts=pcik") == (
        "command line: stages.teacher.prompts: no stage is called 'pcik'. Did you mean 'pick'?"
    )
    assert message(pipeline, "stages.compare.models.2=studnet") == (
        "command line: stages.compare.models.2: no stage is called 'studnet'. Did you mean 'student'?"
    )


def test_references_to_stages_of_the_wrong_kind(pipeline: str) -> None:
    assert message(pipeline, "stages.student.teachers.t2i=pick") == (
        "command line: stages.student.teachers.t2i: stage 'pick' is of kind curate; "
        "a teacher comes from a stage of kind rl or supervised. There is: teacher."
    )
    assert message(pipeline, "stages.teacher.prompts=student") == (
        "command line: stages.teacher.prompts: stage 'student' is of kind distill; "
        "a choice of prompts comes from a stage of kind curate. There is: pick."
    )
    assert message(pipeline, "stages.out.model=compare") == (
        "command line: stages.out.model: stage 'compare' is of kind evaluate; "
        "a model comes from a stage of kind rl, distill, supervised or merge. There is: student, teacher."
    )


def test_a_cycle_is_written_out(write: Write) -> None:
    name = write("""\
        adapter: tiny
        task: world
        rewards: [good]
        stages:
          a: {stage: rl, init: c}
          b: {stage: rl, init: a}
          c: {stage: rl, init: b}
        """)
    assert message(name) == (
        "recipe.yaml:5: stages.a: stage cycle: a -> c -> b -> a. A stage uses what was made before it: let one of them "
        "start from 'base', or from another stage"
    )


def test_a_stage_that_needs_itself(pipeline: str) -> None:
    assert message(pipeline, "stages.teacher.init=teacher") == (
        "command line: stages.teacher.init: stage 'teacher' needs its own result. Name another. There is: "
        "base, student."
    )


def test_names_that_stages_cannot_have(pipeline: str) -> None:
    assert message(pipeline, "stages.base={stage: export, model: student}") == (
        "command line: stages.base: a stage cannot have this name: it stands for the model that everything starts "
        "from. Use letters, digits, '_' and '-'"
    )
    assert message(pipeline, "stages.a/b={stage: export, model: student}") == (
        "command line: stages.a/b: a stage cannot have this name: it is a folder. Use letters, digits, '_' and '-'"
    )


def test_two_rewards_of_one_name(pipeline: str) -> None:
    assert message(pipeline, "rewards=[good, good]") == (
        "command line: rewards.1: two rewards are called 'good'; give one of them another 'name'"
    )
    named = load_recipe(pipeline, ["rewards=[good, {use: good, name: again}]"])
    assert [reward.label for reward in named.stage("pick").rewards] == ["good", "again"]


def test_a_route_without_a_teacher(pipeline: str) -> None:
    assert message(pipeline, "stages.student.prompts.edit=pick") == (
        "recipe.yaml:13: stages.student: 'prompts' has a route 'edit', for which 'teachers' names nobody. "
        "There is: t2i."
    )


def test_a_student_may_have_tasks_of_its_own(pipeline: str) -> None:
    own = load_recipe(pipeline, ["stages.student.tasks.t2i={use: other, with: {count: 9}}"])
    assert own.tasks_of("student") == {"t2i": Ref.model_validate({"use": "other", "with": {"count": 9}})}
    assert own.dependencies("student") == ["teacher"]  # what was chosen for its teacher does not matter
    assert own.task_of("teacher") == Ref(use="world")
    assert own.tasks_of("compare") == {"t2i": Ref(use="world")}  # measured where its teacher is
    assert ("stages", "student", "tasks", "t2i") in [place for place, kind, _ in own.references() if kind == "task"]
    assert message(pipeline, "stages.student.tasks.edit=world") == (
        "recipe.yaml:13: stages.student: 'tasks' has a route 'edit', for which 'teachers' names nobody. There is: t2i."
    )
    assert "route 't2i' has both 'prompts' and 'tasks'. Leave one of them out" in message(
        pipeline, "stages.student={stage: distill, teachers: {t2i: teacher}, prompts: {t2i: pick}, tasks: {t2i: world}}"
    )


def test_a_plugin_that_is_not_a_file(pipeline: str) -> None:
    assert message(pipeline, "plugins=[acme]") == (
        "command line: plugins.0: 'acme' is not a .py file; an installed plugin is used by naming it: 'use: acme/...'"
    )


def test_files_that_are_no_recipes(write: Write) -> None:
    write("stages:\n")
    assert message("recpie.yaml") == "there is no recipe 'recpie.yaml'. Did you mean 'recipe.yaml'?"
    assert message(".") == ". is a folder; give a recipe file. There is: recipe.yaml."
    assert message(write("- a\n- b\n")) == "recipe.yaml: a recipe is a mapping with the key 'stages', this is a list"
    assert message(write("seed: 1\nstages: {a: [}\n")).startswith("recipe.yaml:2: this is not YAML: ")
    assert message(write("seed: !!python/object:os.system {}\n")).startswith("recipe.yaml:1: this is not YAML: could")
    assert message(write("")).startswith("recipe.yaml: stages: this key is missing: ")


def test_anchors_and_merge_keys_may_be_used(write: Write) -> None:
    name = write("""\
        adapter: tiny
        stages:
          a: &a {stage: supervised, task: world, steps: 5}
          b: {<<: *a, steps: 6}
          c: *a
        """)
    recipe = load_recipe(name)
    assert [recipe.stage(stage).steps for stage in "abc"] == [5, 6, 5]


def test_a_place_is_where_it_was_written(pipeline: str) -> None:
    recipe = load_recipe(pipeline, ["stages.student.timesteps.with.count=3"])
    assert recipe.at(("stages", "teacher", "adapter")) == "recipe.yaml:2: adapter"
    assert recipe.at(("stages", "teacher", "sampling", "steps")) == "recipe.yaml:4: sampling.steps"
    assert recipe.at(("stages", "teacher", "sampling", "batch")) == "recipe.yaml:12: stages.teacher.sampling.batch"
    assert recipe.at(("stages", "teacher", "objective")) == "recipe.yaml:9: stages.teacher.objective"
    assert recipe.at(("stages", "student", "timesteps")) == "command line: stages.student.timesteps"


def test_the_schema_knows_every_kind_of_stage_and_both_forms_of_a_reference() -> None:
    schema = recipe_schema()
    definitions = schema["$defs"]
    assert set(schema["properties"]["stages"]["additionalProperties"]["discriminator"]["mapping"]) == {
        "curate", "calibrate", "rl", "distill", "supervised", "merge", "rate", "judge-fit", "evaluate", "export",
    }  # fmt: skip
    assert definitions["RLStage"]["required"] == ["stage"]  # the rest may come from the top
    assert definitions["DistillStage"]["required"] == ["stage", "teachers"]
    assert [form["type"] for form in definitions["Ref"]["anyOf"]] == ["string", "object"]
    assert "with" in definitions["Ref"]["anyOf"][1]["properties"]
    assert json.loads(json.dumps(schema)) == schema


def test_every_key_of_the_schema_is_accepted_by_the_recipe(pipeline: str) -> None:
    schema = recipe_schema()
    assert set(load_recipe(pipeline).model_dump(by_alias=True)) == set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_guidance_at_the_top_is_not_that_of_a_distill_stage(pipeline: str) -> None:
    recipe = load_recipe(pipeline, ["guidance={use: rollout-only, with: {scale: 2.0}}"])
    for stage in ("pick", "teacher", "compare"):
        assert recipe.stage(stage).guidance == Ref(use="rollout-only", with_={"scale": 2.0})
    assert recipe.stage("student").guidance == Ref(use="teacher-only")
    assert recipe.at(("stages", "student", "guidance")) == "recipe.yaml:13: stages.student.guidance"
    assert recipe.at(("stages", "teacher", "guidance")) == "command line: guidance"


def test_an_anchor_inside_of_itself_is_refused(write: Write) -> None:
    assert message(write("stages: &a\n  b: *a\n")) == "recipe.yaml: an anchor stands inside of what it names"


def test_the_baseline_is_one_of_the_models(pipeline: str) -> None:
    assert message(pipeline, "stages.compare.models=[teacher, student]") == (
        "recipe.yaml:16: stages.compare: 'baseline' is 'base', which is not among 'models', so there would be nothing "
        "to compare with. Add it to 'models', or make one of them the baseline: teacher, student"
    )
    kept = load_recipe(pipeline, ["stages.compare.models=[teacher, student]", "stages.compare.baseline=teacher"])
    assert kept.stage("compare").baseline == "teacher"


def test_the_base_cannot_be_exported(pipeline: str) -> None:
    assert message(pipeline, "stages.out.model=base") == (
        "command line: stages.out.model: 'base' is what the adapter loads, untrained; a model here is a stage of kind "
        "rl, distill, supervised or merge. There is: student, teacher."
    )


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_schedule_needs_steps_after_the_warm_up(pipeline: str, stage: str) -> None:
    few = [f"stages.{stage}.steps=5", f"stages.{stage}.optimizer={{warmup: 5, schedule: cosine}}"]
    assert message(pipeline, *few).endswith(
        f"stages.{stage}: optimizer.schedule cosine goes down after the warm-up of 5, but the stage has only 5 "
        "optimiser steps. Take a smaller warmup, or schedule constant"
    )
    assert load_recipe(pipeline, [*few, f"stages.{stage}.steps=6"])
    assert load_recipe(pipeline, [*few, f"stages.{stage}.optimizer.schedule=constant"])


def test_updates_of_a_round_count_as_optimiser_steps(pipeline: str) -> None:
    few = ["stages.teacher.steps=5", "stages.teacher.optimizer={warmup: 5, schedule: linear}"]
    assert load_recipe(pipeline, [*few, "stages.teacher.updates_per_step=2"])


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_devices(pipeline: str, device: str) -> None:
    assert load_recipe(pipeline, [f"engine.device={device}"]).engine.device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU"])
def test_devices_that_are_none(pipeline: str, device: str) -> None:
    assert message(pipeline, f"engine.device='{device}'") == (
        f"command line: engine.device: no device is called '{device}'. Use auto, cpu, cuda or cuda:N, as in cuda:1"
    )


@pytest.mark.parametrize("betas", ["[1, 0.9]", "[0.9, 1.0]"])
def test_a_mean_that_never_moves_is_refused(pipeline: str, betas: str) -> None:
    assert "give less than 1 (got 1" in message(pipeline, f"optimizer.betas={betas}")


def test_what_a_base_model_learns_from_is_no_test_where_there_are_others(write: Write) -> None:
    lines = """\
        adapter: tiny
        stages:
          warm: {stage: supervised, task: pictures}
          judge: {stage: evaluate, models: [base, warm], evaluators: [gold]}
        """
    assert load_recipe(write(lines)).tasks_of("judge") == {"warm": Ref(use="pictures")}
    both = [
        "stages.pick={stage: curate, task: world, rewards: [good]}",
        "stages.learn={stage: rl, prompts: pick, rewards: [good]}",
    ]
    assert load_recipe("recipe.yaml", both).tasks_of("judge") == {"pick": Ref(use="world")}


def test_a_shipped_recipe_is_found_by_its_name_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = find_recipe(Path("tinyworld"))
    assert shipped.is_file()
    assert shipped.name == "tinyworld.yaml"
    assert find_recipe(Path("recipes/tinyworld.yaml")) == shipped
    assert find_recipe(Path("elsewhere/tinyworld.yaml")) == Path("elsewhere/tinyworld.yaml")
    own = tmp_path / "tinyworld"
    own.write_text("stages: {}")
    assert find_recipe(Path("tinyworld")) == Path("tinyworld"), "a file of one's own comes first"
    with pytest.raises(RecipeError, match="Did you mean 'tinyworld'"):
        load_recipe(Path("tinywrld"))
