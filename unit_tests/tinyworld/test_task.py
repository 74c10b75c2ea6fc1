import pickle
import random
import time

import pytest
import torch
from pydantic import ValidationError

from velatura.plugins.tinyworld import words
from velatura.plugins.tinyworld.grammar import EDIT_CATEGORIES, T2I_CATEGORIES, draw_edit, edit_split, wishes
from velatura.plugins.tinyworld.render import render
from velatura.plugins.tinyworld.scenes import NAMES, Thing, request_of
from velatura.plugins.tinyworld.task import TinyWorld, TinyWorldOptions
from velatura.plugins.tinyworld.verify import verify


def prompts(split="train", **options):
    return TinyWorld(TinyWorldOptions(**options)).prompts(split)


def test_no_meaning_is_in_both_splits():
    for category in T2I_CATEGORIES:
        train, held_out = ({w.meaning for w in wishes(category, split)} for split in ("train", "eval"))
        assert train.isdisjoint(held_out)
        assert 0.15 < len(held_out) / (len(held_out) + len(train)) < 0.25


def test_a_relation_is_held_out_together_with_its_mirror():
    held_out = {wish.text for wish in wishes("relation", "eval")}
    for wish in wishes("relation", "eval"):
        if wish.relation == "left of":
            one, other = wish.things
            assert f"a {other.noun} right of a {one.noun} on {wish.background}" in held_out


def test_a_pair_is_held_out_in_either_order():
    held_out = {wish.text for wish in wishes("pair", "eval")}
    for wish in wishes("pair", "eval"):
        one, other = wish.things
        assert f"a {other.noun} and a {one.noun} on {wish.background}" in held_out


def test_every_name_colour_and_shape_can_be_learnt():
    train = " ".join(wish.text for category in T2I_CATEGORIES for wish in wishes(category, "train")).split()
    edit_words = {"make", "the", "remove", "add", "give", "person", "hair", "brown", "orange", "pink", "background"}
    assert set(words.VOCABULARY) - set(train) <= edit_words
    assert set(NAMES) <= set(train)


def test_edits_of_a_split_belong_to_it():
    for split in ("train", "eval"):
        for prompt in prompts(split, task="edit", count=140, eval_count=140):
            request = request_of(prompt)
            assert edit_split(request.source, request.steps) == split


def test_prompt_i_is_always_the_same():
    one, other = (prompts(task="both", targets=True)[77] for _ in range(2))
    assert (one.id, one.text, one.metadata) == (other.id, other.text, other.metadata)
    assert torch.equal(one.target, other.target)


def test_another_seed_draws_other_prompts():
    assert [p.text for p in prompts(seed=0)[:24]] != [p.text for p in prompts(seed=1)[:24]]


def test_two_million_prompts_cost_nothing_until_looked_at():
    begin = time.process_time()
    many = prompts(count=2_000_000, targets=True)
    assert len(many) == 2_000_000
    assert many[-1].id == "tinyworld/t2i/train/1999999"
    assert time.process_time() - begin < 0.5


def test_an_index_out_of_range_is_refused():
    with pytest.raises(IndexError):
        prompts(count=4)[4]


def test_every_prefix_is_balanced_over_categories():
    some = [p.category for p in prompts("eval", task="both")[:26]]
    assert all(some.count(category) == 2 for category in T2I_CATEGORIES + EDIT_CATEGORIES)


def test_a_category_named_twice_comes_twice_as_often():
    some = [p.category for p in prompts(categories=("pair", "pair", "count"))[:30]]
    assert (some.count("pair"), some.count("count")) == (20, 10)


def test_a_category_named_twice_goes_through_its_texts_twice_as_fast():
    twice = [p.text for p in prompts(categories=("pair", "pair"))[:24]]
    assert twice == [p.text for p in prompts(categories=("pair",))[:24]]
    assert len(set(twice)) == 24


def test_mixed_pictures_come_only_where_they_are_named():
    assert "mixed" not in {p.category for p in prompts(task="both")[:200]}
    some = prompts(categories=("mixed",), targets=True, wrong_captions=0, degraded=0)[:200]
    assert all("outlined" in p.text for p in some)
    verdicts = verify(torch.stack([p.target for p in some]).numpy(), [request_of(p) for p in some])
    assert all(verdict.strict for verdict in verdicts)


@pytest.mark.parametrize("categories", [("piar",), (), ("hair",)])
def test_categories_that_do_not_fit_the_task_are_refused(categories):
    with pytest.raises(ValidationError, match=r"categor"):
        TinyWorldOptions(task="t2i", categories=categories)


def test_a_prompt_has_a_target_only_when_asked():
    assert prompts()[0].target is None
    assert prompts(targets=True)[0].target.shape == (3, 24, 24)


def test_a_share_of_train_targets_is_wrong_and_another_is_degraded():
    options = {"count": 1200, "targets": True}
    clean = prompts(wrong_captions=0, degraded=0, **options)
    noisy = prompts(wrong_captions=0.25, degraded=0, **options)
    share = sum(not torch.equal(a.target, b.target) for a, b in zip(clean, noisy, strict=True)) / 1200
    assert share == pytest.approx(0.25, abs=0.05)  # 4 standard errors
    flawed = prompts(wrong_captions=0, degraded=1, **options)
    assert not any(torch.equal(a.target, b.target) for a, b in zip(clean[:60], flawed[:60], strict=True))
    assert all(p.target.min() >= 0 and p.target.max() <= 1 for p in flawed[:60])


def test_held_out_targets_are_never_falsified():
    for prompt in prompts("eval", task="both", targets=True, wrong_captions=1, degraded=1)[:26]:
        assert torch.equal(prompt.target, torch.from_numpy(render(request_of(prompt).target)))


def test_an_edit_changes_nothing_but_what_it_names():
    request = draw_edit("recolour", "train", random.Random(1))
    changed = [(a, b) for a, b in zip(request.source.things, request.target.things, strict=True) if a != b]
    assert len(changed) == 1
    before, after = changed[0]
    assert (before.shape, before.cell, before.down, before.right) == (after.shape, after.cell, after.down, after.right)


def test_no_instruction_is_ambiguous():
    rng = random.Random(0)
    for _ in range(2000):
        request = draw_edit("two-step", "train", rng)
        nouns = [thing.noun for thing in request.source.things]
        assert len(set(nouns)) == len(nouns)
        added = [step.thing.noun for step in request.steps if step.kind == "add"]
        assert not set(added) & set(nouns)
        assert len({thing.cell for thing in request.target.things}) == len(request.target.things)


def test_prompts_can_be_sent_to_another_process():
    prompt = prompts(task="edit")[0]
    assert request_of(pickle.loads(pickle.dumps(prompt))) == request_of(prompt)


def test_rendering_gives_a_fresh_array_each_time():
    scene = request_of(prompts()[5]).target
    render(scene)[:] = 7
    assert render(scene).max() <= 1


def test_an_outlined_thing_says_so():
    assert Thing(colour="red", shape="circle", outlined=True).noun == "outlined red circle"
