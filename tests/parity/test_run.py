"""`qvla run` on public directories, with the bundled episodes for calibration."""

import json

import pytest

from qvla_jax import cli


@pytest.mark.long
@pytest.mark.parametrize("name", ["openvla_tiny", "univla_tiny"])
def test_a_public_directory_runs_from_calibration_to_report(references, tmp_path, name):
    reference, policy, _ = references(name)
    arguments = (
        f"run --model {reference.folder} --out {tmp_path} --frames 2 --probes 1 --validate 0 "
        "--baselines --eval-frames 2 --sweep --uniform-bits 4 --match-uniform --solvers "
        "greedy:marginal"
    )
    assert cli.main(arguments.split()) == cli.DONE
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["model"]["fingerprint"] == policy.fingerprint
    chosen = next(m for m in report["methods"] if m["family"] == "ours")
    assert chosen["stored_bits_per_weight"] <= 4.0
    assert chosen["versus_full_precision"]["action_mse_normalized"] >= 0.0
