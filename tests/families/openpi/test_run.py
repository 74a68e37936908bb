"""pi0.5 walks the whole street: from calibration to a report and a file that loads again."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from qvla_jax.allocation import allocate
from qvla_jax.checkpoints.packed_file import PackedFile
from qvla_jax.checkpoints.weights import assign_tensors
from qvla_jax.cli import main
from qvla_jax.data import calibration_set
from qvla_jax.errors import InputError
from qvla_jax.families.openpi.checkpoint import NamedTensors
from qvla_jax.families.openpi.config import GemmaConfig, SiglipConfig
from qvla_jax.families.openpi.names import parameters
from qvla_jax.families.openpi.network import abstract_model
from qvla_jax.inference import load_policy
from qvla_jax.inference.packed_embed import packed_embeddings
from qvla_jax.inference.policy import make_policy
from qvla_jax.inference.unpacking import unpacked
from qvla_jax.kernels import dequantize, pack_table
from qvla_jax.model_options import ModelOptions
from qvla_jax.models import get_module
from qvla_jax.pipeline.allocate import Allocations, load_tables
from qvla_jax.pipeline.calibrate import check_frames, load_calibration
from qvla_jax.pipeline.configs import ValidateConfig
from qvla_jax.pipeline.files import check_steps
from qvla_jax.pipeline.policies import load_named_policy
from qvla_jax.pipeline.quantize import embedding_bits
from qvla_jax.pipeline.validate import validate
from qvla_jax.report.validation import validation_tables
from qvla_jax.sensitivity.embeddings import embedding_costs

from .conftest import STATISTICS

# One shape of weights, which takes little time to compile.
_WIDTH = 8
_GEMMA = GemmaConfig(
    width=_WIDTH, depth=2, mlp_dim=_WIDTH, num_heads=2, num_kv_heads=2, head_dim=_WIDTH // 2
)
_TOWER = SiglipConfig(width=_WIDTH, depth=1, mlp_dim=_WIDTH, num_heads=2, image_size=28)


@pytest.fixture(scope="module")
def source(configs, tokenizer, tmp_path_factory):
    """A directory as openpi publishes it, and what it does not say."""
    folder = tmp_path_factory.mktemp("published") / "policy"
    config = dataclasses.replace(
        configs["pi05"], vision=_TOWER, language=_GEMMA, action_expert=_GEMMA, num_steps=10
    )
    model = abstract_model(config)
    rng = np.random.default_rng(0)
    random = {
        path: 0.4 * rng.normal(size=variable.shape).astype(np.float32)
        for path, variable in parameters(model)
    }
    assign_tensors(model, NamedTensors(model, random), source="test")
    files = {"tokenizer.json": tokenizer.read_bytes()}
    statistics = {config.asset_id: STATISTICS}
    make_policy(config, model, files, statistics, source="test").export(folder)
    return folder, dict(preset="pi05_libero", tokenizer=str(tokenizer), executed_steps=2)


@pytest.fixture(scope="module")
def walked(source, tmp_path_factory):
    """The folder of a run, and the policy that it began with."""
    (folder, options), out = source, tmp_path_factory.mktemp("run")
    given = {
        "model": folder, "out": out, "frames": 3, "probes": 1, "budget-bits": 14,
        "budget-read": 12, "eval-frames": 2, "latency-calls": 0, "embedding-bits": 8,
        **{name.replace("_", "-"): value for name, value in options.items()},
    }  # fmt: skip
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    nothing_beside = ["--sweep", "--match-uniform", "--uniform-bits"]
    assert main(["run", *arguments, *nothing_beside]) == 0
    return out, load_policy(folder, **options)


def test_the_packed_file_acts_as_its_values_do(walked):
    out, policy = walked
    packed = load_policy(out / "policy.qvla")
    assert packed.config == policy.config
    observation = policy.fake_observation()
    found = packed.infer(observation, seed=3)
    assert np.abs(found - policy.infer(observation, seed=3)).max() > 1e-5
    same = unpacked(policy, packed).infer(observation, seed=3)
    np.testing.assert_allclose(found, same, rtol=1e-3, atol=1e-3)  # of a network of high gain
    assert json.loads((out / "report.json").read_text())["heldout"]["frames"] == 2


def test_costs_are_of_the_entries_that_the_robot_executes(walked):
    out, policy = walked
    (result,) = [
        entry
        for entry in json.loads((out / "evaluation.json").read_text())["methods"]
        if entry["family"] == "ours"
    ]
    assert len(result["versus_full_precision"]["mse_by_dimension"]) == 7 < policy.config.action_dim


def test_costs_and_errors_are_of_the_steps_that_the_client_executes(walked):
    out, policy = walked
    assert policy.layout.executed_steps == 2 < policy.config.action_horizon
    table = load_tables(out)[0]
    assert table.executed_steps == 2
    check_steps(out, table, 2)
    with pytest.raises(InputError, match="count the first 2 actions of a chunk, here count all"):
        check_steps(out, table, None)
    for name in ("evaluation.json", "report.json"):
        assert json.loads((out / name).read_text())["executed_steps"] == 2
    assert load_policy(out / "policy.qvla").layout.executed_steps == 2


def test_token_embeddings_have_8_bits_and_are_counted(walked):
    out, policy = walked
    (table,) = packed_embeddings(load_policy(out / "policy.qvla").model).values()
    assert [segment.bits for segment in table.weight.segments] == [8]
    for name in ("evaluation.json", "report.json"):
        content = json.loads((out / name).read_text())
        found, packed = content["embeddings"], content["packed"]
        assert found["bits"] == 8
        assert found["rows"] == policy.config.vocab_size
        assert found["stored_bytes"] == table.weight.nbytes < found["source_bytes"]
        assert found["versus_full_precision"]["action_sse_normalized"] > 0
        sizes = {entry["family"]: entry["embedding_bytes"] for entry in content["methods"]}
        assert sizes.pop("full") == found["source_bytes"]
        assert set(sizes.values()) == {found["stored_bytes"]}
        assert "Token embeddings have 8 bits" in packed["note"]
        # Packed and in float32 on the same values, those of the embeddings included.
        assert packed["largest_action_difference_normalized"] < 1e-3
        file = PackedFile(out / "policy.qvla")
        assert packed["packed_bytes"] + table.weight.nbytes == file.packed_bytes
        assert packed["packed_bytes"] + packed["other_bytes"] <= packed["file_bytes"]
    assert "Token embeddings have 8 bits" in (out / "report.html").read_text()


def test_a_run_s_policy_by_name_has_its_embeddings(walked, source):
    (out, policy), (folder, options) = walked, source
    named = load_named_policy(f"{folder}@{out}", ModelOptions(**options))
    (table,) = packed_embeddings(load_policy(out / "policy.qvla").model).values()
    rows = get_module(named.model, "PaliGemma.llm.embedder").embedding[...]
    np.testing.assert_array_equal(rows, dequantize(table.weight))
    assert embedding_bits(out / "policy.qvla", policy) == 8


def test_rows_of_embeddings_cost_what_rounding_them_changes(walked):
    out, policy = walked
    calibration = load_calibration(out)
    (found,) = embedding_costs(policy, calibration, bits=(4, 8, 16), probes="full")
    (batch,) = calibration.batches(3)
    inputs = policy.prepare(batch)
    np.testing.assert_array_equal(found.tokens, np.unique(inputs.tokens))
    assert found.frames.max() == 3
    assert found.shape == (policy.config.vocab_size, _WIDTH)
    assert not found.costs[:, 2].any()

    graphdef, state = nnx.split(policy.model)
    path = f"{found.path}.embedding"
    table = np.asarray(get_module(policy.model, found.path).embedding[...])
    act = jax.jit(lambda state: nnx.merge(graphdef, state)(inputs))

    def acts(rows):
        copy = nnx.merge(graphdef, state)
        get_module(copy, path.rpartition(".")[0]).embedding = nnx.Param(rows)
        with jax.default_matmul_precision("float32"):
            return policy.layout.executed(np.asarray(act(nnx.split(copy)[1]), np.float64))

    reference, expected = acts(table), []
    for token in found.tokens:
        changed = table.copy()
        changed[token] = dequantize(pack_table(table[[token]], 8))[0]
        expected.append(np.mean(np.sum((acts(changed) - reference) ** 2, axis=(1, 2))))
    assert max(expected) > 0
    np.testing.assert_allclose(found.costs[:, 1], expected, rtol=0.05, atol=0.01 * max(expected))


def test_validation_measures_kept_layers_and_embeddings(walked, source):
    (out, policy), (folder, options) = walked, source
    found = validate(
        ValidateConfig(
            model=str(folder), out=out, channels=4, frames=3, eval_frames=2, estimators=(),
            budgets=(), sizes=(), seeds=(), noises=(), trajectories=0, **options,
        )
    )  # fmt: skip
    kept = {row.module for row in found.modules if row.kept}
    conditioning = {"llm.final_norm_1.Dense_0", "llm.pre_ffw_norm_1.Dense_0", "time_mlp_in"}
    assert kept >= {"img.head", "action_in_proj", "action_out_proj", "time_mlp_out"} | conditioning
    (costs,) = found.embeddings
    assert costs.module == "PaliGemma.llm.embedder" in kept
    assert len(costs.tokens) + costs.unmeasured_rows == costs.rows == policy.config.vocab_size
    assert 0 < costs.measured["8"] < costs.measured["4"]
    assert costs.summed["8"] == pytest.approx(sum(row.costs["8"] for row in costs.tokens))
    (table,) = (
        t for t in validation_tables(found) if "rows in prompts" in str(t.columns[0].header)
    )
    assert f"{costs.unmeasured_rows} others not measured" in str(table.columns[0].header)


def test_both_budgets_are_kept(walked):
    out, policy = walked
    table, allocations = load_tables(out)[0], Allocations.load(out / "allocation.safetensors")
    chosen = allocations.chosen
    assert chosen.name.endswith("lagrangian@14,read12")
    steps = {
        path: times for path, times in zip(table.index.paths, table.reads, strict=True) if times > 1
    }
    assert set(steps.values()) == {policy.config.num_steps}
    assert all("_1" in path for path in steps)
    widths = [table.bits.index(b) for b in chosen.bits]
    sizes = table.sizes[np.arange(len(widths)), widths]
    assert chosen.read_bytes == int(sizes @ table.reads_of_channels)
    assert chosen.stored_bytes == sizes.sum() <= 14 * table.index.num_weights / 8
    assert chosen.read_bytes <= 12 * table.weights_read / 8
    alone = allocate(table, budget_bits=14)
    assert alone.read_bytes > chosen.read_bytes
    assert alone.predicted_sse_normalized <= chosen.predicted_sse_normalized
    # Along the front, fewer bytes are read and more are stored.
    line = [p for p in allocations.front if p.budget_bits == 14]
    assert len(line) > 3
    assert line[-1].read_bytes < line[0].read_bytes
    assert line[-1].stored_bytes > line[0].stored_bytes
    assert "Bytes read against bytes stored" in (out / "report.html").read_text()


def test_the_manifest_tells_the_noise(walked):
    out, policy = walked
    drawn = load_calibration(out)
    assert drawn.manifest["noise"]["draw"] == 0
    (batch,) = drawn.batches(3)
    noise = policy.prepare(batch).noise
    (again,) = load_calibration(out).batches(3)
    np.testing.assert_array_equal(policy.prepare(again).noise, noise)
    assert len(np.unique(noise)) == noise.size  # each frame has its own
    other = drawn.with_noise(1)
    assert other.hash != drawn.hash
    (changed,) = other.batches(3)
    np.testing.assert_array_equal(changed["image"], batch["image"])
    assert not set(changed["seed"]) & set(batch["seed"])


def test_frames_of_another_robot_are_refused(policies):
    frames = calibration_set("bundled", frames=1, horizon=3)
    check_frames(policies["pi0"], frames)
    config = policies["pi0"].config

    def of(robot):
        return dataclasses.replace(policies["pi0"], config=dataclasses.replace(config, robot=robot))

    with pytest.raises(InputError, match="actions of 8 entries, this data set has 7"):
        check_frames(of("droid"), frames)
    with pytest.raises(InputError, match="state of 14 entries, this data set has 8"):
        check_frames(of("aloha"), frames)
