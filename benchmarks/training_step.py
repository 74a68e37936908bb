"""CPU time of a training step by its parts, on random frames.

    python benchmarks/training_step.py --model pi-mini --batch-size 16

One XLA device takes the losses (about one core), as many as there are cores take Muon, as in
training. CPU seconds, the smallest of five calls: other work on the machine disturbs them less than
the time of day.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvla_jax import devices, sharding
from qvla_jax.families.registry import family_of, preset
from qvla_jax.inference import random_policy
from qvla_jax.training import TrainConfig
from qvla_jax.training.optimizer import make_optimizer


def main() -> None:
    """Prints a line for each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pi-mini", help="a preset")
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    devices.use_all_cpu_cores()
    policy = random_policy(arguments.model)
    print(f"{arguments.model}, {arguments.batch_size} frames, load {os.getloadavg()[0]:.1f}")
    fake = [policy.fake_observation(seed) for seed in range(arguments.batch_size)]
    inputs = policy.prepare(
        {
            key: [np.asarray(f[key]) if key != "instruction" else f[key] for f in fake]
            for key in fake[0]
        }
    )
    shape = (arguments.batch_size, policy.config.action_horizon, policy.config.action_dim)
    chunks = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def loss(model: Any) -> jax.Array:
        return model.loss(inputs, chunks, jax.random.key(0))

    def prefix(model: Any) -> jax.Array:
        held = jax.tree.leaves(model.prefix(inputs).held)
        return sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in held), jnp.float32(0))

    def tower(model: Any) -> jax.Array:
        images = jnp.asarray(inputs.images)
        pixels = images.reshape(-1, *images.shape[2:]).astype(jnp.float32) / 127.5 - 1
        return jnp.sum(jnp.square(model.PaliGemma.img(pixels).astype(jnp.float32)))

    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(preset(arguments.model), dtype=dtype)
        graphdef, params = nnx.split(family_of(config).make_model(config, rngs=nnx.Rngs(0)))
        for part in (loss, prefix, tower):
            gradient = jax.jit(jax.grad(lambda p, f=part, g=graphdef: f(nnx.merge(g, p))))
            print(f"gradient of {part.__name__}, {dtype}: {cpu_seconds(gradient, params):.2f} s")

    params = sharding.replicate(sharding.data_mesh(), params)
    for name in ("muon", "adamw"):
        optimizer = make_optimizer(TrainConfig(data=("",), out=Path(), optimizer=name))
        state = sharding.replicate(sharding.data_mesh(), optimizer.init(params))
        spent = cpu_seconds(jax.jit(optimizer.update), params, state, params)
        print(f"{name}: {spent:.2f} s")


def cpu_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """The least CPU time of five calls, behind one that compiles."""
    jax.block_until_ready(function(*arguments))
    spent = []
    for _ in range(5):
        start = time.process_time()
        jax.block_until_ready(function(*arguments))
        spent.append(time.process_time() - start)
    return min(spent)


if __name__ == "__main__":
    main()
