"""What all diffusers adapters share: folders, sizes, cached rows, LoRA, export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from velatura.api import Context, Prompt, VelaturaError
from velatura.core.rollout import Sampler, rollout
from velatura.plugins.adapters.lora import LORA_NAME
from velatura.plugins.adapters.model_folder import UNWANTED, WANTED
from velatura.plugins.adapters.qwen_image_21 import QwenImage21, QwenImage21Options
from velatura.plugins.adapters.visit import Visit
from velatura.plugins.guidance.policies import RolloutOnly, ScaleOptions
from velatura.schedulers.kernels import Ode

sys.path.insert(0, str(Path(__file__).with_name("families")))
CPU = torch.device("cpu")
PROMPT = Prompt(id="p", text="a red fox", task="t2i")
PIXELS = torch.rand(3, 80, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import qwen_image_21

    return qwen_image_21.build(tmp_path_factory.mktemp("models") / "tiny")


def adapter_of(folder: Path | str, place: Path, **options: Any) -> QwenImage21:
    made = QwenImage21(QwenImage21Options(path=str(folder), **{"height": 64, "width": 96, **options}))
    made.setup(Context(device=CPU, cache=place, seed=0, base=place))
    return made


def edit(*sources: Tensor, **facts: Any) -> Prompt:
    return Prompt(**{"id": "e", "text": "make it blue", "task": "edit", "sources": sources, **facts})


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(VelaturaError, match=r"has no model_index\.json \(there is: notes\.txt\)"):
        adapter_of(tmp_path, tmp_path / "cache").load(CPU)


def test_a_model_of_another_family_names_the_adapter_to_take(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    index = json.loads((other / "model_index.json").read_text())
    for found, remedy in [
        ("StableDiffusion3Pipeline", "Use adapter 'sd3'"),
        ("FluxPipelin", "Did you mean 'FluxPipeline'? It is opened by adapter 'flux'."),
        ("WanPipeline", "Or try adapter 'diffusers-flow'"),
        ("WanPipeline", "There is: QwenImage21Pipeline ('qwen-image-21'), QwenImagePipeline ('qwen-image'),"),
    ]:
        (other / "model_index.json").write_text(json.dumps({**index, "_class_name": found}))
        with pytest.raises(VelaturaError, match=f"holds a {found}, and adapter 'qwen-image-21' stands for") as caught:
            adapter_of(other, tmp_path).load(CPU)
        assert remedy in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(VelaturaError, match=r"there is no model folder .*models/qwen/x/y"):
        adapter_of("models/qwen/x/y", tmp_path).load(CPU)
    with pytest.raises(VelaturaError, match=r"and 'qwen/x' cannot be fetched from the hub: ") as told:
        adapter_of("qwen/x", tmp_path).load(CPU)
    assert "\n" not in str(told.value)
    assert ".." not in str(told.value).replace(str(tmp_path), "")


def test_a_folder_without_its_transformer(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken, ignore=shutil.ignore_patterns("transformer"))
    with pytest.raises(VelaturaError, match="has no transformer"):
        adapter_of(broken, tmp_path).load(CPU)


def test_a_configuration_that_was_cut_off(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    for name in ("scheduler/scheduler_config.json", "transformer/config.json", "model_index.json"):
        whole = (broken / name).read_text()
        (broken / name).write_text(whole[:-20])
        adapter = adapter_of(broken, tmp_path)
        with pytest.raises(VelaturaError, match=rf"{name} cannot be read: .*copied to the end\?"):
            adapter.times(4)
        (broken / name).write_text(whole)


def test_the_size_is_the_prompts_or_the_sources_or_the_configured_one(folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(folder, tmp_path)
    assert adapter.size(PROMPT) == (64, 96)
    assert adapter.size(Prompt(id="q", text="x", task="t2i", size=(96, 32))) == (96, 32)
    height, width = adapter.size(edit(torch.zeros(3, 200, 100)))
    assert (height, width) == (96, 64)  # twice as high as wide, of nearly the configured area
    with pytest.raises(VelaturaError, match=r"multiples of 32\. The nearest size is 64 x 96"):
        adapter.size(Prompt(id="q", text="x", task="t2i", size=(100, 70)))


def test_a_configured_size_that_the_network_cannot_draw_is_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(folder, tmp_path, height=100, width=96)
    monkeypatch.setattr(type(adapter.folder), "transformer", lambda *_: pytest.fail("weights were read"))
    message = r"The adapter's `height` and `width` ask for a picture of 96 x 100 .*nearest size is 96 x 96\."
    for ask in (lambda: adapter.load(CPU), lambda: adapter.size(PROMPT), lambda: adapter.encode([edit(PIXELS)])):
        with pytest.raises(VelaturaError, match=message):
            ask()


def test_pictures_given_to_a_model_that_only_draws_from_text_and_none_given_to_one_that_only_edits(
    opened: Callable[..., Any],
) -> None:
    with pytest.raises(
        VelaturaError,
        match=r"'e' \(make it blue\) has 1 source image\(s\), but 'sd3' only draws from text\. Take a model",
    ):
        opened("sd3").encode([edit(PIXELS)])
    with pytest.raises(VelaturaError, match=r"'e' \(make it blue\) has 2 source images; 'flux' takes 1"):
        opened("flux_kontext").encode([edit(PIXELS, PIXELS)])
    with pytest.raises(
        VelaturaError, match=r"'p' \(a red fox\) has no source image, and 'qwen-image-edit-plus' only edits"
    ):
        opened("qwen_image_edit_plus").encode([PROMPT])


def test_wrong_numbers_of_sources_are_told_before_encoders_too_large_to_be_tried_are_loaded(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a published model, whose `velatura check` reads no weights."""
    monkeypatch.setattr("velatura.plugins.adapters.footprints.TRIED_BYTES", 0)
    monkeypatch.setattr("velatura.plugins.adapters.model_folder.ModelFolder.pipeline", lambda *_: pytest.fail("read"))
    for name, prompt, message in [
        ("sd3", edit(PIXELS), "'sd3' only draws from text"),
        ("flux", edit(PIXELS), "is a FluxPipeline, which only draws from text"),
        ("flux_kontext", edit(PIXELS, PIXELS), "'flux' takes 1"),
        ("qwen_image_edit_plus", PROMPT, "'qwen-image-edit-plus' only edits"),
        ("qwen_image_21", edit(), "is an edit without a source image"),
    ]:
        with pytest.raises(VelaturaError, match=message):
            opened(name).footprint(prompt)


@pytest.mark.parametrize(("family", "side"), [("sd3", 4), ("z_image", 16), ("qwen_image", 16), ("qwen_image_21", 16)])
def test_a_picture_has_as_many_tokens_as_its_network_sees(family: str, side: int, opened: Callable[..., Any]) -> None:
    """`side`: of a token in pixels."""
    assert opened(family).tokens((64, 96)) == (64 // side) * (96 // side)


def test_a_guidance_scale_for_a_guidance_distilled_model_is_refused_in_the_rollout(opened: Callable[..., Any]) -> None:
    guidance, kernel = RolloutOnly(ScaleOptions(scale=3.0)), Ode()
    for adapter, remedy in [
        (opened("flux", true_cfg=False), "`true_cfg: true`"),
        (opened("flux2"), "undistilled klein"),
    ]:
        net = adapter.load(CPU)
        sampler = Sampler(adapter=adapter, guidance=guidance, kernel=kernel, steps=2, batch=4)
        with pytest.raises(VelaturaError, match=r"scale other than 1 was asked of .*guidance to `none`") as told:
            list(rollout(net, sampler, [PROMPT], [[1]]))
        assert remedy in str(told.value)
        told_before = adapter.footprint(PROMPT)
        with pytest.raises(VelaturaError, match=r"scale other than 1 was asked of"):  # what `velatura check` asks for
            told_before.null(1)


def test_bf16_on_a_device_that_lacks_it_is_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = QwenImage21(QwenImage21Options(path=str(folder), height=64, width=64))
    made.setup(Context(device=CPU, cache=tmp_path, seed=0, base=tmp_path, precision="bf16"))
    monkeypatch.setattr(type(made.folder), "transformer", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(VelaturaError, match=r"'bf16', but Tesla T4 \(compute capability 7\.5\) has no bf16.*'fp32'"):
        made.load(torch.device("cuda"))


def test_an_edit_needs_a_source_and_a_batch_one_layout(folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(folder, tmp_path)
    with pytest.raises(VelaturaError, match="is an edit without a source image"):
        adapter.encode([edit()])
    with pytest.raises(VelaturaError, match="batches of one layout; these prompts have 2"):
        adapter.encode([PROMPT, Prompt(id="q", text="x", task="t2i", size=(32, 32))])


def test_a_prompt_is_encoded_once_and_read_from_disk_ever_after(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = adapter_of(folder, tmp_path)
    expected = first.encode([edit(PIXELS), edit(PIXELS, id="f", text="and now green, please")])
    first.null([PROMPT])
    again = adapter_of(folder, tmp_path, lora_rank=None)
    monkeypatch.setattr(QwenImage21, "row", lambda *_: pytest.fail("encoded a second time"))
    found = again.encode([edit(PIXELS), edit(PIXELS, id="f", text="and now green, please")])
    assert torch.equal(found.text, expected.text)
    assert torch.equal(found.sources, expected.sources)
    again.null([PROMPT])


@pytest.mark.parametrize("change", ["text", "pixels", "size", "encoder", "chat", "template", "library", "precision"])
def test_a_row_is_encoded_anew_when_anything_it_depends_on_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    adapter_of(folder, tmp_path / "cache").encode([edit(PIXELS)])
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if change == "encoder":
        (copy / "text_encoder" / "config.json").write_text(json.dumps(
            json.loads((copy / "text_encoder" / "config.json").read_text()) | {"note": "another"}
        ))  # fmt: skip
    if change == "chat":
        (template,) = copy.glob("processor/*.jinja")
        template.write_text(template.read_text() + " ")
    if change == "template":
        monkeypatch.setattr(QwenImage21, "template", "2")
    if change == "library":
        monkeypatch.setattr("velatura.plugins.adapters.diffusers_base.version", lambda name: f"another {name}")
    prompt = {
        "text": edit(PIXELS, text="make it red"),
        "pixels": edit(PIXELS.flip(1)),
        "size": edit(PIXELS, size=(32, 32)),
    }.get(change, edit(PIXELS))
    encoded = []
    row = QwenImage21.row
    monkeypatch.setattr(QwenImage21, "row", lambda *a: encoded.append(1) or row(*a))
    again = adapter_of(copy, tmp_path / "cache")
    if change == "precision":
        again.setup(Context(device=CPU, cache=tmp_path / "cache", seed=0, base=tmp_path, precision="bf16"))
    again.encode([prompt])
    assert encoded == [1]
    kept = [load_file(path)["text"].dtype for path in (tmp_path / "cache" / "conditionings").glob("*/*.safetensors")]
    native = torch.bfloat16 if change == "precision" else torch.float32
    assert sorted(map(str, kept)) == sorted(map(str, (torch.float32, native)))


def test_frozen_parts_stay_for_a_batch_of_rows_and_leave_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(folder, tmp_path, cache=False)
    moves: list[str] = []
    for name in ("bring", "leave"):
        own = getattr(Visit, name)
        monkeypatch.setattr(Visit, name, lambda *given, own=own, name=name: moves.append(name) or own(*given))
    adapter.encode([PROMPT, Prompt(id="q", text="two foxes", task="t2i")])
    assert moves.count("leave") == 1
    assert moves[-1] == "leave"
    assert len(moves) > 2  # brought for each row, where it is already
    del moves[:]
    with adapter.on_device("text_encoder"):
        pass
    assert moves == ["bring", "leave"]


def test_a_copied_model_shares_the_rows_of_the_original(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter_of(folder, tmp_path / "cache").encode([PROMPT])
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.setattr(QwenImage21, "row", lambda *_: pytest.fail("encoded a second time"))
    adapter_of(tmp_path / "copy", tmp_path / "cache").encode([PROMPT])


def test_a_cached_row_that_was_cut_off_is_made_again(folder: Path, tmp_path: Path) -> None:
    expected = adapter_of(folder, tmp_path).encode([PROMPT])
    (file,) = (tmp_path / "conditionings").glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(adapter_of(folder, tmp_path).encode([PROMPT]).text, expected.text)
    assert file.stat().st_size > 50


def test_prompts_of_different_length_are_padded_and_each_gets_what_it_gets_alone(folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(folder, tmp_path)
    net = adapter.load(CPU)
    prompts = [PROMPT, Prompt(id="q", text="a much longer prompt", task="t2i")]
    x, t = adapter.noise(prompts, [1, 2]), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        both = adapter.velocity(net, x, t, adapter.prepare(net, adapter.encode(prompts)), torch.arange(2))
        for i, prompt in enumerate(prompts):
            alone = adapter.prepare(net, adapter.encode([prompt]))
            single = adapter.velocity(net, x[i : i + 1], t[i : i + 1], alone, torch.zeros(1, dtype=torch.int64))
            torch.testing.assert_close(both[i : i + 1], single, rtol=0, atol=2e-6)


def test_lora_trains_little_and_without_it_the_network_is_the_base(folder: Path, tmp_path: Path) -> None:
    adapter, plain = adapter_of(folder, tmp_path, lora_rank=4), adapter_of(folder, tmp_path, lora_rank=None)
    net, base = adapter.load(CPU), plain.load(CPU)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == adapter.describe()["trainable parameters"]
    assert sum(p.numel() for p in base.parameters()) == plain.describe()["trainable parameters"]
    for p in trained:
        torch.nn.init.normal_(p, std=0.3)
    x, t, rows = adapter.noise([PROMPT], [1]), torch.tensor([0.7]), torch.zeros(1, dtype=torch.int64)
    cond = adapter.encode([PROMPT])
    with torch.no_grad():
        moved, before = adapter.velocity(net, x, t, cond, rows), adapter.velocity(base, x, t, cond, rows)
        net.disable_adapters()
        assert torch.equal(adapter.velocity(net, x, t, cond, rows), before)
    assert not torch.equal(moved, before)


def test_a_lora_target_that_matches_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        VelaturaError, match=r"no linear layer called to_qq, .*Did you mean to_q\? There is: .*attn\.to_q"
    ):
        adapter_of(folder, tmp_path, lora_targets=("to_q", "to_qq")).load(CPU)
    with pytest.raises(VelaturaError, match="found no linear layer called x,") as told:
        adapter_of(folder, tmp_path, lora_targets=("x",)).load(CPU)
    shown = str(told.value).rstrip(".").partition("There is: ")[2].split(", ")
    assert all(re.search("[A-Za-z]", name) for name in shown)
    adapter_of(folder, tmp_path, lora_targets=tuple(shown)).load(CPU)  # what is offered can be taken


RELOAD = """
import sys, torch
from diffusers import DiffusionPipeline, QwenImage21Pipeline
from transformers import AutoTokenizer
assert not any(name.startswith("velatura") for name in sys.modules)
folder, base, latents, out = sys.argv[1:]
x = torch.load(latents)
def velocity(net):
    text = torch.ones(1, 5, net.config.context_in_dim)
    mask = torch.tensor([[False] * 5 + [True] * (x.shape[1] // 4)])
    return net(x, text, torch.tensor([0.5]), [[(1, 4, 6)]], mask, return_dict=False)[0][:, -x.shape[1]:]
from diffusers import QwenImage21Transformer2DModel
with torch.no_grad():
    merged = QwenImage21Transformer2DModel.from_pretrained(folder + "/transformer").eval()
    layered = QwenImage21Transformer2DModel.from_pretrained(base + "/transformer").eval()
    state = QwenImage21Pipeline.lora_state_dict(folder + "/lora")
    QwenImage21Pipeline.load_lora_into_transformer(state, layered)
    torch.save([velocity(merged), velocity(layered)], out)
"""


def test_an_exported_model_and_its_lora_weights_load_with_stock_diffusers_alone(folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(folder, tmp_path, lora_rank=4)
    net = adapter.load(CPU)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(3))
    adapter.export(net, tmp_path / "export", info={"guidance_scale": 1.0})
    index = json.loads((tmp_path / "export" / "model_index.json").read_text())
    assert index["processor"] == ["transformers", "Qwen3VLProcessor"]
    assert json.loads((tmp_path / "export" / "velatura.json").read_text()) == {"guidance_scale": 1.0}
    x = adapter.noise([PROMPT], [1])
    torch.save(x, tmp_path / "x.pt")
    paths = (tmp_path / "export", folder, tmp_path / "x.pt", tmp_path / "v.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", RELOAD, *paths], check=True, timeout=120, cwd=tmp_path)
    merged, layered = torch.load(tmp_path / "v.pt")
    text = torch.ones(1, 5, net.config.context_in_dim)
    mask = torch.tensor([[False] * 5 + [True] * (x.shape[1] // 4)])
    with torch.no_grad():
        ours = net(x, text, torch.tensor([0.5]), [[(1, 4, 6)]], mask, return_dict=False)[0][:, -x.shape[1] :]
    assert LORA_NAME in net.peft_config
    torch.testing.assert_close(merged, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(layered, ours, rtol=0, atol=1e-6)


def test_an_export_takes_the_parts_and_the_licence_and_leaves_what_holds_the_old_weights(
    folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    for name in ("LICENSE.md", "the-whole-model.safetensors", "example.png"):
        (source / name).write_text("x")
    (source / "comfy").mkdir()
    adapter = adapter_of(source, tmp_path)
    adapter.export(adapter.load(CPU), tmp_path / "export", info={})
    left = {path.name for path in (tmp_path / "export").iterdir()} ^ {path.name for path in folder.iterdir()}
    assert left == {"LICENSE.md", "lora", "velatura.json"}


def test_other_variants_of_the_same_weights_are_neither_fetched_nor_counted(folder: Path, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    source = tmp_path / "source"
    shutil.copytree(folder, source)
    before = adapter_of(source, tmp_path).folder.frozen_bytes(torch.float32)
    assert before["text_encoder"] > 0
    weights = source / "text_encoder" / "model.safetensors"
    for name in ("model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors"):
        shutil.copy(weights, weights.with_name(name))
    assert adapter_of(source, tmp_path).folder.frozen_bytes(torch.float32) == before
    wanted = ["LICENSE.md", "model_index.json", "text_encoder/model-00001-of-00002.safetensors",
              "text_encoder/model.safetensors.index.json", "tokenizer/tokenizer.json", "vae/config.json"]  # fmt: skip
    others = ["flux1-dev.safetensors", "example.png", "text_encoder/model.fp16.safetensors",
              "text_encoder/model.fp16-00001-of-00002.safetensors", "text_encoder/pytorch_model.bin",
              "vae/model.onnx"]  # fmt: skip
    assert [*filter_repo_objects([*wanted, *others], allow_patterns=WANTED, ignore_patterns=UNWANTED)] == wanted


def test_loading_and_saving_a_model_prints_nothing(
    opened: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = opened("sd3", lora_rank=2)
    adapter.encode([PROMPT])
    adapter.export(adapter.load(CPU), tmp_path / "export", info={})
    assert capfd.readouterr() == ("", "")


def test_the_exported_folder_opens_with_the_same_adapter(folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(folder, tmp_path)
    adapter.export(adapter.load(CPU), tmp_path / "export", info={})
    again = adapter_of(tmp_path / "export", tmp_path, lora_rank=None)
    assert again.encode([PROMPT]).text.shape == adapter.encode([PROMPT]).text.shape
    picture = again.decode(again.noise([PROMPT], [1]), PROMPT)
    assert picture.shape == (1, 3, 64, 96)
    assert 0 <= float(picture.min()) <= float(picture.max()) <= 1
    assert again.latents(picture).shape == again.noise([PROMPT], [1]).shape
