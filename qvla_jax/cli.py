"""The `qvla` command: one subcommand for each stage, and one for the whole walk.

Settings are the frozen dataclasses of the Python API, turned into options by tyro. Results go to
stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.
"""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qvla_jax import __version__
from qvla_jax.errors import InputError, QvlaError

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary: One line for `qvla --help`.
        example: A call that works.
        load: Imports and returns the settings' class and the function that takes them. Only the
            command that runs is imported.
        variants: Option -> what to load instead where that option is given.
    """

    summary: str
    example: str
    load: Callable[[], tuple[type[Any], Callable[[Any], None]]]
    variants: Mapping[str, "Command"] = dataclasses.field(default_factory=dict)


def _run() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands
    from qvla_jax.pipeline import RunConfig

    return RunConfig, commands.run


def _stage(name: str) -> Callable[[], tuple[type[Any], Callable[[Any], None]]]:
    def load() -> tuple[type[Any], Callable[[Any], None]]:
        from qvla_jax import commands, pipeline

        return getattr(pipeline, f"{name.capitalize()}Config"), getattr(commands, name)

    return load


def _sensitivity() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands

    return commands.SensitivityConfig, commands.sensitivity


def _closed_loop() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands
    from qvla_jax.pipeline.closed_loop import ClosedLoopConfig

    return ClosedLoopConfig, commands.closed_loop


def _collect() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands
    from qvla_jax.pipeline.collect import CollectConfig

    return CollectConfig, commands.collect


def _train() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands
    from qvla_jax.training import TrainConfig

    return TrainConfig, commands.train


def _serve() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands
    from qvla_jax.serving import ServeConfig

    return ServeConfig, commands.serve


def _import() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands

    return commands.ImportConfig, commands.import_


def _export() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands

    return commands.ExportConfig, commands.export


def _synthesize() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands

    return commands.SynthesizeConfig, commands.synthesize


def _compare_solvers() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands, pipeline

    return pipeline.CompareSolversConfig, commands.compare_solvers


def _quantize_by_methods() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands, pipeline

    return pipeline.MethodConfig, commands.quantize_by_methods


def _measure_solvers() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands, pipeline

    return pipeline.MeasureSolversConfig, commands.measure_solvers


def _pack() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands, pipeline

    return pipeline.PackConfig, commands.pack


def _inspect() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands

    return commands.InspectConfig, commands.inspect


def _doctor() -> tuple[type[Any], Callable[[Any], None]]:
    from qvla_jax import commands

    return commands.DoctorConfig, commands.doctor


COMMANDS = {
    "run": Command(
        "calibrate, measure, allocate, evaluate and report in one go",
        "qvla run --model libero-mini --budget-bits 4 --out runs/mini",
        _run,
    ),
    "calibrate": Command(
        "draw the calibration frames", "qvla calibrate --frames 128 --out runs/mini",
        _stage("calibrate"),
    ),
    "sensitivity": Command(
        "measure what each channel costs at each bit-width",
        "qvla sensitivity --model libero-mini --out runs/mini",
        _sensitivity,
    ),
    "validate": Command(
        "study whether the sensitivities can be trusted",
        "qvla validate --model libero-mini --out runs/mini", _stage("validate"),
    ),
    "allocate": Command(
        "choose a bit-width for every channel", "qvla allocate --budget-bits 3 --out runs/mini",
        _stage("allocate"),
    ),
    "quantize": Command(
        "pack the weights at the chosen bits into one file",
        "qvla quantize --model libero-mini --out runs/mini",
        _stage("quantize"),
        {
            "--method": Command(
                "quantize by a method's name, such as GPTQ",
                "qvla quantize --method gptq-w4 rtn-w4-g128 --model libero-mini --out runs/mini",
                _quantize_by_methods,
            )
        },
    ),
    "evaluate": Command(
        "measure the action error on held-out frames, or with --sim the success in LIBERO",
        "qvla evaluate --model libero-mini --out runs/mini",
        _stage("evaluate"),
        {
            "--sim": Command(
                "measure the success in LIBERO",
                "qvla evaluate --sim libero_spatial --episodes-per-task 10 --policy libero-mini "
                "--policy libero-mini@3 --out runs/sim",
                _closed_loop,
            )
        },
    ),
    "report": Command(
        "write report.json and report.html", "qvla report --out runs/mini", _stage("report")
    ),
    "study": Command(
        "make the table of results: methods against settings",
        "qvla study --model libero-mini --rows rtn gptq action --columns w4a16 w3 --out runs/study",
        _stage("study"),
    ),
    "compare-solvers": Command(
        "run all solvers on one allocation problem",
        "qvla compare-solvers runs/mini --budget-bits 3 --figure pareto.png",
        _compare_solvers,
    ),
    "collect": Command(
        "collect episodes in LIBERO, by the scripted expert or a policy, as RLDS",
        "qvla collect --sim libero_spatial --episodes-per-task 20 --out rlds",
        _collect,
    ),
    "measure-solvers": Command(
        "measure the joint action error of each solver's allocation",
        "qvla measure-solvers --out runs/mini --budgets 3 4 6",
        _measure_solvers,
    ),
    "pack": Command(
        "pack a policy layer by layer, without calibration",
        "qvla pack --model libero-mini --bits 4 --file four.qvla", _pack,
    ),
    "train": Command(
        "train a policy by behaviour cloning", "qvla train --data DIR --out runs/train", _train
    ),
    "serve": Command(
        "serve a policy to robots, as openpi and OpenVLA do",
        "qvla serve --policy runs/mini/policy.qvla", _serve,
    ),
    "inspect": Command(
        "list what a policy or a .qvla file holds: parameters, bytes, channels, bits",
        "qvla inspect openvla-7b", _inspect
    ),
    "import": Command(
        "import a public directory, one tensor at a time",
        "qvla import --model DIR --out DIR", _import,
    ),
    "export": Command(
        "write a policy in the public (Hugging Face) layout",
        "qvla export --model libero-mini --out DIR", _export,
    ),
    "synthesize": Command(
        "write a public directory with random weights",
        "qvla synthesize --preset openvla-7b --out DIR", _synthesize,
    ),
    "doctor": Command("check this installation", "qvla doctor", _doctor),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _dispatch(arguments)
    except InputError as error:
        return _complain(error, BAD_INPUT)
    except QvlaError as error:
        return _complain(error, FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return DONE if arguments else BAD_INPUT
    if arguments[0] in ("--version", "-V"):
        print(f"qvla {__version__}")
        return DONE
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise InputError(f"there is no command {name!r}{hint} `qvla --help` lists them")
    command = COMMANDS[name]
    for option, variant in command.variants.items():
        if any(argument.split("=")[0] == option for argument in rest):
            command = variant
    # Before anything touches a device: one XLA CPU device uses about one core.
    from qvla_jax.sharding import use_all_cpu_cores

    use_all_cpu_cores()
    kind, function = command.load()
    import tyro

    others = [
        f"\n\nWith {option}: {v.summary}; {v.example}" for option, v in command.variants.items()
    ]
    config = tyro.cli(
        kind,
        args=rest,
        prog=f"qvla {name}",
        description=f"{(kind.__doc__ or command.summary).strip()}\n\nExample: {command.example}"
        + "".join(others),
    )
    function(config)
    return DONE


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
        ]
    )


def _complain(error: object, code: int) -> int:
    message = " ".join(str(error).split())
    print(f"qvla: {'' if code == INTERRUPTED else 'error: '}{message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
