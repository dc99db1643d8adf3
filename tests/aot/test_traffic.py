"""Memory traffic of compiled programs, against counts by hand.

The programs of tests/golden/hlo are real ones, compiled for a TPU v5e and an H100 by `tests.golden.fill_hlo`.
"""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from polaformer_jax.aot import hlo, traffic
from polaformer_jax.aot.hlo import Array, Program, arrays_of
from tests.golden import fill_hlo
from tests.support import ROOT

MIB, KIB = 2**20, 2**10
WORD = 4  # bytes of an index or a counter

# MiB read, written and of padding; and bytes of indices and counters on top, at most.
EXPECTED = {
    "v5e_double": (512, 512, 0),
    "v5e_double_half": (256, 256, 0),  # the other half is not read
    "v5e_layers": (0.5 + 0.125 + 0.125, 0.5, 0),  # x is prefetched; tanh(x w) stays on the chip
    "v5e_update": (1, 1, 0),  # in place
    "v5e_scan": (384, 384, 0),  # 24 parts of 16 MiB, one after the other
    # Copied to rows of 96 channels padded to 128 (384 MiB to 512), read twice and written, and copied back.
    "v5e_kernel": (384 + 2 * 512 + 512, 512 + 512 + 384, 5 * 128),
    "h100_double": (512, 512, 0),
    "h100_double_half": (256, 256, 0),
    "h100_layers": (2 * (0.5 + 0.125), 2 * 0.5, 0),
    "h100_update": (1, 1, 0),
    "h100_scan": (384, 2 * 384, 0),  # the results are zeros before
}


def counted(text: str, platform: str) -> tuple[float, float, float]:
    """MiB read, written, and of padding."""
    moves = traffic.moves(Program(text), platform=platform)
    return tuple(sum(getattr(move, name) for move in moves) / MIB for name in ("read", "written", "padding"))


@pytest.mark.parametrize("name", EXPECTED)
def test_programs_of_known_traffic(name):
    text = (fill_hlo.FOLDER / f"{name}.txt").read_text()
    found = counted(text, "tpu" if name.startswith("v5e") else "gpu")
    assert found == pytest.approx(EXPECTED[name], abs=100 * WORD / MIB)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
)
def test_programs_compiled_for_a_tpu_now(tmp_path):
    """In a process of its own, since libtpu keeps what it has loaded."""
    script = (
        "import sys, jax; jax.config.update('jax_platforms', 'cpu');"
        "from tests.golden.fill_hlo import PROGRAMS, compiled;"
        "[open(f'{sys.argv[1]}/{name}', 'w').write(compiled('v5e:2x2', name)) for name in PROGRAMS]"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=ROOT, capture_output=True)
    for name in fill_hlo.PROGRAMS:
        found = counted((tmp_path / name).read_text(), "tpu")
        assert found == pytest.approx(EXPECTED[f"v5e_{name}"], abs=100 * WORD / MIB)


# --- arrays


@pytest.mark.parametrize(
    "text, size, padded",
    [
        ("bf16[65536,16,48]{2,1,0:T(8,128)(2,1)}", 65536 * 16 * 48 * 2, 65536 * 16 * 128 * 2),  # lanes
        ("bf16[65536,16,48]{0,2,1:T(8,128)(2,1)}", 65536 * 16 * 48 * 2, 65536 * 16 * 48 * 2),  # another order
        ("f32[512,12,49,49]{3,2,1,0:T(8,128)}", 512 * 12 * 49 * 49 * 4, 512 * 12 * 56 * 128 * 4),
        ("f32[3]{0:T(128)}", 12, 512),
        ("f32[]{:T(128)}", 4, 4),
        ("f32[5]{0:T(2,128)}", 20, 2 * 128 * 4),  # more axes in a tile than in the array
        ("f32[7,5]{1,0}", 140, 140),
        ("f32[7,5]", 140, 140),
        ("s4[3,5]{1,0}", 7.5, 7.5),
        ("pred[8]{0}", 8, 8),
        ("f8e4m3fn[8]{0}", 8, 8),
        ("bf16[<=6,2]{1,0}", 24, 24),
        ("token[]", 0, 0),
    ],
)
def test_sizes_of_arrays(text, size, padded):
    (array,) = arrays_of(text)
    assert (array.bytes, array.padded_bytes) == (size, padded)


def test_arrays_of_a_tuple():
    found = arrays_of("((f32[2]{0:T(128)}), bf16[3,4]{0,1:T(8,128)(2,1)S(1)}, u32[]{:S(2)})")
    assert found == (
        Array("f32", (2,), (0,), (128,)),
        Array("bf16", (3, 4), (0, 1), (8, 128), 1),
        Array("u32", (), (), (), 2),
    )


def test_an_unknown_type_is_no_guess():
    with pytest.raises(ValueError, match="'blob' is no type of an array"):
        hlo.bytes_of("blob")


def test_what_is_no_program():
    with pytest.raises(ValueError, match="it has no ENTRY computation"):
        Program("HloModule empty")


# --- instructions


def entry(*lines: str, before: str = "") -> str:
    """A program of these instructions."""
    return "HloModule test\n" + before + "\nENTRY %main (p: f32[1]) -> f32[1] {\n  " + "\n  ".join(lines) + "\n}\n"


A, B = "f32[256,1024]{1,0:T(8,128)}", "f32[256,1024]{1,0:T(8,128)S(1)}"  # a MiB in the memory, and on the chip
Q = "f32[64,1024]{1,0:T(8,128)}"  # a quarter
A_PARAMETER = f"%a = {A} parameter(0)"


@pytest.mark.parametrize(
    "lines, read, written",
    [
        ([f"%b = {B} copy(%a)"], 1, 0),  # to the chip
        ([f"%b = {B} copy(%a)", f"%c = {B} negate(%b)", f"%d = {A} copy(%c)"], 1, 1),  # stays there
        ([f"%b = {A} add(%a, %a)"], 1, 1),  # the same twice
        ([f"%b = {A} bitcast(%a)", f"%t = ({A}, {A}) tuple(%a, %b)", f"%g = {A} get-tuple-element(%t), index=0"], 0, 0),
        # Asynchronous instructions count once, where they start.
        ([f"%s = ({B}, {A}, u32[]{{:S(2)}}) copy-start(%a)", f"%b = {B} copy-done(%s)"], 1, 0),
        (
            [
                f"%s = (({A}), f32[64,1024]{{1,0:T(8,128)S(1)}}, u32[]{{:S(2)}}) slice-start(%a), slice={{[0:64]}}",
                "%b = f32[64,1024]{1,0:T(8,128)S(1)} slice-done(%s)",
            ],
            0.25,
            0,
        ),
        ([f"%s = {A} all-reduce-start(%a), to_apply=%sum", f"%b = {A} all-reduce-done(%s)"], 1, 1),
        (
            [
                f"%s = ({A}, f32[1024,1024]{{1,0:T(8,128)}}) all-gather-start(%a), dimensions={{0}}",
                "%b = f32[1024,1024]{1,0:T(8,128)} all-gather-done(%s)",
            ],
            1,
            4,
        ),
        (
            [
                f"%s = (({A}), {Q}) reduce-scatter-start(%a), dimensions={{0}}",
                f"%u = (({A}), {Q}) reduce-scatter-update(%s)",
                f"%b = {Q} reduce-scatter-done(%u)",
            ],
            1,
            0.25,
        ),
        (["%b = f32[64,1024]{1,0:T(8,128)} slice(%a), slice={[0:64], [0:1024]}"], 0.25, 0.25),
        (["%b = f32[1024]{0:T(1024)} reduce(%a, %zero), dimensions={0}, to_apply=%sum"], 1, 1 / 256),
        ([f"%b = {A} iota(), iota_dimension=0"], 0, 1),
        ([f'%b = {A} custom-call(), custom_call_target="AllocateBuffer"'], 0, 0),
        ([f'%b = {A} custom-call(%a), custom_call_target="unknown"'], 1, 1),
        # By its estimate the operand is read three times.
        (
            [
                f'%b = {A} custom-call(%a), custom_call_target="tpu_custom_call",'
                f' backend_config={{"custom_call_config":{{"cost_estimate":{{"bytes_accessed":"{4 * MIB}"}}}}}}'
            ],
            3,
            1,
        ),
        (
            [
                f'%b = {A} custom-call(%a, %a), custom_call_target="tpu_custom_call",'
                ' frontend_attributes={kernel_metadata={"reads":"1 3"}}'
            ],
            4,
            1,
        ),
        # A workspace may or may not be used.
        (
            [f'%b = ({A}, s8[4194304]{{0}}) custom-call(%a, %a), custom_call_target="__cublas$gemm"'],
            1,
            1,
        ),
    ],
)
def test_one_instruction(lines, read, written):
    assert counted(entry(A_PARAMETER, *lines), "tpu") == (read, written, 0)


def test_numbers_of_memories_mean_the_chip_on_tpus_alone():
    text = entry(A_PARAMETER, f"%b = {B} copy(%a)", f"%c = {B.replace('S(1)', 'S(5)')} copy(%b)")
    assert counted(text, "tpu") == (1, 0, 0)
    assert counted(text, "gpu") == (2, 1, 0)  # 5 is the host's memory


FUSED = f"""
%inner (x: f32[256,1024]) -> f32[64,1024] {{
  %x = {A} parameter(0)
  %y = {A} exponential(%x)
  ROOT %z = f32[64,1024]{{1,0:T(8,128)}} slice(%y), slice={{[0:64], [0:1024]}}
}}

%outer (p: f32[256,1024], u: f32[64,1024]) -> f32[256,1024] {{
  %p = {A} parameter(0)
  %u = f32[64,1024]{{1,0:T(8,128)}} parameter(1)
  %zero = s32[] constant(0)
  %doubled = f32[64,1024]{{1,0:T(8,128)}} add(%u, %u)
  ROOT %r = {A} dynamic-update-slice(%p, %doubled, %zero, %zero)
}}

%whole (p: f32[256,1024]) -> f32[256,1024] {{
  %p = {A} parameter(0)
  %part = f32[64,1024]{{1,0:T(8,128)}} fusion(%p), kind=kLoop, calls=%inner
  %sum = f32[1024]{{0:T(1024)}} reduce(%p, %part), dimensions={{0}}, to_apply=%sum
  ROOT %r = {A} broadcast(%sum), dimensions={{1}}
}}

%used (p: f32[256,1024], u: f32[64,1024]) -> f32[256,1024] {{
  %p = {A} parameter(0)
  %u = {Q} parameter(1)
  %updated = {A} dynamic-update-slice(%p, %u, %zero, %zero)
  ROOT %r = {A} exponential(%updated)
}}

%nested (p: f32[256,1024], u: f32[64,1024]) -> f32[256,1024] {{
  %p = {A} parameter(0)
  %u = {Q} parameter(1)
  ROOT %r = {A} fusion(%p, %u), kind=kLoop, calls=%outer
}}

%all-reduce-scatter (p: f32[256,1024]) -> f32[64,1024] {{
  %p = {A} parameter(0)
  %sum = {A} all-reduce(%p), to_apply=%add
  ROOT %r = {Q} dynamic-slice(%sum, %i, %zero), dynamic_slice_sizes={{64,1024}}
}}
"""


@pytest.mark.parametrize(
    "line, read, written",
    [
        ("%b = f32[64,1024]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%inner", 0.25, 0.25),
        (f"%b = {A} fusion(%a, %u), kind=kLoop, calls=%outer", 0.25, 0.25),  # in place
        (f"%b = {A} fusion(%a), kind=kLoop, calls=%whole", 1, 1),  # one use needs a quarter, another all
        (f"%b = {A} fusion(%a, %u), kind=kLoop, calls=%used", 1.25, 1),  # what is updated is read, and kept
        (f"%b = {A} fusion(%a, %u), kind=kLoop, calls=%nested", 0.25, 0.25),
        (f"%s = (({A}, {Q}), {A}, u32[]) fusion-start(%a, %u), kind=kLoop, calls=%outer", 0.25, 0.25),
        (f"%s = (({A}, {Q}), {A}, u32[]) dynamic-update-slice-start(%a, %u, %i, %i)", 0.25, 0.25),
        (f"%b = {Q} fusion(%a), kind=kCustom, calls=%all-reduce-scatter", 1, 0.25),  # of the whole sum
        # As many rows as there are updates are read and written, beside updates and indices.
        (f"%b = {A} scatter(%a, %i, %u), to_apply=%add", 0.25 + 0.25 + 1 / 4096, 0.25),
    ],
)
def test_fusions_and_updates_in_place(line, read, written):
    updates, indices = "%u = f32[64,1024]{1,0:T(8,128)} parameter(1)", "%i = s32[64]{0} parameter(2)"
    text = entry(A_PARAMETER, updates, indices, line, before=FUSED)
    assert counted(text, "tpu") == (read, written, 0)


BRANCHES = f"""
%small (p: f32[256,1024]) -> f32[256,1024] {{
  ROOT %p = {A} parameter(0)
}}

%large (p: f32[256,1024]) -> f32[256,1024] {{
  %p = {A} parameter(0)
  ROOT %n = {A} negate(%p)
}}
"""


@pytest.mark.parametrize("opcode, attribute", [("call", "to_apply"), ("async-start", "calls")])
def test_what_runs_another_computation(opcode, attribute):
    """A call, and one that runs beside others until its `async-done`."""
    line, end = f"%s = {A} {opcode}(%a), {attribute}=%large", f"%d = {A} async-done(%s)"
    assert counted(entry(A_PARAMETER, line, end, before=BRANCHES), "tpu") == (1, 1, 0)


@pytest.mark.parametrize(
    "attributes", ["branch_computations={%small, %large}", "true_computation=%small, false_computation=%large"]
)
def test_of_a_conditional_the_larger_branch_counts(attributes):
    choice = f"%b = {A} conditional(%i, %a, %a), {attributes}"
    assert counted(entry(A_PARAMETER, choice, before=BRANCHES), "tpu") == (1, 1, 0)


def loop(start="constant(0)", step="constant(1)", limit="constant(6)", direction="LT", noted="") -> str:
    """A loop whose body reads and writes a MiB; its counter is the first element of its tuple, the step the last."""
    shapes = f"(s32[], {A}, s32[])"
    return entry(
        f"%start = s32[] {start}",
        f"%step = s32[] {step}",
        "%copied = s32[] copy(%start)",
        f"%a = {A} parameter(0)",
        f"%t = {shapes} tuple(%copied, %a, %step)",
        f"%w = {shapes} while(%t), condition=%condition, body=%body{noted}",
        before=f"""
%condition (t: {shapes}) -> pred[] {{
  %t = {shapes} parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[] {limit}
  ROOT %less = pred[] compare(%i, %limit), direction={direction}
}}

%body (t: {shapes}) -> {shapes} {{
  %t = {shapes} parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = {A} get-tuple-element(%t), index=1
  %step = s32[] get-tuple-element(%t), index=2
  %y = {A} negate(%x)
  %next = s32[] add(%i, %step)
  ROOT %r = {shapes} tuple(%next, %y, %step)
}}
""",
    )


@pytest.mark.parametrize(
    "changes, times",
    [
        ({}, 6),
        ({"start": "constant(2)"}, 4),
        ({"step": "constant(4)"}, 2),
        ({"limit": "constant(-1)"}, 0),
        ({"noted": ', backend_config={"known_trip_count":{"n":"24"}}'}, 24),
        # Not known: once.
        ({"start": "parameter(1)"}, 1),
        ({"step": "parameter(1)"}, 1),
        ({"step": "constant(0)"}, 1),
        ({"limit": "parameter(0)"}, 1),
        ({"direction": "GT"}, 1),
    ],
)
def test_loops(changes, times):
    found = counted(loop(**changes), "gpu")
    assert found == pytest.approx((times, times, 0), abs=100 * WORD / MIB)


def test_a_program_for_this_cpu():
    x = jnp.ones((256, 1024))
    program = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) * 2, x)).lower(x).compile()
    read, written, padding = counted(program.as_text(), "cpu")
    assert padding == 0
    assert 3 <= read < 8 and 3 <= written < 8  # with copies before and after, and parts without optimisations
