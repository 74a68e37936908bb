"""What the GPU kernel is compiled to computes the product, instruction by instruction."""

import subprocess
import sys

import numpy as np
import pytest

from . import ptx
from .test_ahead_of_time import GPU

DOUBLED = """
.visible .entry doubled(.param .u64 a, .param .u64 b)
{
    .reg .b32 %r<9>;
    ld.param.b64 %rd1, [doubled_param_0];
    ld.param.b64 %rd2, [doubled_param_1];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    mov.b32 %r2, 0;
    mov.b32 %r4, 0;
$L__again:
    ld.global.b32 %r3, [%rd4];
    add.s32 %r2, %r2, %r3;
    add.s32 %r4, %r4, 1;
    setp.lt.u32 %p1, %r4, 2;
    @%p1 bra $L__again;
    add.s64 %rd5, %rd2, %rd3;
    st.global.b32 [%rd5], %r2;
    ret;
}
"""


def test_the_machine_loops_and_stores():
    memory = np.zeros(3072, np.uint8)
    memory[:1024].view(np.int32)[:] = np.arange(-100, 156)
    ptx.Machine(DOUBLED, memory, [0, 2048]).run((0, 0, 0))
    np.testing.assert_array_equal(memory[2048:].view(np.int32), 2 * np.arange(-100, 156))


@pytest.mark.parametrize("command", [pytest.param([sys.executable, ptx.__file__], marks=GPU)])
def test_compiled_kernels_compute_the_product(command):
    # A process of its own: see test_ahead_of_time.
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("bits, groups") == 4
