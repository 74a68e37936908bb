"""The decoders: what the public packages write is read, and nothing else does any harm."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qvla_jax.errors import InputError
from qvla_jax.serving.arrays import DTYPES, checked_array

msgpack = pytest.importorskip("msgpack")

from qvla_jax.serving import json_numpy, msgpack_numpy  # noqa: E402
from qvla_jax.serving.pictures import decode_pictures  # noqa: E402

from .checks import CHECKS  # noqa: E402

arrays = hnp.arrays(
    st.sampled_from(list(DTYPES.values())), hnp.array_shapes(min_dims=0, max_dims=4, max_side=5)
)
texts = st.text(st.characters(codec="utf-8"), max_size=30)
# Names that the formats give a meaning are no names of observations.
names = texts.filter(lambda name: not name.startswith("__") and name != "encoded")
observations = st.dictionaries(names, arrays | texts | st.integers(-5, 5), max_size=5)


def same(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[key].dtype == value.dtype
            np.testing.assert_array_equal(found[key], value)
        else:
            assert found[key] == value


def error_of(function):
    """What a function returns, or the one error that it may raise."""
    try:
        return function()
    except InputError as error:
        return error


def allocated(function, message):
    """The most memory that a decoder held at once, in bytes, and what it raised."""
    tracemalloc.start()
    try:
        function(message)
    except InputError as error:
        return tracemalloc.get_traced_memory()[1], error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, None


@CHECKS
@given(observations)
def test_messages_of_the_openpi_client_are_read(observation):
    theirs = pytest.importorskip("openpi_client.msgpack_numpy")
    same(msgpack_numpy.decode(theirs.packb(observation)), observation)


@CHECKS
@given(observations)
def test_the_openpi_client_reads_our_messages(observation):
    theirs = pytest.importorskip("openpi_client.msgpack_numpy")
    same(theirs.unpackb(msgpack_numpy.encode(observation)), observation)


def test_numpy_scalars_of_the_openpi_client_are_read():
    theirs = pytest.importorskip("openpi_client.msgpack_numpy")
    sent = {"a": np.float32(0.5), "b": np.int64(-3), "c": np.bool_(True)}
    assert msgpack_numpy.decode(theirs.packb(sent)) == {"a": 0.5, "b": -3, "c": True}


@pytest.mark.parametrize("kind", ["raw", "png"])
def test_arrays_and_images_of_vla_eval_are_read_and_written(kind):
    codec = pytest.importorskip("vla_eval.protocol.numpy_codec")
    image_codec = pytest.importorskip("vla_eval.protocol.image_codec")
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    state = np.arange(8, dtype=np.float32)
    sent = {
        "images": {"a": image_codec.encode_image(image, kind)},
        "s": codec.encode_ndarray(state),
    }
    read = decode_pictures(msgpack_numpy.decode(msgpack.packb(sent)), max_side=8)
    np.testing.assert_array_equal(read["images"]["a"], image)
    np.testing.assert_array_equal(read["s"], state)
    reply = msgpack_numpy.encode({"actions": state}, text_keys=True)
    same(msgpack.unpackb(reply, object_hook=codec.decode_ndarray), {"actions": state})


@CHECKS
@given(observations, st.booleans())
def test_messages_of_json_numpy_are_read(observation, twice):
    theirs = pytest.importorskip("json_numpy")
    text = theirs.dumps(observation)
    if twice:
        text = json.dumps({"encoded": text})
    found, was_twice = json_numpy.decode(text.encode())
    same(found, observation)
    assert was_twice == twice


@CHECKS
@given(observations)
def test_json_numpy_reads_our_messages(observation):
    theirs = pytest.importorskip("json_numpy")
    same(theirs.loads(json_numpy.encode(observation)), observation)


@pytest.mark.parametrize(
    "text",
    [
        '"__numpy__": "AAAA"',
        '{"__numpy__": "AAAA", "dtype": "|u1", "shape": [3]}',
        '\\"__numpy__\\": \\"AAAA\\"',
        "__numpy__",
    ],
)
@pytest.mark.parametrize("twice", [False, True])
def test_text_that_looks_like_an_array_stays_text_or_is_refused(text, twice):
    body = json.dumps({"instruction": text})
    if twice:
        body = json.dumps({"encoded": body})
    found = error_of(lambda: json_numpy.decode(body.encode())[0])
    assert found == {"instruction": text} or "__numpy__" in str(found)


@CHECKS
@given(st.binary(max_size=200))
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\x91" * 2000)
@example(b"\x81\xa1a" * 2000)
@example(b"\xc7\x02\x01aa")
@example(b"\xd6\xff\x00\x00\x00\x00")
@example(b"[" * 100_000)
@example(b'{"a":' * 10_000)
@example(b'{"a": ' + b"9" * 10_000 + b"}")
@example(b'{"a": NaN}')
@example(b'{"encoded": "{\\"encoded\\": \\"{}\\"}"}')
def test_bytes_of_any_kind_end_in_a_map_or_in_one_error(message):
    for decode in (msgpack_numpy.decode, lambda m: json_numpy.decode(m)[0]):
        assert isinstance(error_of(lambda decode=decode: decode(message)), dict | InputError)


def wire(data, dtype, shape):
    return {"__ndarray__": True, "data": data, "dtype": dtype, "shape": shape}


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), texts, st.binary(max_size=9),
    st.lists(st.integers(-(2**63), 2**63), max_size=6), st.sampled_from(list(DTYPES)),
    st.sampled_from(["O", "|O", "<U4", "|V8", "i4,f8", "M8[s]", "float32", ">f4"]),
)  # fmt: skip


@CHECKS
@given(ODD, ODD, ODD)
@example(b"", "<f4", [0, 2**62, 2**62])
@example(b"\0" * 8, "|O", [1])
@example(b"\0" * 8, "<f4", [-1, -2])
@example(b"\0" * 4, "<f4", [True])
@example(b"\0", "|u1", [2**64, 0])
def test_arrays_of_any_description_end_in_an_array_or_in_one_error(data, dtype, shape):
    array = error_of(lambda: checked_array(data, dtype, shape))
    if isinstance(array, InputError):
        assert str(array).startswith("array: ")
        return
    assert array.tobytes() == data
    assert list(array.shape) == shape
    assert array.dtype.str == dtype


CLAIMS = [
    # Lists that announce more than the message holds, one in the other.
    b"\x81\xa1a" + b"\xdd\x00\xff\xff\xff" * 500,
    b"\x81\xa1a" + b"\xdc\x00\x40" * 500,
    b"\x81\xa1a\xdc\x00\x40" + b"\xdc\x00\x40".join([b"\x90" * 63] * 500),
    # Bytes and text that are not there.
    b"\x81\xa1a\xc6\xff\xff\xff\xff",
    b"\x81\xa1a\xdb\xff\xff\xff\xff",
    # Millions of small things.
    b"\x81\xa1a\xdd\x00\x0f\x42\x40" + b"\x90" * 1_000_000,
    msgpack.packb({"a": {b"__ndarray__": True, b"data": b"", b"dtype": "<f8", b"shape": [2**40]}}),
]


@pytest.mark.parametrize("message", CLAIMS, ids=range(len(CLAIMS)))
def test_msgpack_allocates_no_more_than_the_message_and_a_megabyte(message):
    peak, error = allocated(msgpack_numpy.decode, message)
    assert error is not None
    assert peak < len(message) + 2**20


def test_honest_images_are_held_once_beside_the_message():
    image = np.zeros((1024, 1024, 3), np.uint8)
    message = msgpack_numpy.encode({"image": image})
    assert allocated(msgpack_numpy.decode, message)[0] < len(message) + 2**20
    body = json_numpy.encode({"image": image}).encode()
    assert allocated(json_numpy.decode, body)[0] < len(body) + 2**20


BODIES = [
    b"[" + b"[]," * 1_000_000 + b"[]]",
    b'{"a": [' + b"1.5," * 1_000_000 + b"1]}",
    b'{"a": "' + b"x" * 1_000_000 + b'\\ud83d\\ude00"}',
    b'{"a": ["' + b'"__numpy__":"",' * 500_000 + b'"]}',
    ("{" + '"a": "' + "\U0001f600" * 500_000 + '"}').encode(),
    b"[" * 1_000_000,
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_json_allocates_no_more_than_the_message_and_a_few_megabytes(body):
    peak, error = allocated(json_numpy.decode, body)
    assert error is not None
    assert peak < len(body) + 4 * 2**20


@CHECKS
@given(st.data())
def test_one_changed_byte_ends_in_a_map_or_in_one_error(data):
    content = {"image": np.zeros((2, 3, 3), np.uint8), "state": np.zeros(8, np.float32)}
    for encode, decode in (
        (msgpack_numpy.encode, msgpack_numpy.decode),
        (lambda c: json_numpy.encode(c).encode(), lambda m: json_numpy.decode(m)[0]),
    ):
        message = bytearray(encode(content | {"instruction": "go"}))
        position = data.draw(st.integers(0, len(message) - 1))
        message[position] = data.draw(st.integers(0, 255))
        found = error_of(lambda decode=decode, m=bytes(message): decode(m))
        assert isinstance(found, dict | InputError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: 2}, "int is not allowed for map key"),
        ({b"a": 1}, "expected a map from names"),
        ([1], "expected a map from names"),
        ({"a": {b"__ndarray__": True, b"data": b"", b"dtype": "|O", b"shape": [1]}}, "dtype '.O'"),
        ({"a": {b"__ndarray__": True, b"data": b"ab", b"dtype": "|u1", b"shape": [3]}}, "3 bytes"),
        ({"a": {b"__npgeneric__": True, b"data": b"x", b"dtype": "|O"}}, "a scalar is bytes"),
        ({"a": "x" * 9000}, "9000 exceeds max_str_len"),
        ({"a": [[]] * 64, "b": [[]] * 64}, "more than 64 lists and maps"),
        # As the package msgpack-numpy writes arrays, by its newer and its older versions.
        (
            {"a": {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [1], b"data": b"abcd"}},
            "as the package msgpack-numpy writes them .*; pack with openpi_client.msgpack_numpy",
        ),
        ({"a": {"nd": False, "type": "<f4", "data": b"abcd"}}, "as the package msgpack-numpy"),
        ({"a": {"__image__": True, "format": "webp", "data": b""}}, "__image__: expected format"),
        ({"a": {"__image__": True, "format": "png", "data": "x"}}, "__image__: expected format"),
    ],
)
def test_unusable_msgpack_is_refused_by_name(content, message):
    with pytest.raises(InputError, match=message):
        msgpack_numpy.decode(msgpack.packb(content))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\xff\xfe", "not readable as JSON"),
        (b"[]", "expected an object"),
        (b'{"a": Infinity}', "Infinity is not JSON"),
        (b'{"a": {"__numpy__": 0}}', "expected the array's bytes in base64"),
        (b'{"a": {"__numpy__": "AAA", "dtype": "|u1", "shape": [2]}}', "no base64"),
        (b'{"a": {"__numpy__": "AAAA", "dtype": "|O", "shape": [3]}}', "dtype"),
        (b'{"a": {"__numpy__": "AAAA", "dtype": [["a", "|O"]], "shape": [3]}}', "dtype"),
        (b'{"encoded": 3}', "'encoded' must be text"),
        (b'{"encoded": "{}", "b": 1}', "stand alone"),
        (b'{"a": "' + b"x" * 70_000 + b'"}', "send images and state as json-numpy does"),
    ],
)
def test_unusable_json_is_refused_by_name(body, message):
    with pytest.raises(InputError, match=message):
        json_numpy.decode(body)
