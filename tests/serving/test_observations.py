"""What robots send is prepared as `Policy.infer` does it, or refused by name."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qvla_jax.errors import InputError
from qvla_jax.families.prismatic import images
from qvla_jax.serving.observations import NAMES, ObservationReader

from .checks import CHECKS


@pytest.fixture
def read(policy):
    return ObservationReader(policy, max_image_side=64)


def test_names_of_other_projects_mean_the_same(policy, read):
    own = policy.fake_observation()
    expected = read(own).inputs
    openpi = {
        "observation/image": own["image"],
        "observation/wrist_image": own["wrist_image"],
        "observation/state": own["state"].astype(np.float64),
        "prompt": own["instruction"],
        "something/else": np.zeros(3),
    }
    oft = {
        "full_image": own["image"],
        "wrist_image": own["wrist_image"],
        "state": own["state"].tolist(),
        "instruction": own["instruction"],
        "unnorm_key": "libero_spatial",
    }
    for other in (openpi, oft):
        found = read(other).inputs
        for a, b in zip(vars(found).values(), vars(expected).values(), strict=True):
            np.testing.assert_array_equal(a, b)


IMAGE = np.zeros((32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "observation has no image or observation/image or full_image; it holds:"),
        ({"full_image": IMAGE}, "image and full_image, which mean the same"),
        ({"image": "red"}, "image: expected an array, or a JPEG or PNG picture, got str"),
        (
            {"image": np.zeros((32, 32, 3), np.float32)},
            r"image: expected uint8 \[H, W, 3\], got float32 \[32, 32, 3\]",
        ),
        ({"image": np.zeros((3, 32, 32), np.uint8)}, r"image: expected uint8 .* \[3, 32, 32\]"),
        ({"image": np.zeros((65, 32, 3), np.uint8)}, "image: 65 x 32 pixels, expected at most 64"),
        ({"image": np.zeros((0, 32, 3), np.uint8)}, "image: an image of .0, 32, 3. has no pixels"),
        ({"wrist_image": None}, "observation has no wrist_image or observation/wrist_image"),
        ({"state": None}, "observation has no state"),
        ({"state": np.zeros(7)}, r"state: expected \[b, 8\], got \[1, 7\]"),
        ({"state": np.zeros((1, 8))}, r"state: expected numbers \[p\], got float64 \[1, 8\]"),
        ({"state": np.zeros(8, bool)}, r"state: expected numbers \[p\], got bool"),
        ({"state": [0.0] * 7 + ["x"]}, "state: expected an array, got list"),
        ({"state": [0.0] * 7 + [10**400]}, "state: "),
        ({"state": np.full(8, np.nan)}, "state: holds NaN or inf"),
        ({"state": np.full(8, 1e300)}, "state: holds NaN or inf"),
        ({"instruction": None}, "observation has no instruction or prompt"),
        ({"instruction": 3}, "instruction: expected text, got int"),
        ({"instruction": "x" * 2001}, "instruction: 2001 characters"),
        ({"instruction": "bowl " * 100}, "tokens, the policy takes at most 24"),
        ({"instruction": "\ud800"}, "instruction: holds half a character"),
        (
            {"unnorm_key": "bridge"},
            "unnorm_key 'bridge': .* no such statistics; there are: libero_spatial",
        ),
    ],
)
def test_unusable_observations_are_refused_by_name(policy, read, change, message):
    observation = {**policy.fake_observation(), **change}
    observation = {key: value for key, value in observation.items() if value is not None}
    with pytest.raises(InputError, match=message):
        read(observation)


ODD = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    st.binary(max_size=9),
    st.lists(st.integers() | st.floats() | st.none(), max_size=9),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=4, max_side=9)),
)
KEYS = [*(alias for aliases in NAMES.values() for alias in aliases), "unnorm_key", "other"]


@CHECKS
@given(st.dictionaries(st.sampled_from(KEYS), ODD, max_size=3), st.sets(st.sampled_from(KEYS)))
def test_entries_of_any_kind_end_in_inputs_or_in_one_error(policy, odd, missing):
    read = ObservationReader(policy, max_image_side=64)
    message = {**policy.fake_observation(), **odd}
    message = {key: value for key, value in message.items() if key in odd or key not in missing}
    try:
        inputs = read(message).inputs
    except InputError as error:
        # What a client sent is not sent back to it at length.
        assert len(str(error)) < 1000  # noqa: PT017
    else:
        assert inputs.images.shape == (1, 2, 32, 32, 3)  # as warmed up
        assert inputs.input_ids.shape == (1, policy.config.max_prompt_tokens)
        assert inputs.proprio.shape == (1, 8)
        assert np.isfinite(inputs.proprio).all()


def with_two_keys(policy):
    """The policy with statistics of another data set, whose values all differ."""
    (key, entry), other = next(iter(policy.statistics.items())), {}
    for block, values in entry.items():
        size = len(values["q01"])
        other[block] = {**values, "q01": [-3.0 - i for i in range(size)], "q99": [2.0] * size}
    return dataclasses.replace(policy, statistics={key: entry, "another": other})


@pytest.mark.parametrize("key", [None, "libero_spatial", "another"])
def test_the_state_is_scaled_by_the_statistics_that_a_request_names(policy, key):
    policy = with_two_keys(policy)
    message = policy.fake_observation(1) | ({} if key is None else {"unnorm_key": key})
    seen = ObservationReader(policy, max_image_side=64)(message)
    block = policy.statistics[key or "libero_spatial"]["proprio"]
    low, high = np.array(block["q01"]), np.array(block["q99"])
    scaled = 2 * (message["state"].astype(np.float64) - low) / (high - low) - 1
    np.testing.assert_allclose(seen.inputs.proprio[0], np.clip(scaled, -1, 1), atol=1e-6)
    assert seen.policy.model is policy.model


def test_statistics_that_do_not_fit_are_refused_and_others_still_hold(policy):
    broken = {**policy.statistics, "broken": {"action": {"q01": [0.0], "q99": [1.0]}}}
    read = ObservationReader(dataclasses.replace(policy, statistics=broken), max_image_side=64)
    for _ in range(2):
        with pytest.raises(InputError, match="broken"):
            read(policy.fake_observation() | {"unnorm_key": "broken"})
    with pytest.raises(InputError, match="unnorm_key: expected text, got list"):
        read(policy.fake_observation() | {"unnorm_key": ["libero_spatial"]})
    with pytest.raises(InputError, match="unnorm_key: expected text, got ndarray"):
        read(policy.fake_observation() | {"unnorm_key": np.zeros(2)})
    assert read(policy.fake_observation()).policy.config.unnorm_key == "libero_spatial"


def test_images_of_many_sizes_leave_nothing_behind():
    for side in range(1, 40):
        images.resize_lanczos3(np.zeros((side, 1, 3), np.uint8), 8)
    assert images._lanczos3.cache_info().currsize <= 16
