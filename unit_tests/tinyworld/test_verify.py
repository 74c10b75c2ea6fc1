from dataclasses import replace
from threading import Thread

import numpy as np
import pytest
import torch

from velatura.plugins.tinyworld.render import render
from velatura.plugins.tinyworld.scenes import NAMES, Face, Request, Scene, Step, Thing, request_of
from velatura.plugins.tinyworld.task import TinyWorld, TinyWorldOptions
from velatura.plugins.tinyworld.verify import Judge, verify

RED = Thing(colour="red", shape="circle", cell=0)
BLUE = Thing(colour="blue", shape="square", cell=1)


def shapes(*things, background="white", **rest):
    return Request(category="pair", text="", target=Scene(background=background, things=things), **rest)


def portrait(name="alice", expression="smiling", background="white"):
    face = Face(identity=NAMES[name], expression=expression)
    return Request(category="portrait", text="", target=Scene(background=background, face=face), name=name)


def edit(step, source):
    return Request(category=step.kind, text=step.text, target=step.apply(source), source=source, steps=(step,))


def judged(scene, request):
    return verify(render(scene)[None], [request])[0]


def lowered(scene, request):
    return {name for name, credit in judged(scene, request).checks.items() if credit < 0.999}


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_the_truth_is_right(task):
    prompts = list(TinyWorld(TinyWorldOptions(task=task, eval_count=420, targets=True)).prompts("eval"))
    verdicts = verify(torch.stack([p.target for p in prompts]).numpy(), [request_of(p) for p in prompts])
    assert all(verdict.strict for verdict in verdicts)
    assert min(verdict.soft for verdict in verdicts) > 0.99
    assert min(verdict.clean for verdict in verdicts) == 1


@pytest.mark.parametrize(
    ("picture", "wrong"),
    [
        ((replace(RED, colour="green"), BLUE), {"colour"}),
        ((replace(RED, shape="triangle"), BLUE), {"shape"}),
        ((RED, BLUE, Thing(colour="yellow", shape="circle", cell=3)), {"count"}),
        ((replace(RED, colour="blue"), replace(BLUE, colour="red")), {"colour"}),
        ((RED, BLUE), set()),
        ((replace(RED, cell=3), replace(BLUE, cell=2)), set()),
    ],
    ids=["colour", "shape", "one too many", "colours swapped", "right", "elsewhere"],
)
def test_a_wrong_attribute_lowers_exactly_its_check(picture, wrong):
    request = shapes(RED, BLUE)
    scene = Scene(background="white", things=picture)
    assert lowered(scene, request) == wrong
    assert judged(scene, request).strict == (not wrong)


def test_the_wrong_background_lowers_only_the_background():
    scene = Scene(background="black", things=(RED, BLUE))
    assert lowered(scene, shapes(RED, BLUE)) == {"background"}


def test_a_missing_thing_lowers_colour_shape_and_count_by_half():
    verdict = judged(Scene(background="white", things=(RED,)), shapes(RED, BLUE))
    assert verdict.checks == pytest.approx({"colour": 0.5, "shape": 0.5, "count": 0.5, "background": 1})
    assert verdict.soft == pytest.approx(0.625)


@pytest.mark.parametrize(("relation", "right"), [("left of", 1), ("right of", 0), ("above", 0), ("below", 0)])
def test_a_relation_is_where_the_first_lies_to_the_second(relation, right):
    request = shapes(RED, BLUE, relation=relation)
    assert judged(request.target, request).checks["relation"] == right


def test_a_filled_shape_is_no_outline_and_an_outline_no_filled_shape():
    outlined = replace(RED, outlined=True)
    assert lowered(Scene(background="white", things=(RED,)), shapes(outlined)) == {"style"}
    assert lowered(Scene(background="white", things=(outlined,)), shapes(RED)) == {"shape"}


@pytest.mark.parametrize(
    ("other", "wrong"),
    [
        (portrait(), set()),
        (portrait(expression="sad"), {"expression"}),
        (portrait(background="black"), {"background"}),
        (portrait("bob"), {"identity"}),
    ],
    ids=["right", "expression", "background", "somebody else"],
)
def test_a_wrong_portrait_lowers_exactly_its_check(other, wrong):
    assert lowered(other.target, portrait()) == wrong


def test_somebody_else_is_right_but_for_the_name():
    verdict = judged(portrait("bob").target, portrait("alice"))
    assert verdict.identity == 0
    assert verdict.nameless == pytest.approx(1)
    assert verdict.nameless_strict
    assert not verdict.strict


def test_noise_is_nobody():
    noise = np.random.default_rng(0).random((1, 3, 24, 24), dtype=np.float32)
    verdict = verify(noise, [portrait()])[0]
    assert verdict.identity == 0
    assert verdict.face < 0.05
    assert verdict.clean < 0.5


def test_names_do_not_exist_for_shapes():
    verdict = judged(Scene(background="white", things=(RED,)), shapes(RED))
    assert (verdict.identity, verdict.face, verdict.expression, verdict.instruction) == (None,) * 4


SOURCE = Scene(background="white", things=(RED, BLUE))
PERSON = Scene(background="white", face=Face(identity=NAMES["alice"], expression="sad"))
STEPS = [
    (SOURCE, Step(kind="recolour", thing=RED, value="green")),
    (SOURCE, Step(kind="remove", thing=BLUE)),
    (SOURCE, Step(kind="add", thing=Thing(colour="yellow", shape="triangle", cell=2))),
    (SOURCE, Step(kind="background", value="black")),
    (PERSON, Step(kind="expression", value="smiling")),
    (PERSON, Step(kind="hair", value="pink")),
    (PERSON, Step(kind="background", value="black")),
]


@pytest.mark.parametrize(("source", "step"), STEPS, ids=[f"{step.kind} {i}" for i, (_, step) in enumerate(STEPS)])
def test_leaving_the_source_as_it_is_preserves_all_and_does_nothing(source, step):
    verdict = judged(source, edit(step, source))
    assert verdict.preservation == 1
    assert verdict.instruction < 0.05
    assert not verdict.strict


def test_an_added_thing_may_lie_in_any_free_cell():
    request = edit(STEPS[2][1], SOURCE)
    elsewhere = replace(request.target, things=(RED, BLUE, Thing(colour="yellow", shape="triangle", cell=3)))
    assert judged(elsewhere, request).strict


def test_one_thing_was_to_be_added():
    request = edit(STEPS[2][1], SOURCE)
    twice = replace(request.target, things=(*request.target.things, Thing(colour="yellow", shape="triangle", cell=3)))
    assert judged(twice, request).instruction == pytest.approx(0.5, abs=0.01)
    assert not judged(twice, request).strict


def test_what_was_not_removed_is_not_taken_for_something_added():
    add, remove = STEPS[2][1], Step(kind="remove", thing=BLUE)
    target = remove.apply(add.apply(SOURCE))
    request = replace(edit(add, SOURCE), target=target, steps=(add, remove), category="two-step")
    assert judged(add.apply(SOURCE), request).checks["add"] == 1


def test_outlines_are_wanted_of_the_thing_that_is_asked_for():
    outlined, filled = replace(RED, outlined=True), BLUE
    request = shapes(outlined, filled)
    assert judged(Scene(background="white", things=(outlined, filled)), request).strict
    swapped = Scene(background="white", things=(RED, replace(BLUE, outlined=True)))
    assert judged(swapped, request).checks["style"] == 0


def test_preservation_is_exp_of_the_error_on_untouched_pixels():
    request = edit(Step(kind="recolour", thing=RED, value="green"), SOURCE)
    picture = render(request.target) * np.float32(0.9)
    mask = (render(SOURCE) == render(request.target)).all(0)
    error = ((picture - render(SOURCE))[:, mask] ** 2).mean()
    assert verify(picture[None], [request])[0].preservation == pytest.approx(np.exp(-error / 0.02), rel=1e-5)


def test_a_moved_bystander_is_not_preserved():
    request = edit(Step(kind="recolour", thing=RED, value="green"), SOURCE)
    moved = replace(request.target, things=(request.target.things[0], replace(BLUE, cell=3)))
    verdict = judged(moved, request)
    assert verdict.instruction == 1
    assert verdict.preservation < 0.1
    assert not verdict.strict


def test_recoloured_hair_is_still_the_same_person():
    request = edit(Step(kind="hair", value="pink"), PERSON)
    assert judged(request.target, request).identity == 1
    # Left undone it is the same person as well: that is the instruction's business.
    assert judged(PERSON, request).identity == 1


def test_another_persons_face_is_not_the_same_person():
    request = edit(Step(kind="expression", value="smiling"), PERSON)
    verdict = judged(portrait("bob", "smiling").target, request)
    assert (verdict.identity, verdict.strict) == (0, False)
    assert verdict.instruction == pytest.approx(1, abs=1e-3)


def test_half_of_two_steps_is_half_an_instruction():
    steps = (Step(kind="recolour", thing=RED, value="green"), Step(kind="remove", thing=BLUE))
    half = steps[0].apply(SOURCE)
    request = Request(category="two-step", text="", target=steps[1].apply(half), source=SOURCE, steps=steps)
    assert judged(half, request).instruction == pytest.approx(0.5)


def test_two_steps_of_one_kind_are_both_checked():
    steps = (Step(kind="remove", thing=RED), Step(kind="remove", thing=BLUE))
    empty = Scene(background="white")
    request = Request(category="two-step", text="", target=empty, source=SOURCE, steps=steps)
    verdict = judged(empty, request)
    assert {"remove", "remove 2"} <= set(verdict.checks)
    assert verdict.strict


def test_a_verdict_does_not_depend_on_the_rest_of_the_batch():
    prompts = list(TinyWorld(TinyWorldOptions(task="both", eval_count=52, targets=True)).prompts("eval"))
    noise = torch.randn(52, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    pictures = (torch.stack([p.target for p in prompts]) + 0.15 * noise).clamp(0, 1).numpy()
    requests = [request_of(p) for p in prompts]
    together = verify(pictures, requests)
    for row in range(0, 52, 5):
        alone = verify(pictures[row : row + 1], requests[row : row + 1])[0]
        assert alone.soft == pytest.approx(together[row].soft, abs=1e-4)  # float32 matrix product
        assert alone.strict == together[row].strict


def test_a_picture_is_verified_once_for_all_threads():
    judge = Judge()
    prompts = list(TinyWorld(TinyWorldOptions(eval_count=48, targets=True)).prompts("eval"))
    images, requests = [p.target for p in prompts], [request_of(p) for p in prompts]
    answers = []
    threads = [Thread(target=lambda: answers.append(judge.verdicts(images, requests))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert judge.verified == len(set(zip([i.numpy().tobytes() for i in images], requests, strict=True)))
    assert all(answer == verify(torch.stack(images).numpy(), requests) for answer in answers)


def test_the_memory_tells_pictures_and_requests_apart():
    judge = Judge()
    red, blue = (torch.from_numpy(render(Scene(background="white", things=(thing,)))) for thing in (RED, BLUE))
    verdicts = judge.verdicts([red, red, blue, blue], [shapes(RED), shapes(BLUE), shapes(RED), shapes(BLUE)])
    assert [verdict.strict for verdict in verdicts] == [True, False, False, True]


def test_the_memory_forgets_what_was_asked_for_longest_ago():
    judge = Judge(capacity=2)
    requests = [shapes(RED), shapes(BLUE), shapes(RED, BLUE)]
    images = [torch.from_numpy(render(request.target)) for request in requests]
    judge.verdicts(images, requests)
    judge.verdicts(images[1:], requests[1:])
    assert judge.verified == 3
    judge.verdicts(images[:1], requests[:1])
    assert judge.verified == 4
