"""The tiny world's network: seeds, grid, layouts, weights, and the answers to what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from velatura.api import Context, Prompt, VelaturaError
from velatura.plugins.adapters.tinyworld import TinyWorldAdapter, TinyWorldAdapterOptions

CPU = torch.device("cpu")


def adapter(**options: object) -> TinyWorldAdapter:
    small = {"weights": None, "width": 32, "heads": 2, "layers": 2}
    return TinyWorldAdapter(TinyWorldAdapterOptions.model_validate(small | options))


def awake(net: nn.Module) -> nn.Module:
    """Fresh networks answer zero; this one answers something."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
    return net


def drawings(*texts: str) -> list[Prompt]:
    return [Prompt(id=text, text=text, task="t2i") for text in texts]


def edits(*texts: str) -> list[Prompt]:
    draw = torch.Generator().manual_seed(4)
    sources = [torch.rand(3, 24, 24, generator=draw) for _ in texts]
    return [Prompt(id=text, text=text, task="edit", sources=(s,)) for text, s in zip(texts, sources, strict=True)]


def answers(model: TinyWorldAdapter, net: nn.Module, prompts: list[Prompt], seeds: list[int]) -> Tensor:
    """Velocity at the noise of each seed and prompt, at t = 0.7."""
    x, rows = model.noise(prompts, seeds), torch.arange(len(prompts))
    with torch.no_grad():
        return model.velocity(net, x, torch.full((len(x),), 0.7), model.encode(prompts), rows)


@pytest.mark.parametrize("patch", [6, 4])
@pytest.mark.parametrize("make", [drawings, edits])
def test_a_sample_does_not_depend_on_the_batch_it_is_in(make: object, patch: int) -> None:
    model = adapter(patch=patch)
    net = awake(model.load(CPU))
    prompts = (drawings if make is drawings else edits)("a red circle on white", "blue", "two green squares")
    together = answers(model, net, prompts, [1, 2, 3])
    alone = torch.cat([answers(model, net, [prompt], [seed]) for prompt, seed in zip(prompts, (1, 2, 3), strict=True)])
    assert (together - alone).abs().max() < 1e-5  # fp32 sums in another order
    assert together.abs().max() > 0.1
    assert together.shape == (3, (24 // patch) ** 2, 48)


def test_text_and_source_both_matter() -> None:
    model, net = adapter(), awake(adapter().load(CPU))
    one, two = edits("make the circle red", "make the circle red")
    other = Prompt(id="other", text="make the circle blue", task="edit", sources=one.sources)
    v = answers(model, net, [one, two, other], [5, 5, 5])
    assert (v[0] - v[1]).abs().max() > 1e-3
    assert (v[0] - v[2]).abs().max() > 1e-3


def test_the_null_of_an_edit_keeps_the_source_and_drops_the_text() -> None:
    model = adapter()
    prompts = edits("make the circle red", "remove the square")
    null, cond = model.null(prompts), model.encode(prompts)
    assert null.sources is not None and cond.sources is not None
    assert torch.equal(null.sources, cond.sources)
    assert null.text.abs().max() == 0


def test_the_null_of_drawings_is_stored_once() -> None:
    null = adapter().null(drawings("red", "green", "blue"))
    assert (len(null), len(null.text)) == (3, 1)


def test_a_fresh_network_starts_at_zero_velocity_and_can_learn() -> None:
    model, net = adapter(), adapter().load(CPU)
    prompts = drawings("red")
    v = model.velocity(net, model.noise(prompts, [0]), torch.ones(1), model.encode(prompts), torch.zeros(1).long())
    assert v.abs().max() == 0
    v.sum().backward()
    assert net.get_parameter("proj_out.weight").grad.abs().max() > 0  # type: ignore[union-attr]


def test_noise_belongs_to_its_seed_alone() -> None:
    noise = adapter().noise(drawings("red", "green", "red"), [7, 8, 7])
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1], adapter().noise(drawings("blue"), [8])[0])


def test_fresh_weights_belong_to_their_seed_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (adapter(seed=seed).load(CPU).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["img_in.weight"], other["img_in.weight"])


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, 3.0])
def test_the_grid_is_the_schedulers_and_runs_from_one_to_zero(shift: float) -> None:
    times = adapter(shift=shift).times(10)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - k / 10 for k in range(10)])
    assert torch.allclose(times, scheduler.sigmas, rtol=0, atol=1e-7)  # an ulp
    assert (times[0], times[-1], times.dtype) == (1, 0, torch.float32)


def test_the_shift_favours_noise() -> None:
    assert torch.allclose(adapter(shift=2.0).times(2), torch.tensor([1, 2 / 3, 0]))


def test_latents_invert_decoding() -> None:
    model = adapter()
    pictures = model.decode(0.1 * model.noise(drawings("red", "blue"), [1, 2]))
    assert pictures.shape == (2, 3, 24, 24)
    assert pictures.min() >= 0 and pictures.max() <= 1
    again = model.decode(model.latents(pictures))
    assert (again - pictures).abs().max() < 0.1  # clamping leaves the 48 components a little


def test_drawings_and_edits_do_not_mix() -> None:
    with pytest.raises(VelaturaError, match=r"'red' has 0 source images.*batch them by task"):
        adapter().encode([*edits("remove the circle"), *drawings("red")])


def test_a_source_of_another_size_is_refused() -> None:
    big = Prompt(id="big", text="red", task="edit", sources=(torch.zeros(3, 32, 32),))
    with pytest.raises(VelaturaError, match=r"'big' is \(3, 32, 32\).*\(3, 24, 24\)"):
        adapter().encode([big])


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValidationError, match="width 40 is not a multiple of 16 for each of 2 heads"):
        adapter(width=40)


def test_weights_are_read_from_a_file_seen_from_the_recipe(tmp_path: Path) -> None:
    net = awake(adapter().load(CPU))
    save_file({name: tensor.clone() for name, tensor in net.state_dict().items()}, tmp_path / "mine.safetensors")
    model = adapter(weights="mine.safetensors")
    model.setup(Context(device=CPU, cache=tmp_path, seed=0, base=tmp_path))
    found = model.load(CPU).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())


def test_a_missing_checkpoint_is_answered_with_what_there_is(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(VelaturaError, match=r"no checkpoint .*mine\.safetensors.* there is: other\.safetensors"):
        adapter(weights=str(tmp_path / "mine.safetensors")).load(CPU)


def test_a_checkpoint_of_another_size_is_answered_with_its_size(tmp_path: Path) -> None:
    net = adapter(width=64, layers=3).load(CPU)
    save_file(net.state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(VelaturaError, match=r"wide.*'time_text.*should be .*width 64, layers 3, heads 2"):
        adapter(weights=str(tmp_path / "wide.safetensors")).load(CPU)


def test_a_foreign_checkpoint_is_named_as_one(tmp_path: Path) -> None:
    save_file({"unet.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(VelaturaError, match="not a checkpoint of this network"):
        adapter(weights=str(tmp_path / "unet.safetensors")).load(CPU)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(VelaturaError, match=r"cut\.safetensors is not a safetensors file"):
        adapter(weights=str(tmp_path / "cut.safetensors")).load(CPU)


def test_description_counts_what_is_trained() -> None:
    whole, lora = adapter().describe(), adapter(lora_rank=2).describe()
    assert whole["trainable parameters"] == whole["parameters"] == lora["parameters"]
    assert lora["trainable parameters"] == 2 * 4 * 2 * 32 * 2  # A and B, four projections, two blocks, 32 x rank 2
    assert whole["weights"] == "fresh, seed 0"


def test_each_patch_has_a_checkpoint_and_may_start_from_the_others() -> None:
    shipped = {patch: TinyWorldAdapter(TinyWorldAdapterOptions(patch=patch)).load(CPU).state_dict() for patch in (6, 4)}
    borrowed = TinyWorldAdapter(TinyWorldAdapterOptions(patch=4, weights="builtin-6")).load(CPU).state_dict()
    assert all(torch.equal(tensor, shipped[6][name]) for name, tensor in borrowed.items())
    assert not any(torch.equal(shipped[4][name], shipped[6][name]) for name in shipped[4])
