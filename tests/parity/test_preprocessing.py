"""The reference's image chain, action tokens and statistics, from its own recorded values."""

import io

import numpy as np
import pytest
from PIL import Image

from qvla_jax.families.prismatic.images import (
    crop_center,
    jpeg_round_trip,
    reference_chain,
    resize_lanczos3,
)
from qvla_jax.families.prismatic.network import action_bins
from qvla_jax.families.prismatic.normalization import Normalizer

from .trim import FIXTURES

IMAGES = ("img_a", "img_b")


@pytest.fixture(scope="module")
def chain():
    with np.load(FIXTURES / "preproc.npz") as file:
        return {name: file[name] for name in file.files}


def _rotated(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[::-1, ::-1])


def _levels(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


@pytest.mark.parametrize("image", IMAGES)
def test_jpeg_coefficients_are_those_of_tensorflow(chain, image):
    # TensorFlow's file through the same decoder: equal pixels mean equal quantized coefficients.
    with Image.open(io.BytesIO(chain[f"{image}_jpeg_bytes"].tobytes())) as file:
        decoded = np.asarray(file.convert("RGB"))
    ours = jpeg_round_trip(_rotated(chain[f"{image}_env"]))
    np.testing.assert_array_equal(ours, decoded)
    # TensorFlow decodes with a faster, less exact inverse transform.
    levels = _levels(ours, chain[f"{image}_jpeg_decoded"])
    assert levels.max() <= 10
    assert levels.mean() < 1.5


@pytest.mark.parametrize("image", IMAGES)
def test_lanczos_and_crop_differ_by_one_level_in_hardly_any_pixel(chain, image):
    resized = resize_lanczos3(chain[f"{image}_jpeg_decoded"], 224)
    for ours, recorded in (
        (resized, chain[f"{image}_resized224"]),
        (crop_center(chain[f"{image}_resized224"]), chain[f"{image}_center_cropped"]),
    ):
        levels = _levels(ours, recorded)
        assert levels.max() <= 1
        assert np.mean(levels > 0) <= 1e-4


@pytest.mark.parametrize("image", IMAGES)
def test_the_whole_chain_differs_as_much_as_the_jpeg_decoders(chain, image):
    ours = reference_chain(_rotated(chain[f"{image}_env"]), center_crop=True)
    levels = _levels(ours, chain[f"{image}_center_cropped"])
    assert levels.mean() < 1.5


@pytest.mark.parametrize("wrong", ["lanczos of PIL", "no antialiasing", "crop of 0.9 of the side"])
def test_other_resampling_is_noticed(chain, wrong):
    decoded, resized = chain["img_a_jpeg_decoded"], chain["img_a_resized224"]
    if wrong == "lanczos of PIL":
        other = np.asarray(Image.fromarray(decoded).resize((224, 224), Image.Resampling.LANCZOS))
        recorded = resized
    elif wrong == "no antialiasing":
        other = np.asarray(Image.fromarray(decoded).resize((224, 224), Image.Resampling.NEAREST))
        recorded = resized
    else:
        box = (0.05 * 224, 0.05 * 224, 0.95 * 224, 0.95 * 224)
        image = Image.fromarray(resized)
        other = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR, box=box))
        recorded = chain["img_a_center_cropped"]
    assert np.mean(_levels(other, recorded) > 0) > 1e-3


def test_bins_and_tokens(chain):
    np.testing.assert_array_equal(action_bins.EDGES, chain["bin_edges"])
    np.testing.assert_array_equal(action_bins.CENTERS, chain["bin_centers"])
    decoded = action_bins.decode(chain["decode_token_ids"].astype(np.int32), 32000)
    np.testing.assert_allclose(decoded, chain["decode_actions"], atol=1e-7)
    # Encoding and decoding again: the bin that holds the value.
    again = action_bins.decode(chain["action_token_ids_vocab32000"].astype(np.int32), 32000)
    inside = np.clip(chain["action_values"], -1.0, 1.0)
    assert np.abs(np.asarray(again) - inside).max() <= 1 / 255 + 1e-7


def test_proprio_is_normalized_as_in_the_reference(chain):
    q01, q99 = chain["proprio_q01"], chain["proprio_q99"]
    normalizer = Normalizer(low=q01, high=q99, mask=np.ones(len(q01), bool))
    ours = normalizer.normalize(chain["proprio_raw"])
    np.testing.assert_allclose(ours, chain["proprio_normalized"], atol=1e-6)
