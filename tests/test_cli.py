"""The command line: exit codes, one clear line for bad input, nothing half-written."""

import json
import shutil
import subprocess
import sys
import types
import typing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qvla_jax import cli, data, output, pipeline
from qvla_jax.commands import doctor as doctor_command
from qvla_jax.commands import pack, quantize_method, sensitivity
from qvla_jax.inference import random_policy
from qvla_jax.plain import from_plain, to_plain
from qvla_jax.repeating import read_settings, write_settings

from .report.fakes import fake_report

# Shapes as in pipeline/conftest.py: programs that are compiled already.
SMALL = (
    "--frames", "6", "--probes", "2", "--validate", "0", "--eval-frames", "9", "--eval-batch", "4",
    "--latency-calls", "2", "--budget-bits", "10", "--sweep", "10", "--uniform-bits", "4",
    "--match-uniform", "8",
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


def test_unknown_estimator_suggests_a_close_match(complaint, policy, tmp_path):
    message = complaint(*run_arguments(policy, tmp_path / "out", "--estimator", "jacobi"))
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


def test_inspect_describes_what_is_there(policy, capsys):
    assert cli.main(["inspect", str(policy)]) == 0
    assert "quantizable output channels" in capsys.readouterr().out


def interrupted(config):
    raise KeyboardInterrupt


def test_interruption_has_its_own_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(doctor_command, "main", interrupted)
    assert cli.main(["doctor"]) == cli.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


def test_an_interrupted_sweep_says_how_to_go_on_and_keeps_its_settings(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(sensitivity, "main", interrupted)
    arguments = ["sensitivity", "--out", str(tmp_path), "--probes", "5"]
    assert cli.main(arguments) == cli.INTERRUPTED
    assert "the same command goes on where it stopped" in capsys.readouterr().err
    kept = json.loads((tmp_path / "sensitivity.config.json").read_text())
    assert kept["settings"]["probes"] == 5


def test_a_closed_pipe_ends_quietly():
    program = (
        "import sys; from qvla_jax import cli; "
        "sys.stdout = open(1, 'w', buffering=1); sys.exit(cli.main(['--help']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() in (cli.DONE, cli.FAILED)
    assert errors == ""


def printed_json(capsys):
    return json.loads(capsys.readouterr().out)


def test_json_holds_the_result_and_nothing_else(policy, tmp_path, capsys, monkeypatch):
    assert cli.main(["inspect", str(policy), "--json"]) == cli.DONE
    reply = printed_json(capsys)
    assert reply["command"] == "inspect"
    assert reply["config"] is None
    found = reply["result"]
    assert found["parameters"] == sum(module["parameters"] for module in found["modules"])

    file = tmp_path / "four.qvla"
    real = pack.main

    def noisy(config):
        print("a library's remark")
        return real(config)

    monkeypatch.setattr(pack, "main", noisy)
    assert cli.main(["pack", "--model", str(policy), "--file", str(file), "--json"]) == cli.DONE
    packed = printed_json(capsys)
    assert packed["config"] == f"{file}.config.json"
    found = packed["result"]
    assert found.pop("peak_resident_bytes") > 0
    assert found["file_bytes"] == file.stat().st_size
    assert sum(layer["stored_bytes"] for layer in found["layers"]) == found["packed_bytes"]
    assert sum(found["channels_by_bits"].values()) == sum(e["shape"][0] for e in found["layers"])
    assert all(list(e["channels_by_bits"]) in (["4"], ["16"]) for e in found["layers"])

    assert cli.main(["inspect", str(file), "--json"]) == cli.DONE
    assert printed_json(capsys)["result"] == found


def test_json_has_the_error_as_well(capsys):
    assert cli.main(["inspect", "libero-mimi", "--json"]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    reply = json.loads(captured.out)
    assert reply["exit_code"] == cli.BAD_INPUT
    assert "libero-mini" in reply["error"]
    assert reply["error"] in captured.err


def test_numbers_that_are_not_finite_are_null_in_json(capsys):
    output.print_json({"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
    assert printed_json(capsys) == {"a": [None, 1.5], "b": {"c": None}}


CALIBRATE = ("calibrate", "--frames", "3", "--seed", "7", "--out")


def test_a_command_is_repeated_from_the_settings_beside_its_output(tmp_path, capsys):
    first, second, third = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    assert cli.main([*CALIBRATE, str(first)]) == cli.DONE
    settings = first / "calibrate.config.json"
    kept = json.loads(settings.read_text())
    assert kept["command"] == "calibrate"
    assert kept["settings"]["frames"] == 3
    assert kept["settings"]["out"] == str(first)
    assert kept["packages"]["jax"]

    again = ["calibrate", "--config", str(settings), "--out"]
    assert cli.main([*again, str(second)]) == cli.DONE
    manifest = (first / "calibration.json").read_bytes()
    assert (second / "calibration.json").read_bytes() == manifest
    # What is given replaces what was recorded, and only that.
    assert cli.main([*again, str(third), "--seed", "8"]) == cli.DONE
    assert (third / "calibration.json").read_bytes() != manifest
    kept = json.loads((third / "calibrate.config.json").read_text())
    assert (kept["settings"]["seed"], kept["settings"]["frames"]) == (8, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kept: kept | {"command": "allocate"}, "settings of `qvla allocate`"),
        (lambda kept: kept | {"format": "other"}, "expected the .config.json file of a command"),
        (lambda kept: kept | {"version": 2}, "format version 2"),
        (lambda kept: kept | {"settings": {"out": "x", "frame": 3}}, "unknown key 'frame'"),
        (lambda kept: kept | {"settings": {"out": "x", "frames": "3"}}, "frames: expected int"),
        (lambda kept: kept | {"settings": {"out": "x", "frames": 0}}, "frames must be at least 1"),
        (lambda kept: kept | {"settings": 3}, "damaged"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(complaint, tmp_path, change, message):
    path = tmp_path / "calibrate.config.json"
    write_settings(path, "calibrate", None, pipeline.CalibrateConfig(out=tmp_path / "out"))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert message in complaint("calibrate", "--config", path)
    assert message in complaint("calibrate", f"--config={path}", "--json")
    assert not (tmp_path / "out").exists()


def test_settings_that_are_not_there_are_refused(complaint, tmp_path):
    assert "not readable" in complaint("calibrate", "--config", tmp_path / "none.config.json")


def test_the_other_form_of_a_command_is_repeated_as_such(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(quantize_method, "main", lambda c: (seen.append(c), RESULT)[1])
    arguments = ["quantize", "--method", "gptq-w4", "rtn-w3", "--out", str(tmp_path)]
    assert cli.main(arguments) == cli.DONE
    settings = tmp_path / "quantize-method.config.json"
    assert cli.main(["quantize", "--config", str(settings), "--model", "tiny"]) == cli.DONE
    assert [config.method for config in seen] == [("gptq-w4", "rtn-w3")] * 2
    assert [config.model for config in seen] == ["libero-mini", "tiny"]


RESULT = output.Result({}, ())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_settings_of_every_command_survive_the_file(name, tmp_path):
    command = cli.COMMANDS[name]
    for option, form in ((None, command), *command.variants.items()):
        kind, _ = form.load()
        settings = example_of(kind, tmp_path)
        write_settings(tmp_path / "file.json", name, option, settings)
        recorded = read_settings(tmp_path / "file.json")
        assert (recorded.command, recorded.variant) == (name, option)
        assert from_plain(kind, recorded.settings, "settings") == settings
        assert form.output is None or hasattr(settings, form.output)


def example_of(kind, folder):
    """Settings with a value for all that is required, and for what is a mapping or None."""
    known = {
        "out": folder, "sim": "libero_spatial", "policy": ("libero-mini", "libero-mini@3"),
        "data": str(folder), "more_data": (str(folder),) * 2, "model": "libero-mini",
        "problem": "openvla", "file": folder / "a.qvla", "figure": folder / "a.png",
        "method": ("rtn-w4",), "minimum_bits": {r".*\.q_proj": 4}, "token_file": folder / "token",
        "qwix": folder, "stablehlo": folder,
    }  # fmt: skip
    hints = typing.get_type_hints(kind)
    if hints.get("policy") is str:
        known["policy"] = "libero-mini"
    if hints.get("data") == tuple[str, ...]:
        known["data"] = (str(folder),) * 2
    if hints.get("model") is Path:
        known["model"] = folder
    if hints.get("method") is str:
        known.pop("method")
    return kind(**{key: value for key, value in known.items() if key in hints})


def example_arguments(name, folder, option=None, model="libero-mini"):
    """Arguments for what a command needs."""
    kind, _ = (cli.COMMANDS[name] if option is None else cli.COMMANDS[name].variants[option]).load()
    values = {
        "out": folder, "sim": "libero_spatial", "policy": model, "data": folder, "model": model,
        "file": Path(folder, "a.qvla"), "method": "rtn-w4", "qwix": folder, "stablehlo": folder,
    }  # fmt: skip
    hints = typing.get_type_hints(kind, include_extras=True)
    arguments = ["openvla"] if "problem" in hints else []
    for key in values.keys() & hints.keys():
        if "Positional" in str(hints[key]):
            arguments.append(str(values[key]))
        elif typing.get_origin(hints[key]) is not types.UnionType and key != "method":
            arguments += [f"--{key}", str(values[key])]
    if option == "--method":
        arguments += [option, values["method"]]
    return arguments


def test_the_installed_command_reports_its_exit_code():
    result = subprocess.run(
        [sys.executable, "-m", "qvla_jax.cli", "calibarte"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == cli.BAD_INPUT
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["run", "report"])
def test_a_report_is_printed_and_is_whole_in_json(name, tmp_path, monkeypatch, capsys):
    content = fake_report()
    monkeypatch.setattr(pipeline, name, lambda *_, **__: content)
    arguments = [name, "--out", str(tmp_path)]
    assert cli.main(arguments) == cli.DONE
    printed = capsys.readouterr().out
    assert all(entry.label in printed for entry in content.methods)
    assert str(tmp_path / "report.html") in printed
    assert cli.main([*arguments, "--json"]) == cli.DONE
    result = printed_json(capsys)["result"]
    assert result == json.loads(json.dumps(to_plain(content)))
