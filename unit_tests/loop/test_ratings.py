"""Ratings: the file, the splits, and how agreement is measured."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from velatura.core.agreement import agreement, ceiling
from velatura.core.clusters import clusters_of, near_duplicates, normalised, split_lines
from velatura.core.errors import VelaturaError
from velatura.core.ratings import RatingFile, RatingLine

LEVELS = (1, 2, 3, 4, 5)


def write(folder: Path, *lines: Any) -> Path:
    Image.new("RGB", (4, 2), (255, 0, 0)).save(folder / "red.png")
    path = folder / "ratings.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def line(**changes: Any) -> dict[str, Any]:
    return {"image": "red.png", "prompt": "a wall", "dimension": "looks", "ratings": [4, 5]} | changes


def test_lines_of_one_dimension_become_pictures_with_ratings(tmp_path):
    other = line(dimension="words", ratings=[1])
    path = write(tmp_path, line(), "", other, line(sources=["red.png"], truth=0.5, rationale="why"))
    data = RatingFile(path, "looks", LEVELS)
    assert (len(data), data.numbers) == (2, [1, 4])
    first, second = data.rated(0), data.rated(1)
    assert first.sample.image.shape == (3, 2, 4)
    assert first.sample.image[:, 0, 0].tolist() == [1, 0, 0]
    assert (first.mean, first.truth, first.sample.prompt.task) == (4.5, None, "t2i")
    assert (second.truth, second.rationale, second.sample.prompt.task) == (0.5, "why", "edit")
    assert first.sample.prompt.id != second.sample.prompt.id  # another request: it has a source


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{", r"ratings.jsonl:2: this is not JSON"),
        ("[]", r":2: this is a list, not an object. Write a line like"),
        (line(rating=[3]), r":2: rating: no such key. Did you mean 'ratings'"),
        ({"image": "red.png", "prompt": "a"}, r":2: dimension: this key is missing: What was rated"),
        (line(ratings=[]), r":2: ratings: nobody has rated this picture"),
        (line(ratings=[3, 6]), r":2: a rating is 6; the rubric has levels 1 to 5"),
        (line(ratings=["good"]), r":2: ratings.0: give a number \(got 'good'\)"),
        (line(image="blue.png"), r":2: there is no image 'blue.png' in"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path, wrong, message):
    path = write(tmp_path, line(), wrong)
    with pytest.raises(VelaturaError, match=message):
        RatingFile(path, "looks", LEVELS)


def test_a_dimension_or_a_file_that_is_not_there_is_answered_with_the_nearest(tmp_path):
    path = write(tmp_path, line())
    with pytest.raises(VelaturaError, match=r"no line rates 'look'. Did you mean 'looks'"):
        RatingFile(path, "look", LEVELS)
    with pytest.raises(VelaturaError, match=r"no ratings file .*Did you mean 'ratings.jsonl'"):
        RatingFile(tmp_path / "rating.jsonl", "looks", LEVELS)


def rating_line(prompt: str, **more: Any) -> RatingLine:
    return RatingLine(image="red.png", prompt=prompt, dimension="looks", ratings=(3,), **more)


def jaccard(a: str, b: str) -> float:
    one, two = ({t[i : i + 5] for i in range(len(t) - 4)} for t in (a, b))
    return len(one & two) / len(one | two)


def test_near_duplicates_are_those_that_comparing_all_pairs_finds():
    draw = random.Random(4)
    words = ("old house", "river", "stone", "with many", "small windows", "near", "the green", "winter", "light")
    texts = {" ".join(draw.choices(words, k=12)) for _ in range(40)}
    texts |= {text[: -draw.randint(1, 9)] for text in list(texts)}
    known = sorted(texts)
    everything = [(a, b) for b in range(len(known)) for a in range(b) if jaccard(known[a], known[b]) >= 0.8]
    assert near_duplicates(known, 0.8) == sorted(everything)
    assert len(everything) >= 20


def test_punctuation_case_one_letter_sources_and_names_tie_lines_together(tmp_path):
    write(tmp_path, line())
    lines = [
        rating_line("A red fox, in the snow near an old wooden barn at dusk."),
        rating_line("a red fox in the snow near an old wooden  barn at dusk"),
        rating_line("a red fox in the snow near an old wooden barn at dusks"),
        rating_line("a blue whale"), rating_line("ten geese", cluster="x"), rating_line("a cup of tea", cluster="x"),
        rating_line("make it red", sources=("red.png",)), rating_line("remove the dog", sources=("red.png",)),
    ]  # fmt: skip
    a, b, c, whale, geese, tea, red, dog = clusters_of(lines, tmp_path, 0.8)
    assert a == b == c
    assert geese == tea
    assert red == dog
    assert len({a, whale, geese, red}) == 4
    assert normalised("A,  red_fox!") == "a red fox"


def test_splits_are_disjoint_shared_as_asked_and_stable_when_lines_are_added(tmp_path):
    draw = random.Random(1)
    lines = [rating_line(f"{draw.getrandbits(64):x} {draw.getrandbits(64):x}") for _ in range(600) for _ in range(1)]
    lines += lines[:100]
    splits = split_lines(lines, tmp_path, near=0.8, train=0.6, calibration=0.2)
    sides = [{splits.clusters[row] for row in rows} for rows in (splits.train, splits.calibration, splits.test)]
    assert not sides[0] & sides[1]
    assert not sides[1] & sides[2]
    assert not sides[0] & sides[2]
    assert [len(side) / 600 for side in sides] == pytest.approx([0.6, 0.2, 0.2], abs=0.06)  # three sd
    assert sorted((*splits.train, *splits.calibration, *splits.test)) == list(range(700))
    fewer = split_lines(lines[::2], tmp_path, near=0.8, train=0.6, calibration=0.2)
    assert {lines[::2][row].prompt for row in fewer.test} <= {lines[row].prompt for row in splits.test}
    assert fewer.digests()["test"] != splits.digests()["test"]
    assert splits.digests() == split_lines(lines[::-1], tmp_path, near=0.8, train=0.6, calibration=0.2).digests()


def test_pairwise_agreement_compares_within_prompts_and_counts_ties_half():
    marks, target = np.array([1.0, 2, 3, 3, 9]), np.array([1.0, 2, 1, 2, 2])
    found = agreement(marks, target, ["a", "a", "b", "b", "b"], ["a", "a", "b", "b", "b"], bootstrap=0, seed=0)
    # a: (1, 2) right. b: (3, 3) a tie, (3, 9) right, (3, 9) against equal targets: not asked
    assert (found.pairs, found.pairwise, found.clusters) == (3, pytest.approx(2.5 / 3), 2)
    assert found.pairwise_interval is None


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Marks that are right with probability .7 in pairs: 95 % intervals over 60 prompts, 100 times."""
    draw = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        right = draw.random(60) < 0.7
        marks = np.array([value for r in right for value in ((1.0, 2.0) if r else (2.0, 1.0))])
        prompts = [str(i // 2) for i in range(120)]
        found = agreement(marks, np.tile([1.0, 2.0], 60), prompts, prompts, bootstrap=200, seed=trial)
        assert found.pairwise == pytest.approx(right.mean())
        covered += found.pairwise_interval[0] <= 0.7 <= found.pairwise_interval[1]
    assert 87 <= covered <= 100


def test_marks_that_do_not_vary_have_no_rank_correlation():
    found = agreement(np.ones(6), np.arange(6.0), list("aabbcc"), list("aabbcc"), bootstrap=50, seed=0)
    assert (found.spearman, found.spearman_interval, found.pairwise) == (None, None, 0.5)


def test_a_judge_that_knows_the_truth_beats_the_ceiling_of_noisy_raters():
    draw = np.random.default_rng(2)
    truth = draw.normal(size=400)
    ratings = [tuple(value + draw.normal(size=3)) for value in truth]
    prompts = [str(i // 4) for i in range(400)]
    found = ceiling(ratings, truth, prompts, prompts)
    # rater and the mean of two others: correlation 1 / sqrt(2 * 1.5) = .577; the truth and that mean: 1 / sqrt(1.5)
    assert found["rater_spearman"] == pytest.approx(0.56, abs=0.05)
    assert found["judge_spearman"] == pytest.approx(0.80, abs=0.04)
    assert found["judge_pairwise"] > found["rater_pairwise"]
    assert ceiling([(1,), (2,)], truth[:2], ["a", "b"], ["a", "b"]) is None
