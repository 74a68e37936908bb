"""The whole walk on a tiny policy: files, figures, schema, reuse."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from qvla_jax import pipeline
from qvla_jax.errors import InputError
from qvla_jax.inference import load_policy, random_policy
from qvla_jax.methods import measurements
from qvla_jax.pipeline import files
from qvla_jax.pipeline.allocate import Allocations, load_tables
from qvla_jax.pipeline.methods import MethodConfig
from qvla_jax.pipeline.quantize import packed_bits
from qvla_jax.plain import to_plain
from qvla_jax.report.page import stage_rows
from qvla_jax.stage_times import StageSeconds

TIMES = ("seconds", "compiling", "cpu")


def entries(content):
    return content["methods"] + content["sweep"]


def test_every_file_is_there_and_nothing_half_written(content, config, written):
    assert written == {
        files.CALIBRATION,
        files.SENSITIVITY,
        files.STATISTICS,
        files.TIMES,
        files.RUN_TIMES,
        "sensitivity_input_hessian.safetensors",
        files.RANKS,
        measurements.MEASUREMENTS,
        files.ALLOCATION,
        files.POLICY,
        files.EVALUATION,
        files.REPORT_JSON,
        files.REPORT_HTML,
    }
    assert json.loads((config.out / files.REPORT_JSON).read_text()) == content


def test_full_precision_has_no_error_and_all_methods_are_compared(content):
    by_name = {e["method"]: e for e in entries(content)}
    full = by_name["full"]["versus_full_precision"]
    assert full["action_mse_normalized"] == 0
    assert full["gripper_flips"] == 0
    assert [e["family"] for e in content["methods"]] == [
        "full",
        "uniform",
        "baseline",
        "other_solver",
        "ours",
        "ours",
    ]
    assert by_name["jacobian+greedy:marginal@uniform8"] in content["methods"]
    for name in (
        "jacobian+greedy:marginal",
        "jacobian+greedy:qvla",
        "input_hessian+greedy:marginal",
    ):
        assert {f"{name}@{b}" for b in ("9", "10", "12")} <= by_name.keys()
    assert {"uniform@3", "uniform@4", "uniform@8"} <= by_name.keys()


def test_a_budget_of_the_sweep_that_cannot_be_met_has_no_point(content):
    assert not any(e["method"].endswith("@0.1") for e in entries(content))


def test_stored_bytes_keep_the_budget_and_count_everything(content):
    weights = content["model"]["quantized_weights"]
    for entry in entries(content):
        if "budget_bytes" in entry:
            assert entry["stored_bytes"] <= entry["budget_bytes"]
            assert entry["budget_bytes"] <= entry["requested_bits"] * weights / 8 + 1e-6
        assert entry["stored_bits_per_weight"] == pytest.approx(8 * entry["stored_bytes"] / weights)
        if entry["family"] != "full":
            assert entry["stored_bits_per_weight"] > entry["avg_bits_per_weight"]
        assert sum(entry["channels_by_bits"].values()) == content["model"]["channels"]
        packed = entry["method"] == content["chosen"]
        assert entry["execution"] == ("packed" if packed else "float32")


def test_the_chosen_policy_ran_from_the_bytes_that_were_counted(content, config):
    packed, path = content["packed"], config.out / files.POLICY
    assert "embeddings" not in content  # which keep their bits unless a run says otherwise
    chosen = next(e for e in entries(content) if e["method"] == content["chosen"])
    assert packed["packed_bytes"] == chosen["stored_bytes"]
    assert packed["largest_action_difference_normalized"] < 1e-3
    assert packed["file_bytes"] == path.stat().st_size
    overhead = packed["file_bytes"] - packed["packed_bytes"] - packed["other_bytes"]
    assert 0 < overhead < 100_000
    policy = load_policy(path)
    found = np.concatenate(list(packed_bits(policy).values()))
    np.testing.assert_array_equal(
        found, Allocations.load(config.out / files.ALLOCATION).chosen.bits
    )


def test_more_bytes_mean_less_error_for_our_allocations(content):
    ours = sorted(
        (e["stored_bytes"], e["versus_full_precision"]["action_sse_normalized"])
        for e in entries(content)
        if e["family"] == "ours"
    )
    errors = [error for _, error in ours]
    assert errors == sorted(errors, reverse=True)


def test_the_comparison_with_a_uniform_grid_is_at_its_bytes(content):
    by_name = {e["method"]: e for e in entries(content)}
    grid, ours = by_name["uniform@8"], by_name["jacobian+greedy:marginal@uniform8"]
    assert ours["budget_bytes"] == grid["stored_bytes"]
    assert ours["stored_bytes"] <= grid["stored_bytes"]
    assert ours["matches_uniform_bits"] == 8


def test_layers_add_up_to_the_chosen_allocation(content, config):
    chosen = Allocations.load(config.out / files.ALLOCATION).chosen
    assert content["chosen"] == chosen.name == "jacobian+greedy:marginal@10"
    assert sum(layer["out_features"] for layer in content["layers"]) == len(chosen.bits)
    for bits in (0, 2, 4, 8, 16):
        by_layer = sum(layer["channels_by_bits"].get(str(bits), 0) for layer in content["layers"])
        assert by_layer == np.sum(chosen.bits == bits)


def test_validation_states_rank_correlations_at_every_bit_width(content):
    validation = content["validation"]
    assert validation["channels"] == 24
    assert [row["bits"] for row in validation["spearman"]] == [0, 2, 4, 8]
    assert all(-1 <= row["spearman"] <= 1 for row in validation["spearman"])
    assert min(row["spearman"] for row in validation["spearman"]) > 0.5


def test_the_report_holds_no_machine_path(content, config):
    text = json.dumps(content) + (config.out / files.REPORT_HTML).read_text()
    assert str(config.out.parent) not in text
    assert str(config.model) not in text


def test_the_stages_of_the_report_are_those_of_the_run_and_add_up(content, config):
    stages = [stage["stage"] for stage in content["stages"]]
    assert stages[:2] == ["load", "calibrate"]
    assert {"jacobian: sensitivity", "jacobian: joint errors", "validation: exact"} <= set(stages)
    assert stages[-4:] == ["allocate", "quantize", "evaluate", "latency"]
    rows = stage_rows([StageSeconds(**stage) for stage in content["stages"]])
    assert rows[-1] == ("all", *(sum(s[k] for s in content["stages"]) for k in TIMES))
    assert all(0 <= compiling <= seconds for _, seconds, compiling, _ in rows)
    page = (config.out / files.REPORT_HTML).read_text()
    assert "Where the time goes" in page


def test_thorough_adds_the_proxy_and_exact_probing_where_they_are_not_named(tmp_path):
    plain = pipeline.RunConfig(out=tmp_path)
    assert (plain.baselines, plain.validate) == ((), 0)
    thorough = pipeline.RunConfig(out=tmp_path, thorough=True)
    assert (thorough.baselines, thorough.validate) == (("input_hessian",), 256)
    named = pipeline.RunConfig(out=tmp_path, thorough=True, baselines=("taylor",), validate=9)
    assert (named.baselines, named.validate) == (("taylor",), 9)


def test_sets_are_disjoint_and_named(content):
    assert content["calibration"]["split"] == "calibration"
    assert content["heldout"]["split"] == "heldout"
    assert content["calibration"]["frames"] == 6
    assert content["heldout"]["frames"] == 9
    assert len(content["calibration"]["hash"]) == 64


def test_stages_one_by_one_give_the_same_as_run(content, config, tmp_path):
    config = dataclasses.replace(config, out=tmp_path / "stages")
    pipeline.calibrate(config)
    pipeline.sensitivity(config)
    pipeline.allocate(config)
    pipeline.quantize(config)
    pipeline.evaluate(config)
    again = to_plain(pipeline.report(config))
    assert again["methods"] == content["methods"]
    assert again["sweep"] == content["sweep"]
    assert again["layers"] == content["layers"]
    assert again["validation"] == content["validation"]


def copy_of(config, folder):
    shutil.copytree(config.out, folder)
    return dataclasses.replace(config, out=folder)


def test_what_a_run_measured_is_not_measured_again(content, config, tmp_path, monkeypatch):
    config = dataclasses.replace(copy_of(config, tmp_path / "copy"), thorough=False, validate=0)
    for name in ("input_statistics", "sensitivities", "joint_factors"):
        monkeypatch.setattr(measurements, name, lambda *_, **__: pytest.fail("measured again"))
    before, seconds = (config.out / name for name in (files.SENSITIVITY, files.TIMES))
    before, seconds = before.read_bytes(), seconds.read_bytes()
    pipeline.sensitivity(config)
    assert (config.out / files.SENSITIVITY).read_bytes() == before
    assert (config.out / files.TIMES).read_bytes() == seconds
    names = ("feedback-w4",)
    pipeline.quantize_by_methods(MethodConfig(out=config.out, model=config.model, method=names))
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        pipeline.sensitivity(dataclasses.replace(config, seed=1))


@pytest.mark.parametrize(
    ("missing", "stage", "command"),
    [
        (files.CALIBRATION, "sensitivity", "qvla calibrate"),
        (files.SENSITIVITY, "allocate", "qvla sensitivity"),
        (files.ALLOCATION, "quantize", "qvla allocate"),
        (files.POLICY, "evaluate", "qvla quantize"),
        (files.EVALUATION, "report", "qvla evaluate"),
    ],
)
def test_a_missing_file_names_the_command_that_writes_it(
    content, config, tmp_path, missing, stage, command
):
    config = copy_of(config, tmp_path / "copy")
    (config.out / missing).unlink()
    with pytest.raises(InputError, match=command) as caught:
        getattr(pipeline, stage)(config)
    assert missing in str(caught.value)


def test_another_policy_is_refused(content, config, tmp_path):
    random_policy("tiny-test", seed=1).save(tmp_path / "other")
    config = dataclasses.replace(copy_of(config, tmp_path / "copy"), model=str(tmp_path / "other"))
    before = (config.out / files.EVALUATION).read_bytes()
    with pytest.raises(InputError, match="another policy fingerprint"):
        pipeline.evaluate(config)
    assert (config.out / files.EVALUATION).read_bytes() == before


def test_another_calibration_set_is_refused(content, config, tmp_path):
    config = dataclasses.replace(copy_of(config, tmp_path / "copy"), seed=1)
    pipeline.calibrate(config)
    with pytest.raises(InputError, match="another calibration hash"):
        pipeline.evaluate(config)


def test_a_report_of_an_older_allocation_is_refused(content, config, tmp_path):
    config = dataclasses.replace(copy_of(config, tmp_path / "copy"), budget_bits=11.0)
    pipeline.allocate(config)
    with pytest.raises(InputError, match="qvla evaluate"):
        pipeline.report(config)


def test_both_policies_are_timed_on_as_many_calls_as_asked(content, config):
    latency = content["latency"]
    for name in ("full", "packed"):
        assert latency[name]["calls"] == config.latency_calls
        assert 0 < latency[name]["median_ms"] <= latency[name]["p95_ms"]
    assert latency["speed_up"] > 0


def test_the_report_takes_closed_loop_episodes_from_a_folder(
    content, config, closed_loop_summary, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(config.out, out)
    simulation = tmp_path / "simulation"
    simulation.mkdir()
    settings = pipeline.ReportConfig(out=out, simulation=simulation)
    with pytest.raises(InputError, match=r"closed_loop\.json: missing; .*qvla evaluate --sim"):
        pipeline.report(settings)
    path = simulation / "closed_loop.json"
    path.write_text(json.dumps(to_plain(closed_loop_summary)))
    assert pipeline.report(settings).closed_loop == closed_loop_summary
    assert "18 of 20" in (out / files.REPORT_HTML).read_text()
    path.write_text(json.dumps({**to_plain(closed_loop_summary), "polices": []}))
    with pytest.raises(InputError, match=r"closed_loop\.json: .*'polices'"):
        pipeline.report(settings)


def test_evaluating_on_the_calibration_split_is_refused(content, config, tmp_path):
    config = dataclasses.replace(copy_of(config, tmp_path / "copy"), eval_split="calibration")
    with pytest.raises(InputError, match="calibrated on"):
        pipeline.evaluate(config)


@pytest.mark.parametrize("name", [files.EVALUATION, files.ALLOCATION, files.SENSITIVITY])
def test_a_truncated_file_is_refused_by_name(content, config, tmp_path, name):
    config = copy_of(config, tmp_path / "copy")
    path = config.out / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=name):
        pipeline.report(config)


def test_allocations_survive_the_round_trip(content, config):
    path = config.out / files.ALLOCATION
    allocations = Allocations.load(path)
    table = load_tables(config.out)[0]
    assert allocations.made_from["policy fingerprint"] == content["model"]["fingerprint"]
    for allocation in allocations.items:
        assert allocation.bits.shape == (len(table.index),)
        assert set(np.unique(allocation.bits)) <= {0, 2, 4, 8, 16}
        assert allocation.lower_bound <= allocation.predicted_sse_normalized * (1 + 1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"budget_bits": 0.0}, "above 0 and at most 16 bits, got 0.0"),
        ({"budget_bits": 17.0}, "above 0 and at most 16 bits, got 17.0"),
        ({"solvers": ()}, "at least one solver"),
    ],
)
def test_settings_out_of_range_are_refused(config, change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config, **change)
