"""Behavior cloning: a policy learns to predict demonstrated action chunks.

How far a prediction is off is the network's own `loss`: the L1 distance, or flow matching's.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from qvla_jax import sharding
from qvla_jax.array_typing import Array, Float
from qvla_jax.atomic import write_json, write_text
from qvla_jax.checkpoints.checksums import check_checksums, write_checksums
from qvla_jax.data.opening import open_source
from qvla_jax.data.statistics import joint_statistics
from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.families.family import Family
from qvla_jax.families.registry import family_of, preset
from qvla_jax.inference import Policy, load_policy
from qvla_jax.inference.policy import make_policy
from qvla_jax.precision import in_32_bits
from qvla_jax.progress import Progress, no_progress
from qvla_jax.provenance import provenance
from qvla_jax.training.augmentation import proprio_noise, random_shift
from qvla_jax.training.config import TrainConfig, claim_folder, of_a_step, portable
from qvla_jax.training.frames import Frames, load_frames
from qvla_jax.training.optimizer import learning_rate, make_optimizer

POLICY_FOLDER = "policy"
LOG_FILE = "log.jsonl"


# What changes from step to step: `params`, `opt_state` and, where it is asked for, `average`.
_State: TypeAlias = dict[str, Any]


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _train_step(
    graphdef: nnx.GraphDef[Any],
    config: TrainConfig,
    family: Family,
    state: _State,
    now: tuple[Array, Float[Array, ""]],
    batch: tuple[Any, Float[Array, "b h a"]],
) -> tuple[_State, Float[Array, ""]]:
    (step, rate), (inputs, chunks) = now, batch  # the step's number and its learning rate
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    shift_key, noise_key, loss_key = jax.random.split(key, 3)
    if (name := family.input_images) is not None:
        shifted = random_shift(shift_key, getattr(inputs, name), pixels=config.shift_pixels)
        inputs = dataclasses.replace(inputs, **{name: shifted})
    name = family.input_state
    if name is not None and (proprio := getattr(inputs, name)) is not None:
        noisy = proprio_noise(noise_key, proprio, scale=config.proprio_noise)
        inputs = dataclasses.replace(inputs, **{name: noisy})
    params = state["params"]
    loss, grads = jax.value_and_grad(
        lambda p: nnx.merge(graphdef, p).loss(inputs, chunks, loss_key)
    )(params)
    updates, opt_state = make_optimizer(config).update(grads, state["opt_state"], params)
    scaled = jax.tree.map(lambda update: rate * update, updates)
    params = optax.apply_updates(params, scaled)
    after = {"params": params, "opt_state": opt_state}
    if "average" in state:
        # The first steps count less: they would stay for long.
        share = jnp.maximum(1 - config.average_decay, 9 / (10 + step))
        after["average"] = jax.tree.map(
            lambda mean, new: mean + share * (new - mean), state["average"], params
        )
    return after, loss


@in_32_bits
def train(config: TrainConfig, *, progress: Progress = no_progress) -> Path:
    """Trains a policy and writes it to `out/policy`.

    An interrupted run resumes from its last checkpoint and gives the same weights as an
    uninterrupted one: the order of the frames and the augmentations depend only on the seed and the
    step.

    Args:
        config: the recipe.
        progress: reports the loading of episodes and the steps.

    Returns:
        The policy's directory (weights rounded to bfloat16), with `training.json` next to them.

    Raises:
        InputError: `out` holds a run with another recipe or other data, or the initial policy has
            another architecture.
        CheckpointError: the last checkpoint is corrupt or of another version; the message says how
            to continue.
        DatasetError: the data set cannot be read.
    """
    architecture = preset(config.model)
    family = family_of(architecture)
    train_sets = [
        open_source(path, config.train_split, spec=config.spec)
        for path in (*config.data, *config.more_data)
    ]
    heldout_sets = [
        open_source(path, config.heldout_split, spec=config.spec) for path in config.data
    ]
    fingerprints = [data.fingerprint() for data in train_sets]
    initial = None if config.initial_policy is None else load_policy(config.initial_policy)
    if initial is not None and not _same_network(family, initial.config, architecture):
        raise InputError(f"{config.initial_policy} is no {config.model}: its configuration differs")
    recipe = portable(config, initial_fingerprint=initial and initial.fingerprint)
    claim_folder(config, recipe, fingerprints)
    statistics = joint_statistics(config.data, config.train_split, spec=config.spec)
    architecture = family.with_statistics(architecture, statistics.dataset_name)
    model = family.make_model(architecture, rngs=nnx.Rngs(config.seed))
    if initial is not None:
        model = initial.model
    _, files = family.random_parts(architecture)
    policy = make_policy(
        architecture,
        model,
        files,
        family.public_statistics(architecture, statistics.to_json()),
        source=", ".join(config.data),
    )
    load = functools.partial(
        load_frames,
        processor=policy.processor,
        horizon=architecture.action_horizon,
        progress=progress,
    )
    frames = load(train_sets, stage="load")
    heldout = load(heldout_sets, stage="load held-out")

    trained = _run(config, policy, frames, heldout, progress)
    folder = config.out / POLICY_FOLDER
    trained.save(folder, dtype=jnp.bfloat16)
    # Validated as shipped: after rounding to bfloat16 and reading back.
    shipped = heldout_l1(load_policy(folder), heldout)
    units = policy.processor.action_units
    write_json(
        folder / "training.json",
        {
            "config": recipe,
            "train_sets": [
                {"name": data.name, "episodes": len(data), "fingerprint": fingerprint}
                for data, fingerprint in zip(train_sets, fingerprints, strict=True)
            ],
            "train_episodes": sum(map(len, train_sets)),
            "train_frames": len(frames),
            "heldout_episodes": sum(map(len, heldout_sets)),
            "heldout_frames": len(heldout),
            # In the data set's units, the controller's commands, which the normalization maps.
            "heldout_l1": float((shipped * units).mean()),
            "heldout_l1_by_dimension": (shipped * units).mean(axis=0).tolist(),
            "heldout_l1_normalized": float(shipped.mean()),
            "heldout_l1_normalized_by_dimension": shipped.mean(axis=0).tolist(),
            "provenance": provenance(seed=config.seed),
        },
    )
    return folder


def _same_network(family: Family, one: Any, other: Any) -> bool:
    """Whether configurations differ in nothing but the data set whose statistics they name."""
    return type(one) is type(other) and family.with_statistics(one, "") == family.with_statistics(
        other, ""
    )


def heldout_l1(policy: Policy, frames: Frames, *, batch_size: int = 64) -> Float[np.ndarray, "h a"]:
    """Mean absolute error over frames, for each entry of the chunk, in normalized space."""
    total = np.zeros(frames.chunks.shape[1:], np.float64)
    for start in range(0, len(frames), batch_size):
        part = frames.take(np.arange(start, min(start + batch_size, len(frames))))
        # Pad the last, smaller batch so that one compiled program serves all.
        padded, count = sharding.pad_batch(part.inputs, batch_size)
        total += np.abs(policy.run(padded)[:count] - part.chunks).sum(axis=0)
    return total / len(frames)


def _run(
    config: TrainConfig, policy: Policy, frames: Frames, heldout: Frames, progress: Progress
) -> Policy:
    mesh = sharding.data_mesh()
    graphdef, params = nnx.split(policy.model)
    state: _State = {"params": params, "opt_state": make_optimizer(config).init(params)}
    if config.average_decay:
        state["average"] = jax.tree.map(jnp.copy, params)  # both are donated
    state = sharding.replicate(mesh, state)
    measured = "average" if config.average_decay else "params"
    rate = learning_rate(config)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager((config.out / "checkpoints").resolve(), options=options) as manager:
        first = 0
        if (latest := manager.latest_step()) is not None:
            folder = Path(manager.directory) / str(latest)
            check_checksums(
                folder,
                remedy="delete this step's folder, and the run goes on from the one before",
            )
            try:
                state = manager.restore(latest, args=ocp.args.StandardRestore(state))
            except ValueError as error:
                raise CheckpointError(
                    f"{folder}: another version of this program wrote it, with another optimizer "
                    "state; go on with that version, or train anew in another folder"
                ) from error
            first = latest
        log = _Log(config.out / LOG_FILE, first)
        losses: list[Any] = []
        for step, rows in _batches(config, len(frames), first):
            batch = frames.take(rows)
            state, loss = _train_step(
                graphdef,
                of_a_step(config),
                policy.family,
                state,
                (jnp.asarray(step), jnp.asarray(rate(step), jnp.float32)),
                sharding.shard_batch(mesh, (batch.inputs, batch.chunks)),
            )
            losses.append(loss)
            done = step + 1
            progress("train", done, config.steps)
            if done % config.evaluate_every == 0 or done == config.steps:
                current = policy.replace(model=nnx.merge(graphdef, state[measured]))
                log.add(
                    step=done,
                    train_loss=float(np.mean(losses)),
                    heldout_l1_normalized=float(heldout_l1(current, heldout).mean()),
                )
                losses.clear()
            if done % config.checkpoint_every == 0 or done == config.steps:
                manager.save(done, args=ocp.args.StandardSave(state))
                write_checksums(Path(manager.directory) / str(done))
    return policy.replace(model=nnx.merge(graphdef, state[measured]))


def _batches(config: TrainConfig, num_frames: int, first: int) -> Iterator[tuple[int, np.ndarray]]:
    """(step, frame rows) from step `first` on; each epoch is a fresh permutation."""
    per_epoch = num_frames // config.batch_size
    if per_epoch == 0:
        raise InputError(f"{num_frames} frames are fewer than one batch of {config.batch_size}")
    order = np.empty(0, np.int64)
    for step in range(first, config.steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == first:
            order = np.random.default_rng([config.seed, epoch]).permutation(num_frames)
        yield step, order[place * config.batch_size : (place + 1) * config.batch_size]


class _Log:
    """One JSON line for each evaluation; lines past a resumed checkpoint are dropped."""

    def __init__(self, path: Path, first: int):
        self._path = path
        old = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in old if _step(line) <= first]
        write_text(path, "".join(line + "\n" for line in kept))

    def add(self, **values: float) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def _step(line: str) -> float:
    """The step of a line; infinite for a truncated line that a killed run left behind."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")
