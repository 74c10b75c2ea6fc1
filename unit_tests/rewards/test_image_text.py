from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loguru import logger
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import tiny_clip

from velatura.api import Context, Prompt, Sample, Status, VelaturaError
from velatura.rewards.dual_encoder import to_bytes
from velatura.rewards.image_text import ClipMetric, ClipScore, ClipScoreOptions, PickScore, PickScoreOptions

TEXTS = ("a red fox in the snow", "two blue birds", "a red fox in the snow", "An OLD map")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    tiny_clip.clip(base / "clip")
    tiny_clip.siglip(base / "siglip")
    return base


def context(base):
    return Context(device=torch.device("cpu"), cache=base, seed=0, base=base)


def samples(texts=TEXTS, sides=(48, 40)):
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(
            prompt=Prompt(id=str(i), text=text, task="t2i"), image=torch.rand(3, *sides, generator=generator), seed=i
        )
        for i, text in enumerate(texts)
    ]


def ready(component, options, base):
    made = component(options)
    made.setup(context(base))
    return made


def pickscore(base, **options):
    return ready(PickScore, PickScoreOptions(path="clip", **options), base)


def clip_score(base, path, **options):
    return ready(ClipScore, ClipScoreOptions(path=path, **options), base)


def stock(path, shown):
    """What the stock model and processor say of each picture and its own prompt: logits and cosine, [B] each."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(path).eval()
    pictures = [Image.fromarray(to_bytes(sample.image)) for sample in shown]
    pixels = AutoImageProcessor.from_pretrained(path, backend="pil")(pictures, return_tensors="pt")
    words, tokenizer = [sample.prompt.text for sample in shown], AutoTokenizer.from_pretrained(path)
    if path.name == "siglip":
        ids = tokenizer([w.lower() for w in words], padding="max_length", max_length=64, return_tensors="pt")
        tokens = {"input_ids": ids["input_ids"]}
    else:
        tokens = dict(tokenizer(words, padding=True, return_tensors="pt"))
    with torch.no_grad():
        seen = model(**tokens, **pixels)
    return seen.logits_per_image.diag(), (seen.image_embeds * seen.text_embeds).sum(-1)


def test_pickscore_is_the_logit_of_the_stock_model(folder):
    logits, _ = stock(folder / "clip", samples())
    scores = pickscore(folder).score(samples())
    assert set(scores.status) == {Status.OK}
    assert scores.values.std() > 0.01
    torch.testing.assert_close(scores.values, logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(pickscore(folder, divisor=26).score(samples()).values, logits / 26, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("path", ["clip", "siglip"])
def test_clip_score_is_a_hundred_times_the_cosine_of_the_stock_model(folder, path):
    _, cosines = stock(folder / path, samples())
    scores = clip_score(folder, path).score(samples())
    assert scores.values.std() > 0.01
    torch.testing.assert_close(scores.values / 100, cosines, atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", ["clip", "siglip"])
def test_scores_do_not_depend_on_order_company_or_batch(folder, path):
    shown = samples()
    together = clip_score(folder, path).score(shown).values
    backwards = clip_score(folder, path, batch=3).score(shown[::-1]).values.flip(0)
    alone = torch.cat([clip_score(folder, path).score([sample]).values for sample in shown])
    torch.testing.assert_close(backwards, together, atol=1e-4, rtol=0)
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)


def test_the_text_decides(folder):
    (sample, *_) = samples()
    other = replace(sample, prompt=replace(sample.prompt, text="nothing of the kind"))
    first, second = pickscore(folder).score([sample, other]).values
    assert abs(first - second) > 0.01


def test_a_picture_that_is_not_finite_has_no_score_and_spoils_no_other(folder):
    shown = samples()
    spoilt = [shown[0], replace(shown[1], image=torch.full((3, 48, 40), math.nan)), *shown[2:]]
    scores = pickscore(folder).score(spoilt)
    assert scores.status == (Status.OK, Status.FAILED, Status.OK, Status.OK)
    expected = pickscore(folder).score(shown).values
    torch.testing.assert_close(scores.values[[0, 2, 3]], expected[[0, 2, 3]], atol=1e-5, rtol=0)


def test_edits_are_not_judged(folder):
    edit = Prompt(id="0", text="make it blue", task="edit", sources=(torch.zeros(3, 8, 8),))
    assert not PickScore(PickScoreOptions()).applies(edit)
    assert not ClipScore(ClipScoreOptions()).applies(edit)
    shown = samples()
    shown[1] = replace(shown[1], prompt=edit)
    column = ready(ClipMetric, ClipScoreOptions(path="clip"), folder).evaluate(shown)["clip_score"]
    expected = clip_score(folder, "clip").score(shown).values
    assert column[1] is None
    assert column[0] == pytest.approx(float(expected[0]), abs=1e-4)


def test_what_is_too_long_is_cut_and_said_once(folder):
    said = []
    handler = logger.add(lambda message: said.append(str(message)), level="WARNING", format="{message}")
    reward, text = pickscore(folder), "word " * 40
    try:
        short = reward.score(samples(["word " * 12])).values
        cut = [reward.score(samples([text + ending])).values for ending in ("", "or more")]
    finally:
        logger.remove(handler)
    (line,) = said
    assert "'pickscore' reads 77 tokens" in line
    assert text[:80] in line
    assert short != cut[0]
    assert cut[0] == cut[1]


def test_bf16_is_close_to_fp32(folder):
    exact, rough = (clip_score(folder, "clip", dtype=kind).score(samples()).values for kind in ("fp32", "bf16"))
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(rough, exact, atol=3.0, rtol=0)


def test_a_wrong_path_is_answered_in_one_message(folder):
    with pytest.raises(
        VelaturaError, match="'clip-score' finds no model in '/gone/clipp': it is neither a folder that has one"
    ):
        clip_score(folder, "/gone/clipp")


def test_a_model_of_another_kind_is_refused(folder, tmp_path):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(VelaturaError, match="model of type 'bert', and 'clip-score' takes clip and siglip"):
        clip_score(folder, str(tmp_path))


def test_a_folder_that_lost_its_tokenizer_is_refused_instead_of_read_as_nonsense(folder, tmp_path):
    model = tiny_clip.clip(tmp_path / "whole")
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(VelaturaError, match=r"the tokenizer of '.*whole' has 2 words, and the network of .* knows 54"):
        clip_score(folder, str(model))
    apart = clip_score(folder, str(model), processor=str(folder / "clip")).score(samples()).values
    torch.testing.assert_close(apart, clip_score(folder, "clip").score(samples()).values, atol=1e-5, rtol=0)
