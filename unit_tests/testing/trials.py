"""What built-ins are tried with that need weights, a file, a server, or pictures of something."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from velatura.api import Context, Prompt, Sample
from velatura.core.served import Served
from velatura.core.serving import RewardServer
from velatura.rewards import brisque, ocr
from velatura.rewards.function import Function, FunctionOptions
from velatura.testing import Trial, make_prompts, make_samples

sys.path.extend(str(Path(__file__).parents[1] / part) for part in ("rewards", "judge", "faces", "adapters/families"))

import author_files
import chat_server as serving
import people
import tiny_backbones
import tiny_clip
import tiny_models
import tiny_raters
import tiny_rewards

FAMILIES = {
    "diffusers-flow": "diffusers_flow_aura", "flux": "flux", "flux2": "flux2", "qwen-image": "qwen_image",
    "qwen-image-21": "qwen_image_21", "qwen-image-edit-plus": "qwen_image_edit_plus", "sana": "sana", "sd3": "sd3",
    "z-image": "z_image",
}  # fmt: skip
"""Adapter -> one of the families that it opens."""
SIDE = 128
"""Pixels of a photograph: faces are half as high, the least that `face-identity` asks of a source is 48."""
DRAWN, EDITED = make_prompts(3), make_prompts(3, task="edit")
FEW = make_samples(DRAWN[1:], per_prompt=2)
"""For judges that take a while."""
FRESH = {"width": 32, "vision_width": 32, "layers": 1, "vision_layers": 1, "patch": 4}
RATER = {"dtype": "fp32", "device": "cpu", "pixels": 56 * 56}
CODE = """
def redness(image, prompt):
    return image[0].mean() - image[1:].mean()
"""


@dataclass
class Workshop:
    """Where tiny weights are made and servers run; each is made once, when it is asked for."""

    root: Path
    tiny: Callable[[str], Path]
    """The folder of a family of diffusion models."""
    servers: ExitStack = field(default_factory=ExitStack)

    def trial(self, kind: str, name: str) -> Trial | None:
        """What a component is tried with, if its defaults do not do."""
        made = TRIALS.get((kind, name))
        return None if made is None else made(self)

    @cached_property
    def clip(self) -> Path:
        """`base`, a CLIP, `hps.pt`, other weights for it, and `head.pth`, linear layers on its features."""
        folder = self.root / "clip"
        tiny_rewards.hps(folder)
        torch.save(tiny_rewards.head(16, "layers", (0, 2, 4, 6, 7))[1], folder / "head.pth")
        return folder

    @cached_property
    def siglip(self) -> Path:
        return tiny_clip.siglip(self.root / "siglip")

    @cached_property
    def dino(self) -> Path:
        return tiny_backbones.dino(self.root / "dino")

    @cached_property
    def blip(self) -> Path:
        folder = self.root / "blip"
        folder.mkdir()
        tiny_rewards.image_reward(folder)
        return folder

    @cached_property
    def qwen(self) -> Path:
        return tiny_models.save_model(self.root / "qwen", "qwen3-vl")

    @cached_property
    def texts(self) -> Path:
        folder = self.root / "texts"
        folder.mkdir()
        (folder / "vie_prompts.py").write_text(author_files.VIE)
        (folder / "checklists.py").write_text(author_files.LISTS)
        (folder / "redness.py").write_text(CODE)
        for split in ("train", "eval"):
            lines = [json.dumps({"prompt": f"a {colour} fox", "category": split}) for colour in ("red", "blue")]
            (folder / f"{split}.jsonl").write_text("\n".join(lines))
        return folder

    def rater(self, name: str, family: str, *heads: str) -> Path:
        """A Qwen judge with reward heads, and its questions."""
        folder = self.root / name
        if not folder.exists():
            folder.mkdir()
            torch.manual_seed(9)
            tiny_raters.save(folder, family, {prefix: tiny_raters.head() for prefix in heads}, "model.safetensors")
            for file in ("prompts.py", "data_collator_qwen_edit.py"):
                (folder / file).write_text(tiny_raters.QUESTIONS)
        return folder

    def chat(self, sheet: Callable[[serving.Question], str]) -> Mapping[str, Any]:
        """Options of a judge behind a socket that answers questions with pictures by `sheet`."""

        def reply(question: serving.Question) -> serving.Raw:
            last = replace(question, body={**question.body, "messages": question.body["messages"][-1:]})
            shows = any(part["type"] == "image_url" for part in last.parts)
            return serving.completion([sheet(last) if shows else "Yes."])

        server = self.servers.enter_context(serving.ChatServer(reply))
        return {"model": serving.MODEL, "server": server.address, "backoff": 0.001}

    def judge(self, **more: Any) -> Mapping[str, Any]:
        """Options of a judge of random weights in this process."""
        return {"rubric": "alignment", "model": str(self.qwen), "reasoning_tokens": 0, "min_mass": 0, **more}


TRIALS: dict[tuple[str, str], Callable[[Workshop], Trial]] = {}
Make = Callable[[Workshop], Trial]


def tries(kind: str, name: str) -> Callable[[Make], Make]:
    """Note what a component is tried with."""

    def note(make: Make) -> Make:
        TRIALS[kind, name] = make
        return make

    return note


@tries("reward", "aesthetic")
def aesthetic(shop: Workshop) -> Trial:
    return Trial(options={"path": str(shop.clip / "head.pth"), "encoder": str(shop.clip / "base")}, prompts=DRAWN)


@tries("reward", "clip-score")
@tries("evaluator", "clip-score")
@tries("reward", "pickscore")
def clip(shop: Workshop) -> Trial:
    return Trial(options={"path": str(shop.clip / "base")}, prompts=DRAWN)


@tries("reward", "siglip-score")
def siglip(shop: Workshop) -> Trial:
    return Trial(options={"path": str(shop.siglip)}, prompts=DRAWN)


@tries("reward", "hpsv2")
def hpsv2(shop: Workshop) -> Trial:
    return Trial(options={"path": str(shop.clip / "hps.pt"), "base": str(shop.clip / "base")}, prompts=DRAWN)


@tries("reward", "image-reward")
def image_reward(shop: Workshop) -> Trial:
    return Trial(options={"path": str(shop.blip), "tokenizer": str(shop.blip / "words")}, prompts=DRAWN)


@tries("reward", "hpsv3")
def hpsv3(shop: Workshop) -> Trial:
    folder = shop.rater("hpsv3", "Qwen2VLProcessor", "rm_head.")
    return Trial(options=RATER | {
        "path": str(folder / "model.safetensors"), "base": str(folder / "base"), "prompts": str(folder / "prompts.py"),
    }, prompts=DRAWN)  # fmt: skip


@tries("reward", "editreward")
def editreward(shop: Workshop) -> Trial:
    folder = shop.rater("editreward", "Qwen2_5_VLProcessor", "rm_heads.head_0.", "rm_heads.head_1.")
    return Trial(
        options=RATER | {"path": str(folder), "base": str(folder / "base"), "prompts": str(folder)}, prompts=EDITED
    )


@tries("reward", "edit-preservation")
def edit_preservation(shop: Workshop) -> Trial:
    return Trial(options={"path": str(shop.dino)}, prompts=EDITED)


@tries("reward", "brisque")
def measured_brisque(shop: Workshop) -> Trial:
    if importlib.util.find_spec("brisque") is None:
        pytest.skip(f"the parameters are not installed: {brisque.INSTALL}")
    return Trial(prompts=DRAWN)


@tries("reward", "ocr")
def read_by_ocr(shop: Workshop) -> Trial:
    """The word that is asked for, and another."""
    if importlib.util.find_spec("rapidocr") is None:
        pytest.skip(f"the extra `ocr` is not installed: {ocr.INSTALL}")
    prompt = Prompt(id="sign", text="a sign that says OPEN", task="t2i", metadata={"text": ["OPEN"]})
    shown = [people.tensor(sign(word)) for word in ("OPEN", "OPAN")]
    return Trial(options={"threads": 1}, samples=samples_of(prompt, shown))


def samples_of(prompt: Prompt, shown: Sequence[Any], group: int = 0) -> list[Sample]:
    """Pictures, tensors or Pillow's, for one prompt."""
    images = [people.as_tensor(one) for one in shown]
    return [Sample(prompt=prompt, image=image, seed=seed, group=group) for seed, image in enumerate(images)]


def sign(word: str) -> Image.Image:
    """64 pixels of dark letters on a light ground."""
    canvas = Image.new("RGB", (64, 64), (240, 240, 235))
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    ImageDraw.Draw(canvas).text((4, 20), word, font=ImageFont.truetype(str(file), 18), fill=(20, 30, 60))
    return canvas


@tries("reward", "face-identity")
def face_identity(shop: Workshop) -> Trial:
    """The person, another, nobody, and the person out of focus."""
    astronaut, hopper = people.photo("astronaut", SIDE), people.photo("hopper", SIDE)
    shown = [astronaut, hopper, people.noise(SIDE), people.blurred(astronaut, 2)]
    asked = people.sample(astronaut, astronaut, "make the sky pink").prompt
    other = people.sample(hopper, hopper, "make the sky green").prompt
    return Trial(samples=[*samples_of(asked, shown), *samples_of(other, shown[:2], group=1)])


@tries("reward", "portrait-checks")
def portrait_checks(shop: Workshop) -> Trial:
    """One face, another, none, and two where one was asked for."""
    astronaut, hopper = people.photo("astronaut", SIDE), people.photo("hopper", SIDE)
    prompt = Prompt(id="p", text="a portrait", task="t2i", category="portrait")
    shown = [astronaut, hopper, people.noise(SIDE), people.beside(astronaut, hopper)]
    return Trial(samples=samples_of(prompt, shown))


@tries("reward", "vlm-judge")
def vlm_judge(shop: Workshop) -> Trial:
    return Trial(options=shop.judge(reasoning_tokens=2), samples=FEW)


@tries("reward", "vlm-pairs")
def vlm_pairs(shop: Workshop) -> Trial:
    """Pictures so different that random weights prefer one."""
    shown = [people.noise(64), torch.zeros(3, 64, 64), torch.ones(3, 64, 64), FEW[0].image]
    first, second = DRAWN[1:]
    return Trial(options=shop.judge(), samples=[*samples_of(first, shown), *samples_of(second, shown[:2], group=1)])


@tries("reward", "vlm-parts")
def vlm_parts(shop: Workshop) -> Trial:
    judge = {name: value for name, value in shop.judge().items() if name != "rubric"}
    return Trial(options={"parts": [{"rubric": "alignment"}, {"rubric": "aesthetics"}], "judge": judge}, samples=FEW)


@tries("judge_model", "vlm")
def vlm(shop: Workshop) -> Trial:
    return Trial(options={"rubric": "alignment", "fresh": FRESH, "min_mass": 0.0}, prompts=DRAWN)


@tries("reward", "unified-reward")
def unified_reward(shop: Workshop) -> Trial:
    def sheet(question: serving.Question) -> str:
        light = question.brightness
        return (
            f"Alignment Score (1-5): {1 + 4 * light:.2f}\nCoherence Score (1-5): {5 - 4 * light:.2f}\n"
            f"Style Score (1-5): {1 + light:.2f}"
        )

    return Trial(options=shop.chat(sheet), prompts=DRAWN)


@tries("reward", "editscore")
def editscore(shop: Workshop) -> Trial:
    def sheet(question: serving.Question) -> str:
        return json.dumps({"reasoning": "fine", "score": [round(25 * question.brightness, 1), 20]})

    return Trial(options={**shop.chat(sheet), "prompts": str(shop.texts / "vie_prompts.py")}, prompts=EDITED[1:])


@tries("reward", "q-judger")
def q_judger(shop: Workshop) -> Trial:
    facets = {"Quality": ("Noise", "Edge Clarity", "Physical Logic"), "Alignment": ("Color",), "Aesthetics": ("Light",)}

    def sheet(question: serving.Question) -> str:
        text = "".join(part.get("text", "") for part in question.parts)
        name = next(name for name in facets if f"# {name}\n" in text)
        mark = min(2, int(6 * question.brightness))
        return json.dumps({facet: {"score": mark} for facet in facets[name]})

    return Trial(options={**shop.chat(sheet), "prompts": str(shop.texts / "checklists.py")}, samples=FEW)


@tries("reward", "http")
def http(shop: Workshop) -> Trial:
    model = Function(FunctionOptions(file="redness.py", call="redness"))
    model.setup(Context(device=torch.device("cpu"), cache=shop.root, seed=0, base=shop.texts))
    served = Served(label="redness", use="function", summary="", version="v1", model=model)
    server = shop.servers.enter_context(RewardServer([served], port=0))
    return Trial(options={"server": server.address, "reward": "redness"}, prompts=DRAWN)


@tries("reward", "function")
def function(shop: Workshop) -> Trial:
    return Trial(options={"file": str(shop.texts / "redness.py"), "call": "redness"}, prompts=DRAWN)


@tries("task", "prompts")
def prompt_file(shop: Workshop) -> Trial:
    files = {"file": str(shop.texts / "train.jsonl"), "eval_file": str(shop.texts / "eval.jsonl")}
    return Trial(options=files)


def family(module: str, shop: Workshop) -> Trial:
    """A family of diffusion models with LoRA on top."""
    made = importlib.import_module(module)
    options = {"path": str(shop.tiny(module)), **made.OPTIONS, "lora_rank": 2}
    like = (EDITED if made.EDITS else DRAWN)[0]
    texts = ("a red fox", "a red fox", "ice")
    return Trial(options=options, prompts=[replace(like, id=str(i), text=text) for i, text in enumerate(texts)])


TRIALS |= {("adapter", name): partial(family, module) for name, module in FAMILIES.items()}
