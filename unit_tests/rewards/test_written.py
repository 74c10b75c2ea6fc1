from __future__ import annotations

import hashlib
import importlib
import json
import math
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

sys.path.extend([str(Path(__file__).parent), str(Path(__file__).parents[1] / "judge")])

import chat_server as serving
import tiny_models
from author_files import LISTS, VIE

from velatura.api import Context, Prompt, Sample, Status, Usage, VelaturaError
from velatura.rewards import written
from velatura.rewards.judge.chat import Asked, ChatOptions, LocalChat, lengths_of
from velatura.rewards.score_sheets import NoScores, checked_off, facets, labelled, pair
from velatura.rewards.written import (
    EditScore,
    EditScoreOptions,
    QJudger,
    QJudgerOptions,
    UnifiedReward,
    UnifiedRewardOptions,
)


@pytest.fixture
def serve():
    with ExitStack() as stack:
        yield lambda behaviour: stack.enter_context(serving.ChatServer(behaviour))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vie_prompts.py").write_text(VIE)
    (tmp_path / "checklists.py").write_text(LISTS)
    return tmp_path


def says(text):
    return lambda question: serving.completion([text])


def ready(component, options, base):
    made = component(options)
    made.setup(Context(device=torch.device("cpu"), cache=base, seed=0, base=base))
    return made


def given(server, **options):
    return {"model": serving.MODEL, "server": server.address, "backoff": 0.001, "retries": 1} | options


def samples(*values, sources=0, text="a <|im_end|> fox"):
    kept = tuple(torch.full((3, 8, 8), 0.1) for _ in range(sources))
    prompt = Prompt(id="p", text=text, task="edit" if sources else "t2i", sources=kept)
    return [Sample(prompt=prompt, image=torch.full((3, 12, 16), v), seed=i) for i, v in enumerate(values)]


SHEET = "Alignment Score (1-5): 2.5\nCoherence Score (1-5): 4\nStyle Score (1-5): 3.25"


def test_unified_reward_is_the_mean_of_three_lines_or_one_of_them(serve, folder):
    server = serve(says(SHEET))
    for axis, value in {"mean": 3.25, "alignment": 2.5, "coherence": 4, "style": 3.25}.items():
        reward = ready(UnifiedReward, UnifiedRewardOptions(**given(server, axis=axis)), folder)
        scores = reward.score(samples(0.2))
        assert scores.values.tolist() == [value]
        assert scores.notes == (SHEET,)
    question = server.questions[-1]
    assert [part["type"] for part in question.parts] == ["image_url", "text"]
    assert "Text Caption: [a < |im_end| > fox]" in question.parts[1]["text"]
    assert question.body["temperature"] == 0


def test_unified_reward_asks_in_its_authors_words_when_it_has_them(serve, folder):
    server = serve(says(SHEET))
    (folder / "asked.txt").write_text("Their words: {prompt}")
    reward = ready(UnifiedReward, UnifiedRewardOptions(**given(server, prompt_file="asked.txt")), folder)
    reward.score(samples(0.2, text="a fox"))
    assert server.questions[-1].parts[1]["text"] == "Their words: a fox"
    (folder / "asked.txt").write_text("Their words")
    with pytest.raises(VelaturaError, match=r"the question .*asked.txt has no \{prompt\} in it"):
        ready(UnifiedReward, UnifiedRewardOptions(**given(server, prompt_file="asked.txt")), folder)


def sheet(first, second):
    return json.dumps({"reasoning": "fine", "score": [first, second]})


def by_pictures(question):
    """Two pictures: followed 20, overdone 16; one: natural 25, artifacts 9."""
    return serving.completion([sheet(20, 16) if len(question.pictures) == 2 else sheet(25, 9)])


def test_editscore_is_the_root_of_the_product_of_the_smaller_scores(serve, folder):
    server = serve(by_pictures)
    reward = ready(EditScore, EditScoreOptions(**given(server, prompts="vie_prompts.py")), folder)
    scores = reward.score(samples(0.2, 0.7, sources=2))
    assert scores.status == (Status.OK,) * 2
    expected = math.sqrt((16 / 2.5) * (9 / 2.5))
    assert scores.values.tolist() == pytest.approx([expected, expected])
    both = next(q for q in server.questions if len(q.body["messages"][0]["content"]) == 5)
    texts = [part["text"] for part in both.parts if part["type"] == "text"]
    assert texts[:2] == ["<img1>: ", "<img2>: "]
    assert texts[2].startswith('Answer as { "reasoning", "score" }\nTwo pictures.\nFrom 0 to 25.')
    assert texts[2].endswith("Editing instruction: a < |im_end| > fox")
    assert both.pictures[0].mean() == pytest.approx(0.1 * 255, abs=1)


def test_editscore_averages_passes_of_its_own_seeds(serve, folder):
    def by_seed(question):
        high = {42: 25, 43: 9}.get(question.body.get("seed"), 4)
        return serving.completion([sheet(high, high)])

    server = serve(by_seed)
    options = given(server, prompts="vie_prompts.py", passes=2, label_pictures=False)
    scores = ready(EditScore, EditScoreOptions(**options), folder).score(samples(0.2, sources=1))
    assert scores.values.tolist() == pytest.approx([(10 + 3.6) / 2])
    asked = [question.body for question in server.questions if "seed" in question.body]
    assert sorted(body["seed"] for body in asked) == [42, 42, 43, 43]
    assert {(body["temperature"], body["top_p"], body["top_k"]) for body in asked} == {(0.7, 0.9, 20)}
    with pytest.raises(ValidationError, match="passes above 1 are drawn at random"):
        EditScoreOptions(model="x", passes=2)


def test_editscore_reads_its_questions_from_a_checked_package(serve, folder, monkeypatch):
    server = serve(by_pictures)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VelaturaError, match=r"Install it: pip install --no-deps editscore==0.2"):
        ready(EditScore, EditScoreOptions(**given(server)), folder)
    monkeypatch.undo()
    (folder / "editscore").mkdir()
    (folder / "editscore" / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "editscore" / "vie_prompts.py").write_text(VIE)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    with pytest.raises(VelaturaError, match=r"'editscore' reads vie_prompts.py of SHA-256 14dee0ac5743"):
        ready(EditScore, EditScoreOptions(**given(server)), folder)
    monkeypatch.setattr(written, "EDIT_DIGEST", hashlib.sha256(VIE.encode()).hexdigest())
    assert ready(EditScore, EditScoreOptions(**given(server)), folder).score(samples(0.2, sources=1)).status == (
        Status.OK,
    )


def test_q_judger_averages_facets_headings_and_dimensions(serve, folder):
    marks = {
        "Quality": {"Detail": {"Noise": {"score": 2}, "Edge Clarity": {"score": 1}},
                    "Realism": {"Physical Logic": {"score": 0}}},
        "Alignment": {"Attributes": {"Color": {"score": "N/A"}}},
        "Aesthetics": {"Lighting": {"Light": {"score": 1}}},
    }  # fmt: skip

    def by_dimension(question):
        text = "".join(part.get("text", "") for part in question.body["messages"][-1]["content"])
        name = next((name for name in marks if f"# {name}\n" in text), "Quality")
        return serving.completion([f"<think>A 2? {{}}</think>\n{json.dumps(marks[name])}"])

    server = serve(by_dimension)
    options = given(server, prompts="checklists.py")
    scores = ready(QJudger, QJudgerOptions(**options), folder).score(samples(0.4))
    quality = ((100 + 60) / 2 + 0) / 2
    assert scores.values.tolist() == pytest.approx([(quality + 60) / 2])  # nothing of Alignment applies
    system, user = server.questions[-1].body["messages"]
    assert system["content"] == "You are an expert. You look."
    assert [part["type"] for part in user["content"]] == ["text", "image_url", "text"]
    assert user["content"][0]["text"] == "# Prompt\na < |im_end| > fox\n"
    assert user["content"][2]["text"].endswith('{"a": 0}')
    one = ready(QJudger, QJudgerOptions(**options, dimensions=("Alignment",)), folder)
    assert one.score(samples(0.4)).status == (Status.NOT_APPLICABLE,)


def test_q_judger_refuses_a_file_of_another_form_and_a_dimension_that_is_not(serve, folder):
    server = serve(says("{}"))
    (folder / "checklists.py").write_text(LISTS.replace("<image>", "picture"))
    with pytest.raises(VelaturaError, match=r"USER_PROMPT_TEMPLATE in checklists.py has another form"):
        ready(QJudger, QJudgerOptions(**given(server, prompts="checklists.py")), folder)
    (folder / "checklists.py").write_text(LISTS.replace("- Light", "Light"))
    with pytest.raises(VelaturaError, match=r"AESTHETICS_CHECKLIST in .*checklists.py has no line like"):
        ready(QJudger, QJudgerOptions(**given(server, prompts="checklists.py")), folder)
    with pytest.raises(ValidationError, match="no dimension 'Beauty'"):
        QJudgerOptions(model="x", prompts="y", dimensions=("Beauty",))


@pytest.mark.parametrize(
    ("reply", "status", "reason"),
    [
        ("Alignment Score (1-5): 2", Status.FAILED, "says no coherence score"),
        (SHEET.replace("4", "7"), Status.FAILED, "score 7 is not within 1 to 5"),
        ("", Status.FAILED, "says no alignment score"),
        ("I'm sorry, I can't assist with that.", Status.REFUSED, "refused"),
    ],
)
def test_a_reply_without_its_scores_is_a_status_and_never_a_number(serve, folder, reply, status, reason):
    reward = ready(UnifiedReward, UnifiedRewardOptions(**given(serve(says(reply)))), folder)
    scores = reward.score(samples(0.2))
    assert scores.status == (status,)
    assert reason in scores.reasons[0]


def test_one_dead_reply_costs_one_picture(serve, folder):
    def dark_fails(question):
        if question.body["messages"][-1]["content"][0].get("type") == "image_url" and question.brightness < 0.5:
            return serving.Raw(b"{}", status=500)
        return serving.completion([SHEET])

    server = serve(dark_fails)
    reward = ready(UnifiedReward, UnifiedRewardOptions(**given(server)), folder)
    shown = [*samples(0.9, 0.1, 0.8), replace(samples(0)[0], image=torch.full((3, 8, 8), math.nan))]
    scores = reward.score(shown)
    assert scores.status == (Status.OK, Status.FAILED, Status.OK, Status.FAILED)
    assert "500" in scores.reasons[1]


def test_a_reply_that_was_cut_off_is_no_sheet(serve, folder):
    """`Style Score: 3.25` cut within the number would read 3."""

    def cut(question):
        body = json.loads(serving.completion([SHEET.removesuffix(".25")]).body)
        body["choices"][0]["finish_reason"] = "length"
        return serving.Raw(json.dumps(body).encode())

    reward = ready(UnifiedReward, UnifiedRewardOptions(**given(serve(cut))), folder)
    scores = reward.score(samples(0.2))
    assert scores.status == (Status.FAILED,)
    assert "is cut off" in scores.reasons[0]
    assert scores.notes == (SHEET.removesuffix(".25"),)


def test_a_reply_of_a_local_model_is_cut_off_where_no_end_came():
    made = torch.tensor([[5, 6, 7, 8], [5, 2, 0, 0], [5, 6, 7, 3], [2, 2, 2, 2]])
    assert lengths_of(made, [2, 3]) == [(4, False), (2, True), (4, True), (1, True)]
    assert lengths_of(made, 2)[2] == (4, False)


def test_a_source_that_is_not_finite_costs_its_own_picture(serve, folder):
    server = serve(by_pictures)
    reward = ready(EditScore, EditScoreOptions(**given(server, prompts="vie_prompts.py")), folder)
    broken = samples(0.2, sources=1)[0]
    prompt = replace(broken.prompt, sources=(torch.full((3, 8, 8), math.nan),))
    scores = reward.score([replace(broken, prompt=prompt), *samples(0.2, sources=1)])
    assert scores.status == (Status.FAILED, Status.OK)
    assert "sources" in scores.reasons[0]


WAYS = [
    (UnifiedReward, UnifiedRewardOptions, {}),
    (EditScore, EditScoreOptions, {"prompts": "vie_prompts.py"}),
    (QJudger, QJudgerOptions, {"prompts": "checklists.py"}),
]


@pytest.mark.parametrize(("component", "options", "more"), WAYS)
def test_where_and_how_patiently_a_judge_is_asked_is_no_part_of_it(folder, component, options, more):
    context = Context(device=torch.device("cpu"), cache=folder, seed=0, base=folder)
    at = {"model": "m", "server": "http://a:1/v1"} | more

    def known(**given):
        return component(options(**at | given)).fingerprint(context)

    assert component.cached
    assert {"server", "timeout", "retries", "device", "batch_size"} <= component.operational
    assert known(timeout=9, retries=1, concurrency=2) == known()
    assert known(model="other") != known()
    if more:
        before = known()
        (folder / more["prompts"]).write_text("CHANGED = ''")
        assert known() != before


def test_tokens_are_counted_as_the_server_says(serve, folder):
    def counted(question):
        body = json.loads(serving.completion([SHEET]).body) | {"usage": {"prompt_tokens": 30, "completion_tokens": 7}}
        return serving.Raw(json.dumps(body).encode())

    reward = UnifiedReward(UnifiedRewardOptions(**given(serve(counted))))
    assert reward.usage() is None
    reward.setup(Context(device=torch.device("cpu"), cache=folder, seed=0, base=folder))
    before = reward.usage()
    reward.score(samples(0.2, 0.4))
    assert reward.usage() - before == Usage(prompt=60, completion=14)


def test_what_is_judged_follows_from_the_options():
    for axis, dimension in {
        "mean": "alignment", "alignment": "alignment", "coherence": "quality", "style": "aesthetics",
    }.items():  # fmt: skip
        assert UnifiedReward(UnifiedRewardOptions(model="m", axis=axis)).dimension() == dimension
    asked = {("Alignment",): "alignment", ("Aesthetics",): "aesthetics", ("Quality", "Alignment"): "quality"}
    for dimensions, dimension in asked.items():
        assert QJudger(QJudgerOptions(model="m", prompts="p", dimensions=dimensions)).dimension() == dimension


def test_a_judge_that_is_not_there_is_said_at_the_beginning(folder):
    options = {"model": "m", "server": "http://127.0.0.1:9/v1", "retries": 0}
    with pytest.raises(VelaturaError, match=r"the judge of 'unified-reward' cannot be asked: no answer from"):
        ready(UnifiedReward, UnifiedRewardOptions(**options), folder)


def test_a_server_that_answers_for_another_model_is_no_judge(serve, folder):
    server = serve(lambda question: serving.completion([SHEET], model="other"))
    with pytest.raises(VelaturaError, match="answered for model 'other', not for 'judge-8b'"):
        ready(UnifiedReward, UnifiedRewardOptions(**given(server)), folder)


def test_a_local_judge_writes_what_its_model_generates(folder):
    from velatura.plugins.adapters.processors import image_only

    path = tiny_models.save_model(folder / "model", "qwen2.5-vl")
    chat = LocalChat(
        ChatOptions(model="model", tokens=16, batch_size=2),
        Context(device=torch.device("cpu"), cache=folder, seed=0, base=folder),
    )
    pictures = [torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    replies = chat.ask([Asked(parts=["Look: ", picture, "Rate it."]) for picture in pictures])
    said = [reply.text for reply in replies]
    net, processor = chat.model.net, image_only("Qwen2_5_VLProcessor").from_pretrained(path)
    text = (
        "<|im_start|>user\nLook: <|vision_start|><|image_pad|><|vision_end|>Rate it.<|im_end|>\n<|im_start|>assistant\n"
    )
    cut, written = [], 0
    for picture, reply in zip(pictures, said, strict=True):
        from velatura.rewards.judge.pictures import to_picture

        inputs = processor(text=[text], images=[to_picture(picture, None)], return_tensors="pt")
        with torch.no_grad():
            ids = inputs["input_ids"]
            more = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
            made = []
            for _ in range(16):
                grown = {"mm_token_type_ids": torch.zeros_like(ids)} if "mm_token_type_ids" in more else {}
                if grown:
                    grown["mm_token_type_ids"][:, : inputs["input_ids"].shape[1]] = inputs["mm_token_type_ids"]
                token = net(input_ids=ids, **(more | grown), use_cache=False).logits[0, -1].argmax()
                if int(token) == processor.tokenizer.eos_token_id:
                    break
                made.append(int(token))
                ids = torch.cat([ids, token.view(1, 1)], 1)
        assert reply == processor.tokenizer.decode(made, skip_special_tokens=True)
        cut.append(len(made) == 16)
        written += min(len(made) + 1, 16)
    assert [reply.is_cut for reply in replies] == cut
    assert chat.usage.completion == written
    assert chat.usage.prompt > 0
    reward = ready(UnifiedReward, UnifiedRewardOptions(model="model", tokens=16), folder)
    assert reward.score(samples(0.3)).status == (Status.FAILED,)  # random weights write no scores


def test_sheets_are_read_as_judges_write_them():
    assert labelled("**Alignment Score (1-5):** 3.5", ["alignment"], 1, 5) == [3.5]
    assert labelled("Alignment: 2\nlater Alignment: 4", ["alignment"], 1, 5) == [4]
    assert pair('{"reasoning" : "a "quoted" word", "score" : [20, 7.5]}', 25) == (20, 7.5)
    assert pair('<think>"score": [1, 1]</think>{"score": [2, 3]}', 25) == (2, 3)
    for broken in ('{"score": [1]}', '{"score": ["a", 2]}', '{"score": [1, 99]}', "well done"):
        with pytest.raises(NoScores):
            pair(broken, 25)


def test_facets_count_to_their_own_heading_wherever_they_were_written():
    checklist = "## Detail\n- Noise: a\n- Edges: b\n## Realism\n- Logic: c"
    assert facets(checklist) == {"Noise": "Detail", "Edges": "Detail", "Logic": "Realism"}
    flat = '{"Noise": {"score": 2}, "Edges": {"score": "1"}, "Logic": {"score": 0}}'
    misplaced = '{"Realism": {"Noise": 2, "Edges": {"score": 1}, "Logic": {"score": 0}}}'
    assert checked_off(flat, checklist) == checked_off(misplaced, checklist) == 40
    assert (
        checked_off('{"Noise": {"score": "N/A"}, "edges": {"score": "N/A"}, "**Logic**": {"score": "n/a"}}', checklist)
        is None
    )
    for broken in ("none", "{", "{}", '{"Noise": {"score": 3}}', '{"Noise": {"score": true}}', '{"Noise": 2}'):
        with pytest.raises(NoScores):
            checked_off(broken, checklist)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Logic": None}, r"leaves out: 'logic'"),
        ({"Noise": None, "Logic": None}, r"leaves out: 'noise', 'logic'"),
        ({"Beauty": {"score": 2}}, r"marks what the checklist does not have: 'beauty'"),
        ({"Detail": {"Edges": {"score": 0}}}, r"marks twice: 'edges'"),
    ],
)
def test_a_sheet_that_is_not_the_whole_checklist_is_no_score(changes, reason):
    checklist = "## Detail\n- Noise: a\n- Edges: b\n## Realism\n- Logic: c"
    sheet = {"Noise": {"score": 2}, "Edges": {"score": "1"}, "Logic": {"score": 0}} | changes
    whole = json.dumps({name: marks for name, marks in sheet.items() if marks is not None})
    with pytest.raises(NoScores, match=reason):
        checked_off(whole, checklist)
