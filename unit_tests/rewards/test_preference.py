from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import tiny_clip
import tiny_rewards

from velatura.api import Context, Prompt, Sample, Status, VelaturaError
from velatura.rewards.aesthetic import Aesthetic, AestheticOptions
from velatura.rewards.dual_encoder import to_bytes
from velatura.rewards.image_reward import ImageReward, ImageRewardOptions
from velatura.rewards.preference import HpsV2, HpsV2Options, SiglipScore, SiglipScoreOptions
from velatura.rewards.ratings import EditReward, EditRewardOptions, HpsV3, HpsV3Options

TEXTS = ("a red fox in the snow", "two blue birds", "an old map of a town")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    tiny_clip.siglip(base / "siglip")
    return base


@pytest.fixture(scope="module")
def hps(folder):
    return tiny_rewards.hps(folder)


@pytest.fixture(scope="module")
def blip(folder):
    return tiny_rewards.image_reward(folder)


def samples(texts=TEXTS):
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(
            prompt=Prompt(id=str(i), text=text, task="t2i"), image=torch.rand(3, 48, 40, generator=generator), seed=i
        )
        for i, text in enumerate(texts)
    ]


def ready(component, options, base):
    made = component(options)
    made.setup(Context(device=torch.device("cpu"), cache=base, seed=0, base=base))
    return made


def hpsv2(base, **options):
    return ready(HpsV2, HpsV2Options(path="hps.pt", base="base", **options), base)


def pixels(shown, side=32):
    """As torchvision's Resize, CenterCrop, ToTensor and Normalize of CLIP would prepare a picture of Pillow."""
    made = []
    for sample in shown:
        picture = Image.fromarray(to_bytes(sample.image))
        scale = side / min(picture.size)
        width, height = (int(scale * length) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        bytes_ = picture.crop((left, top, left + side, top + side)).tobytes()
        tensor = torch.frombuffer(bytearray(bytes_), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1) / 255
        made.append((tensor - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None])
    return torch.stack(made)


def boxed_pixels(shown, side=32):
    """As the authors do: the longer side to 32 pixels, zeros around the rest, then the normalisation of CLIP."""
    made = []
    for sample in shown:
        picture = Image.fromarray(to_bytes(sample.image))
        scale = side / max(picture.size)
        width, height = (round(length * scale) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        bytes_ = picture.tobytes()
        tensor = torch.frombuffer(bytearray(bytes_), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1) / 255
        left, top = (side - width) // 2, (side - height) // 2
        tensor = torch.nn.functional.pad(tensor, (left, side - width - left, top, side - height - top))
        made.append((tensor - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None])
    return torch.stack(made)


def test_hpsv2_sees_the_ends_of_a_long_picture(folder, hps):
    generator = torch.Generator().manual_seed(1)
    long = [replace(sample, image=torch.rand(3, 20, 90, generator=generator)) for sample in samples()]
    changed = [replace(s, image=torch.cat([s.image[..., :75], 1 - s.image[..., 75:]], 2)) for s in long]
    reward = hpsv2(folder)
    assert (reward.score(long).values - reward.score(changed).values).abs().min() > 1e-3


def test_hpsv2_is_a_hundred_times_the_cosine_of_the_network_that_open_clip_would_build(folder, hps):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    longest = max(map(len, ids))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
    with torch.no_grad():
        expected = 100 * hps.cosine(boxed_pixels(samples()), padded, torch.tensor([len(row) - 1 for row in ids]))
    scores = hpsv2(folder).score(samples())
    assert set(scores.status) == {Status.OK}
    assert expected.std() > 1
    torch.testing.assert_close(scores.values, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(hpsv2(folder, scale=1).score(samples()).values, expected / 100, atol=2e-5, rtol=0)


def test_hpsv2_weights_in_the_names_of_transformers_are_taken_as_they_are(folder, hps, tmp_path):
    from velatura.rewards.open_clip_weights import to_transformers

    tiny_rewards.save(tmp_path / "hps.safetensors", to_transformers(hps.state_dict()))
    made = ready(HpsV2, HpsV2Options(path=str(tmp_path / "hps.safetensors"), base=str(folder / "base")), folder)
    torch.testing.assert_close(made.score(samples()).values, hpsv2(folder).score(samples()).values)


def test_weights_that_do_not_fit_the_base_are_refused_with_the_first_tensor(folder, hps, tmp_path):
    weights = dict(hps.state_dict())
    del weights["ln_final.bias"]
    weights["visual.head.weight"] = torch.zeros(2)
    torch.save(weights, tmp_path / "hps.pt")
    made = HpsV2(HpsV2Options(path=str(tmp_path / "hps.pt"), base="base"))
    with pytest.raises(VelaturaError, match=r"lacks 1 \(first text_model.final_layer_norm.bias\), and has 1 that"):
        made.setup(Context(device=torch.device("cpu"), cache=folder, seed=0, base=folder))


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_a_file_that_would_run_code_is_not_read(folder, hps, tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "hps.pt")
    made = HpsV2(HpsV2Options(path=str(tmp_path / "hps.pt"), base="base"))
    with pytest.raises(VelaturaError, match=r"'hpsv2' cannot read weights from .*hps.pt"):
        made.setup(Context(device=torch.device("cpu"), cache=folder, seed=0, base=folder))
    assert capsys.readouterr().out == ""


def test_missing_weights_are_answered_in_one_message(folder, hps):
    with pytest.raises(VelaturaError, match=r"'hpsv2' finds no weights at './hpss.pt': it is neither a file nor"):
        ready(HpsV2, HpsV2Options(path="./hpss.pt", base="base"), folder)


def test_siglip_score_is_the_logit_of_the_stock_model_and_its_sigmoid(folder):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    path = folder / "siglip"
    model = AutoModel.from_pretrained(path).eval()
    shown = [Image.fromarray(to_bytes(sample.image)) for sample in samples()]
    seen = AutoImageProcessor.from_pretrained(path, backend="pil")(shown, return_tensors="pt")
    ids = AutoTokenizer.from_pretrained(path)(list(TEXTS), padding="max_length", max_length=64, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=ids["input_ids"], **seen).logits_per_image.diag()
    scores = ready(SiglipScore, SiglipScoreOptions(path="siglip"), folder).score(samples())
    torch.testing.assert_close(scores.values, logits, atol=1e-5, rtol=0)
    chances = ready(SiglipScore, SiglipScoreOptions(path="siglip", value="probability"), folder).score(samples())
    torch.testing.assert_close(chances.values, logits.sigmoid(), atol=1e-5, rtol=0)


def test_siglip_score_refuses_a_clip(folder, hps):
    with pytest.raises(VelaturaError, match=r"'base' is no SigLIP, it has no logit bias. 'clip-score' takes any CLIP"):
        ready(SiglipScore, SiglipScoreOptions(path="base"), folder)


def test_aesthetic_is_linear_layers_on_the_normalised_features_of_clip(folder, hps):
    from transformers import CLIPModel

    plain, weights = tiny_rewards.head(16, "layers", (0, 2, 4, 6, 7))
    torch.save(weights, folder / "head.pth")
    model = CLIPModel.from_pretrained(folder / "base").eval()
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=pixels(samples())).pooler_output
        features = model.visual_projection(pooled)
        expected = plain(features / features.norm(dim=-1, keepdim=True))[:, 0]
    made = ready(Aesthetic, AestheticOptions(path="head.pth", encoder="base", batch=2), folder)
    scores = made.score(samples())
    assert expected.std() > 1e-4
    torch.testing.assert_close(scores.values, expected, atol=1e-5, rtol=0)


def test_aesthetic_of_version_25_takes_the_pooled_features_of_siglip(folder):
    from transformers import AutoImageProcessor, SiglipVisionModel

    plain, weights = tiny_rewards.head(16, "scoring_head", (0, 2, 4, 6, 8))
    torch.save(weights, folder / "v25.pth")
    path = folder / "siglip"
    shown = [Image.fromarray(to_bytes(sample.image)) for sample in samples()]
    seen = AutoImageProcessor.from_pretrained(path, backend="pil")(shown, return_tensors="pt")
    with torch.no_grad():
        features = SiglipVisionModel.from_pretrained(path).eval()(**seen).pooler_output
        expected = plain(features / features.norm(dim=-1, keepdim=True))[:, 0]
    scores = ready(Aesthetic, AestheticOptions(path="v25.pth", encoder="siglip"), folder).score(samples())
    torch.testing.assert_close(scores.values, expected, atol=1e-5, rtol=0)


def test_a_head_of_another_encoder_is_refused(folder, hps):
    _, weights = tiny_rewards.head(20, "layers", (0, 2, 4, 6, 7))
    torch.save(weights, folder / "wide.pth")
    with pytest.raises(VelaturaError, match=r"takes 20 features, and 'base' has 16. Set 'encoder'"):
        ready(Aesthetic, AestheticOptions(path="wide.pth", encoder="base"), folder)


def test_image_reward_is_the_standardised_head_on_what_the_reader_says(folder, blip):
    from transformers import AutoTokenizer

    eye, reader, mlp = blip
    tokens = AutoTokenizer.from_pretrained(folder / "words")(
        list(TEXTS), padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    with torch.no_grad():
        seen = eye(pixel_values=pixels(samples())).last_hidden_state
        states = reader(
            tokens["input_ids"], tokens["attention_mask"], encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2]),
        ).last_hidden_state  # fmt: skip
        expected = (mlp(states[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072
    made = ready(ImageReward, ImageRewardOptions(path=".", tokenizer="words", batch=2), folder)
    scores = made.score(samples())
    assert expected.std() > 1e-3
    torch.testing.assert_close(scores.values, expected, atol=1e-5, rtol=0)
    other = made.score(samples(TEXTS[::-1]))
    assert abs(float(other.values[0] - scores.values[0])) > 1e-4  # the prompt counts


@pytest.mark.parametrize("which", [HpsV2, SiglipScore, ImageReward])
def test_edits_are_not_judged(which):
    options = {HpsV2: HpsV2Options, SiglipScore: SiglipScoreOptions, ImageReward: ImageRewardOptions}[which]()
    edit = Prompt(id="0", text="make it blue", task="edit", sources=(torch.zeros(3, 8, 8),))
    assert not which(options).applies(edit)
    assert which(options).applies(replace(edit, sources=()))


def test_a_picture_that_is_not_finite_has_no_score_and_spoils_no_other(folder, hps, blip):
    for made in (hpsv2(folder), ready(ImageReward, ImageRewardOptions(path=".", tokenizer="words"), folder)):
        shown = samples()
        spoilt = [shown[0], replace(shown[1], image=torch.full((3, 48, 40), math.nan)), shown[2]]
        scores = made.score(spoilt)
        assert scores.status == (Status.OK, Status.FAILED, Status.OK)
        torch.testing.assert_close(scores.values[[0, 2]], made.score(shown).values[[0, 2]], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "made",
    [
        lambda **o: HpsV2(HpsV2Options(path="none", **o)),
        lambda **o: SiglipScore(SiglipScoreOptions(path="none", **o)),
        lambda **o: Aesthetic(AestheticOptions(path="none", **o)),
        lambda **o: ImageReward(ImageRewardOptions(path="none", **o)),
        lambda **o: HpsV3(HpsV3Options(path="none", **o)),
        lambda **o: EditReward(EditRewardOptions(path="none", prompts="none", **o)),
    ],
)
def test_batch_and_device_are_no_part_of_a_published_reward(made, tmp_path):
    context = Context(device=torch.device("cpu"), cache=tmp_path, seed=0, base=tmp_path)
    assert made().operational == {"batch", "device"}
    assert made().needs_card()
    other = "fp32" if made().options.dtype == "bf16" else "bf16"
    assert made(batch=2).fingerprint(context) == made().fingerprint(context) != made(dtype=other).fingerprint(context)
