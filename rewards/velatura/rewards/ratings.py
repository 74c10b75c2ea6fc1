"""The rewards `hpsv3` and `editreward`: vision-language models with a head for a mean and a deviation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from velatura.api import Context, Prompt, Sample, Scores, Status
from velatura.rewards.author_texts import in_package, texts_in
from velatura.rewards.pretrained import NetworkReward, image_alone, is_finite, ready, scored, weights_file
from velatura.rewards.reward_token import RewardToken, RewardTokenOptions, plain, said

HPS_PACKAGE = "hpsv3==1.0.0"
HPS_INSTALL = f"pip install --no-deps {HPS_PACKAGE}"
HPS_FILE = "dataset/data_collator_qwen.py"
HPS_DIGEST = "b0f936e89f8df652c67d470412e1d9afd27aa711dec85724c19989ac91e7a3e3"
ENDING = "prompt_with_special_token"
"""What both judges' authors call the end of a question."""
ASPECTS = {"following": "INSTRUCTION_EDIT_FOLLOWING", "quality": "INSTRUCTION_EDIT_QUALITY"}
"""What EditReward judges, and what its authors call the question; its heads are in this order."""
Answer = Callable[[Sequence[Sample]], Tensor]


class HpsV3Options(RewardTokenOptions):
    """Options of `hpsv3`."""

    path: str = Field(
        "MizzenAI/HPSv3", description="A file of weights or its folder, seen from the recipe, or a name on the hub."
    )
    file: str = Field("HPSv3.safetensors", description="The file in `path`.")
    base: str = Field(
        "Qwen/Qwen2-VL-7B-Instruct", description="Configuration, tokenizer and preprocessing: a folder or hub name."
    )
    prompts: str | None = Field(
        None, description="The authors' file with the question, `data_collator_qwen.py`; null: that of their package."
    )


class HpsV3(NetworkReward[HpsV3Options]):
    """How much people prefer a picture for its prompt: the mean that HPSv3 gives it; about -5 to 15.

    Qwen2-VL 7B with three layers on the state of a special token, fine-tuned on 1.17 million comparisons
    (arXiv:2508.03789). Its deviation, how unsure it is, stands in the notes. Code MIT; weights and
    Qwen2-VL 7B Apache 2.0.
    The question is the authors'; it is read from their package, of which nothing is run.

    Known holes. It sees every picture at 448 x 448 pixels or as many. Long and ornate prompts raise all scores, so
    compare within a prompt. It does not apply to edits. 17 GB of memory in bf16.
    """

    name = "hpsv3"
    _judge: RewardToken | None = None
    _question: tuple[str, str] = ("", "")

    def setup(self, context: Context) -> None:
        """Load the question and the network.

        Raises:
            VelaturaError: a part is not there, or does not fit.
        """
        options = self.options
        where = (
            context.resolve(options.prompts)
            if options.prompts is not None
            else in_package(self.name, "hpsv3", HPS_FILE, HPS_DIGEST, HPS_INSTALL)
        )
        question, ending = texts_in(self.name, where, ("INSTRUCTION", ENDING))
        self._question = (question, ending)
        path = weights_file(self.name, options.path, options.file, options.revision, context)
        self._judge = RewardToken(self.name, path, options.base, ("rm_head.",), options, context)

    def dimension(self) -> str:
        """Taste, more than what was asked for."""
        return "aesthetics"

    def applies(self, prompt: Prompt) -> bool:
        """Prompts that draw from text."""
        return not prompt.sources

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] means; higher is better. The notes say the deviation."""
        judge: RewardToken = ready(self._judge, self.name)

        def answers(shown: Sequence[Sample]) -> Tensor:
            return judge.ask("rm_head.", [((s.image,), asked(*self._question, s.prompt.text)) for s in shown])

        return rated(samples, answers)


class EditRewardOptions(RewardTokenOptions):
    """Options of `editreward`."""

    path: str = Field(
        "TIGER-Lab/EditReward-Qwen2.5-7B-VL",
        description="A file of weights or its folder, seen from the recipe, or a name on the hub.",
    )
    file: str = Field("model.safetensors", description="The file in `path`.")
    base: str = Field(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        description="Configuration, tokenizer and preprocessing: a folder or hub name; XiaomiMiMo/MiMo-VL-7B-SFT-2508 "
        "for the checkpoint that was made of that.",
    )
    prompts: str = Field(
        description="The folder EditReward/dataset of the authors' repository, TIGER-AI-Lab/EditReward: its prompts.py "
        "and data_collator_qwen_edit.py hold the questions, and are read, not run."
    )
    aspect: Literal["mean", "following", "quality"] = Field(
        "mean",
        description="The instruction, how the edit looks, or the mean of both, which is what its authors report.",
    )


class EditReward(NetworkReward[EditRewardOptions]):
    """How good experts would find an edit, about -3 to 3: mean of a head for the instruction and one for quality.

    Qwen2.5-VL 7B (or MiMo-VL), fine-tuned on 200,000 comparisons (TIGER-Lab, arXiv:2509.26346); each head answers a
    question of its own about source and result. The bases are Apache 2.0 (Qwen2.5-VL 7B) and MIT (MiMo-VL); for the
    rest see repository and card. The authors' questions are not on the package index: clone their repository and give
    the folder.

    Known holes. Every picture is seen at 448 x 448 pixels or as many, so small edits are missed. Of several sources
    only the first is shown. Two forwards for each picture; 17 GB of memory in bf16.
    """

    name = "editreward"
    _judge: RewardToken | None = None
    _questions: dict[str, tuple[str, str]]

    def setup(self, context: Context) -> None:
        """Load the questions and the network.

        Raises:
            VelaturaError: a part is not there, or does not fit.
        """
        options = self.options
        folder: Path = context.resolve(options.prompts)
        (ending,) = texts_in(self.name, folder / "data_collator_qwen_edit.py", (ENDING,))
        texts = texts_in(self.name, folder / "prompts.py", tuple(ASPECTS.values()))
        wanted = tuple(ASPECTS) if options.aspect == "mean" else (options.aspect,)
        heads = {aspect: f"rm_heads.head_{number}." for number, aspect in enumerate(ASPECTS)}
        self._questions = {
            heads[aspect]: (text, ending) for aspect, text in zip(ASPECTS, texts, strict=True) if aspect in wanted
        }
        path = weights_file(self.name, options.path, options.file, options.revision, context)
        self._judge = RewardToken(self.name, path, options.base, tuple(heads.values()), options, context)

    def dimension(self) -> str:
        """Whether the edit was made, or, where `aspect` is that alone, how it looks."""
        return "edit-quality" if self.options.aspect == "quality" else "edit-instruction"

    def applies(self, prompt: Prompt) -> bool:
        """Edits."""
        return bool(prompt.sources)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] means; higher is better. The notes say the deviation."""
        judge: RewardToken = ready(self._judge, self.name)

        def answers(shown: Sequence[Sample]) -> Tensor:
            found = [
                judge.ask(head, [((s.prompt.sources[0], s.image), asked(text, ending, s.prompt.text)) for s in shown])
                for head, (text, ending) in self._questions.items()
            ]
            return torch.stack(found).mean(0)

        return rated(samples, answers, lambda sample: (*sample.prompt.sources[:1], sample.image))


def asked(question: str, ending: str, prompt: str) -> str:
    """The authors' question about a prompt, up to the token that is read."""
    return question.replace("{text_prompt}", plain(prompt)) + ending


def rated(
    samples: Sequence[Sample], answers: Answer, shows: Callable[[Sample], Sequence[Tensor]] = image_alone
) -> Scores:
    """[B] means of `answers` [B 2], with notes; `shows`: which pictures of a sample are read."""
    notes: list[str] = []

    def means(shown: Sequence[Sample]) -> Tensor:
        found = answers(shown)
        notes.extend(said(answer) for answer in found)
        return found[:, 0]

    scores = scored(samples, len(samples) or 1, means, shows)
    given = iter(notes)
    seen = [is_finite(shows(sample)) for sample in samples]
    told = tuple(next(given) if is_seen else "" for is_seen in seen)
    return replace(scores, notes=tuple(n if s is Status.OK else "" for n, s in zip(told, scores.status, strict=True)))
