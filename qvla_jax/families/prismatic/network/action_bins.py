"""OpenVLA's action tokens: 256 bins over [-1, 1] at the end of the vocabulary.

Edges are linspace(-1, 1, 256), which leaves 255 centers: token V - 1 - i stands for center i, V
being the vocabulary without its padding rows, and the lowest token for the last center again.
"""

import jax.numpy as jnp
import numpy as np

from qvla_jax.array_typing import AnyArray, Array, Float, Int

NUM_BINS = 256
EDGES: Float[np.ndarray, " 256"] = np.linspace(-1.0, 1.0, NUM_BINS)
CENTERS: Float[np.ndarray, " 255"] = (EDGES[:-1] + EDGES[1:]) / 2.0


def decode(token_ids: Int[AnyArray, "..."], vocab_size: int) -> Float[Array, "..."]:
    """Token ids -> normalized actions, float32."""
    bins = jnp.clip(vocab_size - jnp.asarray(token_ids) - 1, 0, NUM_BINS - 2)
    return jnp.asarray(CENTERS, jnp.float32)[bins]


def expectation(logits: Float[Array, "... n"], vocab_size: int) -> Float[Array, "..."]:
    """Expected normalized action under the softmax over the action tokens alone.

    Differentiable, unlike the greedy choice.

    Args:
        logits: over the whole vocabulary.
        vocab_size: V.
    """
    ids = np.arange(vocab_size - NUM_BINS, vocab_size)
    chosen = logits[..., ids[0] : ids[-1] + 1].astype(jnp.float32)
    weights = jnp.exp(chosen - jnp.max(chosen, axis=-1, keepdims=True))
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights @ decode(ids, vocab_size)
