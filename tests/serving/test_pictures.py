"""JPEG and PNG pictures are read as Pillow reads them, or refused before they take memory."""

import base64
import io
import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("msgpack")

from qvla_jax.errors import InputError
from qvla_jax.serving import json_numpy, msgpack_numpy
from qvla_jax.serving.observations import ObservationReader
from qvla_jax.serving.pictures import MAX_PICTURES, decode_picture

from .checks import CHECKS

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


def encoded(pixels=PIXELS, kind="PNG", mode="RGB", **settings):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **settings)
    return buffer.getvalue()


def test_a_png_is_exact_and_a_jpeg_is_what_pillow_sees():
    np.testing.assert_array_equal(decode_picture("image", encoded(), 32), PIXELS)
    file = encoded(kind="JPEG", quality=80)
    found = decode_picture("image", file, 32)
    np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(file))))
    assert found.dtype == np.uint8


def huge_png(side):
    """A header that announces many pixels, over nearly no data."""

    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(kind="JPEG", exif=exif)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (encoded(np.zeros((65, 8, 3), np.uint8)), "image: 65 x 8 pixels, expected at most 64"),
        (huge_png(5000), "image: 5000 x 5000 pixels, expected at most 64"),
        (huge_png(60000), "image: "),  # beyond Pillow's own limit
        (encoded(mode="L"), "image: a picture of mode L, expected RGB"),
        (encoded(mode="RGBA"), "image: a picture of mode RGBA, expected RGB"),
        (encoded(kind="JPEG", mode="CMYK"), "image: a picture of mode CMYK, expected RGB"),
        (encoded()[:200], "image: not readable as a JPEG or PNG picture"),
        (b"\xff\xd8\xff", "image: not readable as a JPEG or PNG picture"),
        (turned(), r"EXIF orientation 6.; turn it before it is sent"),
        (
            encoded(save_all=True, append_images=[Image.fromarray(PIXELS[::-1])]),
            "a picture that moves",
        ),
    ],
)
def test_pictures_that_are_not_one_plain_image_are_refused(file, message):
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            decode_picture("image", file, 64)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@CHECKS
@given(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(["PNG", "JPEG"]))
def test_one_changed_byte_ends_in_pixels_or_in_one_error(position, value, kind):
    file = bytearray(encoded(kind=kind))
    file[position % len(file)] = value
    try:
        pixels = decode_picture("image", bytes(file), 64)
    except InputError as error:
        assert str(error).startswith("image: ")  # noqa: PT017
    else:
        assert pixels.dtype == np.uint8
        assert max(pixels.shape) <= 64


def as_websocket(observation):
    return msgpack_numpy.decode(msgpack_numpy.encode(observation))


def as_rest(observation, prefix=""):
    texts = {
        key: prefix + base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for key, value in observation.items()
    }
    return json_numpy.decode(json_numpy.encode(texts).encode())[0]


def as_data_address(observation):
    return as_rest(observation, "data:image/png;base64,")


def as_rest_encoded_twice(observation):
    text = json.dumps({k: base64.b64encode(v).decode() if isinstance(v, bytes) else v
                       for k, v in observation.items()}, default=json_numpy._array)  # fmt: skip
    return json_numpy.decode(json.dumps({"encoded": text}).encode())[0]


@pytest.mark.parametrize(
    "sent",
    [as_websocket, as_rest, as_data_address, as_rest_encoded_twice],
    ids=lambda f: f.__name__,
)
def test_observations_with_pictures_are_those_with_arrays(policy, sent):
    read = ObservationReader(policy, max_image_side=64)
    own = policy.fake_observation()
    packed = own | {"image": encoded(own["image"]), "wrist_image": encoded(own["wrist_image"])}
    found, expected = read(sent(packed)).inputs, read(own).inputs
    for a, b in zip(vars(found).values(), vars(expected).values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bytes_that_are_no_picture_are_named(policy):
    read = ObservationReader(policy, max_image_side=64)
    with pytest.raises(InputError, match="image: expected an array, or a JPEG or PNG picture, got"):
        read(policy.fake_observation() | {"image": b"GIF89a"})


def test_few_pictures_are_decoded_of_one_message(policy):
    read = ObservationReader(policy, max_image_side=64)
    many = {f"camera {number}": encoded() for number in range(MAX_PICTURES + 1)}
    with pytest.raises(InputError, match="more than 8 JPEG or PNG pictures"):
        read(policy.fake_observation() | many)


def test_text_that_looks_like_a_picture_stays_text_or_is_refused():
    with pytest.raises(InputError, match="where none can be"):
        json_numpy.decode(json.dumps({"instruction": 'say "/9j/" aloud'}).encode())
    with pytest.raises(InputError, match="__picture__: expected the array's bytes"):
        json_numpy.decode(b'{"image": {"__picture__": 0}}')
    assert json_numpy.decode(b'{"instruction": "go /9j/"}')[0] == {"instruction": "go /9j/"}
