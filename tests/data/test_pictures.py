"""Pictures in every form in which sets store them, against what TensorFlow's decoder gives."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from qvla_jax import data
from qvla_jax.errors import DatasetError

from . import small_sets as sets
from .small_sets import IMAGE, WRIST

f = tfds.features
RGB = sets.picture(1)
GRAY = RGB[..., 0]


def written(folder: Path, files: list[Any], described: Any = None) -> Path:
    """A set with one episode, whose main camera has these pictures."""
    (episode,) = sets.episodes((len(files),))
    steps = [{**step, IMAGE: file} for step, file in zip(episode, files, strict=True)]
    return sets.write(folder, [steps], changed={IMAGE: described} if described else None)


def images(folder: Path) -> np.ndarray:
    """As they are read, whole episodes and drawn frames alike."""
    (episode,) = data.RldsDataset(folder).episodes()
    (batch,) = data.calibration_set(folder, trajectories="all").batches(9)
    assert episode.image is not None
    np.testing.assert_array_equal(batch["image"], episode.image[batch["step"]])
    return episode.image


def test_files_of_other_modes_become_three_channels(tmp_path: Path) -> None:
    """Each as the channels say, by hand."""
    alpha = np.random.default_rng(0).integers(0, 256, (6, 6, 1), np.uint8)
    colors = Image.fromarray(RGB).quantize(8)
    palette = np.asarray(colors.getpalette(), np.uint8).reshape(-1, 3)
    stacked = np.repeat(GRAY[..., None], 3, axis=-1)
    bits = GRAY > 99
    forms = {
        "RGB": (sets.file_of(RGB), RGB),
        "BMP": (sets.file_of(RGB, "BMP"), RGB),
        "WebP": (sets.file_of(RGB, "WEBP", lossless=True), RGB),
        "RGBA": (sets.file_of(np.concatenate([RGB, alpha], axis=-1)), RGB),
        "L": (sets.file_of(GRAY), stacked),
        "LA": (sets.file_of(np.stack([GRAY, alpha[..., 0]], axis=-1)), stacked),
        "P": (sets.file_of(colors), palette[np.asarray(colors)]),
        "GIF": (sets.file_of(colors, "GIF"), palette[np.asarray(colors)]),
        "1": (sets.file_of(bits), np.repeat(bits[..., None] * np.uint8(255), 3, axis=-1)),
    }
    found = images(written(tmp_path / "set", [file for file, _ in forms.values()]))
    for name, image, (_, expected) in zip(forms, found, forms.values(), strict=True):
        np.testing.assert_array_equal(image, expected, err_msg=name)


def test_tensorflow_decodes_the_same(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow", reason="the decoder of the public loaders")
    smooth = np.broadcast_to(np.arange(0, 240, 40, dtype=np.uint8), (6, 6))
    color = np.stack([smooth, smooth.T, smooth], axis=-1)
    files = [
        sets.file_of(RGB),
        sets.file_of(Image.fromarray(RGB).quantize(4), transparency=2),
        sets.file_of(color, "JPEG"),
        sets.file_of(smooth, "JPEG"),
        sets.file_of(Image.fromarray(color).convert("CMYK"), "JPEG"),
    ]
    for file, image in zip(files, images(written(tmp_path / "set", files)), strict=True):
        expected = tf.io.decode_image(file, channels=3, expand_animations=False).numpy()
        # The JPEG libraries round differently.
        assert np.abs(image.astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    "described", [f.Text(), f.Tensor(shape=(), dtype=np.str_), f.Tensor(shape=(1,), dtype=np.str_)]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_files_in_features_of_text_are_decoded(
    tmp_path: Path, described: Any, kind: str, file_format: str
) -> None:
    if file_format == "tfrecord":
        pytest.importorskip("tensorflow", reason="TFRecord needs TensorFlow (extra `rlds`)")
    plain = sets.episodes((2, 2))
    for number, step in enumerate(itertools.chain(*plain)):
        step[IMAGE] = sets.file_of(sets.picture(number), kind)
    as_text = [[{**step, IMAGE: _like(described, step[IMAGE])} for step in e] for e in plain]
    one = sets.write(tmp_path / "pictures", plain)
    other = sets.write(
        tmp_path / "text", as_text, changed={IMAGE: described}, file_format=file_format
    )
    for a, b in zip(*(data.RldsDataset(path).episodes() for path in (one, other)), strict=True):
        np.testing.assert_array_equal(a.image, b.image)
    batches = [next(data.calibration_set(p, trajectories="all").batches(9)) for p in (one, other)]
    np.testing.assert_array_equal(batches[0]["image"], batches[1]["image"])


def _like(described: Any, file: bytes) -> Any:
    return file if not described.shape else np.asarray([file], object)


def test_plain_arrays_are_read_as_they_are(tmp_path: Path) -> None:
    arrays = [sets.picture(seed) for seed in range(3)]
    folder = written(tmp_path / "set", arrays, f.Tensor(shape=(6, 6, 3), dtype=np.uint8))
    np.testing.assert_array_equal(images(folder), arrays)


@pytest.mark.parametrize(
    ("second", "described", "message"),
    [
        (sets.file_of(RGB[:4]), None, "a picture of 4 x 6 pixels, but the data set declares 6 x 6"),
        (sets.file_of(RGB[:4]), f.Text(), "a picture of 4 x 6 pixels, but step 0 has 6 x 6"),
        (sets.file_of(RGB[:4]), f.Image(shape=(None, 6, 3)), "4 x 6 pixels, but step 0 has 6 x 6"),
        (sets.file_of(RGB[:, :4]), f.Image(shape=(None, 6, 3)), "6 x 4 .* declares any x 6"),
        (
            sets.file_of(np.full((6, 6), 700, np.uint16)),
            None,
            "8 bits .* found PNG of mode I;16, 16 bits",
        ),
    ],
)
def test_sizes_and_depths_are_checked(
    tmp_path: Path, second: bytes, described: Any, message: str
) -> None:
    folder = written(tmp_path / "set", [sets.file_of(RGB), second], described)
    where = f"{folder}: episode 0 of 'train': step 1: {IMAGE}: .*{message}"
    with pytest.raises(DatasetError, match=where):
        list(data.RldsDataset(folder).episodes())
    with pytest.raises(DatasetError, match=f"step [01]: {IMAGE}: "):
        data.calibration_set(folder, trajectories="all")


def test_sizes_may_differ_between_episodes(tmp_path: Path) -> None:
    steps = sets.episodes((2, 2))
    for step in steps[1]:
        step[IMAGE] = sets.file_of(RGB[:4])
    folder = sets.write(tmp_path / "set", steps, changed={IMAGE: f.Image()})
    (batch,) = data.calibration_set(folder, trajectories="all").batches(4)
    heights = [image.shape[0] for image in batch["image"]]
    assert heights == [6 if episode == 0 else 4 for episode in batch["episode"]]


def test_a_camera_that_a_mixture_leaves_out_is_not_decoded(tmp_path: Path) -> None:
    steps = sets.episodes((2,))
    steps[0][0][WRIST] = b""
    blind = sets.write(tmp_path / "blind", steps)
    spec = data.open_x.get("libero").to_json()
    del spec["wrist_image"]
    one_camera = data.open_x.DatasetSpec.from_json(spec, "here")
    assert len(data.calibration_set(blind, frames=2, spec=one_camera)) == 2
    with pytest.raises(DatasetError, match=f"step 0: {WRIST}: the picture is missing"):
        data.calibration_set(blind, frames=2)
