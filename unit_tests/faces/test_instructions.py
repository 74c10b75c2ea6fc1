"""Instructions that leave a face recognisable, and those that do not."""

from __future__ import annotations

import pytest

from velatura.rewards.faces.instructions import adds_people, changed

CHANGING = {
    "removes": [
        "Remove the man from the photo.",
        "delete the two people in the background",
        "erase him",
        "去掉照片里的男人",
    ],
    "replaces": [
        "replace the man with a dog",
        "Swap their faces",
        "turn her into a zombie",
        "换脸",
    ],
    "hides": [
        "make him wear a mask",
        "add sunglasses to the woman",
        "blur the face",
        "给她戴上口罩",
    ],
    "turns": [
        "have him look away from the camera",
        "show her from behind",
        "turn around",
        "让他转过身",
    ],
    "ages": [
        "make him older",
        "make her look 20 years younger",
        "show him as a child",
        "让她变老",
    ],
    "stylises": [
        "turn the image into a cartoon",
        "in the style of Van Gogh",
        "make it anime style",
        "pencil sketch",
        "Convert this photo to a watercolor painting",
        "Make the person a Pixar character",
        "把这张照片变成卡通风格",
        "redraw him as anime",
        "make her look like a marble statue",
        "make it a cartoon",
        "paint them in watercolor",
        "a pencil drawing",
        "转为水彩画",
        "油画",
    ],
}
KEEPING = [
    "Remove her glasses",
    "remove the hat from the man",
    "Remove the blemishes on her face",
    "remove the face mask",
    "replace the man's shirt with a red one",
    "turn her hair blonde",
    "give her glasses",
    "blur the background",
    "add a painting on the wall",
    "change the background to a watercolor painting",
    "make her smile",
    "make the sky pink",
    "make him stand in front of a painting",
    "show her next to a marble statue",
    "change his pose to sitting beside a sculpture",
    "make the woman hold a doll",
    "turn the man to look at the drawing",
    "add a cartoon character next to him",
    "add a painting",
    "add statue",
    "让他站在油画前面",
    "Put a red hat on him",
    "turn him to face the camera",
    "make the people smile",
    "change the drawing on the mug to a cat",
    "hide the tattoo of the woman",
    "put a helmet on the table",
    "Add a sticker to her laptop",
    "cover the wall behind the man",
    "remove the tattoo on his face, and make it black and white",
    "把背景换成海滩",
    "去掉男人的帽子",
    "把头发染成红色",
    "",
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in CHANGING.items() for text in texts])
def test_what_makes_a_face_another_is_named(kind, text):
    assert changed(text) == kind
    assert changed(f"Make the sky pink. {text}") == kind
    assert changed(text.upper()) == kind


@pytest.mark.parametrize("text", KEEPING)
def test_what_leaves_a_face_alone_is_not_excused(text):
    assert changed(text) == ""


@pytest.mark.parametrize(
    "text", ["add a man next to the woman", "add another person", "Insert two children", "增加一个女人"]
)
def test_instructions_may_ask_for_more_people(text):
    assert adds_people(text)
    assert changed(text) == ""


@pytest.mark.parametrize(
    "text", ["add a dog next to the man", "Put a red hat on him", "make the people smile", "增加一只狗"]
)
def test_other_additions_are_not_people(text):
    assert not adds_people(text)
