"""`portrait-checks` on photographs: the number of faces, and what makes one well shown."""

from __future__ import annotations

import importlib.util
import math
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from people import beside, blurred, context, noise, photo, sample, tensor
from PIL import Image

from velatura.api import Status, VelaturaError
from velatura.rewards import brisque
from velatura.rewards.faces.identity import FaceIdentity, IdentityOptions
from velatura.rewards.faces.portrait import PortraitChecks, PortraitOptions


def ready(own, base, **given):
    reward = PortraitChecks(PortraitOptions(**given))
    reward.setup(context(base))
    reward._reader = own
    return reward


@pytest.fixture(scope="module")
def reward(own, tmp_path_factory):
    return ready(own, tmp_path_factory.mktemp("portrait"))


@pytest.fixture(scope="module")
def people():
    return photo("astronaut"), photo("hopper")


def values(reward, *samples):
    scores = reward.score(samples)
    assert set(scores.status) == {Status.OK}, scores.reasons
    return scores.values.tolist()


def placed(picture, side=512):
    whole = Image.new("RGB", (side, side), (120, 140, 160))
    whole.paste(picture, (20, 20))
    return whole


def test_a_good_portrait_scores_one_and_no_face_nothing(reward, people):
    astronaut, hopper = people
    shown = [astronaut, hopper, noise(), torch.full((3, 128, 128), 0.6)]
    assert values(reward, *(sample(one) for one in shown)) == [1, 1, 0, 0]


def test_how_sure_a_detector_has_to_be_is_a_matter_of_that_detector(own, tmp_path, people):
    """Another one that says .7 where ours says .99 means the same; a threshold in the recipe overrules both."""

    class Modest:
        full, none, sure, confidence = own.full, own.none, 0.6, (0.5, 0.65)

        def read(self, images, smallest, recognise):
            found = own.read(images, smallest, recognise)
            return [replace(faces, confidence=torch.full_like(faces.confidence, 0.7)) for faces in found]

    both = beside(*people)
    modest = ready(Modest(), tmp_path)
    assert values(modest, sample(people[0]), sample(both)) == pytest.approx([1, 0.5], abs=0.02)
    assert values(ready(Modest(), tmp_path, min_confidence=0.8), sample(both)) == pytest.approx([1], abs=0.02)
    strict = Modest()
    strict.sure, strict.confidence = own.sure, own.confidence
    assert values(ready(strict, tmp_path), sample(people[0]), sample(both)) == [0, 0]
    identity = FaceIdentity(IdentityOptions())
    identity.setup(context(tmp_path))
    edit = sample(people[0], people[0], "make it warmer")
    for reader, status in ((Modest(), Status.OK), (strict, Status.NOT_APPLICABLE)):
        identity._reader, identity._memory = reader, OrderedDict()
        assert identity.score([edit]).status == (status,)
    with pytest.raises(ValueError, match=r"MTCNN names no face below 0\.7"):
        PortraitOptions(min_confidence=0.6)


def test_exactly_the_faces_asked_for_count(reward, own, tmp_path, people):
    astronaut, hopper = people
    both = beside(astronaut, hopper)
    assert values(reward, sample(both), sample(beside(astronaut, hopper, hopper))) == pytest.approx([0.5, 0], abs=0.02)
    assert values(reward, sample(both, faces=2), sample(astronaut, faces=2)) == pytest.approx([1, 0.5], abs=0.02)
    assert values(reward, sample(noise(), faces=0), sample(astronaut, faces=0)) == [1, 0.5]
    assert values(ready(own, tmp_path, faces=2), sample(both)) == pytest.approx([1], abs=0.02)
    assert values(ready(own, tmp_path, extra=0), sample(both)) == pytest.approx([1], abs=0.02)


def test_blurred_faces_score_less_and_the_notes_say_which_check(reward, people):
    astronaut, _ = people
    shown = [sample(astronaut), *(sample(blurred(astronaut, radius)) for radius in (1.5, 2, 3))]
    found = values(reward, *shown)
    assert found == sorted(found, reverse=True)
    assert found[0] - found[-1] > 0.2
    checks = [float(part) for part in reward.score(shown[-1:]).notes[0].split(": ")[1].split()]
    assert len(checks) == 4
    assert min(checks) == checks[3]
    assert found[-1] == pytest.approx(math.prod(checks) ** 0.25, abs=0.02)


def test_small_faces_score_less_by_their_share(own, tmp_path):
    far = placed(photo("hopper", 96))
    wide, strict = (ready(own, tmp_path, share=share) for share in (0.1, 0.4))
    assert values(wide, sample(far))[0] > values(strict, sample(far))[0] + 0.15


def test_a_squashed_face_scores_less(reward, people):
    astronaut, _ = people
    shown = [sample(astronaut), sample(astronaut.resize((256, 150)))]
    assert values(reward, *shown)[1] < 0.95
    whole, squashed = (float(note.split(": ")[1].split()[2]) for note in reward.score(shown).notes)
    assert whole == 1
    assert squashed < 0.8


def test_only_portraits_are_judged(reward, own, tmp_path, people):
    astronaut, _ = people
    rows = [sample(astronaut), sample(astronaut, category="general"), sample(astronaut, category="general", faces=1)]
    rows.append(sample(astronaut, astronaut, "smile"))
    assert [reward.applies(row.prompt) for row in rows] == [True, False, True, False]
    judged, left = Status.OK, Status.NOT_APPLICABLE
    assert reward.score(rows).status == (judged, left, judged, left)
    anyone = ready(own, tmp_path, categories=("portrait", "general"))
    assert anyone.applies(rows[1].prompt)


def test_broken_pictures_fail_and_wrong_metadata_are_one_message(reward, people):
    broken = torch.full((3, 64, 64), math.nan)
    scores = reward.score([sample(broken), sample(people[0])])
    assert scores.status == (Status.FAILED, Status.OK)
    assert "not finite" in scores.reasons[0]
    with pytest.raises(VelaturaError, match=r"Prompt 'p': its metadata field 'faces' holds 'two'"):
        reward.applies(sample(people[0], name="p", faces="two").prompt)
    with pytest.raises(VelaturaError, match="call `setup` before"):
        PortraitChecks().score([])


def test_scores_do_not_depend_on_company(reward, people):
    astronaut, hopper = people
    shown = [
        sample(blurred(astronaut, 2)),
        sample(noise()),
        sample(placed(photo("hopper", 96))),
        sample(beside(hopper, astronaut)),
    ]
    together = values(reward, *shown)
    assert together == pytest.approx([values(reward, one)[0] for one in shown], abs=1e-3)
    assert together == pytest.approx(values(reward, *shown[::-1])[::-1], abs=1e-3)
    assert len({round(one, 2) for one in together}) >= 3


@pytest.mark.skipif(
    importlib.util.find_spec("brisque") is None, reason=f"the parameters are not installed: {brisque.INSTALL}"
)
def test_the_quality_of_the_face_can_be_a_fifth_check(own, tmp_path, people):
    _, hopper = people
    reward = ready(own, tmp_path, brisque=True)
    speckled = tensor(hopper) + 0.2 * torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0))
    found = values(reward, sample(hopper), sample(speckled.clamp(0, 1)))
    assert found[0] > 0.95
    assert found[1] < found[0] - 0.1
    assert "brisque" in reward.score([sample(hopper)]).notes[0]
