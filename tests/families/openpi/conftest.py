"""Small networks of both variants: every part of the architecture, at widths of a few entries."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tokenizers

from qvla_jax.checkpoints.weights import assign_tensors
from qvla_jax.families.openpi import checkpoint
from qvla_jax.families.openpi.checkpoint import NamedTensors
from qvla_jax.families.openpi.config import GemmaConfig, OpenpiConfig, SiglipConfig, preset
from qvla_jax.families.openpi.names import parameters, public_shapes, slots
from qvla_jax.families.openpi.network import FlowMatching, abstract_model
from qvla_jax.inference import load_policy

STATISTICS = {
    "norm_stats": {
        key: {name: [float(i + 1)] * size for i, name in enumerate(("mean", "std", "q01", "q99"))}
        for key, size in (("state", 8), ("actions", 7))
    }
}
VARIANTS = ("pi0", "pi05")
VOCABULARY = 20
# More than one key-value head, and heads that are not as wide as the network.
_GEMMA = dict(depth=2, mlp_dim=10, num_heads=4, num_kv_heads=2, head_dim=4)


@pytest.fixture(scope="session")
def configs() -> dict[str, OpenpiConfig]:
    """Variant -> configuration."""
    return {
        variant: dataclasses.replace(
            preset(f"{variant}_libero"),
            vision=SiglipConfig(width=12, depth=2, mlp_dim=14, num_heads=3, image_size=28),
            language=GemmaConfig(width=8, **_GEMMA),
            action_expert=GemmaConfig(width=6, **_GEMMA),
            vocab_size=VOCABULARY,
            action_dim=9,
            action_horizon=3,
            max_prompt_tokens=5,
        )
        for variant in ("pi0", "pi05")
    }


@pytest.fixture(scope="session")
def tensors(configs) -> dict[str, dict[str, np.ndarray]]:
    """Variant -> path of every parameter -> random value; every one of them matters."""
    made = {}
    for variant, config in configs.items():
        rng = np.random.default_rng(len(variant))
        made[variant] = {
            path: rng.normal(size=variable.shape).astype(np.float32)
            for path, variable in parameters(abstract_model(config))
        }
    return made


@pytest.fixture(scope="session")
def models(configs, tensors) -> dict[str, FlowMatching]:
    """Variant -> a network with arrays, of moderate gain, that takes three steps."""
    made = {}
    for variant, config in configs.items():
        model = abstract_model(dataclasses.replace(config, num_steps=3))
        moderate = {path: 0.4 * value for path, value in tensors[variant].items()}
        assign_tensors(model, NamedTensors(model, moderate), source=variant)
        made[variant] = model
    return made


@pytest.fixture(scope="session")
def trees(configs, tensors):
    """Variant -> the public tree, stacked by hand: leaf -> array."""
    made = {}
    for variant, config in configs.items():
        model = abstract_model(config)
        tree = {leaf: np.zeros(shape, np.float32) for leaf, shape in public_shapes(model).items()}
        for path, slot in slots(model).items():
            tree[slot.leaf][slot.index] = slot.to_public(tensors[variant][path])
        made[variant] = tree
    return made


def write_tree(folder, tree, *, suffix=(), dtype=None):
    """As openpi does: one tree `params` through orbax's own checkpointer."""
    nested: dict = {}
    for leaf, value in tree.items():
        *parents, last = (*leaf.split("/"), *suffix)
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(value, dtype)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder, {"params": nested})


@pytest.fixture(scope="session")
def published(trees, configs, tmp_path_factory):
    """Variant -> a directory as openpi publishes it."""
    made = {}
    for variant in VARIANTS:
        folder = tmp_path_factory.mktemp("published") / variant
        write_tree(folder / "params", trees[variant])
        asset = folder / "assets" / "physical-intelligence" / "libero"
        asset.mkdir(parents=True)
        (asset / "norm_stats.json").write_text(json.dumps(STATISTICS))
        sizes = checkpoint.public_sizes(configs[variant])
        (folder / "tiny_archs.json").write_text(json.dumps(sizes))
        made[variant] = folder
    return made


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tokenizers file with a few words."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "pick", "up", "the", "black", "bowl"]
    words += [f"<unused{i}>" for i in range(len(words), VOCABULARY)]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("tokenizer") / "words.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="session")
def policies(published, tokenizer):
    """Variant -> the policy of its public directory."""
    return {
        variant: load_policy(published[variant], preset=f"{variant}_libero", tokenizer=tokenizer)
        for variant in VARIANTS
    }
