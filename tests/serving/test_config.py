import dataclasses

import pytest

from qvla_jax import cli
from qvla_jax.errors import InputError
from qvla_jax.serving import ServeConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"max_message_mib": 0.0}, "max_message_mib must be positive"),
        ({"io_timeout": float("inf")}, "io_timeout must be positive"),
        ({"idle_timeout": float("nan")}, "idle_timeout must be positive"),
        ({"batch_window_ms": -1.0}, "batch_window_ms: expected 0 to 1000"),
        ({"port": 65536}, "port: expected 0 to 65535"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(ServeConfig(), **change)


def test_only_this_machine_is_served_by_default():
    assert ServeConfig().host == "127.0.0.1"
    assert ServeConfig().read_token() is None


def test_tokens_are_read_from_a_file(tmp_path):
    file = tmp_path / "token"
    file.write_text("  0123456789abcdef\n")
    assert ServeConfig(token_file=file).read_token() == "0123456789abcdef"


@pytest.mark.parametrize(
    "text", ["", "short", "0123456789 abcdef", "0123456789abcde\x07", "é" * 20]
)
def test_tokens_that_can_be_guessed_or_not_be_sent_are_refused(tmp_path, text):
    file = tmp_path / "token"
    file.write_text(text, "utf-8")
    with pytest.raises(InputError, match=str(file)):
        ServeConfig(token_file=file).read_token()


def test_the_command_checks_the_token_before_it_loads_a_policy(tmp_path, capsys):
    file = tmp_path / "nothing"
    arguments = ["serve", "--policy", "no-such-policy", "--token-file", str(file)]
    assert cli.main(arguments) == cli.BAD_INPUT
    assert f"{file}: no token can be read" in capsys.readouterr().err


def test_the_command_warns_of_a_policy_that_everybody_can_use(capsys):
    arguments = ["serve", "--policy", "libero-mimi", "--host", "0.0.0.0"]
    assert cli.main(arguments) == cli.BAD_INPUT
    errors = capsys.readouterr().err
    assert "everybody who reaches 0.0.0.0 can use this policy" in errors
    assert "did you mean libero-mini" in errors
