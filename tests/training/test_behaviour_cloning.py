import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from qvla_jax.checkpoints import public_tensors
from qvla_jax.data import bundled_path
from qvla_jax.data.rlds import RldsDataset
from qvla_jax.errors import CheckpointError, DatasetError, InputError
from qvla_jax.families.openpi.config import PRESETS, GemmaConfig
from qvla_jax.inference import load_policy, random_policy
from qvla_jax.training import TrainConfig, behaviour_cloning, train
from qvla_jax.training.optimizer import learning_rate

from ..data import lerobot_sets


@pytest.fixture(autouse=True)
def _optax_promotes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


EPISODES = {"calibration": 2, "heldout": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The bundled set with its first episodes alone."""
    folder = tmp_path_factory.mktemp("data") / "1.0.0"
    folder.mkdir()
    info = json.loads((bundled_path() / "dataset_info.json").read_text())
    for split in info["splits"]:
        count = EPISODES[split["name"]]
        (whole,) = bundled_path().glob(f"*-{split['name']}.array_record-*")
        reader = ArrayRecordReader(str(whole))
        writer = ArrayRecordWriter(str(folder / whole.name), "group_size:1")
        for record in reader.read(list(range(count))):
            writer.write(record)
        writer.close()
        split["shardLengths"] = [str(count)]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    shutil.copy(bundled_path() / "features.json", folder)
    return folder


def small(data, out):
    return TrainConfig(
        data=(str(data),),
        out=out,
        model="tiny-test",
        train_split="calibration",
        steps=6,
        batch_size=8,
        warmup_steps=2,
        decay_steps=2,
        checkpoint_every=2,
        evaluate_every=3,
    )


@pytest.fixture
def config(data, tmp_path):
    return small(data, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that was not cut."""
    config = small(data, tmp_path_factory.mktemp("training") / "whole")
    with jax.numpy_dtype_promotion("standard"):
        train(config)
    return config


def test_the_rate_warms_up_stays_and_decays(tmp_path):
    config = TrainConfig(
        data=(str(tmp_path),), out=tmp_path, steps=100, warmup_steps=10, decay_steps=20
    )
    rate = learning_rate(config)
    peak = config.peak_learning_rate
    expected = {0: 0.0, 5: peak / 2, 10: peak, 50: peak, 80: peak, 90: peak / 2, 100: 0.0}
    for step, value in expected.items():
        np.testing.assert_allclose(float(rate(step)), value, atol=1e-9)


def test_a_cut_run_resumes_to_the_same_weights(config, whole):
    def cut_after_three(stage, done, total):
        if stage == "train" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, progress=cut_after_three)
    assert not (config.out / "policy").exists()
    # A kill may leave half a line, and half a checkpoint.
    (config.out / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    with (config.out / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "tra')
    train(config)

    expected = public_tensors(load_policy(whole.out / "policy").model)
    resumed = public_tensors(load_policy(config.out / "policy").model)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(resumed[name], tensor, err_msg=name)
    logs = [(out / "log.jsonl").read_text().splitlines() for out in (whole.out, config.out)]
    assert [json.loads(line)["step"] for line in logs[1]] == [3, 6]
    # The mean training loss of a window that was cut covers only what was run after the cut.
    assert [json.loads(line)["heldout_l1_normalized"] for line in logs[0]] == pytest.approx(
        [json.loads(line)["heldout_l1_normalized"] for line in logs[1]], rel=1e-6
    )


def checkpoint(config, step):
    """Parameters and running average of a checkpoint: path -> array."""
    with ocp.StandardCheckpointer() as checkpointer:
        folder = (config.out / "checkpoints" / str(step) / "default").resolve()
        saved = checkpointer.restore(folder)
    return [
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(saved[name])}
        for name in ("params", "average")
    ]


@pytest.mark.long
def test_flow_matching_on_two_sets_with_averaged_weights(config, data, tmp_path, monkeypatch):
    sizes = dict(depth=1, mlp_dim=8, num_heads=1, num_kv_heads=1, head_dim=4)
    mini = PRESETS["pi-mini"]
    tiny = dataclasses.replace(
        mini,
        vision=dataclasses.replace(mini.vision, width=8, depth=1, mlp_dim=8, num_heads=1),
        language=GemmaConfig(width=8, **sizes),
        action_expert=GemmaConfig(width=8, **sizes),
        num_steps=2,
    )
    monkeypatch.setitem(PRESETS, "pi-mini", tiny)
    other = tmp_path / "other" / "1.0.0"
    shutil.copytree(data, other)
    config = dataclasses.replace(
        config,
        data=(str(data), str(other)),
        model="pi-mini",
        steps=3,
        decay_steps=1,
        checkpoint_every=1,
        optimizer="adamw",
        average_decay=0.3,
    )

    def cut_after_two(stage, done, total):
        if stage == "train" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, progress=cut_after_two)
    _, first = checkpoint(config, 1)
    policy = load_policy(train(config))
    (params_2, second), (params_3, third) = checkpoint(config, 2), checkpoint(config, 3)
    assert params_2
    for name, mean in second.items():
        # The decay of 0.3 does not count yet: it would keep more than 2/11.
        np.testing.assert_allclose(mean, (2 * first[name] + 9 * params_2[name]) / 11, atol=1e-6)
        np.testing.assert_allclose(
            third[name], 0.25 * mean + 0.75 * params_3[name], atol=1e-6, err_msg=name
        )
    # What is shipped is the average, normalized by both sets.
    kernel = np.asarray(third["['action_in_proj']['kernel']['value']"].T, jnp.bfloat16)
    found = public_tensors(policy.model)["action_in_proj.weight"]
    np.testing.assert_array_equal(found, kernel.astype(np.float32))
    assert policy.config.asset_id == "libero_spatial+libero_spatial"
    record = json.loads((config.out / "policy" / "training.json").read_text())
    assert (record["train_episodes"], record["heldout_episodes"]) == (4, 2)


def test_a_changed_byte_of_a_checkpoint_is_found(config, whole):
    shutil.copytree(whole.out, config.out)
    folder = config.out / "checkpoints" / "6"
    largest = max(folder.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{largest.name}: not the bytes .* delete"):
        train(config)


def test_a_checkpoint_of_another_optimizer_is_named(config, whole, monkeypatch):
    shutil.copytree(whole.out, config.out)
    other = optax.sgd(1.0, momentum=0.9)
    monkeypatch.setattr(behaviour_cloning, "make_optimizer", lambda config: other)
    with pytest.raises(CheckpointError, match=r"checkpoints.6: another version .* train anew"):
        train(config)


def test_training_fits_and_says_what_it_reached(config):
    config = dataclasses.replace(
        config, steps=40, evaluate_every=10, checkpoint_every=40, peak_learning_rate=3e-3
    )
    folder = train(config)
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["train_loss"] < 0.7 * log[0]["train_loss"]
    record = json.loads((folder / "training.json").read_text())
    reached = record["heldout_l1_normalized"]
    assert reached == pytest.approx(log[-1]["heldout_l1_normalized"], rel=0.05)
    (statistics,) = json.loads((folder / "dataset_statistics.json").read_text()).values()
    half = np.subtract(statistics["action"]["q99"], statistics["action"]["q01"]) / 2
    half[6] = 1.0  # the gripper is not normalized
    by_dimension = np.multiply(record["heldout_l1_normalized_by_dimension"], half)
    np.testing.assert_allclose(record["heldout_l1_by_dimension"], by_dimension, rtol=1e-5)
    assert record["heldout_l1"] == pytest.approx(by_dimension.mean())
    assert record["train_episodes"] == EPISODES["calibration"]
    assert "data" not in record["config"]


def test_another_recipe_in_the_same_folder_is_refused(whole):
    with pytest.raises(InputError, match="holds a run with batch_size = 8, asked for 16"):
        train(dataclasses.replace(whole, batch_size=16))


def test_a_run_may_be_prolonged_only_before_its_decay(config):
    train(dataclasses.replace(config, steps=2, decay_steps=0))
    train(dataclasses.replace(config, steps=4, decay_steps=1))
    with pytest.raises(InputError, match="past the start of a decay"):
        train(dataclasses.replace(config, steps=6, decay_steps=1))


def test_wrong_data_are_named(config, tmp_path):
    with pytest.raises(DatasetError, match="no such directory"):
        train(dataclasses.replace(config, data=(str(tmp_path / "nothing"),)))
    with pytest.raises(InputError, match="decay_steps 9 do not fit into steps 6"):
        train(dataclasses.replace(config, decay_steps=9))


def test_a_lerobot_set_gives_frames_and_statistics(config, tmp_path, monkeypatch):
    """No step is taken: that is the same for every source of frames."""
    pytest.importorskip("av", reason="reading videos needs PyAV (extra `lerobot`)")
    seen = []

    def stands_still(_, policy, frames, heldout, progress):
        seen.append((len(frames), len(heldout)))
        return policy

    monkeypatch.setattr(behaviour_cloning, "_run", stands_still)
    monkeypatch.setattr(behaviour_cloning, "heldout_l1", lambda *_: np.zeros((8, 7)))
    info = {"splits": {"train": "0:2", "heldout": "2:3"}}
    made = lerobot_sets.parts((6, 5, 8), videos=True, info=info)
    path = lerobot_sets.write(tmp_path / "set", made)
    first = dataclasses.replace(
        config,
        data=(str(path),),
        spec="lerobot/libero",
        train_split="train",
        out=tmp_path / "first",
    )
    folder = train(first)
    assert seen == [(11, 8)]
    statistics = json.loads((folder / "dataset_statistics.json").read_text())
    assert statistics["lerobot/libero"]["num_transitions"] == 11
    assert load_policy(folder).config.unnorm_key == "lerobot/libero"
    # Another policy may start from it, whatever set that one sees.
    train(dataclasses.replace(config, initial_policy=str(folder), out=tmp_path / "second"))


def test_training_goes_on_from_another_policy(config, tmp_path):
    policy = random_policy("tiny-test", seed=7)
    policy.save(tmp_path / "initial")
    start = dataclasses.replace(
        config,
        initial_policy=str(tmp_path / "initial"),
        steps=1,
        warmup_steps=1,
        decay_steps=0,
        evaluate_every=1,
    )
    # The first step of a warm-up has a rate of zero.
    folder = train(start)
    named = json.loads((folder / "training.json").read_text())["config"]["initial_policy"]
    assert named == {"name": "initial", "fingerprint": policy.fingerprint}
    trained = public_tensors(load_policy(folder).model)
    for name, tensor in public_tensors(policy.model).items():
        expected = tensor.astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(trained[name], expected, err_msg=name)
    with pytest.raises(InputError, match="is no libero-mini"):
        train(dataclasses.replace(start, model="libero-mini", out=tmp_path / "other"))


def test_sets_are_trained_on_together(config, data):
    frames = sum(RldsDataset(data, config.train_split).lengths.values())
    config = dataclasses.replace(config, more_data=(str(data),), steps=2, decay_steps=0)
    record = json.loads((train(config) / "training.json").read_text())
    assert [data["episodes"] for data in record["train_sets"]] == [2, 2]
    assert record["train_episodes"] == 4
    assert record["train_frames"] == 2 * frames
    with pytest.raises(InputError, match=r"holds a run with data = \['.*', '.*'\], asked for"):
        train(dataclasses.replace(config, more_data=()))
