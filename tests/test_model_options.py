"""What the files of a public directory do not tell: said alike to every command, and handed on."""

import dataclasses
import importlib
import json
import typing
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvla_jax import cli
from qvla_jax.errors import InputError
from qvla_jax.evaluation.libero import EXPERT
from qvla_jax.families.options import LoadOptions
from qvla_jax.model_options import ModelOptions
from qvla_jax.pipeline import closed_loop, policies

from .test_cli import example_arguments

FORMS = {
    (name, option): form.load()[0]
    for name, command in cli.COMMANDS.items()
    for option, form in ((None, command), *command.variants.items())
}
TAKING = [key for key, kind in FORMS.items() if issubclass(kind, ModelOptions)]
SAID = st.fixed_dictionaries(
    {},
    optional={
        "unnorm_key": st.sampled_from(["bridge_orig", "libero_goal_no_noops", "a b"]),
        "num_images": st.integers(1, 3),
        "center_crop": st.booleans(),
        "action_horizon": st.integers(1, 99),
        "action_normalization": st.sampled_from(["quantiles", "min_max"]),
        "merge_adapter": st.just(True),
        "executed_steps": st.integers(1, 99),
    },
)


def spelled(said):
    """Options as people write them."""
    arguments = []
    for name, value in said.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", str(value)]
    return arguments


def test_every_command_with_a_model_or_a_policy_takes_them():
    named = {
        key
        for key, kind in FORMS.items()
        if {"model", "policy"} & {field.name for field in dataclasses.fields(kind)}
    }
    assert named - set(TAKING) == {("train", None)}  # whose model is an architecture
    assert len(TAKING) > 12


@settings(deadline=None, max_examples=8)
@given(said=SAID, data=st.data())
def test_any_of_them_are_read_alike_by_every_command(said, data):
    name, option = data.draw(st.sampled_from(TAKING))
    arguments = [*example_arguments(name, "folder", option), *spelled(said)]
    found = cli._parse(name, arguments).settings
    assert found.said() == said
    assert {f.name for f in dataclasses.fields(LoadOptions)} >= set(said)


@pytest.mark.parametrize("text", ["True", "False", "None"])
def test_a_value_may_be_spelled_out(text):
    found = cli._parse("pack", ["--file", "a.qvla", "--center-crop", text]).settings
    assert str(found.center_crop) == text
    assert not found.merge_adapter


class LoadedError(InputError):
    """Takes the place of a policy: a policy would have been loaded with these arguments."""


@pytest.fixture
def public(tmp_path):
    folder = tmp_path / "public"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "openvla"}))
    return folder


@pytest.mark.parametrize(("name", "option"), TAKING)
def test_every_command_hands_them_to_the_policy_that_it_loads(
    name, option, public, tmp_path, monkeypatch
):
    said = {
        "unnorm_key": "bridge_orig", "num_images": 2, "center_crop": False, "action_horizon": 5,
        "action_normalization": "min_max", "merge_adapter": True,
        "executed_steps": 4,
    }  # fmt: skip
    seen = []

    def load(source, *_, **keywords):
        seen.append((str(source), {k: v for k, v in keywords.items() if k in said}))
        raise LoadedError("loaded")

    for module in MODULES:
        for function in ("load_policy", "import_policy"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, load)
    monkeypatch.setattr(closed_loop, "check_simulator", lambda make: "none")
    collect = importlib.import_module("qvla_jax.pipeline.collect")
    monkeypatch.setattr(collect, "check_simulator", lambda make: "none")
    monkeypatch.setattr(closed_loop, "has_video_writer", lambda: True)
    for module in ("sensitivity", "validate"):
        found = importlib.import_module(f"qvla_jax.pipeline.{module}")
        for needed in ("load_calibration", "load_tables", "describe"):
            monkeypatch.setattr(found, needed, lambda *_, **__: [None], raising=False)
    inspect = importlib.import_module("qvla_jax.commands.inspect")
    monkeypatch.setattr(inspect, "describe", DESCRIBED)
    # It reads the settings of a public directory and leaves the weights.
    family = SimpleNamespace(read=lambda folder, options: load(folder, **options.said()))
    monkeypatch.setattr(inspect, "public_family", lambda folder: family)
    arguments = example_arguments(name, tmp_path / "out", option, model=public)
    assert cli.main([name, *arguments, *spelled(said)]) == cli.BAD_INPUT
    assert seen == [(str(public), said)]


MODULES = [
    importlib.import_module(f"qvla_jax.{name}")
    for name in (
        *(f"pipeline.{stage}" for stage in (
            "run", "sensitivity", "validate", "quantize", "methods", "evaluate", "study",
            "measure_solvers", "pack", "policies",
        )),
        *(
            f"commands.{verb}"
            for verb in ("serve", "inspect", "export", "export_qwix", "import_")
        ),
    )
]  # fmt: skip


def DESCRIBED(source, **_):  # noqa: N802
    from qvla_jax.report.modules import describe

    return describe("tiny-test")


def test_settings_in_messages_are_spelled_as_options(public, capsys):
    arguments = ["pack", "--model", str(public), "--file", "a.qvla", "--num-images", "0"]
    assert cli.main(arguments) == cli.BAD_INPUT
    assert "--num-images: expected a whole number from 1 on" in capsys.readouterr().err
    path = "/a/num_images/unnorm_key.json: name one with unnorm_key: x"
    assert cli._in_options(path, ["pack"]) == path.replace("h unn", "h --unn").replace(
        "--unnorm_key", "--unnorm-key"
    )
    assert cli._in_options(path, ["allocate"]) == path


@pytest.mark.parametrize(
    ("config", "files", "options", "asked"),
    [
        ({}, (), {}, True),
        ({}, (), {"unnorm_key": "libero_goal"}, True),
        ({}, (), {"center_crop": False}, False),
        ({}, (), {"center_crop": True}, False),
        ({"qvla_jax": {"center_crop": True}}, (), {}, False),
        ({"qvla_jax": {"name": "x"}}, (), {}, True),
        ({}, ("action_head--9_checkpoint.pt",), {}, False),
        ({}, ("action_decoder-5.pt",), {}, False),
    ],
)
def test_a_fine_tune_acts_in_the_simulator_only_where_its_crop_is_told(
    public, config, files, options, asked
):
    (public / "config.json").write_text(json.dumps({"model_type": "openvla", **config}))
    for name in files:
        (public / name).touch()
    told = ModelOptions(**options)
    if not asked:
        policies.check_acting(str(public), told)
        return
    with pytest.raises(InputError, match=r"say --center-crop .* or --no-center-crop"):
        policies.check_acting(str(public), told)
    for name in (str(public), f"{public}@4"):
        with pytest.raises(InputError, match="say --center-crop"):
            closed_loop.load_actors([EXPERT, name], told)


def test_of_several_policies_the_public_ones_take_the_options(public, monkeypatch):
    seen = {}

    def load(source, **keywords):
        seen[source] = keywords
        return source

    monkeypatch.setattr(policies, "load_policy", load)
    options = ModelOptions(center_crop=True, unnorm_key="bridge_orig")
    names = ["libero-mini", EXPERT, str(public)]
    assert set(closed_loop.load_actors(names, options)) == set(names)
    assert seen == {"libero-mini": {}, str(public): options.said()}
    with pytest.raises(InputError, match="unnorm_key, center_crop: said, but libero-mini, expert"):
        closed_loop.load_actors(names[:2], options)


def test_the_names_are_those_of_load_policy():
    from qvla_jax.inference import import_policy, load_policy

    names = [field.name for field in dataclasses.fields(ModelOptions)]
    for function in (load_policy, import_policy):
        assert set(names) <= set(typing.get_type_hints(function))
