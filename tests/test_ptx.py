# SPDX-License-Identifier: Apache-2.0
"""GPU kernels without a GPU: the PTX that Triton and nvcc make of them, executed, measured and broken (tests/ptx).

The tools come first, on small kernels with planted bugs; then the kernels of the package.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ATTENTION_RELATION, PROJECTED_MSE, SOFT_TARGET
from processes import in_a_new_process, numerics_of

from pydistill import _dispatch

pytest.importorskip("triton")
if _dispatch.interpreting:
    pytest.skip("Triton's own interpreter has the kernels of this process", allow_module_level=True)

from ptx import budgets, cuda_device, flow, interpreter, mutants, static, triton_device, workloads
from ptx.parser import PtxError, parse

CASES = {case.name: case for case in (SOFT_TARGET, ATTENTION_RELATION, PROJECTED_MSE)}
EXAMPLES = Path(__file__).parent / "ptx" / "examples.cu"
SOURCES = (cuda_device.CSRC / "cuda").exists()

needs_nvcc = pytest.mark.skipif(cuda_device.nvcc() is None, reason=cuda_device.NO_NVCC)
needs_cuda_sources = pytest.mark.skipif(
    cuda_device.nvcc() is None or not SOURCES, reason=f"{cuda_device.NO_NVCC}; and the source tree around the tests"
)
# Minutes: `make gpu-proof` runs them.
minutes = [pytest.mark.slow, pytest.mark.gpu_proof, pytest.mark.timeout(3600)]


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


# -------------------------------------------------------------------------------- the interpreter, on PTX by hand

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
{
.reg .pred %p<9>;
.reg .b16 %h<9>;
.reg .b32 %r<20>;
.reg .b64 %d<20>;
ld.param.u64 %d1, [kernel_param_0];
ld.param.u64 %d2, [kernel_param_1];
mov.u32 %r1, %tid.x;
mul.wide.u32 %d3, %r1, 4;
add.s64 %d4, %d1, %d3;
add.s64 %d5, %d2, %d3;
ld.global.u32 %r2, [%d4];
"""


def execute(body: str, x: torch.Tensor, *, grid: int = 1) -> torch.Tensor:
    """Every thread has its element of x in %r2 and stores what it leaves in %r3."""
    y = torch.full_like(x, -1)
    interpreter.launch(f"{HEAD}{body}\nst.global.u32 [%d5], %r3;\nret;\n}}", (grid,), (x.numel(),), [x, y], shared=1024)
    return y


def flushed(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < torch.finfo(x.dtype).tiny, x * 0, x)


def to_int32(x: torch.Tensor) -> torch.Tensor:
    return x.double().nan_to_num(0).clamp(-(2.0**31), 2.0**31 - 1).to(torch.int32)


TWO = torch.tensor(2.0)
NUMBERS = [0.0, -0.0, 1.5, -2.5, 1e-40, 3e38, float("inf"), float("nan"), 7.0, -7.0]


@pytest.mark.parametrize(
    ("body", "function"),
    [
        ("add.f32 %r3, %r2, 0f3F800000;", lambda x: x + 1),
        ("fma.rn.f32 %r3, %r2, %r2, %r2;", lambda x: (x.double() * x + x).float()),
        ("mul.rn.ftz.f32 %r3, %r2, 0f3F800000;", lambda x: flushed(x)),
        ("max.f32 %r3, %r2, 0f40000000;", lambda x: torch.fmax(x, TWO)),
        ("max.NaN.f32 %r3, %r2, 0f40000000;", lambda x: torch.maximum(x, TWO)),
        ("neg.f32 %r3, %r2;", lambda x: -x),
        ("rcp.approx.ftz.f32 %r3, %r2;", lambda x: flushed(flushed(x).reciprocal())),
        ("cvt.rzi.s32.f32 %r4, %r2; cvt.rn.f32.s32 %r3, %r4;", lambda x: to_int32(x).float()),
        ("cvt.rn.bf16.f32 %h1, %r2; cvt.f32.bf16 %r3, %h1;", lambda x: x.bfloat16().float()),
        ("cvt.rn.f16x2.f32 %r4, 0f00000000, %r2; mov.b32 {%h1, %h2}, %r4; cvt.f32.f16 %r3, %h1;",
         lambda x: x.half().float()),
        ("setp.ltu.f32 %p1, %r2, 0f00000000; selp.f32 %r3, %r2, 0f40000000, %p1;",
         lambda x: torch.where(x >= 0, TWO, x)),
        ("setp.gt.f32 %p1, %r2, 0f00000000; mov.b32 %r3, %r2; @!%p1 mov.b32 %r3, 0;",
         lambda x: torch.where(x > 0, x, 0)),
    ],
)  # fmt: skip
def test_floating_point(body, function):
    x = torch.tensor((NUMBERS * 4)[:32])
    torch.testing.assert_close(execute(body, x), function(x), rtol=0, atol=0, equal_nan=True)


def test_an_unknown_instruction_stops_the_run():
    with pytest.raises(
        PtxError, match=r"instruction not supported \(wgmma\.fence\.sync\.aligned\): kernel: PTX line 18: wgmma"
    ):
        execute("wgmma.fence.sync.aligned;", torch.zeros(32))
    # So does a known one with a modifier that is not.
    with pytest.raises(PtxError, match=r"instruction not supported \(add\.sat\.f32\)"):
        execute("add.sat.f32 %r3, %r2, %r2;", torch.zeros(32))


def test_shuffles_and_votes():
    x = torch.arange(64, dtype=torch.int32)
    assert execute("shfl.sync.bfly.b32 %r3, %r2, 5, 31, -1;", x).tolist() == [i ^ 5 for i in range(64)]
    assert execute("shfl.sync.idx.b32 %r3, %r2, 3, 31, -1;", x).tolist() == [i // 32 * 32 + 3 for i in range(64)]
    assert execute("shfl.sync.up.b32 %r3, %r2, 1, 0, -1;", x).tolist() == [
        i if i % 32 == 0 else i - 1 for i in range(64)
    ]
    # Segments of 8 lanes: nobody reads from the next one.
    expected = [i + 2 if i % 8 < 6 else i for i in range(64)]
    assert execute("shfl.sync.down.b32 %r3, %r2, 2, 6175, -1;", x).tolist() == expected
    votes = execute("setp.lt.u32 %p1, %r2, 35; vote.sync.ballot.b32 %r3, %p1, -1;", x)
    assert votes.tolist() == [-1] * 32 + [7] * 32
    assert execute("redux.sync.add.s32 %r3, %r2, -1;", x).tolist() == [496] * 32 + [1520] * 32
    # The first lanes of a warp may work without the others, but only with those that are there.
    part = "setp.lt.u32 %p1, %r2, 8; mov.b32 %r3, 0; @%p1 shfl.sync.bfly.b32 %r3, %r2, {}, 31, {};"
    assert execute(part.format(1, 255), x).tolist() == [i ^ 1 if i < 8 else 0 for i in range(64)]
    for partner, mask, message in (
        (1, -1, "some are not there"), (1, 127, "some are not there"), (8, 255, "that the mask does not name")
    ):  # fmt: skip
        with pytest.raises(PtxError, match=message):
            execute(part.format(partner, mask), x)
    with pytest.raises(PtxError, match="a whole warp on a part of one"):
        execute("setp.lt.u32 %p1, %r2, 8; mov.b32 %r3, 0; @%p1 redux.sync.add.s32 %r3, %r2, 255;", x)


def test_parted_threads_meet_again():
    """Also where the text has the place they meet at before the ways that lead there."""
    body = """
    mov.b32 %r5, 0;
    setp.lt.u32 %p1, %r2, 7;
    bra $start;
    $meet:
    shfl.sync.bfly.b32 %r3, %r4, 1, 31, -1;
    add.s32 %r5, %r5, 1;
    setp.lt.s32 %p2, %r5, 3;
    @!%p2 bra $end;
    $start:
    mov.b32 %r4, 10;
    @%p1 bra $meet;
    add.s32 %r4, %r4, %r2;
    bra $meet;
    $end:
    """
    held = [10 if i < 7 else 10 + i for i in range(32)]
    assert execute(body, torch.arange(32, dtype=torch.int32)).tolist() == [held[i ^ 1] for i in range(32)]


def test_order_of_the_flow_graph():
    # 0 -> 1 <-> 2, 2 -> 3 -> (1 | 4): two loops, one in the other; what is behind comes last though it stands first.
    edges = {0: [5], 5: [6], 6: [5, 7], 7: [5, 1], 1: []}
    assert flow.ordered([0, 1, 5, 6, 7], edges) == [0, 5, 6, 7, 1]


def test_global_memory_is_checked():
    x = torch.zeros(32, dtype=torch.int32)
    with pytest.raises(PtxError, match=r"global read out of bounds, 4 bytes, block 0 thread 31: kernel: PTX line 18"):
        execute("ld.global.u32 %r3, [%d4+4];", x)
    with pytest.raises(PtxError, match=r"misaligned global read of 8 bytes, block 0 thread 1"):
        execute("setp.lt.u32 %p1, %r1, 31; @%p1 ld.global.v2.u32 {%r3, %r4}, [%d4];", x)
    # What lies between the elements of a view is not its own; nor is an address that lost its upper half.
    view = torch.zeros(64, dtype=torch.int32)[::2]
    with pytest.raises(PtxError, match="global read out of bounds"):
        execute("", view)
    # (The heap may lie within the first 4 GiB, pages of their own do not.)
    pages = torch.frombuffer(mmap.mmap(-1, 4096), dtype=torch.int32)[:32]
    with pytest.raises(PtxError, match="global read out of bounds"):
        execute("cvt.u32.u64 %r9, %d4; cvt.u64.u32 %d9, %r9; ld.global.u32 %r3, [%d9];", pages)
    with pytest.raises(PtxError, match="race between blocks in global memory"):
        execute("mov.b32 %r3, 1;", x, grid=2)
    with pytest.raises(PtxError, match="no end after"):
        interpreter.launch(f"{HEAD}$again:\nbra $again;\n}}", (1,), (32,), [x, x], max_steps=100)


def test_a_number_that_looks_like_an_address_stays_what_it_is():
    """Such as padding of a struct, in which an earlier pointer was left."""
    x, y = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    number = x.data_ptr() + 5
    text = HEAD.replace("kernel_param_1)", "kernel_param_1, .param .u64 kernel_param_2)")
    body = "ld.param.u64 %d7, [kernel_param_2]; cvt.u32.u64 %r3, %d7;"
    interpreter.launch(
        f"{text}{body}\nst.global.u32 [%d5], %r3;\nret;\n}}", (1,), (32,), [x, y, number.to_bytes(8, "little")]
    )
    assert {one & 0xFFFFFFFF for one in y.tolist()} == {number & 0xFFFFFFFF}


def test_traffic_is_counted():
    """By what is asked for, by sectors of 32 bytes per warp, and by sectors per launch."""
    x, y = torch.zeros(1024), torch.zeros(64)

    def traffic(body: str) -> Any:
        return interpreter.launch(f"{HEAD}{body}\nret;\n}}", (1,), (64,), [x, y]).traffic

    plain = traffic("")
    assert (plain.read, plain.read_sectors, plain.touched_read, plain.written) == (256, 8, 8, 0)
    twice = traffic("ld.global.u32 %r3, [%d4];")
    assert (twice.read, twice.read_sectors, twice.touched_read) == (512, 16, 8)
    strided = traffic("mul.wide.u32 %d6, %r1, 32; add.s64 %d6, %d1, %d6; ld.global.u32 %r3, [%d6];")
    assert (strided.read, strided.read_sectors, strided.touched_read) == (512, 8 + 64, 64)
    wide = traffic(
        "and.b32 %r5, %r1, 15; mul.wide.u32 %d6, %r5, 16; add.s64 %d6, %d1, %d6;"
        "ld.global.v4.u32 {%r3, %r4, %r6, %r7}, [%d6];"
    )
    assert (wide.read, wide.read_sectors, wide.touched_read) == (256 + 1024, 8 + 2 * 8, 8)
    written = traffic("st.global.u32 [%d5], %r2;")
    assert (written.written, written.written_sectors, written.touched_written) == (256, 8, 8)
    assert written.requested == 512 and written.sectors == 512 and written.touched == 512


SHARED = "mov.u32 %r6, 0; shl.b32 %r7, %r1, 2;"


def test_shared_memory_is_checked():
    x = torch.arange(64, dtype=torch.int32)
    other = "xor.b32 %r8, %r7, {};"
    swap = f"{SHARED} st.shared.u32 [%r7], %r2; {{}} {other} ld.shared.u32 %r3, [%r8];"
    assert execute(swap.format("bar.sync 0;", 4 * 33), x).tolist() == [i ^ 33 for i in range(64)]
    assert execute(swap.format("bar.warp.sync -1;", 4), x).tolist() == [i ^ 1 for i in range(64)]
    with pytest.raises(PtxError, match="shared-memory race between warps: no barrier since another: .*ld.shared"):
        execute(swap.format("bar.warp.sync -1;", 4 * 33), x)
    with pytest.raises(PtxError, match="shared-memory race between threads of a warp"):
        execute(swap.format("", 4), x)
    # Lanes that met among themselves are not safe from the others, whatever those have passed.
    halves = "setp.lt.u32 %p1, %laneid, 16; selp.b32 %r9, 65535, -65536, %p1; bar.warp.sync %r9;"
    assert execute(swap.format(halves, 4), x).tolist() == [i ^ 1 for i in range(64)]
    with pytest.raises(PtxError, match="shared-memory race between threads of a warp: .*ld.shared"):
        execute(swap.format(halves, 64), x)
    late = f"{halves} @%p1 bar.warp.sync %r9; st.shared.u32 [%r8], %r2;"
    with pytest.raises(PtxError, match="shared-memory race between threads of a warp: .*st.shared"):
        execute(f"{swap.format('bar.warp.sync -1;', 4)} xor.b32 %r8, %r8, 64; {late}", x)
    # Written over what another warp may still have to read.
    again = f"{swap.format('bar.sync 0;', 4 * 33)} st.shared.u32 [%r7], %r3;"
    with pytest.raises(PtxError, match="race between warps: .*st.shared"):
        execute(again, x)
    with pytest.raises(PtxError, match="threads write different values to one place"):
        execute("st.shared.u32 [0], %r2; mov.b32 %r3, 0;", x)
    with pytest.raises(PtxError, match="a place that nobody has written"):
        execute("ld.shared.u32 %r3, [512];", x)
    with pytest.raises(PtxError, match="shared write out of bounds: 4 bytes of 1024"):
        execute("st.shared.u32 [1024], %r2;", x[:1].expand(32).contiguous())
    with pytest.raises(PtxError, match="barrier that only 32 of 64 threads reach"):
        execute("setp.lt.u32 %p1, %r1, 32; mov.b32 %r3, 0; @%p1 bra $end; bar.sync 0; $end:", x)


def test_asynchronous_copies_land_when_they_are_waited_for():
    x = torch.arange(64, dtype=torch.int32)
    copy = f"{SHARED} cp.async.ca.shared.global [%r7], [%d4], 4; cp.async.commit_group;"
    assert execute(f"{copy} cp.async.wait_group 0; ld.shared.u32 %r3, [%r7];", x).tolist() == x.tolist()
    with pytest.raises(PtxError, match="shared read of a place that cp.async is filling"):
        execute(f"{copy} cp.async.wait_group 1; ld.shared.u32 %r3, [%r7];", x)
    with pytest.raises(PtxError, match="shared write of a place that cp.async is filling"):
        execute(f"{copy} st.shared.u32 [%r7], %r2;", x)
    # Copies of a thread are there for the others after a barrier only.
    with pytest.raises(PtxError, match="shared-memory race between warps"):
        execute(f"{copy} cp.async.wait_group 0; xor.b32 %r8, %r7, 128; ld.shared.u32 %r3, [%r8];", x)
    part = (
        "mov.b32 %r9, 0; cp.async.ca.shared.global [%r7], [%d4], 4, %r9; cp.async.wait_all; ld.shared.u32 %r3, [%r7];"
    )
    assert execute(SHARED + part, x).tolist() == [0] * 64


def test_parser_knows_scopes_and_lines():
    text = (
        HEAD.replace("{\n.reg .pred", '{\n.file 1 "/a/b.cu"\n.loc 1 7 3\n.reg .pred')
        + "{ .reg .b32 %x; mov.b32 %x, 5; { .reg .b32 %x; mov.b32 %x, 6; }\nadd.s32 %r3, %x, 0; }\nret;\n}"
    )
    program = parse(text)
    assert program.name == "kernel" and list(program.parameters.values()) == [8, 8]
    assert [one.source for one in program.instructions][-1] == "b.cu:7"
    first, second, third = program.instructions[-4:-1]
    assert first.operands[0] == third.operands[1] != second.operands[0]
    with pytest.raises(PtxError, match="no entry point other in the PTX, it has kernel"):
        parse(text, "other")


# -------------------------------------------------------------------------------- Triton's PTX


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_softmax(dtype):
    """1000 columns are neither blocks nor vectors."""
    from ptx import examples

    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    with triton_device.Device("sm_80") as device:
        y = examples.softmax(x)
    torch.testing.assert_close(y.double(), x.double().softmax(1), rtol=0, atol=torch.finfo(dtype).eps / 4)
    (launch,) = device.launches
    # Two passes over the rows, and one store.
    assert launch.grid == (3, 1, 1) and launch.traffic.read == 2 * x.nbytes and launch.traffic.written == x.nbytes


@pytest.mark.parametrize(
    ("dtype", "precision", "instruction", "tolerance"),
    [
        (torch.float32, "ieee", None, 3e-5),
        (torch.float32, "tf32", "m16n8k8.row.col.f32.tf32", 5e-2),
        (torch.float16, "ieee", "m16n8k16.row.col.f32.f16", 1e-5),
        (torch.bfloat16, "ieee", "m16n8k16.row.col.f32.bf16", 1e-5),
        (torch.float64, "ieee", "m8n8k4.row.col.f64.f64", 1e-13),
    ],
)
def test_triton_product(dtype, precision, instruction, tolerance):
    """A pipelined loop: cp.async, ldmatrix, the tensor cores of every precision. No whole blocks of rows, columns."""
    from ptx import examples

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((70, 96), (96, 48)))
    with triton_device.Device("sm_80") as device:
        c = examples.matmul(a, b, precision)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=tolerance)
    ptx = device.launches[0].asm["ptx"]
    assert "cp.async" in ptx and (f"mma.sync.aligned.{instruction}" in ptx if instruction else "mma" not in ptx)


def test_triton_races_and_wrong_promises_are_found():
    from ptx import examples

    x = torch.zeros(64)
    with triton_device.Device("sm_80"), pytest.raises(PtxError, match="race between blocks .*examples.py"):
        examples.add_to_first[(2,)](x, torch.zeros(32), 32, BLOCK=32)
    # The row is longer than the tensor: the store of the last block goes over its end.
    with triton_device.Device("sm_80"), pytest.raises(PtxError, match="global read out of bounds"):
        examples.softmax_rows[(1,)](x, torch.zeros(64), 65, 64, BLOCK=128, enable_fp_fusion=True)
    # Code that is specialised to aligned addresses, on one that is not.
    with triton_device.Device("sm_80") as device:
        examples.softmax(torch.zeros(1, 64))
    launch = device.launches[0]
    launch.arguments[0] = ("*fp32", torch.zeros(65)[1:])
    with pytest.raises(PtxError, match="misaligned global read of 16 bytes"):
        launch.execute()


def test_device_is_only_there_inside_of_its_context():
    from triton.runtime.driver import driver

    before = driver._active
    with triton_device.Device("sm_90") as device:
        assert driver.active is device
    assert driver._active is before


# -------------------------------------------------------------------------------- nvcc's PTX

BUGS = {
    1: "shared-memory race between warps: .*examples.cu",  # no barrier before the sum over warps
    2: "shared read of a place that cp.async is filling: .*examples.cu",  # no wait
    3: "shared-memory race .*examples.cu",  # no barrier before a buffer is filled again
    4: "global read out of bounds, 16 bytes, block 2 thread 0: .*examples.cu",
    5: "misaligned global read of 16 bytes, block 0 thread 0: .*examples.cu",
    6: "shared-memory race|barrier that only 64 of 128 threads reach",  # a barrier for half of the threads
    7: "race between blocks in global memory, .*examples.cu",  # all write to one place
}


@pytest.fixture(scope="module")
def examples_cu() -> cuda_device.Library:
    return cuda_device.build([EXAMPLES])


@needs_nvcc
@pytest.mark.parametrize("bug", [0, *BUGS])
def test_cuda_sum_with_planted_bugs(examples_cu, bug):
    x = torch.randn(3, 1536, generator=torch.Generator().manual_seed(0))
    sums = torch.full((3,), float("nan"))

    def run() -> Any:
        with examples_cu.device(x, sums) as device:
            code = examples_cu.functions.run_sum_exp(bug, pointer(x), pointer(sums), 3, 1536, None)
        assert code == 0
        return device

    if bug:
        with pytest.raises(PtxError, match=BUGS[bug]):
            run()
    else:
        device = run()
        torch.testing.assert_close(sums, x.double().exp().sum(1).float(), rtol=1e-6, atol=0)
        assert device.traffic.read == x.nbytes and device.traffic.written == sums.nbytes


@needs_nvcc
@pytest.mark.parametrize("bug", [0, 8])
def test_cuda_warps_with_planted_bug(examples_cu, bug):
    x, y = torch.arange(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    if bug:
        with (
            pytest.raises(PtxError, match="shared-memory race between threads of a warp"),
            examples_cu.device(x, y),
        ):
            examples_cu.functions.run_reverse(bug, pointer(x), pointer(y), 2, None)
        return
    with examples_cu.device(x, y):
        examples_cu.functions.run_reverse(bug, pointer(x), pointer(y), 2, None)
    assert y.tolist() == [i ^ 31 for i in range(256)]


@needs_nvcc
def test_cuda_product(examples_cu):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((16, 16), (8, 16)))
    c = torch.full((16, 8), float("nan"))
    with examples_cu.device(a, b, c):
        examples_cu.functions.run_product(pointer(a), pointer(b), pointer(c), None)
    torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


@needs_nvcc
def test_cuda_integers(examples_cu):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-(2**62), 2**62, (100,), generator=generator) for _ in range(2))
    x[:40] >>= 32
    y[:60] >>= 40
    y[(y & 0xFFFFFFFF) == 0] += 1
    out = torch.zeros(100, 12, dtype=torch.int64)
    with examples_cu.device(x, y, out):
        examples_cu.functions.run_integers(pointer(x), pointer(y), pointer(out), 100, None)

    def wrap(number: int, bits: int, signed: bool = True) -> int:
        number &= (1 << bits) - 1
        return number - (1 << bits) if signed and number >> (bits - 1) else number

    def quotient(a: int, b: int) -> int:
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)

    for a, b, found in zip(x.tolist(), y.tolist(), out.tolist(), strict=True):
        c, d = wrap(a, 32), wrap(b, 32)
        uc, ud, ua = wrap(a, 32, False), wrap(b, 32, False), wrap(a, 64, False)
        both = [*uc.to_bytes(4, "little"), *ud.to_bytes(4, "little")]
        assert found[0] == wrap(quotient(a, b), 64) and found[1] == a - quotient(a, b) * b
        assert found[2] == wrap(quotient(c, d), 32) and found[3] == c - quotient(c, d) * d
        assert found[4] == uc // ud and found[5] == c * d >> 32 and found[6] == a * b >> 64
        assert found[7] == a >> (b & 63) and found[8] == wrap(ua >> (d & 63), 64)
        assert found[9] == bin(uc).count("1") + 100 * (32 - ud.bit_length()) + 10000 * (a & -a).bit_length()
        assert found[10] == wrap(int.from_bytes([both[5], both[3], both[7], both[1]], "little"), 32, False)
        assert found[11] == wrap(int(format(uc, "032b")[::-1], 2), 32, False)


# -------------------------------------------------------------------------------- what is read out of compiled code


@pytest.mark.parametrize(
    ("target", "registers", "threads", "shared", "expected"),
    [
        # From cuda_occupancy.h of CUDA 13.0, NVIDIA's own calculator.
        ("sm_80", 64, 256, 0, 0.5), ("sm_80", 65, 256, 0, 0.375), ("sm_80", 128, 128, 36864, 0.25),
        ("sm_80", 255, 128, 0, 0.125), ("sm_80", 40, 96, 1024, 0.75), ("sm_80", 32, 1024, 0, 1.0),
        ("sm_80", 33, 1024, 0, 0.5), ("sm_80", 16, 32, 0, 0.5), ("sm_80", 90, 160, 20000, 20 / 64),
        ("sm_90", 128, 128, 49152, 0.25), ("sm_90", 168, 384, 100000, 12 / 64), ("sm_90", 48, 256, 232448, 0.125),
        ("sm_90", 38, 288, 5000, 45 / 64), ("sm_100", 96, 128, 49152, 0.25), ("sm_100", 57, 224, 9000, 28 / 64),
        # From AMD's occupancy table of CDNA3: 512 registers a lane, given out by eights, at most eight waves a SIMD.
        ("gfx942", 64, 256, 0, 1.0), ("gfx942", 65, 256, 0, 7 / 8), ("gfx942", 128, 256, 0, 0.5),
        ("gfx942", 129, 256, 0, 3 / 8), ("gfx942", 256, 256, 0, 0.25), ("gfx942", 32, 256, 32768, 0.25),
    ],
)  # fmt: skip
def test_occupancy(target, registers, threads, shared, expected):
    assert static.occupancy(target, registers, threads, shared) == expected


def test_code_of_every_target():
    """A product in bf16 uses the tensor cores of each, by the instruction that it has."""
    from ptx import examples

    for target in triton_device.TARGETS:
        with triton_device.Device(target, execute=False) as device:
            examples.matmul(torch.zeros(64, 64).bfloat16(), torch.zeros(64, 64).bfloat16(), block=64)
        code = static.of_launch(target, device.launches[0])
        assert code.matrix > 0 and code.loads_128 + code.copies > 0 and code.spills == 0, code
        assert 16 < code.registers <= 255 and code.shared > 0 and 0 < code.occupancy <= 1
        assert device.launches[0].traffic is None


def test_a_broken_budget_is_reported():
    code = static.Code("sm_80", 40, 0, 1024, 128, 0.75, 4, 4, 2, 8, 0, 1, 300)
    kernel = budgets.Kernel("triton", workloads.soft_target("fp32", 1, 1024, "mse"), "rows", code)
    kept = {kernel.key: {"sm_80": budgets.budget_of(code)}}
    assert budgets.violations(kernel, kept) == []
    for change, message in (
        ({"registers": 39}, "registers 40, at most 39"),
        ({"occupancy": 0.8}, "occupancy 0.75, at least 0.8"),
        ({"matrix": 9}, "matrix 8, at least 9"),
    ):
        budget = {kernel.key: {"sm_80": {**kept[kernel.key]["sm_80"], **change}}}
        (found,) = budgets.violations(kernel, budget)
        assert found.startswith("triton: soft_target mse fp32 1 x 1024: rows: sm_80: ") and found.endswith(message)
    assert "has no budget" in budgets.violations(kernel, {})[0]


# -------------------------------------------------------------------------------- mutants


@pytest.mark.usefixtures("poisoned_memory")
def test_mutants_of_a_product():
    """Of a kernel that is tested well almost all are caught: what survives guards edges that this shape has not."""
    from ptx import examples

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((40, 96), (96, 24)))
    with triton_device.Device("sm_80", keep=True) as device:
        c = examples.matmul(a, b)
    before = c.clone()
    result = mutants.score(device.launches, per_kind=2)
    assert result.rate > 0.8 and result.total > 20, str(result)
    for kind in ("copy left out", "registers of A swapped", "registers of B swapped", "registers swapped"):
        assert result.caught[kind] == 2, str(result)
    assert torch.equal(c, before)


# -------------------------------------------------------------------------------- the package's kernels: numerics

SHAPES: dict[str, tuple[Any, ...]] = {
    "soft_target": (5, 70), "attention_relation": (2, 3, 40, 16, 32), "projected_mse": (37, 24, 48)
}  # fmt: skip
# What takes the tensor cores, masks and every output along.
VARIANTS = {
    "soft_target": "jsd", "attention_relation": "self mask segments causal", "projected_mse": "normalize bias mask"
}  # fmt: skip
# Of the numerics tests, those that run in a minute or two each; all of them would be hours.
NUMERICS = {
    "soft_target": "(error_budget and (bf16 or fp16)) or forbidden or ragged or reductions or all_rows or garbage-fp32",
    "attention_relation": "error_budget and bf16",
    "projected_mse": "error_budget and bf16",
}


def implementations() -> list[Any]:
    cuda = _dispatch.CUDA_LOSSES if hasattr(_dispatch, "CUDA_LOSSES") else ()
    return [
        *(pytest.param("triton", loss, id=f"triton-{loss}") for loss in CASES if loss in _dispatch.TRITON_OPS),
        *(
            pytest.param("cuda", loss, id=f"cuda-{loss}", marks=[needs_cuda_sources, *minutes])
            for loss in CASES
            if loss in cuda
        ),
    ]


@pytest.mark.parametrize(("implementation", "loss"), implementations())
def test_op_through_ptx(implementation, loss):
    """One call in bf16 in a process of its own, with gradients, within the error budget."""
    code = f"import test_ptx; test_ptx.check_one({implementation!r}, {loss!r})"
    assert in_a_new_process(["-c", code], timeout=1500, PYDISTILL_TEST_IMPL=implementation).strip() == "within budget"


def check_one(implementation: str, loss: str) -> None:
    from cases import assert_within_budget, run, truth

    case = CASES[loss]
    tensors, keywords = case.select(case.inputs(SHAPES[loss], torch.bfloat16), VARIANTS[loss])
    reference = run(case.reference, tensors, keywords, case.differentiable)
    if implementation == "triton":
        triton_device.register_ops()
        device: Any = triton_device.Device("sm_80")
    else:
        cuda_device.stand_in_for_cuda()
        device = cuda_device.ops().device()
    with device:
        found = run(case.loss, tensors, {**keywords, "impl": implementation}, case.differentiable)
    assert device.launches and all(launch.steps for launch in device.launches)
    assert_within_budget(found, reference, truth(case, tensors, keywords))
    print("within budget")


@pytest.mark.parametrize(
    ("implementation", "loss"),
    [pytest.param(*one.values, id=one.id, marks=[*one.marks, *minutes]) for one in implementations()],
)
def test_numerics_through_ptx(implementation, loss):
    """A choice of the loss's numerics tests, with their tolerances."""
    arguments = ["-m", "pytest", "-q", "-x", "-p", "ptx.plugin", *numerics_of(f"test_{loss}.py")[3:]]
    arguments += ["-k", f"{implementation} and ({NUMERICS[loss]})"]
    assert " passed" in in_a_new_process(arguments, timeout=3000, PYDISTILL_TEST_IMPL=implementation)


# -------------------------------------------------------------------------------- the package's kernels: what they cost


@pytest.mark.parametrize(
    "implementation",
    [pytest.param("triton", marks=minutes), pytest.param("cuda", marks=[needs_cuda_sources, *minutes])],
)
def test_budgets_and_traffic(implementation):
    """Registers, spills, occupancy and instructions as budgets.json has them, and bytes as the formula has them."""
    printed = in_a_new_process([str(budgets.HERE / "budgets.py"), implementation], timeout=3000)
    assert "all budgets are kept" in printed


def test_the_recorded_table_is_of_these_budgets():
    """docs/benchmarks/gpu-static.json has the kernels that budgets.json has, and keeps what it says."""
    if not budgets.RECORD.exists():
        pytest.skip("needs the source tree around the tests")
    recorded = json.loads(budgets.RECORD.read_text())
    limits = budgets.read()
    keys = {f"{one['implementation']}: {one['op']} {one['workload']}: {one['kernel']}" for one in recorded["kernels"]}
    assert keys == set(limits)
    for one in recorded["traffic"]:
        assert one["moved"] <= 1.1 * one["formula"], one


# -------------------------------------------------------------------------------- the package's kernels: mutants

# Mutants of executed instructions that the trials catch, of all: a little below what they do. What survives is listed,
# and is mostly the same kernel in effect (a bound that no launch reaches, a product's first sum, which is zero, lanes
# that write what others write too).
CAUGHT = {"soft_target": 0.8, "attention_relation": 0.75, "projected_mse": 0.77}


@pytest.mark.parametrize(
    ("implementation", "loss"),
    [pytest.param(*one.values, id=one.id, marks=[*one.marks, *minutes]) for one in implementations()],
)
def test_mutants(implementation, loss):
    script = str(budgets.HERE / "trials.py")
    printed = in_a_new_process([script, implementation, loss], timeout=3000, PYDISTILL_TEST_IMPL=implementation)
    print(printed)
    assert float(printed.split()[-1]) >= CAUGHT[loss], printed
