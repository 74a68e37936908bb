"""Every key of every settings file is followed, known to be irrelevant, or refused by name."""

import json
import shutil
from pathlib import Path

import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qvla_jax.checkpoints.declared import Follow, Ignore, Only, shown
from qvla_jax.errors import CheckpointError
from qvla_jax.families.options import LoadOptions
from qvla_jax.families.prismatic.checkpoint import keys
from qvla_jax.families.prismatic.checkpoint.huggingface import check_tokenizer, read_config
from qvla_jax.families.prismatic.checkpoint.lora import merge_adapter
from qvla_jax.families.prismatic.network import make_model
from qvla_jax.families.prismatic.word_tokenizer import word_tokenizer
from qvla_jax.inference import load_policy

from .test_huggingface import STATISTICS, architecture, write_directory
from .test_lora import halves, weights
from .test_lora import write as write_adapter

# File -> where in it -> the list of what may stand there.
LISTS = {
    ("config.json",): keys.CONFIG,
    ("config.json", "text_config"): keys.TEXT_CONFIG,
    ("generation_config.json",): keys.GENERATION_CONFIG,
    ("preprocessor_config.json",): keys.PREPROCESSOR,
    ("preprocessor_config.json", "tvf_normalize_params", 0): keys.NORMALIZE,
    ("preprocessor_config.json", "tvf_resize_params", 1): keys.RESIZE,
    ("preprocessor_config.json", "tvf_crop_params", 0): keys.CROP,
    ("tiny_vision_archs.json", "b"): keys.TOWER,
    ("tokenizer_config.json",): keys.TOKENIZER,
    ("dataset_statistics.json", "libero_x"): keys.STATISTICS,
    ("dataset_statistics.json", "libero_x", "action"): keys.BLOCK,
    ("lora_adapter/adapter_config.json",): keys.ADAPTER,
}
SIDES = [{"size": [16, 16], "interpolation": 3, "max_size": None, "antialias": True}] * 2

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
names = st.from_regex(r"[a-z][a-z_0-9]{0,20}", fullmatch=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory that decodes tokens, with all settings files; and its content, file by file."""
    path = tmp_path_factory.mktemp("public") / "hf"
    config = architecture("tokens")
    write_directory(path, config, make_model(config, rngs=nnx.Rngs(0)))
    write_adapter(path / "lora_adapter", halves())
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')
    (path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    preprocessor = json.loads((path / "preprocessor_config.json").read_text())
    preprocessor |= {"tvf_resize_params": SIDES, "tvf_crop_params": [{"output_size": [16, 16]}] * 2}
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    read_config(path)
    return path


@pytest.fixture(scope="module")
def contents(folder):
    return {file: (folder / file).read_text() for file, *_ in LISTS}


def _read(folder):
    """All that is read of the settings: configuration, statistics, adapters."""
    check_tokenizer(folder, word_tokenizer())
    merged = merge_adapter(weights(), folder / "lora_adapter")
    config, statistics = read_config(folder)
    return config, statistics, {name: tensor.tobytes() for name, tensor in merged.items()}


def _read_with(folder, contents, place, key, value):
    file, *inner = place
    content = found = json.loads(contents[file])
    for step in inner:
        found = found[step]
    found[key] = value
    (folder / file).write_text(json.dumps(content))
    try:
        return _read(folder)
    finally:
        (folder / file).write_text(contents[file])


def _refused(folder, contents, place, key, value) -> None:
    with pytest.raises(CheckpointError) as caught:
        _read_with(folder, contents, place, key, value)
    message = str(caught.value)
    assert all(part in message for part in (Path(place[0]).name, repr(key), shown(value))), message


@settings(deadline=None)
@given(st.sampled_from(sorted(LISTS, key=str)), names, json_values)
def test_a_key_that_nobody_knows_is_refused(folder, contents, place, key, value):
    assume(key not in LISTS[place])
    if LISTS[place] is keys.ADAPTER:  # PEFT lists all switches, and has new ones in each version
        assume(value is not None and value is not False and value not in ("", [], {}))
    value = json.loads(json.dumps(value))
    _refused(folder, contents, place, key, value)


@settings(deadline=None)
@given(st.data())
def test_an_irrelevant_key_changes_nothing(folder, contents, data):
    place = data.draw(st.sampled_from(sorted(LISTS, key=str)))
    ignored = sorted(key for key, rule in LISTS[place].items() if isinstance(rule, Ignore))
    assume(ignored)
    key, value = data.draw(st.sampled_from(ignored)), data.draw(json_values)
    expected = _read(folder)
    config, statistics, merged = _read_with(folder, contents, place, key, value)
    assert (config, merged) == (expected[0], expected[2])
    if "dataset_statistics.json" not in place:
        assert statistics == expected[1]


@settings(deadline=None)
@given(st.data())
def test_a_key_has_the_listed_values_only(folder, contents, data):
    place = data.draw(st.sampled_from(sorted(LISTS, key=str)))
    rules = {key: rule for key, rule in LISTS[place].items() if isinstance(rule, Only)}
    assume(rules)
    key = data.draw(st.sampled_from(sorted(rules)))
    value = data.draw(st.sampled_from(rules[key].values))
    config, *_ = _read_with(folder, contents, place, key, value)
    if key != "global_pool":  # says whether the weights hold a pooling head, which is not read
        assert config == _read(folder)[0]
    other = json.loads(json.dumps(data.draw(json_values)))
    assume(all(other != known for known in rules[key].values))
    _refused(folder, contents, place, key, other)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (("config.json", "text_config"), "rope_scaling", {"type": "linear", "factor": 2.0}),
        (("config.json", "text_config"), "rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        (("config.json", "text_config"), "hidden_act", "gelu"),
        (("config.json", "text_config"), "attention_bias", True),
        (("config.json", "text_config"), "tie_word_embeddings", True),
        (("config.json", "text_config"), "head_dim", 16),
        (("config.json", "text_config"), "rms_norm_eps", -1),
        (("config.json", "text_config"), "num_hidden_layers", 2.5),
        (("config.json", "text_config"), "quantization_config", {"load_in_4bit": True}),
        (("config.json",), "quantization_config", {"load_in_8bit": True}),
        (("config.json",), "llm_backbone_id", "vicuna-v15-7b"),
        (("config.json",), "vision_backbone_id", "dinosiglip-vit-so-384px"),
        (("config.json",), "use_fused_vision_backbone", False),
        (("config.json",), "image_resize_strategy", "letterbox"),
        (("config.json",), "n_action_bins", 128),
        (("config.json",), "attn_implementation", "magic"),
        (("generation_config.json",), "repetition_penalty", 1.2),
        (("generation_config.json",), "num_beams", 4),
        (("preprocessor_config.json",), "tvf_do_letterbox", True),
        (("preprocessor_config.json",), "input_sizes", [[3, 16, 16], [3, 32, 32]]),
        (("preprocessor_config.json", "tvf_resize_params", 0), "size", [32, 16]),
        (("preprocessor_config.json", "tvf_crop_params", 1), "output_size", [8, 8]),
        (("tiny_vision_archs.json", "a"), "no_embed_class", False),
        (("tiny_vision_archs.json", "a"), "img_size", 32),
        (("tiny_vision_archs.json", "b"), "norm_eps", 1e-5),
        (("tokenizer_config.json",), "add_eos_token", True),
        (("tokenizer_config.json",), "add_bos_token", False),
        (("dataset_statistics.json", "libero_x"), "normalization_type", "bounds"),
        (("dataset_statistics.json", "libero_x", "action"), "scale", [1.0] * 7),
        (("lora_adapter/adapter_config.json",), "use_dora", True),
        (("lora_adapter/adapter_config.json",), "init_lora_weights", "pissa"),
        (("lora_adapter/adapter_config.json",), "bias", "all"),
        (("lora_adapter/adapter_config.json",), "modules_to_save", ["lm_head"]),
        (("lora_adapter/adapter_config.json",), "fan_in_fan_out", True),
        (("lora_adapter/adapter_config.json",), "layers_to_transform", [0]),
        (("lora_adapter/adapter_config.json",), "target_modules", ["mlp"]),
    ],
)
def test_what_would_change_a_number_is_refused(folder, contents, place, key, value):
    _refused(folder, contents, place, key, value)


def test_what_is_followed_changes_the_configuration(folder, contents):
    place = ("config.json", "text_config")
    for key, value in {
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "max_position_embeddings": 999,
    }.items():
        config, *_ = _read_with(folder, contents, place, key, value)
        assert getattr(config.text, key) == value
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    config, *_ = _read_with(folder, contents, place, "rope_parameters", parameters)
    assert config.text.rope_theta == 5e5


def test_load_policy_refuses_too(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "hf", ignore=shutil.ignore_patterns("lora_adapter"))
    path = tmp_path / "hf" / "tokenizer_config.json"
    path.write_text('{"added_tokens_decoder": {"1": {"content": "<pad>"}}}')
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: 'added_tokens_decoder'"):
        load_policy(tmp_path / "hf")


def test_a_tokenizer_cuts_and_pads_nothing(folder, tmp_path):
    # transformers turns off what tokenizer.json asks for before each call.
    shutil.copytree(folder, tmp_path / "hf", ignore=shutil.ignore_patterns("lora_adapter"))
    tokenizer = word_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    plain, changed = (
        load_policy(path, mapped=True).processor.tokenize(["open the top drawer"])
        for path in (_without_adapter(folder, tmp_path), tmp_path / "hf")
    )
    assert plain[1] == changed[1]
    assert (plain[0] == changed[0]).all()


def _without_adapter(folder, tmp_path):
    path = tmp_path / "plain"
    return shutil.copytree(folder, path, ignore=shutil.ignore_patterns("lora_adapter"))


def test_generation_settings_do_not_matter_with_a_regression_head(tmp_path):
    config = architecture("l1")
    write_directory(tmp_path / "hf", config, make_model(config, rngs=nnx.Rngs(0)))
    (tmp_path / "hf" / "generation_config.json").write_text('{"num_beams": 4}')
    assert read_config(tmp_path / "hf", empty_token_id=4)[0] == config


def test_other_data_sets_may_declare_anything(folder, contents):
    path = folder / "dataset_statistics.json"
    path.write_text(json.dumps({**STATISTICS, "other": {"normalization_type": "bounds"}}))
    try:
        with pytest.raises(CheckpointError, match="name one with unnorm_key: libero_x, other"):
            read_config(folder)
        assert read_config(folder, LoadOptions(unnorm_key="libero_x"))[0].unnorm_key == "libero_x"
        with pytest.raises(CheckpointError, match="other: 'normalization_type' is 'bounds'"):
            read_config(folder, LoadOptions(unnorm_key="other"))
    finally:
        path.write_text(contents["dataset_statistics.json"])


def test_the_page_lists_every_key():
    page = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text()
    for place, rules in LISTS.items():
        lacking = [
            k for k, rule in rules.items() if not isinstance(rule, Follow) and f"`{k}`" not in page
        ]
        assert not lacking, place


@pytest.mark.parametrize("place", [("config.json",), ("config.json", "text_config")])
@pytest.mark.parametrize("decoding", ["tokens", "l1"])
def test_implementations_of_attention(tmp_path, place, decoding):
    """Tokens are decoded alike by all; OpenVLA-OFT attends both ways with sdpa alone."""
    config = architecture(decoding)
    folder = tmp_path / "hf"
    write_directory(folder, config, make_model(config, rngs=nnx.Rngs(0)))
    content = (folder / "config.json").read_text()
    for value, passes in (("sdpa", True), ("flash_attention_2", decoding == "tokens")):
        changed = json.loads(content)
        (changed["text_config"] if len(place) > 1 else changed)["_attn_implementation"] = value
        (folder / "config.json").write_text(json.dumps(changed))
        if passes:
            assert read_config(folder)[0].decoding == decoding
        else:
            with pytest.raises(CheckpointError, match="_attn_implementation' is 'flash"):
                read_config(folder)
