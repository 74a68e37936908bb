"""Observations in and actions out against openpi's own policies: images, prompts, units."""

import dataclasses
import logging

import numpy as np
import pytest

from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.families.openpi import robots
from qvla_jax.families.openpi.checkpoint import read_statistics
from qvla_jax.families.openpi.images import parse_image, resize_with_pad
from qvla_jax.families.openpi.normalization import read_normalizers
from qvla_jax.families.openpi.tokenizer import PromptTokenizer
from qvla_jax.serving.observations import ObservationReader

from .trim_openpi import FIXTURES, NAMES, ROWS_STEP

_STATISTICS = {"libero": "physical-intelligence/libero", "padded": "padded_stats"}


@pytest.fixture(scope="module")
def images():
    with np.load(FIXTURES / "openpi_preproc.npz") as file:
        return {name: file[name] for name in file.files}


def _statistics(folder, asset_id: str) -> dict:
    return read_statistics(folder, asset_id)[asset_id]


def _observation(reference) -> dict:
    arrays = reference.arrays
    return {
        "image": arrays["policy_obs0_image"],
        "wrist_image": arrays["policy_obs0_wrist_image"],
        "state": arrays["policy_obs0_state"],
        "instruction": reference.meta["prompts"][0],
    }


@pytest.mark.parametrize("size", ["180x320", "97x131", "301x200", "64x224"])
def test_images_are_resized_as_by_the_client(images, size):
    resized = resize_with_pad(images[f"uint8_{size}"], 224)
    np.testing.assert_array_equal(resized[::ROWS_STEP], images[f"client_224_{size}"])


def test_an_image_of_the_right_size_is_left_alone(images):
    image = images["uint8_224x224"]
    assert resize_with_pad(image, 224) is image


def test_float_images_with_channels_first_are_truncated(images):
    parsed = parse_image(images["parse_float_chw"], where="image")
    np.testing.assert_array_equal(parsed, images["parse_float_hwc_uint8"])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8), np.uint8), r"camera: expected an image .* got uint8 \[8, 8\]"),
        (np.zeros((8, 8, 3), np.int32), r"camera: expected an image .* got int32"),
        (np.full((8, 8, 3), 7.0), r"camera: a float image must be in \[0, 1\]"),
        (np.full((8, 8, 3), np.nan), r"camera: a float image must be in \[0, 1\]"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(InputError, match=message):
        parse_image(image, where="camera")


def test_an_image_that_is_too_narrow_is_refused():
    with pytest.raises(InputError, match="an image of 1 x 500 pixels is too narrow"):
        resize_with_pad(np.zeros((1, 500, 3), np.uint8), 224)


@pytest.mark.parametrize("name", NAMES)
def test_model_inputs_are_those_of_openpi(openpi_references, name):
    reference = openpi_references(name)
    arrays, policy = reference.arrays, reference.policy
    observation = {key: [value] for key, value in _observation(reference).items()}
    inputs = policy.prepare(observation | {"noise": arrays["policy_noise"][:1]})
    # The camera that LIBERO lacks is left out: masked in the record, read by nothing.
    np.testing.assert_array_equal(arrays["policy_in0_image_mask"], [True, True, False])
    assert inputs.image_mask.tolist() == [[True, True]]
    for camera, slot in zip(inputs.images[0], robots.SLOTS, strict=False):
        np.testing.assert_array_equal(camera, arrays[f"image_{slot}"][0])
    prefix = "nostate_" if name == "pi05_tiny" else ""  # as pi05_libero is configured
    np.testing.assert_array_equal(inputs.tokens[0], arrays[f"policy_{prefix}in0_tokenized_prompt"])
    mask = arrays[f"policy_{prefix}in0_tokenized_prompt_mask"]
    np.testing.assert_array_equal(inputs.token_mask[0], mask)
    if name == "pi0_tiny":
        np.testing.assert_allclose(inputs.state[0], arrays["policy_in0_state"], atol=1e-6)
    else:
        assert inputs.state is None


def test_the_state_stands_in_the_prompt_where_the_policy_reads_it_there(openpi_references):
    reference = openpi_references("pi05_tiny")
    arrays = reference.arrays
    processor = reference.processor(discrete_state=True)
    image = np.zeros((2, 224, 224, 3), np.uint8)
    batch = {
        "image": image,
        "wrist_image": image,
        "state": np.stack([arrays["policy_obs0_state"], arrays["policy_obs1_state"]]),
        "instruction": reference.meta["prompts"],
    }
    inputs = processor(batch)
    for sample in range(2):
        expected = arrays[f"policy_in{sample}_tokenized_prompt"]
        np.testing.assert_array_equal(inputs.tokens[sample], expected)


@pytest.mark.parametrize("name", NAMES)
def test_infer_gives_the_actions_of_openpis_policy(openpi_references, name):
    reference = openpi_references(name)
    arrays, policy = reference.arrays, reference.policy
    key = "policy_nostate_env_actions0" if name == "pi05_tiny" else "policy_env_actions0"
    actions = policy.infer(_observation(reference), noise=arrays["policy_noise"][0])
    assert actions.shape == (10, 7)
    np.testing.assert_allclose(actions, arrays[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_what_openpis_client_sends_gets_the_actions_of_its_own_server(openpi_references, name):
    reference = openpi_references(name)
    arrays, policy = reference.arrays, reference.policy
    key = "policy_nostate_env_actions0" if name == "pi05_tiny" else "policy_env_actions0"
    own = _observation(reference)
    message = {
        "observation/image": own["image"],
        "observation/wrist_image": own["wrist_image"],
        "observation/state": own["state"],
        "prompt": own["instruction"],
        "noise": arrays["policy_noise"][0],
    }
    seen = ObservationReader(policy, max_image_side=256)(message)
    actions = policy.unnormalize_actions(policy.run(seen.inputs), seen.state)[0]
    np.testing.assert_allclose(actions, arrays[key], atol=1e-4, rtol=0)


def test_the_seed_alone_decides_on_the_noise(openpi_references):
    noise = openpi_references("pi0_tiny").policy.processor.noise
    (first, again), (_, other) = noise([3, 3]), noise([0, 4])
    np.testing.assert_array_equal(first, again)
    assert first.shape == (10, 32)
    assert np.abs(first - other).max() > 1.0
    assert 0.8 < first.std() < 1.2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("statistics", ["libero", "padded"])
@pytest.mark.parametrize("kind", ["zscore", "quantile"])
def test_units_are_those_of_openpi(openpi_references, name, statistics, kind):
    reference = openpi_references(name)
    arrays, folder = reference.arrays, reference.folder
    content = _statistics(folder, _STATISTICS[statistics])
    normalizers = read_normalizers(content, kind, where="statistics")
    for sample in range(2):
        state = arrays[f"policy_obs{sample}_state"]
        normalized = normalizers["state"].normalize(state)
        expected = arrays[f"policy_norm{sample}_{statistics}_{kind}_state"]
        np.testing.assert_allclose(normalized, expected, rtol=1e-9, atol=1e-9)
        for delta, chain in ((False, "plain"), (True, "delta")):
            processor = dataclasses.replace(
                reference.processor(normalization=kind, delta_actions=delta),
                state=normalizers["state"],
                actions=normalizers["actions"],
            )
            chunk = arrays[f"policy_model_actions{sample}"][None]
            actions = processor.unnormalize_actions(chunk, state[None])[0]
            # What is added there is the network's state, un-normalized; it was normalized as the
            # policy does, whatever the way back.
            state = normalizers["state"].unnormalize(arrays[f"policy_in{sample}_state"])[:8]
            expected = arrays[f"policy_out{sample}_{statistics}_{kind}_{chain}"]
            np.testing.assert_allclose(actions, expected, atol=1e-6, rtol=0)


def test_statistics_that_are_too_short_leave_the_rest_as_it_is(openpi_references):
    content = _statistics(openpi_references("pi0_tiny").folder, _STATISTICS["libero"])
    for kind in ("zscore", "quantile"):
        actions = read_normalizers(content, kind, where="x")["actions"]
        values = np.linspace(-2.0, 2.0, 32)
        np.testing.assert_array_equal(actions.unnormalize(values)[7:], values[7:])
        known = actions.unnormalize(values)[:7]
        np.testing.assert_allclose(actions.normalize(known), values[:7], atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_tokenized_as_by_openpi(openpi_references, name, caplog):
    reference = openpi_references(name)
    tokenizer = PromptTokenizer.from_file(reference.tokenizer_file, max_tokens=1)
    cut = 0
    with caplog.at_level(logging.WARNING):
        for case in reference.tokenizer_cases:
            caplog.clear()
            sized = dataclasses.replace(tokenizer, max_tokens=case["max_len"])
            state = None if case["state"] is None else np.asarray(case["state"])
            ids, mask = sized(case["prompt"], state)
            np.testing.assert_array_equal(ids, case["tokens"], err_msg=str(case))
            np.testing.assert_array_equal(mask, case["mask"], err_msg=str(case))
            if caplog.records:
                assert "tokens and is cut to" in caplog.text
                assert mask.all()
                cut += 1
    assert len(reference.tokenizer_cases) == 52
    assert cut > 3


def test_aloha_is_converted_as_by_openpi(openpi_references):
    arrays = openpi_references("pi0_tiny").arrays
    recorded = {k.removeprefix("robots_"): v for k, v in arrays.items() if k.startswith("robots_")}
    state = robots.aloha_state(recorded["aloha_state"])
    np.testing.assert_allclose(state, recorded["aloha_state_pi"], rtol=1e-12)
    actions = robots.aloha_actions(recorded["aloha_actions_in"])
    np.testing.assert_allclose(actions, recorded["aloha_actions_pi"], rtol=1e-12)
    commands = robots.aloha_commands(recorded["aloha_model_actions"][:, :14])
    np.testing.assert_allclose(commands, recorded["aloha_env_actions"], rtol=1e-12)
    aloha = robots.ROBOTS["aloha"]
    np.testing.assert_array_equal(aloha.relative, recorded["delta_mask_aloha"])
    added = robots.relative_to(recorded["aloha_state_pi"], aloha.relative, 14)
    np.testing.assert_allclose(
        recorded["aloha_actions_pi"] - added, recorded["aloha_delta"], atol=1e-12
    )
    added = robots.relative_to(recorded["aloha_state_pi"], aloha.relative, 32)
    np.testing.assert_allclose(
        recorded["aloha_model_actions"] + added, recorded["aloha_absolute"], atol=1e-12
    )


def test_droids_state_is_seven_joints_and_the_gripper(openpi_references):
    recorded = openpi_references("pi0_tiny").arrays["robots_droid_state"]
    image = np.zeros((180, 320, 3), np.uint8)
    for gripper in (recorded[7], recorded[7:]):
        observation = robots.ROBOTS["droid"].from_client(
            {
                "observation/exterior_image_1_left": image,
                "observation/wrist_image_left": image,
                "observation/joint_position": recorded[:7],
                "observation/gripper_position": gripper,
                "prompt": b"open the drawer",
            }
        )
        np.testing.assert_array_equal(observation["state"], recorded)
        assert observation["instruction"] == "open the drawer"


def test_a_camera_that_aloha_may_lack_is_masked(openpi_references):
    reference = openpi_references("pi0_tiny")
    policy = reference.policy
    statistics = _statistics(reference.folder, "padded_stats")
    processor = dataclasses.replace(
        policy.processor,
        config=dataclasses.replace(policy.config, robot="aloha", default_prompt="Transfer cube"),
        state=read_normalizers(statistics, "zscore", where="x")["state"],
    )
    client = {
        "images": {"cam_high": np.full((3, 48, 64), 200, np.uint8)},
        "state": reference.arrays["robots_aloha_state"],
    }
    observation = robots.ROBOTS["aloha"].from_client(client)
    batch = {key: np.asarray(value)[None] for key, value in observation.items()}
    inputs = processor(batch)
    expected = reference.meta["robots"]["aloha_missing_camera_masks"]
    assert inputs.image_mask[0].tolist() == [expected[slot] for slot in robots.SLOTS]
    assert inputs.images[0, 0].max() == 200
    assert not inputs.images[0, 1:].any()
    default = processor.tokenizer("Transfer cube")[0]
    np.testing.assert_array_equal(inputs.tokens[0], default)
    with pytest.raises(InputError, match="unexpected camera 'cam_left'; there are: cam_high"):
        robots.ROBOTS["aloha"].from_client({**client, "images": {"cam_left": None}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": None}, "observation has no 'state'"),
        ({"wrist_image": None}, "observation has no 'wrist_image'"),
        ({"instruction": None}, "observation has no 'instruction'"),
        ({"state": np.zeros((1, 7))}, r"state: expected \[b, 8\], got \[1, 7\]"),
        ({"state": np.full((1, 8), np.nan)}, "state: holds NaN or inf"),
        ({"instruction": ["a", "b"]}, "entries differ in length: .*'instruction': 2"),
        ({"noise": np.zeros((1, 9, 32), np.float32)}, r"noise: expected shape \(1, 10, 32\)"),
        ({"seed": np.zeros(2, int)}, r"seed: expected 1 whole numbers, got int64 \[2\]"),
        ({"seed": np.zeros(1)}, r"seed: expected 1 whole numbers, got float64 \[1\]"),
    ],
)
def test_a_wrong_observation_is_refused(openpi_references, change, message):
    reference = openpi_references("pi0_tiny")
    batch = {key: [value] for key, value in _observation(reference).items()}
    batch = {key: value for key, value in (batch | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        reference.policy.prepare(batch)


def test_a_missing_tokenizer_says_where_to_get_it(openpi_references, tmp_path):
    with pytest.raises(CheckpointError, match=r"gs://big_vision/paligemma_tokenizer\.model"):
        PromptTokenizer.from_file(tmp_path / "paligemma_tokenizer.model", max_tokens=48)
    for name in ("damaged.model", "damaged.json"):
        (tmp_path / name).write_bytes(b"\xff\xfe nothing")
        with pytest.raises(CheckpointError, match=f"{name}: not a "):
            PromptTokenizer.from_file(tmp_path / name, max_tokens=48)


def test_a_tokenizers_file_does_as_well(openpi_references, tmp_path):
    """The same pieces as a `tokenizers` BPE, as Hugging Face converts them."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    reference = openpi_references("pi05_tiny")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(reference.tokenizer_file))
    names = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
    names[pieces.bos_id()] = "<bos>"
    rank = {name: i for i, name in enumerate(names)}
    merges = sorted(
        (
            (name[:cut], name[cut:])
            for name in names
            for cut in range(1, len(name))
            if name[:cut] in rank and name[cut:] in rank
        ),
        key=lambda pair: (rank[pair[0] + pair[1]], rank[pair[0]], rank[pair[1]]),
    )
    tokenizer = Tokenizer(
        models.BPE(rank, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_special_tokens([AddedToken("<bos>", normalized=False, special=True)])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    loaded = PromptTokenizer.from_file(path, max_tokens=1)
    for case in reference.tokenizer_cases:
        sized = dataclasses.replace(loaded, max_tokens=case["max_len"])
        state = None if case["state"] is None else np.asarray(case["state"])
        np.testing.assert_array_equal(sized(case["prompt"], state)[0], case["tokens"], str(case))
