"""The reward `ocr`: whether a picture shows the words it was asked to show."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from loguru import logger
from pydantic import Field

from velatura.api import Context, Options, Prompt, RewardModel, Sample, Scores, Status, VelaturaError
from velatura.rewards.dual_encoder import to_bytes
from velatura.rewards.measured import Measured, measured
from velatura.rewards.wording import compare, listed, plain, quoted

PACKAGES = ("rapidocr==3.10.0", "onnxruntime>=1.20,<2")
"""What the extra `ocr` installs."""
INSTALL = "pip install " + " ".join(f'"{package}"' for package in PACKAGES)
WEIGHTS: Mapping[str, tuple[str, str]] = {
    "Det": ("PP-OCRv6_det_small.onnx", "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f"),
    "Cls": ("ch_ppocr_mobile_v2.0_cls_mobile.onnx", "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c"),
    "Rec": ("PP-OCRv6_rec_small.onnx", "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884"),
}
"""Finding lines, turning them upright, reading them: file inside rapidocr and its SHA-256."""


class OcrOptions(Options):
    """Options of `ocr`."""

    text: Literal["auto", "metadata", "quotes"] = Field(
        "auto",
        description="Where the words asked for stand: in a field of the prompt's metadata; in the prompt, in double "
        "quotes; `auto`: in the field, or else in quotes unless the prompt edits a picture.",
    )
    field: str = Field("text", min_length=1, description="The field of the metadata: a string or a list of strings.")
    extra: float = Field(
        1.0, ge=0, description="What a letter that nobody asked for counts, of one asked for; 0 lets text flood."
    )
    match_case: bool = Field(False, description="Whether letters of the other case are wrong.")
    min_confidence: float = Field(
        0.5, ge=0, le=1, description="Lines that are read with less confidence are not counted as found."
    )
    threads: int = Field(4, ge=1, description="CPU threads that read one picture.")


class Ocr(RewardModel[OcrOptions]):
    """Share of the letters asked for that can be read in the picture, less where it is flooded with others; in [0, 1].

    r = (n - d) / (n + extra e): n letters asked for, d the least edits that make them out of what is read, e letters
    read that belong to none of them. White space does not count, nor does case. For one text in full this is one minus
    the edit distance over the longer length; Flow-GRPO's reward for text (arXiv:2505.05470) divides by n, down to 0.

    PP-OCRv6 small reads, from inside the package rapidocr (Apache 2.0, code and weights), on the CPU and without a
    network. It knows 18,708 characters: Latin with accents, Chinese, Japanese. Prompts that ask for others, Cyrillic or
    Korean, get no score, and those that ask for no words are not judged.

    Known holes. It reads, and does not look: ugly letters, the wrong place and the wrong sign count as right. Where the
    detector sees no line there is no gradient towards one: all pictures of a group score 0.
    """

    name = "ocr"
    operational = frozenset({"threads"})
    _reader: Any = None
    _alphabet: frozenset[str] = frozenset()
    _told = False

    def setup(self, context: Context) -> None:
        """Check the weights and load them.

        Raises:
            VelaturaError: the extra is missing, or its weights are others.
        """
        models = folder_of_models()
        paths = {part: checked(models / name, digest) for part, (name, digest) in WEIGHTS.items()}
        from rapidocr import RapidOCR

        self._reader = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.text_score": self.options.min_confidence,
                "EngineConfig.onnxruntime.intra_op_num_threads": min(self.options.threads, os.cpu_count() or 1),
                **{f"{part}.model_path": str(path) for part, path in paths.items()},
            }
        )
        self._alphabet = alphabet_of(paths["Rec"])

    def asked(self, prompt: Prompt) -> tuple[str, ...]:
        """The texts that the picture should show; empty when there are none.

        Raises:
            VelaturaError: the field of the metadata holds something else.
        """
        where = self.options.text
        texts = listed(prompt, self.options.field) if where != "quotes" else None
        if texts is None:
            texts = quoted(prompt.text) if where == "quotes" or (where == "auto" and not prompt.sources) else ()
        return tuple(text for text in texts if plain(text, self.options.match_case))

    def applies(self, prompt: Prompt) -> bool:
        """Prompts that ask for words."""
        return bool(self.asked(prompt))

    def score(self, samples: Sequence[Sample]) -> Scores:
        """[B] in [0, 1]; what was read stands in the notes."""
        if self._reader is None:
            raise VelaturaError("'ocr' has no weights yet: call `setup` before it is asked.")
        return measured(samples, self._judge)

    def _judge(self, sample: Sample) -> Measured:
        asked = self.asked(sample.prompt)
        if not asked:
            return Measured(status=Status.NOT_APPLICABLE, reason="The prompt asks for no words")
        if unknown := self._unknown(asked):
            return Measured(status=Status.NOT_APPLICABLE, reason=f"'ocr' cannot read {unknown!r}")
        try:
            found = self._reader(to_bytes(sample.image)[:, :, ::-1].copy()).txts or ()
        except Exception as error:
            return Measured(status=Status.FAILED, reason=f"rapidocr: {str(error).strip()[-300:]}")
        agreement = compare(asked, found, self.options.match_case)
        return Measured(agreement.score(self.options.extra), note="read: " + " | ".join(found))

    def _unknown(self, asked: Sequence[str]) -> str:
        """The characters asked for that the network cannot read; said once."""
        letters = set(plain("".join(asked), self.options.match_case))
        unknown = "".join(sorted(one for one in letters if not {one, one.upper()} & self._alphabet))
        if unknown and not self._told:
            self._told = True
            logger.warning(
                "'ocr' cannot read {!r} and does not judge prompts that ask for such characters: {!r} is the first. "
                "This is said once.", unknown, asked[0][:80],
            )  # fmt: skip
        return unknown


def folder_of_models() -> Path:
    """Where rapidocr keeps its weights; nothing is imported.

    Raises:
        VelaturaError: rapidocr or onnxruntime is not installed.
    """
    specs = {name: importlib.util.find_spec(name) for name in ("rapidocr", "onnxruntime")}
    missing = [name for name, spec in specs.items() if spec is None]
    spec = specs["rapidocr"]
    if missing or spec is None or spec.origin is None:
        raise VelaturaError(f"'ocr' needs {' and '.join(missing)}. Install it: {INSTALL}")
    return Path(spec.origin).parent / "models"


def checked(path: Path, digest: str) -> Path:
    """`path`, when the file has the SHA-256 `digest`.

    Raises:
        VelaturaError: it is missing or another.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
    if found != digest:
        raise VelaturaError(
            f"'ocr' reads with {path.name} of SHA-256 {digest[:12]}…, and {path} of rapidocr {version('rapidocr')} is "
            f"{found if found == 'no file' else found[:12] + '…'}. Scores of other weights cannot be compared. "
            f'Install the package again: pip install --force-reinstall --no-deps "{PACKAGES[0]}"'
        )
    return path


def alphabet_of(path: Path) -> frozenset[str]:
    """The characters that the network at `path` can name."""
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return frozenset(session.get_modelmeta().custom_metadata_map["character"].splitlines())
