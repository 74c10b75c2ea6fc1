"""The shared prefix computes what the stock forward computes, with the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel
from torch import Tensor, nn

from velatura.api import VelaturaError
from velatura.plugins.adapters.lora import add_lora, merged_state
from velatura.plugins.adapters.qwen_image_21_network import (
    Grid,
    Layout,
    QwenImage21Conditioning,
    prepare,
    velocity,
)

P, G, L, C, WIDTH = 3, 2, 5, 8, 12
TARGET, SOURCE = Grid(1, 2, 4), Grid(1, 4, 2)
ROUNDING = 2e-6  # a few fp32 ulp of values of order 1, summed in another order


def network() -> QwenImage21Transformer2DModel:
    torch.manual_seed(0)
    return QwenImage21Transformer2DModel(
        in_channels=C,
        out_channels=C,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        context_in_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def layout(edits: bool, length: int = L) -> Layout:
    slots = (False, *(True, True), *[False] * (length - 1)) if edits else (False,) * length
    return Layout(slots=slots, sources=(SOURCE,) if edits else (), target=TARGET)


def conditioning(edits: bool) -> QwenImage21Conditioning:
    form, draw = layout(edits), torch.Generator().manual_seed(1)
    text = torch.randn(P, len(form.slots), WIDTH, generator=draw)
    sources = torch.randn(P, SOURCE.tokens, C, generator=draw) if edits else None
    return QwenImage21Conditioning.of(text, form, sources=sources)


def points() -> tuple[Tensor, Tensor, Tensor]:
    """x [N 8 C], t [N], rows [N] of P * G points, G per prompt."""
    draw = torch.Generator().manual_seed(2)
    rows = torch.arange(P).repeat_interleave(G)
    return torch.randn(P * G, TARGET.tokens, C, generator=draw), torch.rand(P * G, generator=draw), rows


def stock(net: nn.Module, x: Tensor, t: Tensor, cond: QwenImage21Conditioning, rows: Tensor) -> Tensor:
    """The forward of the class without any cache: the whole sequence of every point."""
    tokens = x if cond.sources is None else torch.cat([cond.sources[rows], x], dim=1)
    slots = torch.tensor([*cond.layout.slots, *[True] * (TARGET.tokens // 4)]).expand(len(x), -1)
    images = [[*cond.layout.sources, TARGET]] * len(x)
    return net(tokens, cond.text[rows], t, images, slots, return_dict=False)[0][:, -TARGET.tokens :]


def gradients(net: nn.Module, v: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    torch.cos(v).mean().backward()
    return {name: weight.grad.clone() for name, weight in net.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("edits", [False, True])
def test_the_prepared_velocity_is_the_stock_forward(edits: bool) -> None:
    net, cond, (x, t, rows) = network(), conditioning(edits), points()
    with torch.no_grad():
        expected = stock(net, x, t, cond, rows)
        prepared = velocity(net, x, t, prepare(net, cond), rows)
        unprepared = velocity(net, x, t, cond, rows)
    assert (prepared - expected).abs().max() < ROUNDING
    assert (unprepared - expected).abs().max() < ROUNDING


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("edits", [False, True])
def test_one_prefix_shared_by_all_points_of_a_prompt_has_the_gradient_of_separate_ones(
    edits: bool, checkpointing: bool, lora: bool
) -> None:
    net, cond, (x, t, rows) = network(), conditioning(edits), points()
    if lora:
        add_lora(net, 4, 8)
        nn.init.normal_(net.transformer_blocks[0].attn.to_k.lora_B["policy"].weight)
    if checkpointing:
        net.enable_gradient_checkpointing()
    expected = gradients(net, stock(net, x, t, cond, rows))
    shared = prepare(net, cond)
    halves = [velocity(net, x[half], t[half], shared, rows[half]) for half in (slice(0, 4), slice(4, None))]
    found = gradients(net, torch.cat(halves))
    assert found.keys() == expected.keys()
    assert ("txt_in.in_layer.weight" in found) is not lora
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name  # fp32 sums in another order


@pytest.mark.parametrize("edits", [False, True])
def test_a_prompt_gets_what_it_gets_alone_however_long_its_padding(edits: bool) -> None:
    net, whole, (x, t, rows) = network(), conditioning(edits), points()
    padding = torch.tensor([0, 3, 1])
    total = len(whole.layout.slots)
    mask = torch.arange(total) < (total - padding)[:, None]
    padded = QwenImage21Conditioning.of(whole.text, whole.layout, mask=mask, sources=whole.sources)
    with torch.no_grad():
        found = velocity(net, x, t, prepare(net, padded), rows)
        for p, cut in enumerate(padding.tolist()):
            sources = None if whole.sources is None else whole.sources[p : p + 1]
            text = whole.text[p : p + 1, : total - cut]
            alone = QwenImage21Conditioning.of(text, layout(edits, L - cut), sources=sources)
            own = rows == p
            expected = stock(net, x[own], t[own], alone, rows[own] * 0)
            assert (found[own] - expected).abs().max() < ROUNDING


def test_padded_prompts_have_the_gradient_they_have_alone() -> None:
    net, whole, (x, t, rows) = network(), conditioning(True), points()
    total = len(whole.layout.slots)
    mask = (torch.arange(total) < total - 2).expand(P, -1)
    padded = QwenImage21Conditioning.of(whole.text, whole.layout, mask=mask, sources=whole.sources)
    alone = QwenImage21Conditioning.of(whole.text[:, : total - 2], layout(True, L - 2), sources=whole.sources)
    expected = gradients(net, stock(net, x, t, alone, rows))
    found = gradients(net, velocity(net, x, t, padded, rows))
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_selection_answers_for_its_rows_prepared_or_not() -> None:
    net, cond, (x, t, _) = network(), conditioning(True), points()
    rows = torch.tensor([2, 0, 2, 2, 0, 0])
    with torch.no_grad():
        expected = velocity(net, x, t, cond, rows)
        chosen = cond.select(torch.tensor([2, 0]))
        after = prepare(net, cond).select(torch.tensor([2, 0]))
        places = (rows == 0).long()
        assert len(chosen) == 2
        assert len(chosen.text) == 2
        assert (velocity(net, x, t, chosen, places) - expected).abs().max() < ROUNDING
        assert (velocity(net, x, t, after, places) - expected).abs().max() < ROUNDING


@pytest.mark.parametrize("prepared", [False, True])
def test_a_joined_conditioning_answers_as_its_parts_do(prepared: bool) -> None:
    net, cond, (x, t, rows) = network(), conditioning(True), points()
    mask = torch.arange(len(cond.layout.slots)) < torch.tensor([[5], [4], [6]])
    padded = QwenImage21Conditioning.of(cond.text, cond.layout, mask=mask, sources=cond.sources)
    with torch.no_grad():
        first, second = (prepare(net, part) if prepared else part for part in (cond, padded.select(torch.tensor([1]))))
        joint = first.join(second.expand(P))
        assert joint is not None
        both = velocity(net, torch.cat([x, x]), torch.cat([t, t]), joint, torch.cat([rows, rows + P]))
        expected = torch.cat([velocity(net, x, t, first, rows), velocity(net, x, t, second, rows * 0)])
    assert (both - expected).abs().max() < ROUNDING


def test_what_cannot_share_a_forward_does_not_join() -> None:
    cond = conditioning(True)
    assert cond.join(conditioning(False)) is None
    assert prepare(network(), cond).join(cond) is None


def test_one_stored_row_serves_many_prompts_with_one_prefix() -> None:
    net, (x, t, rows) = network(), points()
    null = conditioning(False).select(torch.tensor([1])).expand(P)
    with torch.no_grad():
        expected = stock(net, x, t, null, rows * 0)
    batches: list[int] = []
    net.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["timestep"])), with_kwargs=True
    )
    with torch.no_grad():
        prepared = prepare(net, null)
        found = velocity(net, x, t, prepared.select(torch.tensor([2, 0, 0])), rows)
    assert len(null) == P
    assert batches == [1, P * G]
    assert (found - expected).abs().max() < ROUNDING


def test_lora_starts_where_the_network_was_and_trains_nothing_else() -> None:
    plain, net, cond, (x, t, rows) = network(), network(), conditioning(False), points()
    add_lora(net, 2, 4)
    with torch.no_grad():
        assert torch.equal(velocity(net, x, t, cond, rows), velocity(plain, x, t, cond, rows))
    trainable = {name for name, weight in net.named_parameters() if weight.requires_grad}
    assert len(trainable) == 2 * 4 * 3  # A and B of four projections in three blocks
    assert all(".lora_" in name for name in trainable)


def test_lora_weights_come_from_their_seed_and_leave_the_global_generator_alone() -> None:
    def first(seed: int) -> Tensor:
        net = network()
        before = torch.get_rng_state()
        add_lora(net, 2, 2, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        weight: Any = net.transformer_blocks[0].attn.to_q.lora_A["policy"].weight
        return weight.detach()

    assert torch.equal(first(5), first(5))
    assert not torch.equal(first(5), first(6))


def test_lora_without_a_match_says_which_layers_there_are() -> None:
    with pytest.raises(VelaturaError, match=r"no linear layer called q_proj.*to_q"):
        add_lora(network(), 2, 2, targets=["q_proj"])


def test_merged_weights_compute_what_the_lora_network_computes() -> None:
    net, merged, cond, (x, t, rows) = network(), network(), conditioning(True), points()
    add_lora(net, 2, 4)
    for name, weight in net.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(weight, std=0.3)
    merged.load_state_dict(merged_state(net))
    with torch.no_grad():
        tuned = velocity(net, x, t, cond, rows)
        assert (velocity(merged, x, t, cond, rows) - tuned).abs().max() < 1e-5  # merged weights round once more
        net.disable_adapters()
        merged.load_state_dict(merged_state(net))
        assert torch.equal(velocity(merged, x, t, cond, rows), velocity(net, x, t, cond, rows))


def test_a_conditioning_that_does_not_fit_its_layout_is_refused() -> None:
    with pytest.raises(VelaturaError, match="8 source tokens; given are 7 embeddings and 0 source tokens"):
        QwenImage21Conditioning.of(torch.zeros(1, L + 2, WIDTH), layout(True))
