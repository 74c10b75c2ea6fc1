"""Judges that were trained to write scores down: `unified-reward`, `editscore` and `q-judger`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator
from torch import Tensor

from velatura.api import Context, Prompt, RewardModel, Sample, Scores, Status, Usage, VelaturaError
from velatura.rewards.author_texts import in_package, texts_in
from velatura.rewards.judge.chat import Asked, Chat, ChatOptions, Written, opened_chat
from velatura.rewards.judge.options import OPERATIONAL
from velatura.rewards.judge.rubric import Part
from velatura.rewards.judge.scoring import REFUSALS, Verdict, as_scores, failed
from velatura.rewards.pretrained import ready
from velatura.rewards.reward_token import plain
from velatura.rewards.score_sheets import NoScores, checked_off, facets, labelled, pair

AXES = ("alignment", "coherence", "style")
UNIFIED = """You see a picture that an image generator made, and the caption it was made from.
Rate the picture from 1 to 5 on three axes. Decimals are welcome.
- Alignment Score: does its content match the caption?
- Coherence Score: is it free of glitches, distorted objects and contradictions?
- Style Score: is it pleasing to look at, whatever the caption says?

Answer with these three lines alone:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Text Caption: [{prompt}]"""
"""Our words for the authors' question; labels and form of the answer are theirs."""
EDIT_PACKAGE = "editscore==0.2"
EDIT_INSTALL = f"pip install --no-deps {EDIT_PACKAGE}"
EDIT_DIGEST = "14dee0ac57433f096ee3c44aa84577576f546c41df56e19b8d85ac44c175aa29"
EDIT_TEXTS = (
    *("_context_no_delimit_reasoning_first", "_prompts_0shot_two_image_edit_rule"),
    *("_prompts_0shot_tie_rule_SC", "_prompts_0shot_rule_PQ"),
)
HIGHEST = 25
"""EditScore's scale; the texts in its package say 10, and its authors replace that."""
CHECKLISTS = {
    "Quality": "QUALITY_CHECKLIST",
    "Aesthetics": "AESTHETICS_CHECKLIST",
    "Alignment": "ALIGNMENT_CHECKLIST",
    "Real-world Fidelity": "REAL_WORLD_FIDELITY_CHECKLIST",
    "Creative Generation": "CREATIVE_GENERATION_CHECKLIST",
}
Given = TypeVar("Given", bound=ChatOptions)
Reading = Callable[[Sequence[str]], Verdict]


class WritesScores(RewardModel[Given]):
    """What the judges of this file have in common: slow, an opinion, and the same wherever they run."""

    cached = True
    operational = OPERATIONAL
    _chat: Chat | None = None

    def needs_card(self) -> bool:
        """An opinion."""
        return True

    def usage(self) -> Usage | None:
        """Tokens of all replies so far."""
        return None if self._chat is None else self._chat.usage


class UnifiedRewardOptions(ChatOptions):
    """Options of `unified-reward`."""

    axis: Literal["mean", "alignment", "coherence", "style"] = Field("mean", description="Which of the three scores.")
    prompt_file: str | None = Field(
        None, description="A text file with the question in the authors' words, {prompt} where the caption goes."
    )


class UnifiedReward(WritesScores[UnifiedRewardOptions]):
    """The scores that UnifiedReward 2.0 writes for a picture, 1 to 5: alignment, coherence, style, or their mean.

    Qwen-VLs of 2 to 72 billion parameters, fine-tuned to rate (arXiv:2503.05236); serve CodeGoat24/UnifiedReward-2.0-*
    with vLLM or name a folder. Code and weights MIT, without the licence of their base. The question here is in our
    words and asks for the answer in the authors' form; with `prompt_file` you ask in theirs, which is what the model
    was trained on.

    Known holes. One written number without probabilities: coarse, and ties are frequent. Text in a picture may talk
    to it. It does not apply to edits.
    """

    name = "unified-reward"
    _question = UNIFIED

    def setup(self, context: Context) -> None:
        """Open the model or find the server.

        Raises:
            VelaturaError: it is not there, or `prompt_file` is no question.
        """
        if self.options.prompt_file is not None:
            self._question = question_in(self.name, context, self.options.prompt_file)
        self._chat = opened_chat(self.name, self.options, context)

    def dimension(self) -> str:
        """What its axis is about; of the mean, what was asked for."""
        return {"coherence": "quality", "style": "aesthetics"}.get(self.options.axis, "alignment")

    def applies(self, prompt: Prompt) -> bool:
        """Prompts that draw from text."""
        return not prompt.sources

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [1, 5]; higher is better. The notes hold the reply."""
        chat: Chat = ready(self._chat, self.name)
        axes = AXES if self.options.axis == "mean" else (self.options.axis,)

        def read(replies: Sequence[str]) -> Verdict:
            values = labelled(replies[0], axes, 1, 5)
            return Verdict(status=Status.OK, value=math.fsum(values) / len(values), note=replies[0])

        asked = [[Asked(parts=[s.image, self._question.replace("{prompt}", plain(s.prompt.text))])] for s in samples]
        return judged(samples, chat, asked, read)


class EditScoreOptions(ChatOptions):
    """Options of `editscore`."""

    passes: int = Field(
        1, ge=1, le=16, description="Replies to average, at temperature 0.7; more than 1 need a server."
    )
    label_pictures: bool = Field(
        True,
        description="Write <img1>: before a picture, as the judges made of Qwen2.5-VL expect; not those of Qwen3-VL.",
    )
    prompts: str | None = Field(None, description="The authors' file vie_prompts.py; null: that of their package.")

    @field_validator("passes")
    @classmethod
    def _needs_server(cls, passes: int, info: Any) -> int:
        if passes > 1 and info.data.get("server") is None:
            raise ValueError("passes above 1 are drawn at random, which only a server does; a local model has one")
        return passes


class EditScore(WritesScores[EditScoreOptions]):
    """How good an edit is, 0 to 10: sqrt(min(followed, not overdone) · min(natural, without artifacts)).

    EditScore (VectorSpaceLab, arXiv:2509.23909): Qwen2.5-VL of 7 to 72 billion parameters or Qwen3-VL, fine-tuned to
    write two pairs of scores of 0 to 25, the first about source and result, the second about the result alone; with
    `passes` their mean. Code Apache 2.0; see the card of the adapter; the base of 72B has Qwen's own licence. The
    adapters are LoRAs: serve them with vLLM (`--enable-lora`), or merge them into a folder. The questions are the
    authors', read from their package, of which nothing is run. Where the authors' code guesses a number for a reply it
    cannot read, here it fails.

    Known holes. Two replies with reasoning for each picture: slow. A whole number in 26 steps, with noise between
    passes (take 4). Of several sources only the first is shown.
    """

    name = "editscore"
    _questions: tuple[str, str] = ("", "")

    def setup(self, context: Context) -> None:
        """Read the questions, open the model or find the server.

        Raises:
            VelaturaError: something is not there.
        """
        where = (
            context.resolve(self.options.prompts)
            if self.options.prompts is not None
            else in_package(self.name, "editscore", "vie_prompts.py", EDIT_DIGEST, EDIT_INSTALL)
        )
        head, rule, followed, natural = texts_in(self.name, where, EDIT_TEXTS)
        first, second = (text.replace("10", str(HIGHEST)) for text in (followed, natural))
        self._questions = ("\n".join([head, rule, first]), "\n".join([head, second]))
        self._chat = opened_chat(self.name, self.options, context)

    def dimension(self) -> str:
        """Whether the edit was made."""
        return "edit-instruction"

    def applies(self, prompt: Prompt) -> bool:
        """Edits."""
        return bool(prompt.sources)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [0, 10]; higher is better. The notes hold the replies."""
        chat: Chat = ready(self._chat, self.name)

        def read(replies: Sequence[str]) -> Verdict:
            pairs = [min(pair(reply, HIGHEST)) for reply in replies]
            values = [math.sqrt(a * b) * 10 / HIGHEST for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
            return Verdict(status=Status.OK, value=math.fsum(values) / len(values), note="\n---\n".join(replies))

        return judged(samples, chat, [self._asked(sample) for sample in samples], read)

    def _asked(self, sample: Sample) -> list[Asked]:
        """Both questions, for every pass."""
        about_both, about_result = self._questions
        about_both = about_both.replace("<instruction>", plain(sample.prompt.text))
        made = []
        for number in range(self.options.passes):
            drawn = (("temperature", 0.7), ("top_p", 0.9), ("top_k", 20), ("seed", 42 + number))
            sampling = drawn if self.options.passes > 1 else ()
            for shown, text in (
                ((sample.prompt.sources[0], sample.image), about_both),
                ((sample.image,), about_result),
            ):
                made.append(Asked(parts=[*self._labelled(shown), text], sampling=sampling))
        return made

    def _labelled(self, pictures: Sequence[Tensor]) -> list[Part]:
        if not self.options.label_pictures:
            return list(pictures)
        return [part for i, picture in enumerate(pictures, start=1) for part in (f"<img{i}>: ", picture)]


class QJudgerOptions(ChatOptions):
    """Options of `q-judger`."""

    tokens: int = Field(4096, ge=16, le=32768, description="Most tokens of a reply; the judge thinks before it marks.")
    max_pixels: int | None = Field(
        1024 * 1024, ge=1024, description="Larger pictures are scaled down to this many pixels."
    )
    prompts: str = Field(
        description="The file checklists.py of the authors' repository, QwenLM/Qwen-Image-Bench: it holds the "
        "questions and is read, not run."
    )
    dimensions: tuple[str, ...] = Field(
        ("Quality", "Aesthetics", "Alignment"),
        min_length=1,
        description="Which of Quality, Aesthetics, Alignment, Real-world Fidelity and Creative Generation are judged.",
    )

    @field_validator("dimensions")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in CHECKLISTS:
                raise ValueError(f"Q-Judger has no dimension {name!r}. There is: {', '.join(CHECKLISTS)}.")
        return names


class QJudger(WritesScores[QJudgerOptions]):
    """The marks of Q-Judger, the judge of Qwen-Image-Bench, 0 to 100: mean over dimensions, headings and facets.

    Qwen3.6-27B, fine-tuned to mark every facet of a checklist as failed, passed or excellent, 0, 60 and 100 (arXiv:
    2605.28091); facets that do not apply do not count. Weights Qwen/Qwen-Image-Bench, Apache 2.0. The questions are the
    authors' and come from your clone of their repository.

    Known holes. It is the judge of a benchmark: trained on, the benchmark says nothing any more. Its marks are coarse.
    One reply with thoughts for each dimension: the slowest of all. Pictures above 1024 pixels are scaled down in
    shape (`max_pixels`), where the authors' script makes them square. It does not apply to edits.
    """

    name = "q-judger"
    _system, _question = "", ""
    _lists: tuple[str, ...] = ()

    def setup(self, context: Context) -> None:
        """Read the questions, open the model or find the server.

        Raises:
            VelaturaError: something is not there.
        """
        names = [CHECKLISTS[name] for name in self.options.dimensions]
        path = context.resolve(self.options.prompts)
        self._system, self._question, *lists = texts_in(
            self.name, path, ("SYSTEM_PROMPT", "USER_PROMPT_TEMPLATE", *names)
        )
        bare = [name for name, one in zip(names, lists, strict=True) if not facets(one)]
        if bare:
            raise VelaturaError(
                f"'{self.name}': {bare[0]} in {path} has no line like '- Noise: ...' below '## Detail', so no facets "
                "are known."
            )
        self._lists = tuple(lists)
        self._asked("", self.options.dimensions[0], lists[0])
        self._chat = opened_chat(self.name, self.options, context)

    def dimension(self) -> str:
        """What its questions ask about; of several, quality."""
        only = self.options.dimensions[0] if len(self.options.dimensions) == 1 else ""
        return {"Alignment": "alignment", "Aesthetics": "aesthetics"}.get(only, "quality")

    def applies(self, prompt: Prompt) -> bool:
        """Prompts that draw from text."""
        return not prompt.sources

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [0, 100]; higher is better. The notes hold the replies."""
        chat: Chat = ready(self._chat, self.name)

        def read(replies: Sequence[str]) -> Verdict:
            found = [checked_off(reply, one) for reply, one in zip(replies, self._lists, strict=True)]
            values = [value for value in found if value is not None]
            note = "\n---\n".join(replies)
            if not values:
                return Verdict(status=Status.NOT_APPLICABLE, reason="the judge found nothing that applies", note=note)
            return Verdict(status=Status.OK, value=math.fsum(values) / len(values), note=note)

        return judged(samples, chat, [self._all(sample) for sample in samples], read)

    def _all(self, sample: Sample) -> list[Asked]:
        """One question for each dimension."""
        made = []
        for name, one in zip(self.options.dimensions, self._lists, strict=True):
            before, after = self._asked(plain(sample.prompt.text), name, one)
            made.append(Asked(parts=[before, sample.image, after], system=self._system))
        return made

    def _asked(self, prompt: str, dimension: str, checklist: str) -> tuple[str, str]:
        """The text before and after the picture.

        Raises:
            VelaturaError: the authors' file has another form than the one known.
        """
        try:
            before, after = self._question.split("<image>")
            fields = {"prompt": prompt, "level1_dim": dimension, "format_checklist": checklist}
            return before.format(**fields), after.format(**fields)
        except (ValueError, KeyError, IndexError) as error:
            raise VelaturaError(
                f"'{self.name}': USER_PROMPT_TEMPLATE in {self.options.prompts} has another form than the one known "
                f"({type(error).__name__}: {error})."
            ) from error


def question_in(user: str, context: Context, file: str) -> str:
    """The text of a file with {prompt} in it.

    Raises:
        VelaturaError: it is not there, or has no place for the prompt.
    """
    path = context.resolve(file)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if "{prompt}" not in text:
        what = "has no {prompt} in it" if path.is_file() else "does not exist"
        raise VelaturaError(f"'{user}': the question {path} {what}. It is a text with {{prompt}} for the caption.")
    return text


def judged(samples: Sequence[Sample], chat: Chat, asked: Sequence[Sequence[Asked]], read: Reading) -> Scores:
    """[B]: what `read` makes of the replies to the questions about each picture, all sent at once."""
    shown = [row for row, questions in enumerate(asked) if all(map(_is_finite, questions))]
    replies = iter(chat.ask([question for row in shown for question in asked[row]]))
    verdicts = [failed("The picture, or one of its sources, holds values that are not finite") for _ in samples]
    for row in shown:
        verdicts[row] = verdict_on([next(replies) for _ in asked[row]], read)
    return as_scores(verdicts)


def _is_finite(question: Asked) -> bool:
    """Whether every picture in it can be shown."""
    return all(bool(part.isfinite().all()) for part in question.parts if isinstance(part, Tensor))


def verdict_on(replies: Sequence[Written], read: Reading) -> Verdict:
    """A verdict on the replies about one picture: none where one did not come, or cannot be read."""
    for reply in replies:
        if reply.status is not Status.OK:
            return Verdict(status=reply.status, reason=reply.reason)
    texts = [reply.text for reply in replies]
    if any(reply.is_cut for reply in replies):
        return failed("the judge's reply is cut off: it has as many tokens as it may have; raise `tokens`", texts[-1])
    try:
        return read(texts)
    except NoScores as error:
        whole = "\n---\n".join(texts)
        if any(REFUSALS.search(text) for text in texts):
            return Verdict(status=Status.REFUSED, reason="the judge refused", note=whole)
        return failed(str(error), whole)
