"""The command line: exit codes, one clear line for bad input, nothing half-written."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qvla_jax import cli, commands, data
from qvla_jax.inference import random_policy

SMALL = (
    "--frames", "4", "--probes", "1", "--validate", "0", "--eval-frames", "4",
    "--budget-bits", "10", "--sweep", "10", "--uniform-bits", "4", "--match-uniform", "8",
)  # fmt: skip


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "policy"
    random_policy("tiny-test", seed=0).save(folder)
    return folder


@pytest.fixture
def complaint(capsys):
    """Runs the command line, expects exit code 2, and returns its one line on stderr."""

    def run(*arguments):
        assert cli.main([str(a) for a in arguments]) == cli.BAD_INPUT
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("qvla: error: ")
        return lines[0]

    return run


def run_arguments(policy, out, *more):
    return ("run", "--model", policy, "--out", out, *SMALL, *more)


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert "Example: qvla" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qvla 0.")


def test_no_command_is_bad_input():
    assert cli.main([]) == cli.BAD_INPUT


def test_unknown_command_suggests_a_close_match(complaint):
    assert "did you mean calibrate" in complaint("calibarte")


def test_unknown_option_is_bad_input():
    with pytest.raises(SystemExit) as caught:
        cli.main(["allocate", "--out", "x", "--budget", "4"])
    assert caught.value.code == cli.BAD_INPUT


def test_unknown_model_suggests_a_close_match(complaint, tmp_path):
    message = complaint(*run_arguments("libero-mimi", tmp_path / "out"))
    assert "libero-mini" in message
    assert not (tmp_path / "out").exists()


def test_unknown_solver_suggests_a_close_match(complaint, policy, tmp_path):
    message = complaint(*run_arguments(policy, tmp_path / "out", "--solvers", "greedy:margin"))
    assert "greedy:marginal" in message
    assert not (tmp_path / "out").exists()


def test_unknown_sensitivity_method_suggests_a_close_match(complaint, policy, tmp_path):
    message = complaint(*run_arguments(policy, tmp_path / "out", "--method", "jacobi"))
    assert "jacobian" in message
    assert not (tmp_path / "out").exists()


def test_budget_below_the_minimum_states_the_minimum(complaint, policy, tmp_path):
    message = complaint(*run_arguments(policy, tmp_path / "out", "--budget-bits", "0.01"))
    assert "at least" in message
    assert not (tmp_path / "out").exists()


def test_dataset_without_the_needed_keys_is_refused(complaint, policy, tmp_path):
    broken = tmp_path / "rlds" / "libero_spatial" / "1.0.0"
    shutil.copytree(data.bundled_path(), broken)
    features = broken / "features.json"
    text = features.read_text()
    assert '"language_instruction"' in text
    features.write_text(text.replace('"language_instruction"', '"language"'))
    message = complaint(*run_arguments(policy, tmp_path / "out", "--dataset", broken))
    assert "language_instruction" in message
    assert not (tmp_path / "out").exists()


def test_folder_without_a_dataset_is_refused(complaint, policy, tmp_path):
    message = complaint(*run_arguments(policy, tmp_path / "out", "--dataset", tmp_path))
    assert str(tmp_path) in message
    assert not (tmp_path / "out").exists()


def test_more_frames_than_there_are_is_refused(complaint, policy, tmp_path):
    message = complaint(*run_arguments(policy, tmp_path / "out", "--frames", "1000000"))
    assert "1000000" in message
    assert not (tmp_path / "out").exists()


def damaged(policy, folder, change):
    shutil.copytree(policy, folder)
    weights = folder / "model.safetensors"
    change(weights)
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def scramble_header(path):
    content = bytearray(path.read_bytes())
    content[8:200] = b"\xff" * 192
    path.write_bytes(bytes(content))


def drop_a_tensor(path):
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


def poison(path):
    tensors = {k: v.copy() for k, v in load_file(path).items()}
    name = next(n for n in sorted(tensors) if "language_model.model.layers.0" in n)
    tensors[name].reshape(-1)[0] = np.nan
    save_file(tensors, path)


@pytest.mark.parametrize("change", [truncate, scramble_header, drop_a_tensor, poison])
def test_weights_that_cannot_be_used_are_refused(complaint, policy, tmp_path, change):
    folder = damaged(policy, tmp_path / "policy", change)
    message = complaint(*run_arguments(folder, tmp_path / "out"))
    assert "nan" in message.lower() or "model.safetensors" in message
    assert not (tmp_path / "out").exists()


def test_output_folder_that_is_a_file_is_refused(complaint, policy, tmp_path):
    (tmp_path / "out").write_text("precious")
    message = complaint(*run_arguments(policy, tmp_path / "out"))
    assert "is a file" in message
    assert (tmp_path / "out").read_text() == "precious"


def test_run_prints_the_methods_and_where_the_report_is(policy, tmp_path, capsys):
    assert cli.main([str(a) for a in run_arguments(policy, tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "full precision" in captured.out
    assert "uniform round-to-nearest, 4 bits" in captured.out
    assert str(tmp_path / "out" / "report.html") in captured.out
    assert captured.err == ""
    assert json.loads((tmp_path / "out" / "report.json").read_text())["validation"] is None


def test_inspect_and_doctor_describe_what_is_there(policy, capsys):
    assert cli.main(["inspect", str(policy)]) == 0
    assert "quantizable output channels" in capsys.readouterr().out
    assert cli.main(["doctor"]) == 0
    assert "greedy:marginal" in capsys.readouterr().out


def test_interruption_has_its_own_exit_code(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "doctor", interrupted)
    assert cli.main(["doctor"]) == cli.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


def test_the_installed_command_reports_its_exit_code():
    result = subprocess.run(
        [sys.executable, "-m", "qvla_jax.cli", "calibarte"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == cli.BAD_INPUT
    assert "Traceback" not in result.stderr
