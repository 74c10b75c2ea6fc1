import pytest
import torch

from velatura.plugins.tinyworld.scenes import request_of
from velatura.plugins.tinyworld.task import TinyWorld, TinyWorldOptions
from velatura.plugins.tinyworld.vae import fit, load_vae, patches, unpatch
from velatura.plugins.tinyworld.verify import verify


@pytest.fixture(scope="module")
def held_out():
    prompts = TinyWorld(TinyWorldOptions(task="both", eval_count=390, targets=True)).prompts("eval")
    return list(prompts)


@pytest.mark.parametrize("patch", [6, 4])
def test_patches_are_put_back_where_they_were(patch):
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpatch(patches(images, patch), patch), images)


def test_a_token_sees_its_own_patch_only():
    images = torch.zeros(1, 3, 24, 24)
    images[0, :, 6:12, 12:18] = 1  # second row, third column: token 6
    changed = (load_vae().encode(images) != load_vae().encode(torch.zeros(1, 3, 24, 24))).any(2)
    assert changed.nonzero().tolist() == [[0, 6]]
    fine = (load_vae(4).encode(images) != load_vae(4).encode(torch.zeros(1, 3, 24, 24))).any(2)
    assert fine.nonzero()[:, 1].tolist() == [9, 10, 15, 16]  # rows 4 to 12, columns 12 to 20


@pytest.mark.parametrize(("patch", "tokens"), [(6, 16), (4, 36)])
def test_latents_have_unit_deviation_overall(held_out, patch, tokens):
    latents = load_vae(patch).encode(torch.stack([prompt.target for prompt in held_out]))
    assert latents.shape == (390, tokens, 48)
    assert float(latents.std()) == pytest.approx(1, abs=0.1)


def test_the_round_trip_is_judged_like_the_original(held_out):
    vae, images = load_vae(), torch.stack([prompt.target for prompt in held_out])
    requests = [request_of(prompt) for prompt in held_out]
    verdicts = verify(vae.decode(vae.encode(images)).numpy(), requests)
    assert sum(verdict.strict for verdict in verdicts) / 390 > 0.98


def test_encoding_what_was_decoded_changes_nothing_inside_the_range():
    vae = load_vae()
    latents = vae.encode(torch.full((1, 3, 24, 24), 0.5))
    latents = latents + 0.01 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(vae.encode(vae.decode(latents)), latents, atol=1e-5)


def test_patches_of_four_pixels_lose_nothing(held_out):
    vae, images = load_vae(4), torch.stack([prompt.target for prompt in held_out[:50]])
    assert torch.allclose(vae.decode(vae.encode(images)), images.clamp(0, 1), atol=1e-5)


def test_decoding_is_clamped():
    images = load_vae().decode(100 * torch.ones(1, 16, 48))
    assert images.min() >= 0
    assert images.max() <= 1


def test_the_shipped_basis_is_orthonormal_and_what_fit_gives():
    shipped, fitted = load_vae(), fit(4000)
    assert torch.allclose(shipped.basis.T @ shipped.basis, torch.eye(48), atol=1e-5)
    assert fitted.retained == pytest.approx(0.99, abs=0.003)
    # Fewer pictures turn single components, not the span of the strongest.
    overlap = torch.linalg.matrix_norm(shipped.basis[:, :12].T @ fitted.vae.basis[:, :12]) ** 2 / 12
    assert overlap > 0.97
