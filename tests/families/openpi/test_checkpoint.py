"""Checkpoint directories of openpi: read, refused, written again."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from qvla_jax.checkpoints.weights import assign_tensors
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.families.openpi import checkpoint, torch_file
from qvla_jax.families.openpi.checkpoint import (
    NamedTensors,
    PublicTensors,
    export,
    read_config,
    step_folder,
)
from qvla_jax.families.openpi.names import parameters, slots
from qvla_jax.families.openpi.network import abstract_model
from qvla_jax.families.openpi.orbax_tree import StoredTree

from .conftest import STATISTICS, write_tree

# By asset id.
ENTRIES = {"physical-intelligence/libero": STATISTICS}
VARIANTS = ("pi0", "pi05")


def _load_model(folder, config):
    model = abstract_model(config)
    tensors = NamedTensors(model, checkpoint.open_tensors(folder, model))
    assign_tensors(model, tensors, source=str(folder))
    return model


def _restore(folder):
    """Leaf -> array, by orbax's own checkpointer."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder, restore_args=None)
    flat, _ = jax.tree_util.tree_flatten_with_path(restored)
    return {"/".join(key.key for key in path): np.asarray(value) for path, value in flat}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_published_directory_is_read(published, configs, tensors, variant):
    folder = step_folder(published[variant])
    config = read_config(folder, preset_name=f"{variant}_libero")
    assert config == configs[variant]
    model = _load_model(folder, config)
    for path, variable in parameters(model):
        np.testing.assert_array_equal(variable[...], tensors[variant][path], err_msg=path)
    assert checkpoint.read_statistics(folder, config.asset_id) == ENTRIES


def test_the_trainers_layout_is_read_in_bfloat16(trees, configs, tensors, tmp_path):
    """`value` behind every leaf, below the step's folder, beside the optimizer's state."""
    step = tmp_path / "100"
    write_tree(step / "params", trees["pi05"], suffix=("value",), dtype=jnp.bfloat16)
    (step / "train_state").mkdir()
    assert step_folder(tmp_path) == step
    model = abstract_model(configs["pi05"])
    found = PublicTensors(step, model)
    assert StoredTree(step / "params").value_keys
    for path, value in found.items():
        assert value.dtype == found.dtype(path) == ml_dtypes.bfloat16
        expected = tensors["pi05"][path].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(value, expected, err_msg=path)
    (tmp_path / "200" / "params").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds the steps 100, 200; name one of them"):
        step_folder(tmp_path)


@pytest.mark.parametrize("value_keys", [False, True])
def test_what_is_exported_is_the_tree_bit_for_bit(published, configs, trees, tmp_path, value_keys):
    config, source = configs["pi0"], published["pi0"]
    found = PublicTensors(source, abstract_model(config))
    export(config, found, ENTRIES, tmp_path / "out", value_keys=value_keys)
    restored = _restore(tmp_path / "out" / "params")
    end = "/value" if value_keys else ""
    assert restored.keys() == {f"params/{leaf}{end}" for leaf in trees["pi0"]}
    for leaf, value in trees["pi0"].items():
        np.testing.assert_array_equal(restored[f"params/{leaf}{end}"], value, err_msg=leaf)
    # Our own file tells the rest, so no preset is needed any more.
    again = read_config(tmp_path / "out")
    assert again == config
    assert checkpoint.read_statistics(tmp_path / "out", config.asset_id) == ENTRIES
    with pytest.raises(InputError, match="holds files already"):
        export(config, found, ENTRIES, tmp_path / "out")


def test_exported_bfloat16_stays_bfloat16(configs, tensors, tmp_path):
    rounded = {path: v.astype(ml_dtypes.bfloat16) for path, v in tensors["pi05"].items()}
    export(configs["pi05"], rounded, ENTRIES, tmp_path / "out")
    found = PublicTensors(tmp_path / "out", abstract_model(configs["pi05"]))
    for path, value in found.items():
        assert value.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(value, rounded[path], err_msg=path)


def test_an_export_that_fails_leaves_nothing(configs, tensors, tmp_path):
    short = dict(tensors["pi0"])
    short["state_proj.kernel"] = np.zeros((2, 2), np.float32)
    with pytest.raises(CheckpointError, match=r"'state_proj.kernel' has shape \(2, 2\)"):
        export(configs["pi0"], short, ENTRIES, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    short["state_proj.kernel"] = tensors["pi0"]["state_proj.kernel"]
    up = "PaliGemma.llm.layers.1.mlp.up.kernel"
    mixed = short | {up: short[up].astype(ml_dtypes.bfloat16)}
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up\.kernel' has dtype bfloat16"):
        export(configs["pi0"], mixed, ENTRIES, tmp_path / "out")
    del short["state_proj.kernel"]
    with pytest.raises(CheckpointError, match=r"'state_proj.kernel' is missing"):
        export(configs["pi0"], short, ENTRIES, tmp_path / "out")


def test_what_is_stored_by_layers_is_read_by_layers(trees, configs, tensors, tmp_path):
    """Where the file has a chunk for each layer, no more than one is held."""
    leaf = "PaliGemma/llm/layers/mlp/gating_einsum"
    value = trees["pi0"][leaf]
    write_tree(tmp_path / "params", trees["pi0"])
    name = tmp_path / "params" / f"params.{leaf.replace('/', '.')}"
    # The same array again, in a folder of its own and in chunks of one layer.
    plain = tmp_path / "plain"
    export(configs["pi0"], tensors["pi0"], ENTRIES, plain)
    name = plain / "params" / f"params.{leaf.replace('/', '.')}"
    shutil.rmtree(name)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{name}/"},
        "metadata": {"chunks": [1, *value.shape[1:]]},
    }
    ts.open(spec, create=True, dtype=ts.float32, shape=value.shape).result().write(value).result()
    stored = StoredTree(plain / "params")[leaf]
    for layer in range(value.shape[0]):
        for part in range(2):
            np.testing.assert_array_equal(stored.read((layer, part)), value[layer, part])
            first, held = stored._rows
            assert (first, len(held)) == (layer, 1)
    np.testing.assert_array_equal(stored.read((0, 1)), value[0, 1])


@pytest.fixture
def damaged(trees, published, configs, tmp_path):
    """(variant, change of the tree) -> what reading says of it."""

    def read(variant, change):
        tree = dict(trees[variant])
        change(tree)
        write_tree(tmp_path / "params", tree)
        shutil.copy(published[variant] / "tiny_archs.json", tmp_path)
        config = read_config(tmp_path, preset_name=f"{variant}_libero")
        return dict(PublicTensors(tmp_path, abstract_model(config)))

    return read


def test_a_missing_leaf_is_named(damaged):
    with pytest.raises(
        CheckpointError, match=r"'action_out_proj/bias' of shape \(9,\) is missing \(1 in all\)"
    ):
        damaged("pi0", lambda tree: tree.pop("action_out_proj/bias"))


def test_an_unexpected_leaf_is_named(damaged):
    def rename(tree):
        tree["PaliGemma/llm/layers/attn/qkv_einsum/w"] = np.zeros((2, 3), np.float32)

    with pytest.raises(CheckpointError, match=r"attn/qkv_einsum/w' of shape \(2, 3\) is unexp"):
        damaged("pi05", rename)


def test_a_leaf_of_another_shape_is_named(damaged):
    def cut(tree):
        leaf = "PaliGemma/llm/layers/mlp_1/linear"
        tree[leaf] = tree[leaf][:, :-1]

    with pytest.raises(CheckpointError, match=r"mlp_1/linear' has shape \(2, 9, 6\), expected"):
        damaged("pi0", cut)


def test_a_value_that_is_not_finite_is_named(damaged):
    def spoil(tree):
        leaf = "PaliGemma/llm/layers/attn/kv_einsum/w"
        tree[leaf] = tree[leaf].copy()
        tree[leaf][1, 1, 0, 0, 0] = np.nan

    with pytest.raises(CheckpointError, match="attn/kv_einsum/w' holds NaN or inf"):
        damaged("pi0", spoil)


def test_integers_are_no_weights(damaged):
    def spoil(tree):
        tree["action_in_proj/bias"] = np.zeros(6, np.int32)

    with pytest.raises(CheckpointError, match="'action_in_proj/bias' has dtype int32, expected"):
        damaged("pi0", spoil)


@pytest.mark.parametrize("change", ["both", "neither"])
def test_weights_of_neither_or_both_variants_are_refused(damaged, change):
    def spoil(tree):
        if change == "both":
            tree["time_mlp_in/kernel"] = tree["state_proj/kernel"]
        else:
            del tree["state_proj/kernel"]

    message = {"both": "holds both 'state_proj/kernel'", "neither": "not supported"}[change]
    with pytest.raises(CheckpointError, match=message):
        damaged("pi0", spoil)


def test_what_no_file_tells_is_asked_for(published, tmp_path):
    with pytest.raises(CheckpointError, match=r"preset=\.\.\., one of: pi05_base, pi05_libero"):
        read_config(published["pi05"])
    with pytest.raises(CheckpointError, match="the weights are those of pi05 "):
        read_config(published["pi05"], preset_name="pi0_libero")
    with pytest.raises(CheckpointError, match=r"droid/norm_stats.json: missing; .* there are: phy"):
        checkpoint.read_statistics(published["pi05"], "droid")
    with pytest.raises(CheckpointError, match="there is neither params/ nor model"):
        step_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "many"}, "vocab_size: expected int, got 'many'"),
        ({"gemma_variants": {}}, "missing or unusable key"),
        ({"model_config": None}, "missing or unusable key"),
        (
            {"siglip_variants": {"So400m/14": {"patch_size": [14, 7]}}},
            "patches of 14 x 7, not square",
        ),
        ({"siglip_variants": {"So400m/14": {"widht": 3}}}, "did you mean width"),
    ],
)
def test_sizes_that_are_no_sizes_are_refused(published, tmp_path, change, message):
    shutil.copytree(published["pi0"] / "params", tmp_path / "params")
    sizes = json.loads((published["pi0"] / "tiny_archs.json").read_text()) | change
    (tmp_path / "tiny_archs.json").write_text(json.dumps(sizes))
    with pytest.raises(CheckpointError, match=f"tiny_archs.json: .*{message}"):
        read_config(tmp_path, preset_name="pi0_libero")


def test_other_sizes_do_not_fit_the_weights(published, tmp_path):
    shutil.copytree(published["pi05"] / "params", tmp_path / "params")
    sizes = json.loads((published["pi05"] / "tiny_archs.json").read_text())
    (tmp_path / "tiny_archs.json").write_text(json.dumps(sizes | {"vocab_size": 21}))
    config = read_config(tmp_path, preset_name="pi05_libero")
    with pytest.raises(CheckpointError, match=r"\(20, 8\), expected \(21, 8\); sizes that are not"):
        PublicTensors(tmp_path, abstract_model(config))


def test_a_folder_that_is_no_checkpoint_is_refused(published, tmp_path):
    (tmp_path / "params").mkdir()
    with pytest.raises(CheckpointError, match="params: not a readable orbax checkpoint"):
        read_config(tmp_path, preset_name="pi05_libero")
    cut = tmp_path / "cut"
    shutil.copytree(published["pi05"], cut)
    largest = max((cut / "params").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    config = read_config(cut, preset_name="pi05_libero")
    with pytest.raises(CheckpointError, match="cannot be read"):
        dict(PublicTensors(cut, abstract_model(config)))


# LoRA


def _adapters(tree, configs, rank=None):
    """Random adapters for every weight of both experts, of the public ranks."""
    rng = np.random.default_rng(0)
    added = {}
    for leaf, value in tree.items():
        name = leaf.removesuffix("/w")
        if leaf.endswith("/w") or "/mlp" in leaf:
            join = "/" if leaf.endswith("/w") else "_"
            r = rank or (32 if "_1" in leaf else 16)
            *lead, fan_in, out = value.shape
            added[f"{name}{join}lora_a"] = rng.normal(size=(*lead, fan_in, r)).astype(np.float32)
            added[f"{name}{join}lora_b"] = rng.normal(size=(*lead, r, out)).astype(np.float32)
    return added


def test_adapters_are_merged_as_openpi_applies_them(trees, configs, tmp_path):
    """Each product with the merged weight is openpi's own: base plus two einsums of the halves."""
    tree = trees["pi0"]
    adapters = _adapters(tree, configs)
    write_tree(tmp_path / "params", tree | adapters)
    merged = dict(PublicTensors(tmp_path, abstract_model(configs["pi0"])))
    places = slots(abstract_model(configs["pi0"]))
    rng = np.random.default_rng(1)
    equations = {
        # base, then the adapter's two halves, as `lora.Einsum` derives them
        "q_einsum": ("btd,ndh->btnh", "btd,ndl->btnl", "btnl,nlh->btnh"),
        "k_einsum": ("bsd,kdh->bskh", "bsd,kdl->bskl", "bskl,klh->bskh"),
        "v_einsum": ("bsd,kdh->bskh", "bsd,kdl->bskl", "bskl,klh->bskh"),
        "attn_vec_einsum": ("btnh,nhd->btd", "btnh,nhl->btl", "btl,nld->btd"),
        "gate": ("btd,df->btf", "btd,dl->btl", "btl,lf->btf"),
        "up": ("btd,df->btf", "btd,dl->btl", "btl,lf->btf"),
        "linear": ("btd,df->btf", "btd,dl->btl", "btl,lf->btf"),
    }
    checked = 0
    for path, slot in places.items():
        kind = path.split(".")[-2].removesuffix("_1")
        stem = slot.leaf.removesuffix("/w")
        join = "/" if slot.leaf.endswith("/w") else "_"
        if f"{stem}{join}lora_a" not in adapters:
            np.testing.assert_array_equal(merged[path], slot.to_flax(tree[slot.leaf][slot.index]))
            continue
        a, b = (adapters[f"{stem}{join}lora_{half}"][slot.index] for half in "ab")
        w = tree[slot.leaf][slot.index]
        first, second, third = equations[kind]
        shape = w.shape[:-1] if kind == "attn_vec_einsum" else (w.shape[-2],)
        x = rng.normal(size=(2, 3, *shape))
        expected = np.einsum(first, x, w) + np.einsum(third, np.einsum(second, x, a), b)
        found = x.reshape(2, 3, -1) @ merged[path].astype(np.float64)
        np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=1e-3, atol=1e-3)
        checked += 1
    assert checked == 2 * 2 * 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, leaf: a.pop(f"{leaf}_lora_b"), "mlp/linear_lora_a' has no other half"),
        (
            lambda a, leaf: a.update({f"{leaf}_lora_a": a[f"{leaf}_lora_a"][..., :4]}),
            r"mlp/linear_lora_a' has shape \(2, 10, 4\), expected \(2, 10, 16\): the scale",
        ),
        (
            lambda a, leaf: a.update({"PaliGemma/llm/layers/attn/x_einsum/lora_a": np.ones(3)}),
            "attn/x_einsum/lora_a' of shape .3,. is unexpected",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(trees, configs, tmp_path, change, message):
    adapters = _adapters(trees["pi0"], configs)
    change(adapters, "PaliGemma/llm/layers/mlp/linear")
    write_tree(tmp_path / "params", trees["pi0"] | adapters)
    with pytest.raises(CheckpointError, match=message):
        PublicTensors(tmp_path, abstract_model(configs["pi0"]))


# PyTorch


def _torch(config, tensors, *, prefix="", head=True, embeddings=True):
    """A state dict as the public conversions leave it."""
    places = slots(abstract_model(config))
    state = {
        torch_file.torch_name(path): np.ascontiguousarray(
            torch_file.to_torch(path, slot, tensors[path])
        )
        for path, slot in places.items()
    }
    name = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    table = state[name]
    if not embeddings:
        del state[name]
    if head:
        state["paligemma_with_expert.paligemma.lm_head.weight"] = table
        state["paligemma_with_expert.gemma_expert.lm_head.weight"] = np.zeros((20, 6), np.float32)
    return {f"{prefix}{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("pi0", {"embeddings": False}),  # as safetensors' save_model leaves tied tensors
        ("pi05", {}),
        ("pi05", {"prefix": "model.", "embeddings": False}),  # LeRobot's
        ("pi0", {"head": False}),
    ],
)
def test_pytorch_weights_are_read(configs, tensors, published, tmp_path, variant, options):
    import safetensors.numpy

    config = configs[variant]
    state = _torch(config, tensors[variant], **options)
    if options.get("prefix"):
        state["model.state_proj.weight"] = np.ones((6, 9), np.float32)  # dropped there as well
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    shutil.copy(published[variant] / "tiny_archs.json", tmp_path)
    assert step_folder(tmp_path) == tmp_path
    assert read_config(tmp_path, preset_name=f"{variant}_libero") == config
    model = _load_model(tmp_path, config)
    for path, variable in parameters(model):
        np.testing.assert_array_equal(variable[...], tensors[variant][path], err_msg=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("state_proj.bias"), r"'state_proj.bias' of shape \(6,\) is missing"),
        (lambda s: s.update({"x.y": np.ones(2)}), r"'x.y' of shape \(2,\) is unexpected"),
        (
            lambda s: s.update({"state_proj.bias": np.ones(5, np.float32)}),
            r"'state_proj.bias' has shape \(5,\), expected \(6,\)",
        ),
        (
            lambda s: s.update({"state_proj.bias": np.full(6, np.inf, np.float32)}),
            "'state_proj.bias' holds NaN or inf",
        ),
    ],
)
def test_pytorch_weights_that_do_not_fit_are_refused(configs, tensors, tmp_path, change, message):
    import safetensors.numpy

    state = _torch(configs["pi0"], tensors["pi0"])
    change(state)
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        _load_model(tmp_path, configs["pi0"])
