# SPDX-License-Identifier: MIT
"""Every case on every instruction set of the CPU kernel that this machine has."""

import contextlib
import ctypes
import dataclasses
import itertools
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator

import cpu_library
import pytest
import torch
from budgets import BUDGET, assert_within_budget, oracle, same_dtype_error
from cases import HALF_SOFTMAX_CASES, KERNEL_CASES, Case
from emulated import Guarded, strided

from fastmqa_export import reference
from fastmqa_export.accuracy import measure
from fastmqa_export.config import OP_INPUTS
from fastmqa_export.cpu_kernels import CpuKernels, ThreadPool
from fastmqa_export.errors import ConfigError, KernelError
from fastmqa_export.kernels import make_call

pytestmark = [
    pytest.mark.skipif(cpu_library.missing() is not None, reason=cpu_library.missing() or ""),
    pytest.mark.usefixtures("one_thread"),
]

BY_NAME = {case.name: case for case in KERNEL_CASES}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32)
_PARALLEL_FOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, _TASK, ctypes.c_void_p)


class ShuffledPool:
    """Says that it has some threads, and runs tasks one after the other in a random order."""

    def __init__(self, threads: int, seed: int) -> None:
        self.calls = 0
        self._random = random.Random(seed)
        self._function = _PARALLEL_FOR(self._parallel_for)
        self.pool = ThreadPool(None, threads, ctypes.cast(self._function, ctypes.c_void_p))

    def _parallel_for(self, _pool, count, task, context) -> None:
        assert 1 < count <= self.pool.threads
        self.calls += 1
        for i in self._random.sample(range(count), count):
            task(context, i)


@pytest.fixture(scope="module")
def library() -> CpuKernels:
    return CpuKernels(cpu_library.library())


@contextlib.contextmanager
def each_target(library: CpuKernels) -> Iterator[Iterator[str]]:
    """The instruction sets of this machine, each in use until the next; an error names it."""
    target = "none"

    def targets() -> Iterator[str]:
        nonlocal target
        for i, target in enumerate(library.targets()):
            library.library.fastmqa_cpu_use_target(i)
            yield target

    try:
        yield targets()
    except BaseException as error:
        error.add_note(f"with the kernel for {target}")
        raise
    finally:
        library.library.fastmqa_cpu_use_target(0)


def run(library: CpuKernels, tensors, attributes, pool: ThreadPool, *, return_lse: bool = False):
    """Y and lse of a call whose operands, outputs and workspace lie between guards of NaN."""
    inputs = {name: Guarded(tensor) for name, tensor in tensors.items()}
    call = make_call(
        *(inputs[n].tensor if n in inputs else None for n in OP_INPUTS),
        attributes=attributes,
        return_lse=return_lse,
    )
    y = Guarded(torch.full_like(call.y, torch.nan))
    lse = None if call.lse is None else Guarded(torch.full_like(call.lse, torch.nan))
    call.params.y = y.tensor.data_ptr()
    call.params.lse = None if lse is None else lse.tensor.data_ptr()
    size = library.library.fastmqa_cpu_workspace_bytes(call.params, pool.threads)
    workspace = Guarded(torch.full((size,), 0xFF, dtype=torch.uint8))
    call.params.workspace = workspace.tensor.data_ptr()
    library._check(library.library.fastmqa_cpu_run, call.params, pool)
    for guarded in (*inputs.values(), y, workspace, *([lse] if lse else [])):
        guarded.check()
    return y.tensor, None if lse is None else lse.tensor


def check(library: CpuKernels, case: Case, dtype: torch.dtype) -> None:
    """The case is within the budget, and its bits do not depend on the pool."""
    poisoned, tensors = case.tensors(dtype, poison=True), case.tensors(dtype)
    attributes = case.attributes()
    expected, expected_lse = oracle(tensors, attributes)
    same_dtype = same_dtype_error(tensors, attributes, expected)
    # Scores of float16 are 2^-11 off at most.
    tolerance = 2**-10 if case.softmax_precision == 10 else 1e-5
    with each_target(library) as targets:
        for i, _ in enumerate(targets):
            y, lse = run(library, poisoned, attributes, library.pool(1), return_lse=True)
            error = measure(y, expected, dtype)
            assert BUDGET.accepts(error, same_dtype), (error, BUDGET.limit(same_dtype))
            torch.testing.assert_close(
                lse, expected_lse.float(), rtol=tolerance, atol=4 * tolerance
            )
            shuffled = ShuffledPool(2 + (len(case.name) + i) % 4, case.seed).pool
            again = run(library, poisoned, attributes, shuffled, return_lse=True)
            assert torch.equal(y, again[0])
            assert torch.equal(lse, again[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [case.name for case in KERNEL_CASES])
def test_every_case_is_within_the_budget(library, name, dtype):
    check(library, BY_NAME[name], DTYPES[dtype])


@pytest.mark.parametrize("case", HALF_SOFTMAX_CASES, ids=lambda case: case.name)
def test_the_softmax_in_float16_is_within_the_budget(library, case):
    check(library, case, torch.float16)


@pytest.mark.parametrize("heads", [2, 8, 32])
def test_scores_distances_and_exponentials_are_rounded_to_float16(library, heads):
    """A sum of 16-bit exponentials is exact in float32: the log-sum-exp shows each rounding."""
    case = Case(name="", B=1, H=heads, S=1, T=200, D=8, V=8, softmax_precision=10, scale=1.0)
    tensors, attributes = case.tensors(torch.float16), case.attributes()
    tensors["q"] = torch.zeros_like(tensors["q"])
    tensors["q"][..., 0], tensors["q"][..., 1] = 1, 2**-10  # a score that float32 holds exactly
    tensors["k"] *= 3
    expected = reference.attention(*(tensors.get(n) for n in OP_INPUTS), attributes=attributes)[1]
    exact = oracle(tensors, attributes)[1]
    assert (expected - exact).abs().max() > 1e-4
    with each_target(library) as targets:
        for _ in targets:
            _, lse = run(library, tensors, attributes, library.pool(1), return_lse=True)
            torch.testing.assert_close(lse, expected.float(), rtol=0, atol=2e-6)


def random_case(seed: int) -> Case:
    """Sizes that leave tails everywhere, features that combine, and enough keys for splits."""
    any_of = random.Random(seed)
    kv_heads, queries = any_of.choice((1, 1, 2, 3)), any_of.choice((1, 1, 2, 5, 33))
    keys = any_of.randint(1, 2500 if queries == 1 else 400)
    d, v = (8 * any_of.choice((1, 3, 5, 8, 9, 10, 13, 16, 24, 31)) for _ in range(2))
    batch = any_of.choice((1, 1, 2))
    return Case(
        name=f"random_{seed}",
        B=batch,
        H=kv_heads * any_of.choice((1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 71)),
        Hkv=kv_heads,
        S=queries,
        T=keys,
        D=d,
        V=min(v, d) if seed % 5 == 0 else v,
        values_in_k=seed % 5 == 0,
        is_causal=any_of.random() < 0.5,
        window_left=any_of.choice((-1, -1, 3, 150)),
        softcap=any_of.choice((0.0, 0.0, 20.0)),
        mask=any_of.choice(("", "", "bool", "float")),
        mask_shape=any_of.choice(("BHST", "BT", "ST", "HT")),
        kv_lengths=any_of.choice((None, tuple(any_of.randint(0, keys) for _ in range(batch)))),
        q_start=any_of.choice((None, None, tuple(any_of.randint(-3, keys) for _ in range(batch)))),
        layout=any_of.choice((0, 1)),
        softmax_precision=any_of.choice((1, 1, 1, 10)) if seed % 3 == 1 else 1,
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(60))
def test_random_shapes_are_within_the_budget(library, seed):
    check(library, random_case(seed), list(DTYPES.values())[seed % 3])


SPLIT = Case(name="split", B=1, H=32, S=1, T=4100, D=128, V=128, kv_lengths=(4001,))
FULL = Case(name="full", B=2, H=8, Hkv=2, S=150, T=150, D=64, V=72, is_causal=True)


@pytest.mark.parametrize("case", [SPLIT, FULL], ids=["split", "full"])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(library, case, threads):
    tensors, attributes = case.tensors(torch.float32, poison=True), case.attributes()
    y, _ = run(library, tensors, attributes, library.pool(1))
    for _ in range(5):
        assert torch.equal(run(library, tensors, attributes, library.pool(threads))[0], y)
    assert_within_budget(y, case.tensors(torch.float32), attributes)


def test_one_sequence_of_a_decode_is_divided_among_the_threads(library):
    tasks = ShuffledPool(4, 0)
    run(library, SPLIT.tensors(torch.float32), SPLIT.attributes(), tasks.pool)
    assert tasks.calls == 2, "the units, and the combination of their results"
    # Too little for another thread to be worth waking.
    small, tasks = Case(name="small", B=1, H=4, S=1, T=9, D=32, V=32), ShuffledPool(4, 0)
    run(library, small.tensors(torch.float32), small.attributes(), tasks.pool)
    assert tasks.calls == 0


def test_scratch_memory_does_not_grow_with_the_scores(library):
    def size(length: int, threads: int) -> int:
        case = Case(name="", B=1, H=32, S=length, T=length, D=128, V=128)
        nothing = {name: torch.empty_like(x) for name, x in case.tensors(torch.float32).items()}
        call = make_call(
            *(nothing.get(n) for n in OP_INPUTS), attributes=case.attributes(), return_lse=False
        )
        return library.library.fastmqa_cpu_workspace_bytes(call.params, threads)

    assert size(64, 1) == size(512, 1) < 1 << 20
    assert size(512, 4) < 4 << 20


def test_callers_at_the_same_time_do_not_disturb_each_other(library):
    tensors, attributes = SPLIT.tensors(torch.float32), SPLIT.attributes()
    expected, _ = run(library, tensors, attributes, library.pool(1))
    found: list[torch.Tensor] = []

    def call() -> None:
        for _ in range(5):
            found.append(run(library, tensors, attributes, library.pool(2))[0])

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 20
    assert all(torch.equal(y, expected) for y in found)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3)])
@pytest.mark.parametrize("queries", [1, 9])
def test_any_order_of_the_axes_in_memory(library, order, queries):
    case = Case(name="strided", B=2, H=6, Hkv=2, S=queries, T=170, D=64, V=40, is_causal=True)
    plain, attributes = case.tensors(torch.float32), case.attributes()
    moved = {name: strided(tensor, order) for name, tensor in plain.items()}
    pool = library.pool(2)
    with each_target(library) as targets:
        for _ in targets:
            y, _ = run(library, plain, attributes, pool)
            assert torch.equal(run(library, moved, attributes, pool)[0], y)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 4), (1, 5), (1, 170))))
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_masks_of_every_shape_and_type(library, shape, mask_dtype, kv_heads):
    """With one KV head 20 rows lie in lanes, with four 5 rows do or keys do."""
    case = Case(name="mask", B=2, H=4, Hkv=kv_heads, S=5, T=170, D=32, V=32)
    tensors = case.tensors(torch.float16)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = noise > -0.5 if mask_dtype == torch.bool else noise.to(mask_dtype)
    tensors["attn_mask"] = mask
    attributes = dataclasses.replace(case.attributes(), features=1)
    with each_target(library) as targets:
        for _ in targets:
            y, _ = run(library, tensors, attributes, library.pool(1))
            assert_within_budget(y, tensors, attributes)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_masks_hold_every_number_of_their_type(library, dtype):
    """All 16-bit patterns but NaN, as the mask of one key: the row's log-sum-exp gives it back."""
    numbers = torch.arange(2**16).to(torch.uint16).view(DTYPES[dtype])
    numbers = numbers[~numbers.isnan()]
    case = Case(name="numbers", B=1, H=1, S=numbers.numel(), T=1, D=8, V=8)
    tensors = {name: torch.zeros_like(x) for name, x in case.tensors(DTYPES[dtype]).items()}
    tensors["attn_mask"] = numbers[None, None, :, None]
    attributes = dataclasses.replace(case.attributes(), features=17)
    _, lse = run(library, tensors, attributes, library.pool(1), return_lse=True)
    finite = numbers < torch.inf  # a score of +infinity has no softmax
    assert torch.equal(lse[0, 0, finite], numbers[finite].float())


@pytest.mark.parametrize("heads", [3, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_finite_minimum_as_mask_excludes_no_key(library, dtype, heads):
    case = Case(name="minimum", B=1, H=heads, S=1, T=140, D=64, V=64)
    tensors = case.tensors(DTYPES[dtype])
    tensors["attn_mask"] = torch.full((1, heads, 1, 140), torch.finfo(torch.float32).min)
    tensors["attn_mask"][:, 1, :, 3:] = 0
    attributes = dataclasses.replace(case.attributes(), features=1)
    y, _ = run(library, tensors, attributes, library.pool(1))
    average = tensors["v"].double().mean(2, keepdim=True)
    torch.testing.assert_close(y[:, :1].double(), average, rtol=2**-8, atol=2**-8)
    assert_within_budget(y, tensors, attributes)


@pytest.mark.parametrize("heads", [2, 32], ids=["keys in lanes", "rows in lanes"])
@pytest.mark.parametrize("name", ["k", "v"])
def test_not_a_number_among_live_keys_is_not_hidden(library, name, heads):
    case = Case(name="nan", B=1, H=heads, S=1, T=2000, D=64, V=64)
    tensors = case.tensors(torch.float32)
    payload = torch.tensor(0x7FC01234, dtype=torch.int32).view(torch.float32)
    tensors[name][0, 0, 1017, 5] = payload
    with each_target(library) as targets:
        for _ in targets:
            y, lse = run(library, tensors, case.attributes(), library.pool(2), return_lse=True)
            assert y.isnan()[..., 5].all()
            assert lse.isnan().all() == (name == "k")


@pytest.mark.parametrize("heads", [2, 32], ids=["keys in lanes", "rows in lanes"])
def test_what_a_bool_mask_excludes_may_be_infinite(library, heads):
    case = Case(name="infinite", B=1, H=heads, S=1, T=50, D=64, V=64, mask="bool", mask_shape="T")
    tensors, attributes = case.tensors(torch.float32), case.attributes()
    expected, _ = run(library, tensors, attributes, library.pool(1))
    excluded = ~tensors["attn_mask"][0, 0, 0]
    assert 0 < excluded.sum() < 50
    tensors["k"][:, :, excluded] = torch.tensor(torch.inf)
    tensors["k"][:, :, excluded, ::2] = torch.nan
    assert torch.equal(run(library, tensors, attributes, library.pool(1))[0], expected)


def test_results_round_to_the_nearest_even(library):
    """One key: y is v, and of 16 bits exactly; the average of two keys ends in a tie or not."""
    for dtype in (torch.float16, torch.bfloat16):
        case = Case(name="ties", B=1, H=1, S=1, T=2, D=64, V=64)
        tensors = case.tensors(dtype)
        tensors["q"].zero_()
        step = torch.finfo(dtype).eps
        tensors["v"][0, 0, 0] = 1 + step * torch.arange(64)
        tensors["v"][0, 0, 1] = tensors["v"][0, 0, 0] + step
        expected = tensors["v"].double().mean(2).to(dtype)
        with each_target(library) as targets:
            for _ in targets:
                y, _ = run(library, tensors, case.attributes(), library.pool(1))
                assert torch.equal(y[0, 0, 0], expected[0, 0])


def _set(name: str, value: int | float | None):
    return lambda params: setattr(params, name, value)


#: What is put into the arguments of a valid call, and what the library says of it.
BAD_ARGUMENTS = {
    "q is null": (_set("q", None), "q is a null pointer"),
    "y is null": (_set("y", None), "y is a null pointer"),
    "no batch": (_set("batch", 0), "B (batch) is 0; it must be at least 1"),
    "heads": (_set("kv_heads", 3), "H=4 query heads are not a multiple of Hkv=3"),
    "head size": (_set("head_size", 60), "both must be multiples of 8"),
    "dtype": (_set("dtype", 11), "dtype 11 is none of float16 (10), bfloat16 (16), float32"),
    "mask without a type": (_set("attn_mask", 64), "attn_mask at 0x40 with mask_dtype none"),
    "a mask's type": (_set("mask_dtype", 16), "attn_mask is bfloat16 (16); it may be bool"),
    "window": (_set("window_left", -2), "window -2, -1: a number of keys >= 0"),
    "scale": (_set("scale", float("nan")), "scale nan, softcap 0: both must be finite"),
    "precision": (_set("softmax_precision", 16), "softmax_precision 16 with float16"),
    "no workspace": (_set("workspace", None), "workspace is null; this call needs "),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_before_anything_is_written(library, name):
    spoil, message = BAD_ARGUMENTS[name]
    case = Case(name="bad", B=1, H=4, Hkv=1, S=1, T=300, D=64, V=64)
    tensors = case.tensors(torch.float16)
    call = make_call(
        *(tensors.get(n) for n in OP_INPUTS), attributes=case.attributes(), return_lse=False
    )
    size = library.library.fastmqa_cpu_workspace_bytes(call.params, 1)
    workspace = torch.empty(size, dtype=torch.uint8)
    call.params.workspace = workspace.data_ptr()
    call.y.fill_(7)
    spoil(call.params)
    with pytest.raises(ConfigError, match=re.escape(message)):
        library._check(library.library.fastmqa_cpu_run, call.params, library.pool(1))
    assert (call.y == 7).all()
    if name not in ("q is null", "y is null", "mask without a type", "no workspace"):
        assert library.library.fastmqa_cpu_workspace_bytes(call.params, 1) == 0
        with pytest.raises(ConfigError, match=re.escape(message)):
            library.supports(call)


def test_a_pool_without_threads_is_refused(library):
    case = Case(name="none", B=1, H=4, S=1, T=30, D=64, V=64)
    call = make_call(
        *(case.tensors(torch.float32).get(n) for n in OP_INPUTS),
        attributes=case.attributes(),
        return_lse=False,
    )
    with pytest.raises(ConfigError, match="a pool of 0 threads"):
        library.run(call, ThreadPool())


def test_a_pool_is_started_once(library):
    assert library.pool(3) is library.pool(3)
    assert library.pool(3).threads == 3
    with pytest.raises(KernelError, match="-1 threads could not be started"):
        library.pool(-1)


def test_head_sizes_beyond_the_ops_are_taken(library):
    check(library, Case(name="large", B=1, H=3, Hkv=3, S=2, T=20, D=1000, V=640), torch.float32)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_the_compiler_keeps_the_fetches_of_upcoming_keys_and_values():
    """GCC drops calls of a function that only fetches, and nothing but the time shows it."""
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", cpu_library.library()],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    functions = re.split(r"^[0-9a-f]+ <", listing, flags=re.MULTILINE)
    fetching: dict[str, list[bool]] = {
        name: [] for name in ("scores_of_panel", "scores_of_rows", "outputs_of_tile")
    }
    for function in functions:
        # Some only choose a function by the number of rows.
        if re.search(r"\b(v?fmadd|mulps|fmla)", function):
            for name, found in fetching.items():
                if f"::{name}<" in function.partition("\n")[0]:
                    found.append(re.search("prefetch|prfm", function) is not None)
    assert all(fetching.values())
    assert all(map(all, fetching.values()))


_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpclmul", "-maes")
SANITIZERS = {
    "address and undefined": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}


@pytest.mark.parametrize("name", SANITIZERS)
def test_no_sanitizer_finds_anything(library, name):
    """Random calls against the naive kernels, by several callers with threads of their own."""
    flags = _AVX2 if "AVX2" in library.targets() else ()
    source = cpu_library.ROOT / "tests" / "cpu" / "stress.cpp"
    program = cpu_library.program(source, "-O1", "-g1", *flags, *SANITIZERS[name])
    assert "60 of 60" in cpu_library.run([str(program), "60", "1"])
