import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.families.prismatic.images import resize_bicubic
from qvla_jax.families.prismatic.normalization import Normalizer
from qvla_jax.families.prismatic.word_tokenizer import SPECIAL_TOKENS, word_tokenizer
from qvla_jax.inference import load_policy, random_policy


def observation(size: int = 32) -> dict:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (size, size, 3), np.uint8),
        "wrist_image": rng.integers(0, 256, (size, size, 3), np.uint8),
        "state": np.linspace(-0.5, 0.5, 8, dtype=np.float32),
        "instruction": "Open the top drawer",
    }


@pytest.fixture(scope="module")
def policy():
    return random_policy("tiny-test")


def test_infer_scales_all_but_the_gripper_to_the_quantiles(policy, tmp_path):
    policy.save(tmp_path)
    path = tmp_path / "dataset_statistics.json"
    statistics = json.loads(path.read_text())
    (block,) = statistics.values()
    low, high = np.linspace(-2.0, 0.0, 7), np.linspace(0.5, 3.0, 7)
    mask = [True] * 6 + [False]
    block["action"] = {"q01": low.tolist(), "q99": high.tolist(), "mask": mask}
    path.write_text(json.dumps(statistics))
    obs = observation()
    batch = {k: [v] if k == "instruction" else v[None] for k, v in obs.items()}
    normalized = policy.infer_normalized(batch)[0].astype(np.float64)
    expected = np.where(mask, low + (normalized + 1) / 2 * (high - low), normalized)
    np.testing.assert_allclose(load_policy(tmp_path).infer(obs), expected, atol=1e-5)


def test_save_and_load_give_the_same_policy(policy, tmp_path):
    policy.save(tmp_path / "p")
    loaded = load_policy(tmp_path / "p")
    assert loaded.fingerprint == policy.fingerprint
    assert loaded.config == policy.config
    np.testing.assert_array_equal(loaded.infer(observation()), policy.infer(observation()))


def test_the_fingerprint_sees_a_single_weight(policy):
    other = random_policy("tiny-test")
    assert other.fingerprint == policy.fingerprint
    changed = random_policy("tiny-test")
    kernel = changed.model.projector.fc1.kernel
    kernel[...] = kernel[...].at[0, 0].add(1e-3)
    assert changed.fingerprint != policy.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wrist_image": None}, "no 'wrist_image'; it holds: image, instruction, state"),
        ({"state": None}, "no 'state'"),
        ({"state": np.zeros(7, np.float32)}, r"state: expected \[b, 8\], got \[1, 7\]"),
        ({"state": np.full(8, np.nan, np.float32)}, "state: holds NaN"),
        ({"image": np.zeros((32, 32, 3), np.float32)}, "image: expected uint8"),
        ({"image": np.zeros((32, 32), np.uint8)}, "image: expected uint8"),
        ({"state": np.array([None] * 8)}, "state: expected numbers, got object"),
        ({"state": np.array(["1"] * 8)}, "state: expected numbers, got <U1"),
        ({"image": np.zeros((0, 9, 3), np.uint8)}, r"image: an image of \[0, 9, 3\] has no pixels"),
        ({"instruction": b"pick"}, "instruction: expected text, got bytes_ .*b'pick'"),
        ({"instruction": 5}, "instruction: expected text, got int64"),
        ({"instruction": ["pick"]}, "instruction: expected one text for each frame"),
        ({"instruction": "a\ud800"}, "instruction: holds half a character"),
        ({"instruction": "the " * 40}, "42 tokens, the policy takes at most 24"),
    ],
)
def test_malformed_observations_name_the_key(policy, change, message):
    obs = {k: v for k, v in {**observation(), **change}.items() if v is not None}
    with pytest.raises(InputError, match=message):
        policy.infer(obs)


def test_a_batch_takes_no_single_text(policy):
    one = observation()
    batch = {key: np.stack([value] * 2) for key, value in one.items() if key != "instruction"}
    with pytest.raises(InputError, match="instruction: expected one text for each frame, got 'go'"):
        policy.prepare(batch | {"instruction": "go"})


def test_images_of_other_sizes_are_resized(policy):
    large, small = observation(size=64), observation(size=64)
    for key in ("image", "wrist_image"):
        small[key] = resize_bicubic(large[key], 32)
    np.testing.assert_array_equal(policy.infer(large), policy.infer(small))


def test_unknown_models_suggest_close_names():
    with pytest.raises(InputError, match="unknown model 'libero-mimi'; did you mean libero-mini"):
        load_policy("libero-mimi")
    with pytest.raises(InputError, match="ships without weights"):
        load_policy("openvla-oft-7b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "openvla/openvla-7b",
            r"^openvla/openvla-7b: there is no such file .* Hub: HF_HUB_OFFLINE is set",
        ),
        ("/nowhere/run", "^/nowhere/run: there is no such file or directory$"),
        ("run.qvla", "^run.qvla: (there is )?no such file"),
        ("FOLDER/config.json", "config.json: is no directory; give the one that"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, name, message):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=message):
        load_policy(name.replace("FOLDER", str(tmp_path)))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "config.json: not valid JSON"),
        ("config.json", '{"name": "x"}', "config.json: .* names no 'family' .*prismatic, openpi"),
        ("config.json", '{"family": "prismatik"}', "unknown family .* mean prismatic"),
        ("config.json", '{"family": "prismatic", "typo": 1}', "config: unknown key 'typo'"),
        ("config.json", '{"family": "prismatic", "name": 3}', "config.name: expected str, got 3"),
        ("dataset_statistics.json", "{}", "unknown statistics 'libero_spatial'; there are: none"),
        ("tokenizer.json", "[]", "tokenizer.json: not a tokenizers file"),
    ],
)
def test_broken_directories_name_the_file(policy, tmp_path, file, text, message):
    policy.save(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=message):
        load_policy(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file}: missing"):
        load_policy(tmp_path)


def test_statistics_that_do_not_fit_are_refused(policy, tmp_path):
    policy.save(tmp_path)
    path = tmp_path / "dataset_statistics.json"
    statistics = json.loads(path.read_text())
    del statistics["libero_spatial"]["action"]["q01"][0]
    path.write_text(json.dumps(statistics))
    with pytest.raises(CheckpointError, match=r"action: q01, q99 and mask have shapes"):
        load_policy(tmp_path)


@given(st.integers(0, 2**32 - 1))
def test_normalization_is_inverted_inside_the_quantiles(seed):
    rng = np.random.default_rng(seed)
    q01 = rng.uniform(-2, 0, 7)
    q99 = q01 + rng.uniform(0.1, 2, 7)
    normalizer = Normalizer(low=q01, high=q99, mask=np.arange(7) < 6)
    inside = rng.uniform(q01, q99, (4, 8, 7))
    normalized = normalizer.normalize(inside)
    assert np.abs(normalized[..., :6]).max() <= 1.0
    np.testing.assert_allclose(normalizer.unnormalize(normalized), inside, atol=1e-5)
    np.testing.assert_array_equal(normalized[..., 6], inside[..., 6].astype(np.float32))


def test_normalization_clips_outside_the_quantiles():
    normalizer = Normalizer(low=np.zeros(2), high=np.ones(2), mask=np.array([True, False]))
    np.testing.assert_allclose(normalizer.normalize(np.array([5.0, 5.0])), [1.0, 5.0])
    np.testing.assert_allclose(normalizer.normalize(np.array([-5.0, -5.0])), [-1.0, -5.0])


def test_unscaled_entries_of_the_state_are_clipped_and_those_of_actions_are_not(policy):
    """As OpenVLA-OFT's `normalize_proprio` and `_unnormalize_actions`."""
    block = {"q01": [0.0, 0.0], "q99": [1.0, 1.0], "mask": [True, False]}
    state = Normalizer.from_statistics(block, where="x", clip_unscaled=True)
    values = np.array([[0.75, 0.5], [9.0, 9.0], [-9.0, -9.0]])
    np.testing.assert_allclose(state.normalize(values), [[0.5, 0.5], [1, 1], [-1, -1]], atol=1e-6)
    assert policy.processor.proprio.clip_unscaled
    assert not policy.processor.actions.clip_unscaled


def test_the_word_tokenizer_begins_with_bos_and_knows_unknown_words():
    tokenizer = word_tokenizer()
    ids = tokenizer.encode("Pick up the zebra").ids
    tokens = [tokenizer.id_to_token(i) for i in ids]
    assert tokens == ["<s>", "pick", "up", "the", "<unk>"]
    assert [tokenizer.id_to_token(i) for i in range(5)] == list(SPECIAL_TOKENS)


def test_prompts_end_with_the_empty_token_once(policy):
    ids, lengths = policy.processor.tokenize(["open the drawer", "turn on the stove"])
    empty = policy.config.empty_token_id
    for row, length in zip(ids, lengths, strict=True):
        assert row[length - 1] == empty
        assert (row[: length - 1] != empty).all()
        assert (row[length:] == policy.config.pad_token_id).all()


def _with_places(policy, places: int | None, **changes):
    text = dataclasses.replace(policy.config.text, max_position_embeddings=places)
    config = dataclasses.replace(policy.config, text=text, **changes)
    processor = dataclasses.replace(policy.processor, config=config)
    return dataclasses.replace(policy, config=config, processor=processor)


@pytest.mark.parametrize(("words", "width"), [(1, 24), (22, 24), (23, 48), (46, 48), (47, 96)])
def test_prompts_are_padded_to_few_lengths(policy, words, width):
    ids, lengths = _with_places(policy, 2048).processor.tokenize(["the " * words, "open"])
    assert ids.shape == (2, width)
    assert lengths[0] == words + 2  # with BOS and the empty token


def test_prompts_end_where_the_places_do(policy):
    # 8 patches and the state come before, 56 placeholders and the stop token behind.
    long = _with_places(policy, 9 + 57 + 40)
    assert long.config.prompt_limit == 40
    assert long.processor.tokenize(["the " * 38])[0].shape == (1, 40)
    with pytest.raises(InputError, match="41 tokens, the policy takes at most 40"):
        long.processor.tokenize(["the " * 39])


def test_padding_changes_no_action(policy):
    batch = {k: [v] if k == "instruction" else v[None] for k, v in observation().items()}
    long = batch | {"instruction": ["the black bowl " * 10]}
    widened = _with_places(policy, 2048)
    wide = _with_places(policy, 2048, max_prompt_tokens=48)
    np.testing.assert_array_equal(widened.infer_normalized(batch), policy.infer_normalized(batch))
    found, expected = widened.infer_normalized(long), wide.infer_normalized(long)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - policy.infer_normalized(batch)).max() > 0
    joined = widened.processor.join([widened.prepare(batch), widened.prepare(long)])
    assert joined.input_ids.shape == (2, 48)
    both = widened.run(joined)
    np.testing.assert_allclose(both[1], expected[0], atol=1e-5)
    np.testing.assert_allclose(both[0], policy.infer_normalized(batch)[0], atol=1e-5)


def test_the_fingerprint_is_that_of_the_actions(policy):
    assert _with_places(policy, 2048).fingerprint == policy.fingerprint
