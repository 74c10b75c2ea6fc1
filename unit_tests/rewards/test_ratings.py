from __future__ import annotations

import hashlib
import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import tiny_raters

from velatura.api import Context, Prompt, Sample, Status, VelaturaError
from velatura.plugins.adapters.processors import image_only
from velatura.rewards import ratings
from velatura.rewards.dual_encoder import to_bytes
from velatura.rewards.ratings import EditReward, EditRewardOptions, HpsV3, HpsV3Options

TEXTS = ("a red fox", "two <|Reward|> birds in snow", "map")
SMALL = {"dtype": "fp32", "device": "cpu", "pixels": 56 * 56}


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    base = tmp_path_factory.mktemp("hpsv3")
    torch.manual_seed(9)
    heads = {"rm_head.": tiny_raters.head()}
    net = tiny_raters.save(base, "Qwen2VLProcessor", heads, "HPSv3.safetensors")
    (base / "asked.py").write_text(tiny_raters.QUESTIONS)
    return base, net, heads


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    base = tmp_path_factory.mktemp("editreward")
    torch.manual_seed(10)
    heads = {f"rm_heads.head_{i}.": tiny_raters.head() for i in range(2)}
    net = tiny_raters.save(base, "Qwen2_5_VLProcessor", heads, "model.safetensors")
    for name in ("prompts.py", "data_collator_qwen_edit.py"):
        (base / name).write_text(tiny_raters.QUESTIONS)
    return base, net, heads


def ready(component, options, base):
    made = component(options)
    made.setup(Context(device=torch.device("cpu"), cache=base, seed=0, base=base))
    return made


def hpsv3(folder, **options):
    given = {"path": "HPSv3.safetensors", "base": "base", "prompts": "asked.py"} | SMALL | options
    return ready(HpsV3, HpsV3Options(**given), folder)


def editreward(folder, **options):
    given = {"path": ".", "base": "base", "prompts": "."} | SMALL | options
    return ready(EditReward, EditRewardOptions(**given), folder)


def samples(sources=0):
    generator = torch.Generator().manual_seed(0)
    given = tuple(torch.rand(3, 30, 30, generator=generator) for _ in range(sources))
    return [
        Sample(
            prompt=Prompt(id=str(i), text=text, task="edit" if sources else "t2i", sources=given),
            image=torch.rand(3, 40, 60, generator=generator), seed=i,
        )
        for i, text in enumerate(TEXTS)
    ]  # fmt: skip


def plain_answer(base, family, net, head, pictures, text):
    """[2], by plain calls: one question at a time, words and pictures put together, positions counted one by one."""
    processor = image_only(family).from_pretrained(base / "base")
    word = len(processor.tokenizer)
    shown = []
    for picture in pictures:
        height, width = picture.shape[-2:]
        scale = math.sqrt(56 * 56 / (height * width))
        sides = [max(28, math.floor(side * scale / 28) * 28 if scale < 1 else math.ceil(side * scale / 28) * 28)
                 for side in (width, height)]  # fmt: skip
        shown.append(Image.fromarray(to_bytes(picture)).resize(sides, Image.Resampling.BICUBIC))
    before, after = text.split("<|Reward|>")
    marks = "<|vision_start|><|image_pad|><|vision_end|>" * len(shown)
    inputs = processor(
        text=[f"<|im_start|>user\n{marks}{before}"], images=[shown], return_tensors="pt", do_resize=False
    )
    end = processor.tokenizer(f"{after}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")["input_ids"]
    ids = torch.cat([inputs["input_ids"], torch.tensor([[word]]), end], 1)
    with torch.no_grad():
        seen = net.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        words = net.get_input_embeddings()(ids)
        is_picture = (ids == net.config.image_token_id)[..., None].expand_as(words)
        words = words.masked_scatter(is_picture, torch.cat(list(seen)))
        states = net.model.language_model(inputs_embeds=words).last_hidden_state
        return head(states[ids == word])[0]


def test_hpsv3_is_the_head_on_the_state_of_the_reward_token(hps):
    base, net, heads = hps
    expected = []
    for sample in samples():
        asked = f"\nHow good is it?\nTextual prompt - {sample.prompt.text}\n"
        asked = asked.replace("<|Reward|>", "< |Reward| >") + "\nRate: <|Reward|>\n\nEND\n"
        expected.append(plain_answer(base, "Qwen2VLProcessor", net, heads["rm_head."], (sample.image,), asked))
    expected = torch.stack(expected)
    scores = hpsv3(base, batch=2).score(samples())
    assert scores.status == (Status.OK,) * 3
    assert expected[:, 0].std() > 1e-3
    torch.testing.assert_close(scores.values, expected[:, 0], atol=2e-5, rtol=0)
    assert scores.notes[0] == f"mean {expected[0, 0]:.3f}, deviation {expected[0, 1].exp():.3f}"


def test_hpsv3_reads_its_question_from_the_authors_package_without_running_it(hps, tmp_path, monkeypatch):
    base, _, _ = hps
    (tmp_path / "hpsv3" / "dataset").mkdir(parents=True)
    (tmp_path / "hpsv3" / "__init__.py").write_text("raise RuntimeError('imported')")
    file = tmp_path / "hpsv3" / "dataset" / "data_collator_qwen.py"
    file.write_text(tiny_raters.QUESTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(VelaturaError, match=r"reads dataset/data_collator_qwen.py of SHA-256 b0f936e89f8d.*--no-deps"):
        hpsv3(base, prompts=None)
    monkeypatch.setattr(ratings, "HPS_DIGEST", hashlib.sha256(file.read_bytes()).hexdigest())
    values = hpsv3(base, prompts=None).score(samples()).values
    torch.testing.assert_close(values, hpsv3(base).score(samples()).values)


def test_without_the_package_the_command_that_installs_it_is_said(hps, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        VelaturaError, match=r"'hpsv3' needs dataset/data_collator_qwen.py .*: pip install --no-deps hpsv3==1.0.0"
    ):
        hpsv3(hps[0], prompts=None)


def test_editreward_is_the_mean_of_its_two_heads_each_with_its_question(edits):
    base, net, heads = edits
    questions = {"rm_heads.head_0.": "Was it followed?", "rm_heads.head_1.": "How does it look?"}
    expected = {head: [] for head in heads}
    for sample in samples(sources=1):
        text = sample.prompt.text.replace("<|Reward|>", "< |Reward| >")
        for head, question in questions.items():
            asked = f"{question} {text}\nRate: <|Reward|>\n\nEND\n"
            shown = (sample.prompt.sources[0], sample.image)
            expected[head].append(plain_answer(base, "Qwen2_5_VLProcessor", net, heads[head], shown, asked)[0])
    following, quality = (torch.stack(values) for values in expected.values())
    assert abs(float((following - quality).mean())) > 1e-3
    for aspect, wanted in {"mean": (following + quality) / 2, "following": following, "quality": quality}.items():
        scores = editreward(base, aspect=aspect).score(samples(sources=1))
        torch.testing.assert_close(scores.values, wanted, atol=2e-5, rtol=0)


def test_each_judges_its_own_kind_of_prompt(hps):
    shown, edit = samples()[0].prompt, samples(sources=1)[0].prompt
    judge, other = HpsV3(HpsV3Options()), EditReward(EditRewardOptions(prompts="x"))
    assert (judge.applies(shown), judge.applies(edit)) == (True, False)
    assert (other.applies(shown), other.applies(edit)) == (False, True)


def test_a_picture_that_is_not_finite_fails_alone(hps):
    shown = samples()
    spoilt = [replace(shown[0], image=torch.full((3, 8, 8), math.inf)), *shown[1:]]
    judge = hpsv3(hps[0])
    scores = judge.score(spoilt)
    assert scores.status == (Status.FAILED, Status.OK, Status.OK)
    assert scores.notes[0] == ""
    torch.testing.assert_close(scores.values[1:], judge.score(shown).values[1:], atol=2e-5, rtol=0)


def test_a_checkpoint_of_another_judge_is_refused(hps, edits):
    with pytest.raises(
        VelaturaError, match=r"has no head 'rm_head.' of linear layers that ends in two numbers|not those"
    ):
        hpsv3(hps[0], path=str(edits[0] / "model.safetensors"), base=str(edits[0] / "base"))


def test_a_file_without_the_question_is_answered_with_what_it_lacks(hps, tmp_path):
    (tmp_path / "asked.py").write_text("INSTRUCTIONS = 'x'\n")
    with pytest.raises(VelaturaError, match=r"assigns no text to INSTRUCTION. Did you mean 'INSTRUCTIONS'"):
        hpsv3(hps[0], prompts=str(tmp_path / "asked.py"))


@pytest.mark.parametrize(
    ("size", "sides"), [((448, 448), (448, 448)), ((1024, 1024), (448, 448)), ((100, 100), (448, 448)),
                        ((1920, 1080), (588, 336)), ((300, 400), (392, 532))]
)  # fmt: skip
def test_pictures_are_resized_as_qwen_vl_utils_does_between_equal_limits(size, sides):
    from velatura.rewards.reward_token import sides_of

    assert sides_of(size, 28, 256 * 28 * 28) == sides


def test_a_source_that_is_not_finite_costs_its_own_picture(edits):
    first, second, third = samples(sources=1)
    broken = replace(second, prompt=replace(second.prompt, sources=(torch.full((3, 30, 30), math.nan),)))
    scores = editreward(edits[0]).score([first, broken, third])
    assert scores.status == (Status.OK, Status.FAILED, Status.OK)
    assert [bool(note) for note in scores.notes] == [True, False, True]


def test_the_aspect_says_what_is_judged():
    for aspect, dimension in {
        "mean": "edit-instruction", "following": "edit-instruction", "quality": "edit-quality",
    }.items():  # fmt: skip
        assert EditReward(EditRewardOptions(prompts=".", aspect=aspect)).dimension() == dimension
