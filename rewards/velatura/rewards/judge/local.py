"""A judge in this process: any vision-language model that transformers opens as image-text-to-text."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from loguru import logger
from PIL import Image
from torch import Tensor

from velatura.api import Context, Usage, VelaturaError
from velatura.rewards.judge.options import VlmJudgeOptions
from velatura.rewards.judge.pictures import to_picture
from velatura.rewards.judge.rubric import Question, Rubric
from velatura.rewards.judge.scoring import MARKER, NOT_APPLICABLE, Verdict, expected, failed, last_score
from velatura.rewards.pretrained import first_line

FORCED = f"\n{MARKER}"
"""Written after the reasoning by us, so that the next token is the level."""


@dataclass(eq=False)
class Model:
    """Weights, processor, and a lock: these models keep positions of the last forward on themselves."""

    net: Any
    processor: Any
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def tokenizer(self) -> Any:
        """The processor's."""
        return self.processor.tokenizer

    def inputs(self, texts: Sequence[str], pictures: Sequence[list[Image.Image]]) -> dict[str, Tensor]:
        """A batch for the network."""
        return inputs_of(self.processor, texts, pictures, next(self.net.parameters()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Token ids of what may stand in place of the level."""

    levels: Mapping[int, int]
    none: int | None
    """First token of N/A; None where the rubric has no such answer."""


_models: WeakValueDictionary[tuple[str, str | None, str, str], Model] = WeakValueDictionary()
_loading = threading.Lock()


def shared_model(source: str, revision: str | None, dtype: str, device: str) -> Model:
    """The model of a folder, or of a hub name and its revision; judges with several rubrics share one copy."""
    key = (source, revision, dtype, device)
    with _loading:
        model = _models.get(key)
        if model is None:
            model = _models[key] = _loaded(*key)
        return model


def _loaded(source: str, revision: str | None, dtype: str, device: str) -> Model:
    net, processor = read_model(source, dtype, revision)
    logger.info("judge model {} on {}", source, device)
    return Model(net=net.to(device).requires_grad_(False).train(False), processor=processor)


def read_model(source: str, dtype: str, revision: str | None = None) -> tuple[Any, Any]:
    """Network and processor of a folder, or of a hub name and its revision.

    Raises:
        VelaturaError: they do not open, or nobody can talk with the model.
    """
    import transformers

    if source.startswith(("/", "./", "../")) and not Path(source).is_dir():
        raise VelaturaError(f"the judge's model: there is no folder {source!r}. Give one that transformers saved.")
    opener: Any = transformers.AutoModelForImageTextToText
    try:
        net = opener.from_pretrained(source, dtype=dtype, revision=revision or "main")
        processor = _processor(source, net.config.model_type, revision or "main")
    except (OSError, ValueError) as error:
        raise VelaturaError(
            f"the judge's model {source!r} does not open as an image-text-to-text model: {first_line(error)}. Give a "
            f"folder that transformers saved or a name on the hub, or set `server` if it runs elsewhere."
        ) from error
    if getattr(processor, "chat_template", None) is None:
        raise VelaturaError(f"the judge's model {source!r} has no chat template, so it cannot be asked anything")
    return net, processor


def _processor(source: str, model_type: str, revision: str) -> Any:
    """The stock processor, or for Qwen's that would need torchvision the one without videos."""
    import transformers
    from transformers.models.auto import processing_auto

    from velatura.plugins.adapters.processors import IMAGE_ONLY, image_only

    names: Any = vars(processing_auto)["PROCESSOR_MAPPING_NAMES"]
    name = str(names.get(model_type, ""))
    opener: Any = image_only(name) if name in IMAGE_ONLY else transformers.AutoProcessor
    return opener.from_pretrained(source, revision=revision)


class LocalJudge:
    """Asks a model in this process: reasoning first, then the probabilities of the levels after a forced prefix."""

    def __init__(self, options: VlmJudgeOptions, rubric: Rubric, model: Model) -> None:
        """Raises `VelaturaError` where a level is no single token of the model."""
        self.options, self.rubric, self.model = options, rubric, model
        self.labels = labels_of(model.tokenizer, rubric)
        self.usage = Usage()

    @classmethod
    def opened(cls, options: VlmJudgeOptions, rubric: Rubric, context: Context) -> LocalJudge:
        """Raises `VelaturaError` where the model does not open, too."""
        folder = context.resolve(options.model)
        device = options.device or str(context.device)
        source = str(folder) if folder.is_dir() else options.model
        return cls(options, rubric, shared_model(source, options.revision, options.dtype, device))

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict per question, in their order."""
        found: list[Verdict | None] = [None] * len(questions)
        asked: list[tuple[int, str, list[Image.Image]]] = []
        for i, question in enumerate(questions):
            try:
                asked.append((i, *in_chat_format(self.model.processor, question, self.options.max_pixels)))
            except ValueError as error:
                found[i] = failed(str(error))
        size = self.options.batch_size
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            verdicts = self._judged([text for _, text, _ in part], [pictures for _, _, pictures in part])
            for (i, _, _), verdict in zip(part, verdicts, strict=True):
                found[i] = verdict
        return [verdict for verdict in found if verdict is not None]

    def _judged(self, texts: Sequence[str], pictures: Sequence[list[Image.Image]]) -> list[Verdict]:
        with self.model.lock, torch.inference_mode():
            reasoning = self._reasoning(texts, pictures) if self.options.reasoning_tokens else [""] * len(texts)
            whole = [f"{text}{said}{FORCED}" for text, said in zip(texts, reasoning, strict=True)]
            logits = self.model.net(**self._inputs(whole, pictures), logits_to_keep=1).logits[:, -1]
        logprobs = logits.float().log_softmax(-1).cpu()
        return [self._verdict(row, said) for row, said in zip(logprobs, reasoning, strict=True)]

    def _inputs(self, texts: Sequence[str], pictures: Sequence[list[Image.Image]]) -> dict[str, Tensor]:
        """A batch as the model reads it, its tokens counted."""
        inputs = self.model.inputs(texts, pictures)
        self.usage += Usage(prompt=int(inputs["attention_mask"].sum()))
        return inputs

    def _verdict(self, logprobs: Tensor, reasoning: str) -> Verdict:
        """From log-probabilities [V] at the place of the level."""
        levels = {level: float(logprobs[token]) for level, token in self.labels.levels.items()}
        none = -math.inf if self.labels.none is None else float(logprobs[self.labels.none])
        return expected(levels, none=none, min_mass=self.options.min_mass, note=reasoning)

    def _reasoning(self, texts: Sequence[str], pictures: Sequence[list[Image.Image]]) -> list[str]:
        """What the model writes greedily, cut before a score of its own."""
        import transformers

        settings: Any = transformers.GenerationConfig
        own = self.model.net.generation_config
        ends = own.eos_token_id if own.eos_token_id is not None else self.model.tokenizer.eos_token_id
        config = settings(
            max_new_tokens=self.options.reasoning_tokens, do_sample=False, eos_token_id=ends,
            pad_token_id=self.model.tokenizer.pad_token_id,
        )  # fmt: skip
        inputs = self._inputs(texts, pictures)
        made = self.model.net.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
        self.usage += Usage(completion=int((made != config.pad_token_id).sum()))
        said = self.model.processor.batch_decode(made, skip_special_tokens=True)
        stops = torch.tensor(ends, device=made.device).flatten()
        ended = torch.isin(made, stops).any(1).tolist()
        return [_before_score(text, is_cut=not whole) for text, whole in zip(said, ended, strict=True)]


def in_chat_format(processor: Any, question: Question, max_pixels: int | None) -> tuple[str, list[Image.Image]]:
    """The question as the model reads it, and the pictures in it.

    Raises:
        ValueError: a picture is none.
    """
    pictures = [to_picture(part, max_pixels) for part in question if isinstance(part, Tensor)]
    content = [{"type": "text", "text": _plain(p)} if isinstance(p, str) else {"type": "image"} for p in question]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return str(text), pictures


def inputs_of(
    processor: Any, texts: Sequence[str], pictures: Sequence[list[Image.Image]], like: Tensor
) -> dict[str, Tensor]:
    """A batch, padded on the left so that every row ends where the model goes on; in the precision of `like`, where it
    is."""
    processor.tokenizer.padding_side = "left"
    batch = processor(text=list(texts), images=[list(p) for p in pictures], padding=True, return_tensors="pt")
    return {
        name: value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)
        for name, value in batch.items()
    }


def labels_of(tokenizer: Any, rubric: Rubric) -> Labels:
    """Token ids of the levels after the forced prefix.

    Raises:
        VelaturaError: a level is not exactly one token there.
    """

    def after_prefix(answer: str) -> list[int] | None:
        prefix = tokenizer.encode(FORCED, add_special_tokens=False)
        whole = tokenizer.encode(FORCED + answer, add_special_tokens=False)
        return whole[len(prefix) :] if whole[: len(prefix)] == prefix else None

    tokens = {level: after_prefix(str(level)) for level in rubric.levels}
    split = [str(level) for level, ids in tokens.items() if ids is None or len(ids) != 1]
    if split:
        raise VelaturaError(
            f"rubric '{rubric.name}': level {', '.join(split)} is no single token of the judge's model. Scores are "
            f"expectations over single tokens; use a rubric whose levels have one digit, or another model."
        )
    none = after_prefix(NOT_APPLICABLE) if rubric.not_applicable else None
    return Labels(levels={level: ids[0] for level, ids in tokens.items() if ids}, none=none[0] if none else None)


def _plain(text: str) -> str:
    """Text in which no token of the chat format is written out."""
    return text.replace("<|", "< |").replace("|>", "| >")


def _before_score(text: str, *, is_cut: bool) -> str:
    """Reasoning without the line that states the score; of one that was cut off that may not have come yet."""
    found = last_score(text, is_cut=is_cut)
    return (text if found is None else text[: found.start()]).rstrip("\n *#")
