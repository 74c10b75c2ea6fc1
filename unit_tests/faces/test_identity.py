"""`face-identity` on photographs: who is there counts, and neither erasing nor copying a face pays."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from loguru import logger
from people import beside, blurred, compressed, context, distorted, noise, photo, sample, tensor
from PIL import Image
from pydantic import ValidationError

from velatura.api import Prompt, Status, VelaturaError
from velatura.core.judge import Judge, WeightedReward
from velatura.rewards.faces import options
from velatura.rewards.faces.identity import REMEMBERED, FaceIdentity, IdentityOptions
from velatura.rewards.faces.matching import assigned, ramp
from velatura.rewards.faces.portrait import PortraitChecks
from velatura.rewards.faces.reading import Faces

SKY = "make the sky pink"


def ready(own, base, **given):
    reward = FaceIdentity(IdentityOptions(**given))
    reward.setup(context(base))
    reward._reader = own
    return reward


@pytest.fixture(scope="module")
def reward(own, tmp_path_factory):
    return ready(own, tmp_path_factory.mktemp("identity"))


@pytest.fixture(scope="module")
def people():
    return photo("astronaut"), photo("hopper")


def values(reward, *samples):
    scores = reward.score(samples)
    assert set(scores.status) == {Status.OK}, scores.reasons
    return scores.values.tolist()


def faces(embeddings, boxes, size=(100, 100)):
    count = len(embeddings)
    flat = torch.zeros(count)
    return Faces(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(count, 4),
        points=torch.zeros(count, 5, 2),
        confidence=flat + 1,
        yaw=flat,
        misfit=flat,
        sharpness=flat + 1,
        embeddings=torch.tensor(embeddings, dtype=torch.float32).reshape(count, 2),
        size=size,
    )


def test_the_person_counts_and_not_the_pixels(reward, people):
    """A copy earns what any good picture of the person earns; another person, and nobody, earn nothing."""
    astronaut, hopper = people
    shown = [astronaut, distorted(astronaut)["jpeg"], distorted(astronaut)["turned"], hopper, noise()]
    assert values(reward, *(sample(one, astronaut, SKY) for one in shown)) == [1, 1, 1, 0, 0]


def test_between_the_bounds_credit_falls_with_the_distance(own, tmp_path, people):
    astronaut, _ = people
    shown = [sample(blurred(astronaut, radius), astronaut, SKY) for radius in (1, 2, 3)]
    found = values(ready(own, tmp_path, full=0.1, none=0.9), *shown)
    notes = ready(own, tmp_path).score(shown).notes
    apart = [float(note.rsplit(" ", 1)[1]) for note in notes]
    assert apart == sorted(apart)
    assert found == pytest.approx([(0.9 - one) / 0.8 for one in apart], abs=0.01)


def test_several_faces_are_matched_one_to_one(reward, people):
    astronaut, hopper = people
    both = beside(astronaut, hopper)
    shown = [both, beside(hopper, astronaut), beside(hopper, hopper), hopper, noise()]
    found = values(reward, *(sample(one, both, SKY) for one in shown))
    assert found[:2] == [1, 1]
    assert found[2:4] == pytest.approx([0.5, 0.5], abs=0.03)
    assert found[4] == 0


def test_faces_too_many_cost_unless_they_were_asked_for(reward, own, tmp_path, people):
    astronaut, hopper = people
    crowd = beside(astronaut, hopper, hopper)
    rows = [
        sample(crowd, astronaut, SKY, name="a"),
        sample(crowd, astronaut, SKY, name="b", faces=2),
        sample(crowd, astronaut, SKY, name="c", faces=3),
        sample(crowd, astronaut, "add two women beside her", name="d"),
        sample(crowd, beside(astronaut, hopper), SKY, name="e"),
    ]
    assert values(reward, *rows) == pytest.approx([0.8, 0.9, 1, 1, 0.95], abs=0.01)
    assert values(ready(own, tmp_path, extra=0), rows[0]) == [1]
    assert values(ready(own, tmp_path, extra=1), rows[0]) == [0]


def test_every_source_counts_when_it_is_told_so(own, tmp_path, people):
    astronaut, hopper = people
    row = sample(beside(hopper, astronaut), [astronaut, hopper], "both in a park", faces=2)
    alone = sample(astronaut, [astronaut, hopper], "both in a park", faces=2)
    assert values(ready(own, tmp_path, sources="all"), row, alone) == pytest.approx([1, 0.5], abs=0.03)
    assert values(ready(own, tmp_path), alone) == [1]


def test_a_source_that_shows_nobody_recognisable_is_not_judged(reward, people):
    astronaut, _ = people
    small = Image.new("RGB", (256, 256), (90, 120, 90))
    small.paste(photo("astronaut", 64), (0, 0))
    sources = [noise(), small, blurred(astronaut, 5), astronaut]
    scores = reward.score([sample(astronaut, one, SKY, name=str(row)) for row, one in enumerate(sources)])
    assert scores.status == (Status.NOT_APPLICABLE,) * 3 + (Status.OK,)
    assert scores.reasons[0] == "The source shows no face"
    assert "pixels high" in scores.reasons[1]
    assert "sharpness 0.0" in scores.reasons[2]


def test_the_output_cannot_close_the_gate(reward, people):
    """Whatever the edit shows, the reward applies: it is decided from the prompt and its source."""
    astronaut, _ = people
    scores = reward.score(
        [sample(one, astronaut, SKY) for one in (noise(), torch.zeros(3, 64, 64), blurred(astronaut, 9))]
    )
    assert scores.status == (Status.OK,) * 3
    assert scores.values.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "metadata", "applies"),
    [
        (SKY, {}, True),
        ("remove the woman", {}, False),
        ("turn it into a cartoon", {}, False),
        (SKY, {"keeps_identity": False}, False),
        ("turn it into a cartoon", {"keeps_identity": True}, True),
    ],
)
def test_instruction_or_metadata_say_whether_faces_stay(reward, people, text, metadata, applies):
    astronaut, hopper = people
    shown = sample(hopper, astronaut, text, **metadata)
    assert reward.applies(shown.prompt) is applies
    assert reward.score([shown]).status == (Status.OK if applies else Status.NOT_APPLICABLE,)
    assert not reward.applies(sample(hopper, text=text).prompt)


def test_wrong_metadata_are_one_message(reward, people):
    astronaut, _ = people
    with pytest.raises(VelaturaError, match=r"Prompt 'p': its metadata field 'keeps_identity' holds 'no', and true or"):
        reward.applies(sample(astronaut, astronaut, SKY, name="p", keeps_identity="no").prompt)
    with pytest.raises(
        VelaturaError, match=r"its metadata field 'faces' holds True\. .*\"metadata\": \{\"faces\": 2\}"
    ):
        reward.score([sample(astronaut, astronaut, SKY, faces=True)])


def test_scores_do_not_depend_on_company(reward, people):
    astronaut, hopper = people
    shown = [
        sample(compressed(astronaut, 8), astronaut, SKY, name="a"),
        sample(hopper, noise(), SKY, name="b"),
        sample(blurred(hopper, 3), beside(hopper, astronaut), SKY, name="c"),
        sample(torch.full((3, 64, 64), math.nan), astronaut, SKY, name="a"),
    ]
    together = reward.score(shown)
    assert together.status == (Status.OK, Status.NOT_APPLICABLE, Status.OK, Status.FAILED)
    for row, one in enumerate(shown):
        assert reward.score([one]).status == together.status[row : row + 1]
        assert float(reward.score([one]).values) == pytest.approx(float(together.values[row]), abs=1e-3)


def test_prompts_of_one_name_keep_their_own_sources(reward, people):
    """Ids are unique within a task only."""
    astronaut, hopper = people
    shown = [sample(astronaut, astronaut, SKY, name="0"), sample(astronaut, hopper, SKY, name="0")]
    assert values(reward, *shown) == [1, 0]


def test_sources_are_read_once_and_kept_in_memory_only(own, tmp_path, people):
    astronaut, hopper = people
    reward, calls = ready(own, tmp_path), []

    class Counting:
        full, none, sure = own.full, own.none, own.sure

        def read(self, images, smallest, recognise):
            calls.append(len(images))
            return own.read(images, smallest, recognise)

    reward._reader = Counting()
    rows = [sample(astronaut, astronaut, SKY), sample(hopper, astronaut, SKY)]
    values(reward, *rows)
    values(reward, *rows)
    assert calls == [1, 2, 0, 2]
    assert len(reward._memory) == 1 <= REMEMBERED
    assert list(tmp_path.iterdir()) == []


def test_a_detector_that_breaks_fails_its_picture_only(own, tmp_path, people):
    """The run sees a status; the others of the batch keep their scores."""
    astronaut, _ = people
    reward, broken = ready(own, tmp_path), torch.full((3, 77, 77), 0.25)

    class Breaking:
        full, none, sure = own.full, own.none, own.sure

        def read(self, images, smallest, recognise):
            if any(image.shape == broken.shape for image in images):
                raise RuntimeError("out of memory")
            return own.read(images, smallest, recognise)

    reward._reader = Breaking()
    prompt = sample(astronaut, astronaut, SKY).prompt
    rows = [sample(one, astronaut, SKY) for one in (astronaut, broken, astronaut)]
    with Judge([WeightedReward(label="identity", at="here", model=reward)], max_failed=1.0) as judge:
        judge.submit(rows)
        report = judge.report([prompt])
    assert report.status[:, 0].tolist() == [Status.OK, Status.FAILED, Status.OK]
    assert report.scores[[0, 2], 0].tolist() == [1, 1]
    assert "out of memory" in report.reasons[0][1]


def test_the_assignment_is_the_cheapest_and_prefers_the_same_place():
    required = faces([[0.0, 0], [1, 0]], [[0, 0, 10, 10], [50, 50, 60, 60]])
    shown = faces([[0.9, 0], [0.5, 0]], [[0, 0, 20, 20], [100, 100, 120, 120]], size=(200, 200))
    assert assigned(required, shown, prior=0).tolist() == pytest.approx([0.5, 0.1])
    assert assigned(required, shown, prior=2).tolist() == pytest.approx([0.9, 0.5])
    assert assigned(required, faces([[0.9, 0]], [[0, 0, 1, 1]]), prior=0).tolist() == pytest.approx([math.inf, 0.1])
    assert assigned(required, faces([], []), prior=0.1).tolist() == [math.inf, math.inf]
    assert ramp(torch.tensor([0.2, 0.35, 0.475, 0.6, math.inf]), 0.6, 0.35).tolist() == pytest.approx([1, 1, 0.5, 0, 0])


def test_faces_weigh_by_how_well_the_source_shows_them(reward, people):
    """A blurred face of the source that is lost costs less than a sharp one."""
    astronaut, hopper = people
    half = beside(blurred(astronaut, 2), hopper)
    lost_blurred = sample(beside(noise_picture(), hopper), half, SKY)
    lost_sharp = sample(beside(blurred(astronaut, 2), noise_picture()), half, SKY)
    first, second = values(reward, lost_blurred, lost_sharp)
    assert 0 < second < 0.45 < 0.55 < first < 1
    assert first + second == pytest.approx(1, abs=0.05)


def noise_picture():
    return Image.fromarray((noise().permute(1, 2, 0) * 255).byte().numpy())


def test_options_that_contradict_each_other_are_refused(own, tmp_path):
    with pytest.raises(ValidationError, match=r"`full` \(0.7\) is not below `none` \(0.6\)"):
        IdentityOptions(full=0.7, none=0.6)
    with pytest.raises(VelaturaError, match=r"`full` \(0.7\) is not below `none` \(0.6\): set both"):
        ready(own, tmp_path, full=0.7)
    with pytest.raises(VelaturaError, match="call `setup` before"):
        FaceIdentity().score([])


def test_insightface_asks_for_consent_and_is_named_when_missing(monkeypatch, tmp_path):
    with pytest.raises(ValidationError, match=r"non-commercial research only\. Set `accept_non_commercial: true`"):
        IdentityOptions(backend="insightface")
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    reward = FaceIdentity(IdentityOptions(backend="insightface", accept_non_commercial=True))
    said = []
    handler = logger.add(lambda message: said.append(str(message)), level="WARNING")
    try:
        with pytest.raises(VelaturaError, match=r'Install it: pip install "velatura\[insightface\]"'):
            reward.setup(context(tmp_path))
    finally:
        logger.remove(handler)
    assert said == []


def test_making_the_reward_imports_nothing_heavy():
    code = (
        "import sys; from velatura.rewards.faces.identity import FaceIdentity; FaceIdentity(); "
        "assert not {'insightface', 'onnxruntime', 'cv2', 'torchvision', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pictures_may_have_other_sizes_than_their_sources(reward, people):
    astronaut, _ = people
    wide = Image.new("RGB", (400, 300), (200, 200, 210))
    wide.paste(astronaut, (100, 20))
    assert values(reward, sample(wide, astronaut, SKY), sample(tensor(photo("astronaut", 160)), astronaut, SKY)) == [
        1,
        1,
    ]


def test_prompts_without_a_source_are_not_judged(reward, people):
    prompt = Prompt(id="0", text=SKY, task="t2i")
    assert not reward.applies(prompt)
    assert reward.score([sample(people[0])]).status == (Status.NOT_APPLICABLE,)


@pytest.mark.parametrize("component", [FaceIdentity, PortraitChecks])
@pytest.mark.parametrize("root", ["~/insight", "insight"])
def test_weights_of_insightface_are_a_part_of_the_reward(component, root, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    held = tmp_path / "insight" / "models" / "tiny"
    held.mkdir(parents=True)
    given = {"insightface_model": "tiny", "accept_non_commercial": True, "insightface_root": root}

    def known(backend="insightface", **more):
        reward = component(component.options_class(backend=backend, **given | more))
        return reward.fingerprint(context(tmp_path)), dict(reward.identity())

    (held / "det.onnx").write_bytes(b"one")
    before, own = known(), known("own")
    assert known(batch=3) == before
    (held / "det.onnx").write_bytes(b"another")
    after = known()
    assert after[0] != before[0]
    assert (after[1] != before[1]) == root.startswith("~")  # elsewhere the card reads the option's folder
    assert root.startswith("insight") or known("own") == own


def test_where_faces_are_read_is_no_part_of_the_reward():
    assert FaceIdentity.operational == PortraitChecks.operational == {"batch", "device"}
