"""The `qvla` command: one subcommand for each stage, and one for the whole pipeline.

Settings are the frozen dataclasses of the Python API, turned into options by tyro and written next
to the output (`repeating`). Results go to stdout, as text or with `--json` as one JSON object;
progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.
"""

import contextlib
import dataclasses
import importlib
import io
import itertools
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from qvla_jax import __version__
from qvla_jax.errors import CheckpointWarning, InputError, QvlaError, unknown
from qvla_jax.failures import broken_package, in_one_line

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# The settings class, and the function that takes them, which returns an `output.Result`, or prints
# by itself and returns None.
Loaded: TypeAlias = tuple[type[Any], Callable[[Any], Any]]


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary: one line for `qvla --help`.
        example: a call that works.
        module: its module in `qvla_jax.commands`. Only the module of the command that runs is
            imported.
        variants: option -> the command that runs instead if that option is given.
        output: the setting that names its output, where its settings are kept; None if it writes
            nothing.
        beside: settings are kept next to the output, not in it, because it is a file or a policy's
            directory.
        resumable: after an interruption, the same command resumes where it stopped.
        has_result: it returns a `Result`, which `--json` prints.
        bare: it needs nothing but Python, and starts no device.
    """

    summary: str
    example: str
    module: str
    variants: Mapping[str, "Command"] = dataclasses.field(default_factory=dict)
    output: str | None = "out"
    beside: bool = False
    resumable: bool = False
    has_result: bool = True
    bare: bool = False

    def load(self) -> Loaded:
        """Imports it: the class of its settings, and the function that takes them.

        Raises:
            InputError: a package that it needs is missing or broken.
        """
        try:
            module = importlib.import_module(f"qvla_jax.commands.{self.module}")
        except QvlaError:
            raise
        except Exception as error:
            if (known := broken_package(error)) is None:
                raise
            raise known from error
        return module.Config, module.main


COMMANDS = {
    "run": Command(
        "calibrate, measure, allocate, evaluate and report in one go",
        "qvla run --model libero-mini --budget-bits 4 --out runs/mini",
        "run",
        resumable=True,
    ),
    "calibrate": Command(
        "draw the calibration frames", "qvla calibrate --frames 128 --out runs/mini",
        "calibrate",
    ),
    "sensitivity": Command(
        "measure what each channel costs at each bit-width",
        "qvla sensitivity --model libero-mini --out runs/mini",
        "sensitivity",
        resumable=True,
    ),
    "validate": Command(
        "study whether the sensitivities can be trusted",
        "qvla validate --model libero-mini --out runs/mini", "validate",
    ),
    "allocate": Command(
        "choose a bit-width for every channel", "qvla allocate --budget-bits 3 --out runs/mini",
        "allocate",
    ),
    "quantize": Command(
        "pack the weights at the chosen bits into one file",
        "qvla quantize --model libero-mini --out runs/mini",
        "quantize",
        {
            "--method": Command(
                "quantize by a method's name, such as GPTQ",
                "qvla quantize --method gptq-w4 rtn-w4-g128 --model libero-mini --out runs/mini",
                "quantize_method",
            )
        },
    ),
    "evaluate": Command(
        "measure the action error on held-out frames, or with --sim the success in LIBERO",
        "qvla evaluate --model libero-mini --out runs/mini",
        "evaluate",
        {
            "--sim": Command(
                "measure the success in LIBERO",
                "qvla evaluate --sim libero_spatial --episodes-per-task 10 --policy libero-mini "
                "--policy libero-mini@3 --out runs/sim",
                "evaluate_sim",
                resumable=True,
            )
        },
    ),
    "report": Command(
        "write report.json and report.html", "qvla report --out runs/mini", "report"
    ),
    "study": Command(
        "make the table of results: methods against settings",
        "qvla study --model libero-mini --rows rtn gptq action --columns w4a16 w3 --out runs/study",
        "study",
        resumable=True,
    ),
    "compare-solvers": Command(
        "run all solvers on one allocation problem",
        "qvla compare-solvers runs/mini --budget-bits 3 --figure pareto.png",
        "compare_solvers",
        output="figure",
        beside=True,
    ),
    "collect": Command(
        "collect episodes in LIBERO, by the scripted expert or a policy, as RLDS",
        "qvla collect --sim libero_spatial --episodes-per-task 20 --out rlds",
        "collect",
        resumable=True,
    ),
    "measure-solvers": Command(
        "measure the joint action error of each solver's allocation",
        "qvla measure-solvers --out runs/mini --budgets 3 4 6",
        "measure_solvers",
    ),
    "pack": Command(
        "pack a policy layer by layer, without calibration",
        "qvla pack --model libero-mini --bits 4 --file four.qvla", "pack",
        output="file", beside=True,
    ),
    "train": Command(
        "train a policy by behavior cloning", "qvla train --data DIR --out runs/train", "train",
        resumable=True,
    ),
    "serve": Command(
        "serve a policy to robots, as openpi and OpenVLA do",
        "qvla serve --policy runs/mini/policy.qvla", "serve",
        output=None, has_result=False,
    ),
    "inspect": Command(
        "list what a policy or a .qvla file holds: parameters, bytes, channels, bits",
        "qvla inspect openvla-7b", "inspect", output=None,
    ),
    "import": Command(
        "import a public directory, one tensor at a time",
        "qvla import --model DIR --out DIR", "import_", beside=True,
    ),
    "export": Command(
        "write a policy in the public layout, for qwix, or as StableHLO",
        "qvla export --model libero-mini --out DIR",
        "export",
        {
            "--qwix": Command(
                "write a packed policy as quantized arrays of qwix",
                "qvla export --model runs/mini/policy.qvla --qwix DIR",
                "export_qwix", output="qwix", beside=True,
            ),
            "--stablehlo": Command(
                "write a policy as a function that JAX runs without this package",
                "qvla export --model runs/mini/policy.qvla --stablehlo DIR",
                "export_stablehlo", output="stablehlo", beside=True,
            ),
        },
        beside=True,
    ),
    "synthesize": Command(
        "write a public directory with random weights",
        "qvla synthesize --preset openvla-7b --out DIR", "synthesize", beside=True,
    ),
    "doctor": Command("check this installation", "qvla doctor", "doctor", output=None, bare=True),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of terminals without a multiplication sign
    try:
        code = _main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `qvla inspect openvla-7b | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code


def _main(arguments: Sequence[str]) -> int:
    for_machines = _JSON in arguments
    try:
        return _dispatch(arguments)
    except InputError as error:
        return _complain(_in_options(str(error), arguments), BAD_INPUT, for_machines)
    except QvlaError as error:
        return _complain(error, FAILED, for_machines)
    except KeyboardInterrupt as error:
        return _complain(str(error) or "interrupted", INTERRUPTED, for_machines)


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return DONE if arguments else BAD_INPUT
    if arguments[0] in ("--version", "-V"):
        print(f"qvla {__version__}")
        return DONE
    name, *rest = arguments
    if name not in COMMANDS:
        raise InputError(f"{unknown('command', name, COMMANDS)} `qvla --help` lists them")
    if not COMMANDS[name].bare:
        from qvla_jax import devices

        devices.rest_idle_threads()
        devices.use_all_cpu_cores()
    call = _parse(name, rest)
    if not call.command.bare and not getattr(call.settings, "joins", False):
        from qvla_jax import devices

        devices.ready()  # processes that join do so first
    return _execute(call)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A subcommand with its settings."""

    name: str
    variant: str | None
    command: Command
    settings: Any
    function: Callable[[Any], Any]
    for_machines: bool


_JSON, _CONFIG = "--json", "--config"


def _parse(name: str, arguments: Sequence[str]) -> _Call:
    """Turns arguments into settings; given options replace those of a `--config` file."""
    if COMMANDS[name].bare:
        return _parse_bare(name, arguments)
    try:
        import tyro
    except Exception as error:
        raise broken_package(error) or error from error

    from qvla_jax.plain import from_plain
    from qvla_jax.repeating import read_settings

    command, variant, recorded = COMMANDS[name], None, None
    path = _value_of(_CONFIG, arguments) if command.output else None
    if path is not None:
        recorded = read_settings(Path(path))
        if recorded.command != name or recorded.variant not in (None, *command.variants):
            raise InputError(
                f"--config {path}: settings of `qvla {recorded.command}`, not of `qvla {name}`"
            )
        variant = recorded.variant
    for option in command.variants:
        if any(argument.split("=")[0] == option for argument in arguments):
            variant = option
    if recorded is not None and recorded.variant != variant:
        raise InputError(f"--config {path}: settings of `qvla {name}` without {variant}")
    chosen = command if variant is None else command.variants[variant]
    kind, function = chosen.load()
    others = [f"\n\nWith {o}: {v.summary}; {v.example}" for o, v in command.variants.items()]
    forms = _arguments_of(kind, chosen)
    default = None
    if recorded is not None:
        default = forms(from_plain(kind, recorded.settings, f"--config {path}: settings"))
    found = tyro.cli(
        forms,
        args=_with_values(kind, arguments),
        prog=f"qvla {name}",
        description=f"{_description(kind) or chosen.summary}\n\nExample: {chosen.example}"
        + "".join(others),
        **({} if default is None else {"default": default}),
    )
    return _Call(
        name, variant, chosen, found.settings, function, bool(getattr(found, "json", False))
    )


def _parse_bare(name: str, arguments: Sequence[str]) -> _Call:
    """The arguments of a command without settings, read without a library."""
    command = COMMANDS[name]
    kind, function = command.load()
    if {"-h", "--help"} & set(arguments):
        usage, option = f"usage: qvla {name} [{_JSON}]", f"{_JSON}  Print one JSON object."
        print("\n\n".join((usage, kind.__doc__ or "", f"Example: {command.example}", option)))
        raise SystemExit(DONE)
    if wrong := [argument for argument in arguments if argument != _JSON]:
        raise InputError(f"{unknown('option', wrong[0], (_JSON, '--help'))} `qvla {name} --help`")
    return _Call(name, None, command, kind(), function, _JSON in arguments)


def _with_values(kind: type[Any], arguments: Sequence[str]) -> list[str]:
    """Spells out settings that are true, false or not given: `--no-NAME` is `--NAME False`."""
    hints = typing.get_type_hints(kind)
    names = {f"--{name.replace('_', '-')}" for name, hint in hints.items() if hint == bool | None}
    spelled: list[str] = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        option = argument.replace("_", "-") if argument.startswith("--") else argument
        if option in names and following not in ("True", "False", "None"):
            spelled += [option, "True"]
        elif f"--{option.removeprefix('--no-')}" in names and option.startswith("--no-"):
            spelled += [f"--{option.removeprefix('--no-')}", "False"]
        else:
            spelled.append(argument)
    return spelled


def _description(kind: type[Any]) -> str:
    """The docstring of a settings class, without its Python examples."""
    return (kind.__doc__ or "").partition(">>>")[0].strip()


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value of an option, which decides how the others are read."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.removeprefix(f"{option}=")
    return None


def _arguments_of(kind: type[Any], command: Command) -> Any:
    """The settings class together with the options that commands have in common."""
    import tyro

    def option(name: str, kind: Any, default: Any, text: str) -> tuple[str, Any, Any]:
        described = Annotated[kind, tyro.conf.arg(help=text), tyro.conf.FlagCreatePairsOff]
        return name, described, dataclasses.field(default=default)

    fields: list[Any] = [("settings", Annotated[kind, tyro.conf.arg(name="")])]
    if command.output:
        text = "File of settings that an earlier call left; options that are given replace them."
        fields.append(option("config", Path | None, None, text))
    if command.has_result:
        text = "Print the result as one JSON object: command and result, or error and exit_code."
        fields.append(option("json", bool, False, text))
    return dataclasses.make_dataclass("Arguments", fields)


def _execute(call: _Call) -> int:
    """Runs a command, keeps its settings, and prints its result."""
    from qvla_jax.output import print_json, print_result

    output = call.command.output and getattr(call.settings, call.command.output)
    # Keep the output of libraries out of the JSON.
    aside = (
        contextlib.redirect_stdout(sys.stderr) if call.for_machines else contextlib.nullcontext()
    )
    try:
        with aside:
            result = _result_of(call)
    except InputError:
        raise  # nothing was made
    except (QvlaError, KeyboardInterrupt) as error:
        if output is not None and Path(output).exists():
            _keep_settings(call, Path(output))
        if isinstance(error, KeyboardInterrupt) and call.command.resumable:
            raise KeyboardInterrupt(
                "interrupted; the same command goes on where it stopped"
            ) from error
        raise
    kept = None if output is None else _keep_settings(call, Path(output))
    if result is None:
        return DONE
    if call.for_machines:
        told = {"command": call.name, "config": kept and str(kept), "result": result.content}
        print_json(told | _sources(call))
    else:
        print_result(result)
    if result.failure is not None:
        print(f"qvla: error: {result.failure}", file=sys.stderr)
        return BAD_INPUT if result.bad_input else FAILED
    return DONE


def _result_of(call: _Call) -> Any:
    """Runs it; errors of the system and of libraries that are not bugs become ours."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            if call.command.bare:
                return call.function(call.settings)
            from qvla_jax.precision import in_32_bits

            return in_32_bits(call.function)(call.settings)
    except QvlaError:
        raise
    except Exception as error:
        if (known := in_one_line(error)) is None:
            raise
        raise known from error


def _sources(call: _Call) -> dict[str, Any]:
    """What was fetched from elsewhere, for the result."""
    if call.command.bare:
        return {}
    from qvla_jax.remote.folder import origins

    return {"sources": found} if (found := origins()) else {}


_SHOW = warnings.showwarning


def _warn(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Shows a warning; those meant for users in one line, without the location in the code."""
    if issubclass(category, CheckpointWarning):
        print(f"qvla: warning: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        _SHOW(message, category, *place)


def _keep_settings(call: _Call, output: Path) -> Path | None:
    """Writes the settings next to the output, once for all processes."""
    from qvla_jax.repeating import settings_file, write_settings

    if getattr(call.settings, "process", 0) != 0:
        return None
    path = settings_file(output, call.name, call.variant, beside=call.command.beside)
    write_settings(path, call.name, call.variant, call.settings)
    return path


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qvla COMMAND [options]",
            "",
            "Quantize vision-language-action policies, channel by channel.",
            "",
            *lines,
            "",
            "`qvla COMMAND --help` lists the options; for example:",
            f"  {COMMANDS['run'].example}",
            "",
            "A command leaves its settings with what it writes, as *.config.json; --config FILE",
            "repeats it. --json prints the result for machines. Exit codes: 0 done, 1 failed,",
            "2 bad input, 130 interrupted.",
        ]
    )


def _in_options(message: str, arguments: Sequence[str]) -> str:
    """Spells settings that a message names as options: `unnorm_key` is `--unnorm-key`."""
    command = COMMANDS.get(arguments[0])
    if command is None or command.bare:
        return message
    names: set[str] = set()
    with contextlib.suppress(Exception):  # if it is not installed, the message says so
        for form in (command, *command.variants.values()):
            names |= {field.name for field in dataclasses.fields(form.load()[0])}
    for name in names:
        if "_" in name:  # one word may be just that
            word = rf"(?<![\w/.'\"-]){name}(?![\w/.'\"-])"
            message = re.sub(word, f"--{name.replace('_', '-')}", message)
    return message


def _complain(error: object, code: int, for_machines: bool) -> int:
    message = " ".join(str(error).split())
    print(f"qvla: {'' if code == INTERRUPTED else 'error: '}{message}", file=sys.stderr)
    if for_machines:
        from qvla_jax.output import print_json

        print_json({"error": message, "exit_code": code})
    return code


if __name__ == "__main__":
    sys.exit(main())
