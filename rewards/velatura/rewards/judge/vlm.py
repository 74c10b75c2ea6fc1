"""The judge model `vlm`: any vision-language model, fine-tuned to mark pictures as raters do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from velatura.api import Context, JudgeModel, Loss, Options, Rated, Sample, Scores, VelaturaError
from velatura.plugins.adapters.lora import add_lora, merged_state, unwrap
from velatura.rewards.judge.backend import rubric_of
from velatura.rewards.judge.fitted import JUDGE_FILE, RUBRIC_FILE, weights_digest
from velatura.rewards.judge.fitting import Losses, rating_losses, shares, weighted
from velatura.rewards.judge.fresh import Fresh, fresh_model
from velatura.rewards.judge.local import FORCED, LocalJudge, Model, in_chat_format, inputs_of, labels_of, read_model
from velatura.rewards.judge.options import VlmJudgeOptions
from velatura.rewards.judge.rubric import Rubric, is_file_name, shipped_rubric
from velatura.rewards.judge.scoring import as_scores

ANSWER_END = "]"
"""What closes the line of the score; after it the judge's turn is over."""


class VlmOptions(Options):
    """Where the judge starts from, what it is asked, what is trained, and on which losses."""

    rubric: str = Field(description="Name of a shipped rubric, or the path of one of your own, seen from the recipe.")
    model: str | None = Field(None, min_length=1, description="A model folder or a name on the hub to start from.")
    fresh: Fresh | None = Field(None, description="In place of `model`: a tiny network with random weights.")
    losses: Losses = Field(Losses(), description="How much each loss counts: see docs/judges.md.")
    reasoning_tokens: int = Field(
        0, ge=0, le=32768, description="Most tokens of reasoning before the score; above 0 rationales are learnt."
    )
    lora_rank: int | None = Field(None, ge=1, description="Train LoRA weights of this rank; null trains all weights.")
    lora_alpha: float | None = Field(
        None, gt=0, description="LoRA weights count alpha / rank times; null means alpha = rank."
    )
    lora_targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1, description="Linear layers that get LoRA weights."
    )
    train_vision: bool = Field(True, description="Train the vision tower, too, where all weights are trained.")
    min_mass: float = Field(
        0.5, ge=0, lt=1, description="Least probability of all levels together; below it the judge gives no mark."
    )
    max_pixels: int | None = Field(
        None, ge=1024, description="Larger pictures are scaled down to this many pixels before the judge sees them."
    )

    @field_validator("rubric")
    @classmethod
    def _is_known(cls, rubric: str) -> str:
        if not is_file_name(rubric):
            shipped_rubric(rubric)
        return rubric

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.model is None) == (self.fresh is None):
            raise ValueError("give either `model` (a folder or a name) or `fresh` (a tiny random one), and not both")
        if self.fresh is not None and self.lora_rank is not None:
            raise ValueError("`fresh` weights know nothing yet, so all of them have to be trained: leave lora_rank out")
        if bool(self.losses.rationale) != bool(self.reasoning_tokens):
            raise ValueError(
                "a judge that reasons before its score learns how: set both `reasoning_tokens` and `losses.rationale`, "
                "or neither"
            )
        return self


class Vlm(JudgeModel[VlmOptions]):
    """A vision-language model learns the level tokens of its rubric from ratings; what it becomes is a `vlm-judge`.

    It is asked exactly what `vlm-judge` asks, up to `Score: [`, and the losses are taken on the probabilities of the
    level tokens at that place: (E[s] - y)^2 + lambda CE (the form of Qwen-Image-2.0-RL, arXiv:2606.27608, where the
    score is the expectation), KL to the distribution of the ratings, Bradley-Terry on pairs of one prompt, and
    cross-entropy on the tokens of a rationale before the score.
    """

    name = "vlm"

    def setup(self, context: Context) -> None:
        """Read the rubric; nothing is loaded yet."""
        self._context = context
        self.rubric: Rubric = rubric_of(VlmJudgeOptions(rubric=self.options.rubric, model="-"), context)

    @property
    def levels(self) -> Sequence[int]:
        """Of the rubric, lowest first."""
        return list(self.rubric.levels)

    def describe(self) -> Mapping[str, Any]:
        """Rubric, and where the weights come from."""
        source = self.options.model or "fresh"
        return {"rubric": self.rubric.name, "rubric version": self.rubric.version, "rubric hash": self.rubric.digest,
                "model": source, "reasoning tokens": self.options.reasoning_tokens}  # fmt: skip

    def fingerprint(self) -> str:
        """Of the rubric, and of the weights where they are a folder here."""
        folder = self._folder()
        return f"{self.rubric.digest}-{weights_digest(folder) if folder else self.options.model or 'fresh'}"

    def load(self, device: torch.device) -> nn.Module:
        """The network without dropout; LoRA weights, all weights, or all but the vision tower are trained."""
        options = self.options
        if options.fresh is not None:
            net, self.processor = fresh_model(options.fresh, self._words())
        else:
            dtype = "bfloat16" if self._context.precision == "bf16" else "float32"
            net, self.processor = read_model(str(self._folder() or options.model), dtype)
        self.labels = labels_of(self.processor.tokenizer, self.rubric)
        net.train(False).requires_grad_(True)
        if options.lora_rank is not None:
            add_lora(net, options.lora_rank, options.lora_alpha or options.lora_rank, seed=self._context.seed,
                     targets=options.lora_targets)  # fmt: skip
        elif not options.train_vision:
            _vision_tower(net).requires_grad_(False)
        placed: nn.Module = net.to(device)
        return placed

    def loss(self, net: nn.Module, rated: Sequence[Rated]) -> Loss:
        """The weighted losses of B pictures in one forward."""
        weights = self.options.losses
        asked = [self._asked(row.sample) for row in rated]
        said = [self._said(row) for row in rated]
        texts = [text + answer for (text, _), answer in zip(asked, said, strict=True)]
        spans = [self._length(text, whole) for (text, _), whole in zip(asked, texts, strict=True)]
        tail = self._length("", self._tail) + 1 if weights.rationale else 0
        like = next(net.parameters())
        inputs = inputs_of(self.processor, texts, [pictures for _, pictures in asked], like)
        keep = max(spans) + 1 if weights.rationale else 1
        logprobs = net(**inputs, logits_to_keep=keep).logits.float().log_softmax(-1)
        tokens = torch.tensor(list(self.labels.levels.values()), device=like.device)
        q = shares([row.ratings for row in rated], self.levels).to(like.device)
        prompts = [row.sample.prompt.id for row in rated]
        found = rating_losses(logprobs[:, -1 - tail][:, tokens], q, self.levels, prompts, weights)
        if weights.rationale:
            found["rationale"] = written_loss(logprobs, inputs["input_ids"], spans)
        return Loss(value=weighted(found, weights), metrics={name: value.detach() for name, value in found.items()})

    def mark(self, net: nn.Module, samples: Sequence[Sample]) -> Scores:
        """What `vlm-judge` would give these pictures."""
        options = VlmJudgeOptions(
            rubric=self.options.rubric, model="-", reasoning_tokens=self.options.reasoning_tokens,
            min_mass=self.options.min_mass, max_pixels=self.options.max_pixels, batch_size=max(1, len(samples)),
        )  # fmt: skip
        judge = LocalJudge(options, self.rubric, Model(net=unwrap(net), processor=self.processor))
        return as_scores(judge.verdicts([self.rubric.question(s, options.reasoning_tokens) for s in samples]))

    def save(self, net: nn.Module, folder: Path, info: Mapping[str, Any]) -> None:
        """A folder that transformers and `vlm-judge` open: LoRA weights folded in, rubric and `judge.json` beside."""
        network = unwrap(net)
        with torch.device("meta"):
            plain = type(network)(network.config)
        plain.save_pretrained(folder, state_dict=merged_state(network))
        self.processor.save_pretrained(folder)
        _name_stock_class(folder / "processor_config.json")
        (folder / RUBRIC_FILE).write_text(self.rubric.model_dump_json(indent=1) + "\n", encoding="utf-8")
        facts = {
            "format": 1, "rubric": self.rubric.digest, "rubric_name": self.rubric.name,
            "rubric_version": self.rubric.version, "reasoning_tokens": self.options.reasoning_tokens,
            "max_pixels": self.options.max_pixels, "min_mass": self.options.min_mass,
            "losses": self.options.losses.model_dump(),
            "started_from": self.options.model or "fresh", "weights": weights_digest(folder), **info,
        }  # fmt: skip
        (folder / JUDGE_FILE).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def _folder(self) -> Path | None:
        """Of the model, where it is one here."""
        if self.options.model is None:
            return None
        folder = self._context.resolve(self.options.model)
        return folder if folder.is_dir() else None

    def _words(self) -> str:
        """Everything that is the same in all questions."""
        tokens = self.options.reasoning_tokens
        rubric = self.rubric
        return f"{rubric.instructions(tokens)}\n{rubric.reminder(tokens)}\nPrompt:\n<<<\n>>>\n\nPicture:{FORCED}"

    @property
    def _tail(self) -> str:
        """What follows the level."""
        return f"{ANSWER_END}{self.processor.tokenizer.eos_token}"

    def _asked(self, sample: Sample) -> tuple[str, list[Image.Image]]:
        question = self.rubric.question(sample, self.options.reasoning_tokens)
        return in_chat_format(self.processor, question, self.options.max_pixels)

    def _said(self, row: Rated) -> str:
        """The answer up to the level, or with a rationale to its end."""
        if not self.options.losses.rationale:
            return FORCED
        if not row.rationale.strip():
            raise VelaturaError(
                f"losses.rationale is above 0, and a picture for {row.sample.prompt.text!r} has no rationale. Give "
                f"every line of this dimension one, or set losses.rationale and reasoning_tokens to 0."
            )
        level = min(self.levels, key=lambda at: (abs(at - row.mean), at))
        return f"{row.rationale.strip()}{FORCED}{level}{self._tail}"

    def _length(self, text: str, whole: str) -> int:
        """Tokens that `whole` has more than `text`."""
        encode = self.processor.tokenizer.encode
        return len(encode(whole, add_special_tokens=False)) - len(encode(text, add_special_tokens=False))


def written_loss(logprobs: Tensor, ids: Tensor, spans: Sequence[int]) -> Tensor:
    """[] mean over B answers of -log p of a token: the last spans[b] tokens of row b, which is padded on the left.

    `logprobs` [B K V] are those at the last K places, `ids` [B T] the tokens.
    """
    found = []
    for row, own, span in zip(logprobs, ids, spans, strict=True):
        said = own[len(own) - span :]
        found.append(-row[-span - 1 : -1].gather(-1, said[:, None]).mean())
    return torch.stack(found).mean()


def _vision_tower(net: Any) -> nn.Module:
    """Raises `VelaturaError` where there is none of a known name."""
    for name, module in net.named_modules():
        if name.rpartition(".")[2] in ("visual", "vision_tower", "vision_model"):
            return module  # type: ignore[no-any-return]
    raise VelaturaError("train_vision is false, but the model has no part called visual, vision_tower or vision_model")


def _name_stock_class(path: Path) -> None:
    """Let the processor's file name the class that everybody has."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["processor_class"] = str(content.get("processor_class", "")).removeprefix("ImageOnly")
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
