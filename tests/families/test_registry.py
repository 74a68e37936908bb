"""Families by name, by preset, and by what files record."""

import json

import pytest

from qvla_jax.errors import CheckpointError, InputError
from qvla_jax.families import FAMILIES
from qvla_jax.families.registry import (
    family_named,
    family_of,
    from_record,
    preset,
    public_family,
    to_record,
)


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_are_found_and_survive_a_file(name):
    family = family_named(name)
    assert family.name == name
    for config in family.presets.values():
        assert family_of(config) is family
        assert preset(config.name) == config
        record = json.loads(json.dumps(to_record(config)))
        assert record["family"] == name
        assert "family" not in config.identity()  # fingerprints do not depend on it
        assert from_record(record, "config.json") == config
        assert family.layout(config).stages


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"name": "x"}, "x.json: the configuration names no 'family' .*: prismatic, openpi"),
        ({"family": 3}, "names no 'family'"),
        ({"family": "openpy"}, "x.json: unknown family 'openpy'; did you mean openpi"),
        ({"family": "openpi", "nam": "x"}, "x.json: config: unknown key 'nam'"),
        ([], "x.json: expected the configuration of a policy, found list"),
        (None, "x.json: expected the configuration of a policy, found NoneType"),
    ],
)
def test_a_record_names_its_family(record, message):
    with pytest.raises(CheckpointError, match=message):
        from_record(record, "x.json")


def test_an_unknown_preset_has_close_matches_of_all_families():
    with pytest.raises(InputError, match="unknown model 'pi05_libro'; did you mean pi05_libero"):
        preset("pi05_libro")
    with pytest.raises(InputError, match="did you mean openvla-7b"):
        preset("openvla-7")


def test_a_directory_of_ours_is_no_public_one(tmp_path):
    assert public_family(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "openvla"}')
    assert public_family(tmp_path) is family_named("prismatic")
    (tmp_path / "config.json").write_text('{"family": "prismatic", "model_type": "openvla"}')
    assert public_family(tmp_path) is None
    assert public_family(tmp_path / "missing") is None
