"""Tables: contract, round trip, and files that must be refused."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy

from qvla_jax.allocation import allocate
from qvla_jax.errors import BudgetError, InputError
from qvla_jax.quantization import InputStatistics, QuantizerSettings
from qvla_jax.quantization.index import ChannelIndex, LayerInfo
from qvla_jax.quantization.layout import option_sizes
from qvla_jax.sensitivity import SensitivityTable
from qvla_jax.solvers import solve

NEAREST = QuantizerSettings(rounding="nearest")
BITS = (0, 2, 4, 8, 16)
INDEX = ChannelIndex(
    (
        LayerInfo(path="a", out_features=3, fan_in=64, has_bias=True),
        LayerInfo(path="b.0", out_features=2, fan_in=32, has_bias=False),
    )
)


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    costs = np.sort(rng.exponential(size=(5, 5)), axis=1)[:, ::-1].copy()
    costs[:, -1] = 0
    return SensitivityTable(
        costs=costs,
        sizes=option_sizes(INDEX, BITS),
        bits=BITS,
        index=INDEX,
        method="jacobian",
        provenance={"policy": "p", "calibration": "c", "seed": 3},
        standard_error=costs / 10,
        settings=NEAREST,
        statistics=InputStatistics(
            {layer.path: rng.normal(size=layer.fan_in) for layer in INDEX.layers}
        ),
    )


def test_round_trip(table, tmp_path):
    path = tmp_path / "folder" / "table.safetensors"
    table.save(path)
    loaded = SensitivityTable.load(path)
    for name in ("costs", "sizes", "standard_error"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(table, name))
        assert getattr(loaded, name).dtype == getattr(table, name).dtype
    for name in ("bits", "index", "method", "settings", "provenance"):
        assert getattr(loaded, name) == getattr(table, name)
    assert [p.name for p in path.parent.iterdir()] == ["table.safetensors"]


def test_a_table_without_extras_round_trips(table, tmp_path):
    dataclasses.replace(table, standard_error=None).save(tmp_path / "t.safetensors")
    loaded = SensitivityTable.load(tmp_path / "t.safetensors")
    assert loaded.standard_error is None
    assert loaded.statistics is None


def test_problem_and_bits(table):
    problem = table.problem(budget_bits=4.0)
    assert problem.budget == 4 * INDEX.num_weights // 8
    assert table.problem(budget_bytes=200).budget == 200
    solution = solve(problem, "greedy:marginal")
    bits = table.bits_of(solution)
    np.testing.assert_array_equal(bits, np.asarray(BITS)[solution.choice])
    assert table.predicted(bits) == pytest.approx(solution.cost)
    assert type(bits) is np.ndarray


def test_least_bits_of_layers_bind_the_solution(table):
    first = INDEX.layers[0]
    pattern = first.path.replace(".", r"\.")
    problem = table.problem(budget_bits=9.0, minimum_bits={pattern: 8, ".*": 2})
    bits = table.bits_of(solve(problem, "core"))
    of_first = INDEX.layer_of == 0
    assert bits[of_first].min() >= 8
    assert bits[~of_first].min() >= 2
    free = table.problem(budget_bits=9.0)
    assert solve(problem, "core").cost >= solve(free, "core").cost
    with pytest.raises(BudgetError, match="minimums"):
        table.problem(budget_bits=3.0, minimum_bits={".*": 8})
    for pattern, bits, message in (
        (".*", 3, "3 is none of"),
        ("x", 2, "none of the"),
        ("(", 2, "unt"),
    ):
        with pytest.raises(InputError, match=message):
            table.problem(budget_bits=9.0, minimum_bits={pattern: bits})


def test_an_allocation_brings_the_quantizer_of_its_table(table):
    allocation = allocate(table, budget_bits=4.0)
    assert allocation.quantizer is table.quantizer
    assert allocation.index is table.index
    assert allocation.budget_bytes == table.problem(budget_bits=4.0).budget
    assert table.predicted(allocation.bits) == pytest.approx(allocation.predicted_sse_normalized)


def test_a_table_without_its_statistics_allocates_but_names_what_rounding_needs(table):
    bare = dataclasses.replace(table, statistics=None)
    assert not bare.can_quantize
    assert allocate(bare, budget_bits=4.0).quantizer is None
    with pytest.raises(InputError, match="pass statistics"):
        bare.quantizer  # noqa: B018


def test_joint_factors_weigh_the_problem_but_not_the_costs(table, tmp_path):
    weighted = dataclasses.replace(table, joint=(3.0, 2.0, 1.0, 1.0, 1.0))
    weighted.save(tmp_path / "t.safetensors")
    loaded = SensitivityTable.load(tmp_path / "t.safetensors")
    assert loaded.joint == weighted.joint
    np.testing.assert_array_equal(loaded.costs, table.costs)
    np.testing.assert_array_equal(
        loaded.problem(budget_bits=4.0).costs, table.costs * [3, 2, 1, 1, 1]
    )
    assert loaded.predicted(np.zeros(5, int)) == pytest.approx(3 * table.costs[:, 0].sum())


def test_budgets_that_make_no_sense(table):
    with pytest.raises(BudgetError):
        table.problem(budget_bytes=9)  # biases alone take 10
    for arguments in ({}, {"budget_bits": 4.0, "budget_bytes": 10}, {"budget_bits": np.nan}):
        with pytest.raises(InputError):
            table.problem(**arguments)


def changed(table, **fields):
    return lambda: dataclasses.replace(table, **fields)


def test_inconsistent_tables_are_refused(table):
    nan, negative, nonzero = table.costs.copy(), table.costs.copy(), table.costs.copy()
    nan[4, 1], negative[3, 2], nonzero[0, 4] = np.nan, -1, 1
    cases = [
        (changed(table, costs=nan), r"b\.0\[1\] holds"),
        (changed(table, costs=negative), r"b\.0\[0\] holds"),
        (changed(table, costs=nonzero), "16 bits"),
        (changed(table, costs=table.costs[:4]), "expected shape"),
        (changed(table, sizes=table.sizes * 1.0), "integers"),
        (changed(table, bits=(0, 2, 4, 8, 5)), "distinct options"),
        (changed(table, bits=(0, 2, 4, 8, 8)), "distinct options"),
        (changed(table, joint=(1.0, 1.0)), "joint: expected 5 factors"),
        (changed(table, joint=(0.5, 1.0, 1.0, 1.0, 1.0)), "joint: expected 5 factors"),
        (changed(table, statistics=InputStatistics({"a": np.zeros(64)})), r"means: b\.0"),
    ]
    for make, message in cases:
        with pytest.raises(InputError, match=message):
            make()


def saved(table, path):
    table.save(path)
    with safetensors.safe_open(path, "numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return arrays, json.loads(file.metadata()["header"])


def write(path, arrays, header):
    safetensors.numpy.save_file(arrays, path, metadata={"header": json.dumps(header)})


@pytest.mark.parametrize("length", [0, 7, 100, -40])
def test_truncated_files_are_refused(table, tmp_path, length):
    path = tmp_path / "t.safetensors"
    table.save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"t\.safetensors"):
        SensitivityTable.load(path)


def test_hostile_files_are_refused(table, tmp_path):
    path = tmp_path / "t.safetensors"
    arrays, header = saved(table, path)
    nan = arrays["costs"].copy()
    nan[0, 0] = np.nan
    cases = [
        ({**arrays, "costs": nan}, header),
        ({**arrays, "costs": arrays["costs"][:, :3].copy()}, header),
        ({k: v for k, v in arrays.items() if k != "sizes"}, header),
        (arrays, {**header, "kind": "other"}),
        (arrays, {**header, "version": 99}),
        (arrays, {**header, "layers": "none"}),
        (arrays, {**header, "layers": [{"path": "a"}]}),
        (arrays, {**header, "layers": [{**header["layers"][0], "out_features": -3}]}),
        (arrays, {**header, "layers": [{**header["layers"][0], "fan_in": "x"}]}),
        (arrays, {**header, "bits": [0, 2, 4]}),
        (arrays, {**header, "bits": None}),
        (arrays, {**header, "joint": [1, "x", 1, 1, 1]}),
        (arrays, {k: v for k, v in header.items() if k != "quantizer"}),
        (arrays, {**header, "quantizer": {"grid": "other"}}),
        (arrays, {**header, "quantizer": {"unknown": 1}}),
        (arrays, {k: v for k, v in header.items() if k != "method"}),
    ]
    for bad_arrays, bad_header in cases:
        write(path, bad_arrays, bad_header)
        with pytest.raises(InputError, match=r"t\.safetensors"):
            SensitivityTable.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"missing\.safetensors"):
        SensitivityTable.load(tmp_path / "missing.safetensors")
