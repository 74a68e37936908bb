"""Small policies of openpi, of random weights."""

import dataclasses

import numpy as np
import tokenizers
from flax import nnx
from tokenizers import models, pre_tokenizers

from qvla_jax.families.openpi.config import GemmaConfig, SiglipConfig, preset
from qvla_jax.families.openpi.network import make_model
from qvla_jax.families.openpi.robots import ROBOTS
from qvla_jax.inference.policy import make_policy

WORDS = ("<pad>", "</s>", "<bos>", "<unk>", "do", "something", "transfer", "cube")
PRESETS = {"libero": "pi05_libero", "droid": "pi05_droid", "aloha": "pi0_aloha_towel"}
_GEMMA = dict(depth=1, mlp_dim=12, num_heads=2, num_kv_heads=1, head_dim=4)


def make_policies():
    """Robot -> a policy of random weights."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    rng = np.random.default_rng(0)
    made = {}
    for robot, name in PRESETS.items():
        config = dataclasses.replace(
            preset(name),
            vision=SiglipConfig(width=12, depth=1, mlp_dim=14, num_heads=3, image_size=28),
            language=GemmaConfig(width=8, **_GEMMA),
            action_expert=GemmaConfig(width=8, **_GEMMA),
            vocab_size=len(WORDS),
            action_dim=16,
            action_horizon=10,
            max_prompt_tokens=8,
            num_steps=2,
            asset_id="here",
        )
        sizes = {"state": ROBOTS[robot].state_dim, "actions": ROBOTS[robot].action_dim}
        statistics = {
            "here": {
                "norm_stats": {
                    block: {
                        "mean": rng.normal(size=size).tolist(),
                        "std": rng.uniform(0.5, 1.5, size).tolist(),
                        "q01": rng.uniform(-2, -1, size).tolist(),
                        "q99": rng.uniform(1, 2, size).tolist(),
                    }
                    for block, size in sizes.items()
                }
            }
        }
        model = make_model(config, rngs=nnx.Rngs(0))
        made[robot] = make_policy(config, model, files, statistics, source=robot)
    return made
