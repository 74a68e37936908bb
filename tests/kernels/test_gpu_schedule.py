"""Counts of instructions in assembled kernels; nothing is compiled here."""

import importlib
from pathlib import Path

import pytest

CODE = """
\t.text
.L_x_0:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   LOP3.LUT R8, R4, 0x43084308, R9, 0x6c, !PT ;
        /*0030*/                   HMMA.16816.F32.BF16 R12, R8, R16, R12 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5+URZ], R4 ;
        /*0060*/               @P2 BRA `(.L_x_0) ;
.L_x_2:
        /*0070*/                   SYNCS.PHASECHK.TRANS64 P0, [R5+URZ], R4 ;
        /*0080*/              @!P0 BRA `(.L_x_2) ;
        /*0090*/                   EXIT ;
"""
LOG = """ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    0 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 98 registers, used 1 barriers, 1 bytes smem
"""


@pytest.fixture
def schedule(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("gpu_schedule")


def test_the_shortest_loop_with_products_counts(schedule):
    count, loops = schedule.parse_code(CODE)
    assert count == 10
    # Neither the outer loop, which has no other product, nor the one that waits.
    assert [loop.instructions for loop in loops] == [3]
    assert loops[0].by_name == {"LOP3.LUT": 1, "HMMA.16816.F32.BF16": 1, "BRA": 1}
    assert loops[0].products == 1


def test_the_log_has_registers_and_spills(schedule):
    assert schedule.parse_log(LOG) == (98, 24)
    with pytest.raises(ValueError, match="no output"):
        schedule.parse_log("")


@pytest.mark.parametrize(
    ("registers", "shared", "programs"),
    # Of 65,536 registers, 228 KiB of shared memory and 2,048 threads.
    [(128, 0, 2), (129, 0, 1), (32, 0, 8), (64, 114752, 2), (64, 115713, 1)],
)
def test_programs_of_a_processor(schedule, registers, shared, programs):
    program = schedule.Program(registers, 0, shared, 10, ())
    assert program.programs("h100") == programs
