"""The weights are those that were published, and come with their notices."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from people import context
from safetensors.torch import load_file

from velatura.api import VelaturaError
from velatura.rewards.faces import weights
from velatura.rewards.faces.identity import FaceIdentity
from velatura.rewards.faces.portrait import PortraitChecks

ROOT = Path(__file__).parents[2]


def copied(folder):
    for name in weights.WEIGHTS:
        shutil.copy(weights.FOLDER / name, folder)
    return folder


@pytest.mark.parametrize("name", sorted(weights.WEIGHTS))
@pytest.mark.parametrize("reward", [FaceIdentity, PortraitChecks])
def test_a_byte_that_differs_is_an_error(reward, name, monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "FOLDER", copied(tmp_path))
    reward().setup(context(tmp_path))
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    pinned = weights.WEIGHTS[name][:12]
    with pytest.raises(VelaturaError, match=rf"{name} of SHA-256 {pinned}…, .* has [0-9a-f]{{12}}….*pip install"):
        reward().setup(context(tmp_path))
    path.unlink()
    with pytest.raises(VelaturaError, match=rf"{name} does not exist"):
        reward().setup(context(tmp_path))


def test_bytes_stand_for_numbers_as_published():
    """A convolution stored in bytes is byte * scale + least; one stored in full is itself."""
    stored, found = load_file(weights.FOLDER / "recognition.safetensors"), weights.read("recognition.safetensors")
    key = "conv32_1/conv1/conv/filters"
    scale, least = 0.0007328585666768691, -0.0974701893680236
    assert stored[key].dtype == torch.uint8
    assert stored[f"{key}/range"].tolist() == [scale, least]
    torch.testing.assert_close(found[key], stored[key].float() * scale + least)
    whole = "conv64_1/conv1/conv/filters"
    assert torch.equal(found[whole], stored[whole])
    assert not any(name.endswith("/range") for name in found)
    assert all(values.dtype == torch.float32 and bool(values.isfinite().all()) for values in found.values())


def test_the_files_are_small():
    assert sum((weights.FOLDER / name).stat().st_size for name in weights.WEIGHTS) < 8_500_000


def test_the_notice_names_each_file_its_source_and_its_licence():
    notice = (weights.FOLDER / "NOTICE.md").read_text()
    for name, digest in weights.WEIGHTS.items():
        assert f"`{name}`" in notice
        assert digest in notice
    for words in ("@vladmandic/face-api 1.7.15", "facenet-pytorch 2.6.0", "CC0", "Vladimir Mandic", "Timothy Esler"):
        assert words in notice
    assert notice.count('THE SOFTWARE IS PROVIDED "AS IS"') == 2
    assert "rewards/velatura/rewards/faces/NOTICE.md" in (ROOT / "THIRD_PARTY_NOTICES.md").read_text()


def converter():
    spec = importlib.util.spec_from_file_location("convert_face_weights", ROOT / "tools" / "convert_face_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_converter_takes_nothing_but_what_was_published(tmp_path):
    """Its pins are in the notice; another archive ends it before anything of it is read."""
    import io
    import tarfile
    import zipfile

    made = converter()
    notice = (weights.FOLDER / "NOTICE.md").read_text()
    for name, digest in {**made.RECOGNITION, **made.DETECTION}.items():
        assert Path(name).name in notice
        assert digest in notice
    tar, wheel = tmp_path / "a.tgz", tmp_path / "b.whl"
    with tarfile.open(tar, "w:gz") as files:
        for name in made.RECOGNITION:
            entry = tarfile.TarInfo(name)
            entry.size = 2
            files.addfile(entry, io.BytesIO(b"[]"))
    with zipfile.ZipFile(wheel, "w") as files:
        for name in made.DETECTION:
            files.writestr(name, b"cos\nsystem\n(S'exit 1'\ntR.")
    for call, archive in ((made.recognition, tar), (made.detection, wheel)):
        with pytest.raises(SystemExit, match="was published"):
            call(archive)


def test_the_converter_reads_bytes_and_floats_in_their_order():
    made = converter()
    data = bytes(range(6)) + torch.tensor([1.5, -2.0]).numpy().tobytes()
    coded, size = made.read({"shape": [2, 3], "quantization": {"dtype": "uint8"}}, data, 0)
    assert (coded.tolist(), size) == ([[0, 1, 2], [3, 4, 5]], 6)
    plain, size = made.read({"shape": [2]}, data, 6)
    assert (plain.tolist(), size) == ([1.5, -2.0], 8)
