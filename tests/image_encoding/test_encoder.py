"""Image embeddings: of eight devices as of one, and as of `transformers`; what is sent to them."""

import jax
import numpy as np
import pytest
import torch
import transformers

from tests import tiny
from vixml_jax.image_encoding.encoder import ImageEncoder

SIZE = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_siglip(tmp_path_factory.mktemp("siglip"), SIZE, 4, width=12)


@pytest.fixture(scope="module")
def encoder(model):
    return ImageEncoder(model, keep_aspect=False, dtype="float32")


def pixels_of(count):
    return [*np.random.default_rng().integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)]


@pytest.mark.eight_host_devices
def test_eight_devices_embed_as_one_and_as_transformers(model, encoder, monkeypatch):
    pixels, sent, put = pixels_of(13), [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, *a: sent.append(put(x, *a)) or sent[-1])
    found, is_finite = encoder.start(pixels, encoder.batch_size(13))()
    monkeypatch.undo()
    (batch,) = sent
    assert batch.dtype == np.uint8 and batch.shape == (16, SIZE, SIZE, 3)
    assert {shard.data.shape[0] for shard in batch.addressable_shards} == {2}
    assert is_finite.all() and found.shape == (13, 12)

    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    alone = ImageEncoder(model, keep_aspect=False, dtype="float32")
    assert (encoder.batch_size(1), alone.batch_size(1), alone.batch_size(13)) == (8, 1, 13)
    np.testing.assert_allclose(found, alone.start(pixels, 13)()[0], rtol=1e-5, atol=1e-6)

    tower = transformers.SiglipVisionModel.from_pretrained(model).eval()
    values = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = tower(values).pooler_output
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_embedding_does_not_depend_on_other_images(encoder):
    pixels = pixels_of(8)
    together, _ = encoder.start(pixels, 8)()
    for place in (0, 5):
        alone, _ = encoder.start([None] * place + [pixels[place]], 8)()
        np.testing.assert_array_equal(alone[place], together[place])


def test_embeddings_that_are_not_finite_are_said(encoder, monkeypatch):
    params = jax.tree.map(lambda x: x * 1e20, encoder._params)
    monkeypatch.setattr(encoder, "_params", params)
    assert not encoder.start(pixels_of(2), 8)()[1].any()
