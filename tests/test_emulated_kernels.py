# SPDX-License-Identifier: MIT
"""Every case on every generation of the CUDA kernels, their source compiled for the host."""

import ctypes
import dataclasses
import itertools

import pytest
import torch
from budgets import assert_within_budget, oracle
from cases import HALF_SOFTMAX_CASES, KERNEL_CASES, Case
from emulated import ALL_VARIANTS, SHARED_BYTES, EmulatedKernels, build, missing, strided

from fastmqa_export.config import OP_INPUTS
from fastmqa_export.errors import ConfigError
from fastmqa_export.kernels import AttentionParams, Device, make_call

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
    pytest.mark.usefixtures("one_thread"),
]

BY_NAME = {case.name: case for case in KERNEL_CASES}

#: Which code runs on which SM: float16 for both generations, and where shared memory is short.
TARGETS = {
    "float16_sm75": (torch.float16, 75),
    "float16_sm80": (torch.float16, 80),
    "bfloat16_sm86": (torch.bfloat16, 86),
    "float32_sm75": (torch.float32, 75),
}

#: Variants that some case has run, by index.
VARIANTS_SEEN: set[int] = set()


@pytest.fixture(scope="module")
def kernels() -> EmulatedKernels:
    return EmulatedKernels(build(ALL_VARIANTS))


def check(kernels: EmulatedKernels, case: Case, dtype: torch.dtype, sm: int, **options) -> None:
    """The case is within the budget, NaN in its padding or not, and repeats bit by bit."""
    poisoned, attributes = case.tensors(dtype, poison=True), case.attributes()
    y, lse, variant = kernels.run(
        poisoned, attributes, sm=sm, return_lse=case.lse, seed=case.seed, **options
    )
    VARIANTS_SEEN.add(variant)
    tensors = case.tensors(dtype)
    assert_within_budget(y, tensors, attributes)
    if lse is not None:
        # Scores of float16 are 2^-11 off at most.
        tolerance = 2**-10 if case.softmax_precision == 10 else 1e-5
        expected = oracle(tensors, attributes)[1].float()
        torch.testing.assert_close(lse, expected, rtol=tolerance, atol=4 * tolerance)
    again = kernels.run(
        poisoned, attributes, sm=sm, return_lse=case.lse, seed=case.seed + 1, **options
    )
    assert torch.equal(y, again[0])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", BY_NAME)
def test_every_case_is_within_the_budget(kernels, name, target):
    dtype, sm = TARGETS[target]
    check(kernels, BY_NAME[name], dtype, sm)


@pytest.mark.parametrize("sm", [75, 80])
@pytest.mark.parametrize("case", HALF_SOFTMAX_CASES, ids=lambda case: case.name)
def test_the_softmax_in_float16_is_within_the_budget(kernels, case, sm):
    check(kernels, case, torch.float16, sm)


HEAD_SIZES = sorted({(case.D, case.V, case.values_in_k) for case in KERNEL_CASES})


MORE_TARGETS = TARGETS | {
    "float16_sm90": (torch.float16, 90),
    "bfloat16_sm80": (torch.bfloat16, 80),
    "float32_sm80": (torch.float32, 80),
}


@pytest.mark.parametrize("target", MORE_TARGETS)
@pytest.mark.parametrize(("d", "v", "values_in_k"), HEAD_SIZES)
def test_tiles_of_many_rows_are_within_the_budget(kernels, d, v, values_in_k, target):
    """More rows than a tile holds, and as many blocks as SMs: the largest tiles."""
    dtype, sm = MORE_TARGETS[target]
    case = Case(
        name="many_rows", B=1, H=2, Hkv=1, S=75, T=140, D=d, V=v, values_in_k=values_in_k,
        is_causal=True, lse=True, kv_lengths=(133,),
    )  # fmt: skip
    check(kernels, case, dtype, sm, sm_count=1)
    check(kernels, dataclasses.replace(case, S=32), dtype, sm, sm_count=1)


def test_no_variant_was_left_out(kernels):
    """Runs after the tests above; alone, it cannot tell."""
    if len(VARIANTS_SEEN) < 60:
        pytest.skip("only with the whole file")
    assert not [v for v in kernels.library.variants() if v["index"] not in VARIANTS_SEEN]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["decode_48_1_d128", "prefill_257_d64", "prefill_129_d80"])
def test_the_number_of_splits_changes_no_more_than_the_rounding(kernels, name, target):
    dtype, sm = TARGETS[target]
    case = BY_NAME[name]
    tensors, attributes = case.tensors(dtype, poison=True), case.attributes()
    for sm_count in (1, 3, 17, 200):
        y, lse, _ = kernels.run(tensors, attributes, sm=sm, sm_count=sm_count, return_lse=True)
        assert_within_budget(y, case.tensors(dtype), attributes)
        expected = oracle(case.tensors(dtype), attributes)[1].float()
        torch.testing.assert_close(lse, expected, rtol=1e-5, atol=4e-5)


@pytest.mark.parametrize("tactic", range(1, 6))
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", ["decode_48_1_d128", "prefill_129_d80", "softcap_causal_mask_mqa_bhsd"]
)
def test_every_tactic_is_within_the_budget(kernels, name, target, tactic):
    dtype, sm = TARGETS[target]
    check(kernels, BY_NAME[name], dtype, sm, sm_count=7, tactic=tactic)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3)])
@pytest.mark.parametrize("target", TARGETS)
def test_any_order_of_the_axes_in_memory(kernels, order, target):
    dtype, sm = TARGETS[target]
    case = Case(name="strided", B=2, H=6, Hkv=2, S=9, T=70, D=64, V=64, is_causal=True)
    plain, attributes = case.tensors(dtype), case.attributes()
    y, _, _ = kernels.run(plain, attributes, sm=sm)
    moved = {name: strided(tensor, order) for name, tensor in plain.items()}
    assert torch.equal(kernels.run(moved, attributes, sm=sm)[0], y)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 4), (1, 5), (1, 70))))
def test_masks_of_every_shape_and_type(kernels, shape, mask_dtype):
    case = Case(name="mask", B=2, H=4, Hkv=2, S=5, T=70, D=32, V=32)
    tensors = case.tensors(torch.float16)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = noise > -0.5 if mask_dtype == torch.bool else noise.to(mask_dtype)
    tensors["attn_mask"] = mask
    attributes = dataclasses.replace(case.attributes(), features=1)
    y, _, _ = kernels.run(tensors, attributes, sm=80)
    assert_within_budget(y, tensors, attributes)


@pytest.mark.parametrize("target", TARGETS)
def test_a_finite_minimum_as_mask_excludes_no_key(kernels, target):
    dtype, sm = TARGETS[target]
    case = Case(name="minimum", B=1, H=3, Hkv=1, S=4, T=40, D=64, V=64)
    tensors = case.tensors(dtype)
    tensors["attn_mask"] = torch.full((1, 1, 4, 40), torch.finfo(torch.float32).min)
    tensors["attn_mask"][:, :, 1, 3:] = 0
    attributes = dataclasses.replace(case.attributes(), features=1)
    y, _, _ = kernels.run(tensors, attributes, sm=sm)
    average = tensors["v"].double().mean(2, keepdim=True).expand(1, 3, 3, 64)
    torch.testing.assert_close(y[:, :, [0, 2, 3]].double(), average, rtol=2**-8, atol=2**-8)
    assert_within_budget(y, tensors, attributes)


@pytest.mark.parametrize("target", TARGETS)
def test_values_in_k_of_any_head_size(kernels, target):
    dtype, sm = TARGETS[target]
    case = Case(name="in_k", B=2, H=4, Hkv=2, S=3, T=70, D=96, V=64, values_in_k=True)
    check(kernels, case, dtype, sm)


@pytest.mark.parametrize(("d", "v"), [(8, 8), (40, 24), (72, 72), (104, 8), (136, 112), (256, 8)])
@pytest.mark.parametrize("target", TARGETS)
def test_head_sizes_between_the_variants_run_in_the_next_larger(kernels, d, v, target):
    dtype, sm = TARGETS[target]
    case = Case(name="odd", B=1, H=5, Hkv=1, S=7, T=75, D=d, V=v, is_causal=True, lse=True)
    check(kernels, case, dtype, sm)


def test_not_a_number_among_live_keys_is_not_hidden(kernels):
    case = Case(name="nan", B=1, H=2, Hkv=1, S=3, T=40, D=64, V=64)
    for name in ("k", "v"):
        tensors = case.tensors(torch.float16)
        tensors[name][0, 0, 17, 5] = torch.nan
        for sm_count in (1, 100):
            y, lse, _ = kernels.run(
                tensors, case.attributes(), sm=80, sm_count=sm_count, return_lse=True
            )
            assert y.isnan()[..., 5].all()
            assert lse.isnan().all() == (name == "k")


REFUSED = {
    "too large": (Case(name="", D=264, V=264), 80, "D=264, V=264 is not built for SM80"),
    "values beside k": (Case(name="", D=576, V=512), 80, "576/512 (values in k)"),
    "bfloat16 on a T4": (Case(name="", D=64, V=64), 75, "none (bfloat16 needs SM80)"),
    "an old GPU": (Case(name="", D=64, V=64), 70, "SM75 and newer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_variant_covers_is_refused_with_those_that_are_near(kernels, name):
    case, sm, message = REFUSED[name]
    tensors = case.tensors(torch.bfloat16)
    with pytest.raises(ConfigError) as error:
        kernels.run(tensors, case.attributes(), sm=sm)
    assert message in str(error.value)


def _address(name: str, value: int | None):
    return lambda params: setattr(params, name, value)


def _stride(name: str, axis: str, value: int):
    return lambda params: setattr(getattr(params, name), axis, value)


#: What is put into the arguments of a valid call, and what the library says of it.
BAD_ARGUMENTS = {
    "q is null": (_address("q", None), "q is a null pointer"),
    "y is null": (_address("y", None), "y is a null pointer"),
    "k is misaligned": (_address("k", 1 << 20 | 8), "k at 0x100008 is not aligned to 16 bytes"),
    "lse is misaligned": (_address("lse", 2), "lse at 0x2 is not aligned to 4 bytes"),
    "lengths are misaligned": (_address("kv_lengths", 6), "kv_lengths at 0x6 is not aligned"),
    "a stride": (_stride("v_strides", "row", 68), "v has a row stride of 68 elements; it must"),
    "no batch": (_address("batch", 0), "B (batch) is 0; it must be at least 1"),
    "negative keys": (_address("keys", -5), "T (keys) is -5; it must be at least 1"),
    "heads": (_address("kv_heads", 3), "H=4 query heads are not a multiple of Hkv=3"),
    "head size": (_address("head_size", 60), "both must be multiples of 8"),
    "dtype": (_address("dtype", 11), "dtype 11 is none of float16 (10), bfloat16 (16), float32"),
    "mask without a type": (_address("attn_mask", 64), "attn_mask at 0x40 with mask_dtype none"),
    "a mask's type": (_address("mask_dtype", 16), "attn_mask is bfloat16 (16); it may be bool"),
    "window": (_address("window_left", -2), "window -2, -1: a number of keys >= 0"),
    "scale": (_address("scale", float("nan")), "scale nan, softcap 0: both must be finite"),
    "softcap": (_address("softcap", -1.0), "softcap -1: both must be finite, softcap >= 0"),
    "precision": (_address("softmax_precision", 16), "softmax_precision 16 with float16"),
    "too many rows": (_address("queries", 1 << 30), "split the batch"),
    "too many keys": (_address("keys", (1 << 30) + 1), "at most 2^30 keys"),
    "no workspace": (lambda params: None, "workspace is null; this call needs 1056 bytes"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_before_the_launch(kernels, name):
    spoil, message = BAD_ARGUMENTS[name]
    case = Case(name="bad", B=1, H=4, Hkv=1, S=1, T=300, D=64, V=64)
    tensors = case.tensors(torch.float16)
    call = make_call(
        *(tensors.get(n) for n in OP_INPUTS), attributes=case.attributes(), return_lse=True
    )
    call.y.fill_(7)
    spoil(call.params)
    library, device = kernels.library, Device(80, 40, SHARED_BYTES[80])
    with pytest.raises(ConfigError) as error:
        library._check(library.library.fastmqa_run, call.params, device, 0, 0)
    assert message in str(error.value)
    assert (call.y == 7).all(), "nothing was launched"


def test_a_text_never_overflows(kernels):
    params, device = AttentionParams(), Device(80, 40, SHARED_BYTES[80])
    text = ctypes.create_string_buffer(b"x" * 20, 20)
    assert kernels.library.library.fastmqa_run(params, device, 0, 0, text, 10) == 1
    assert text.raw == b"B (batch)\0" + b"x" * 10
    assert kernels.library.library.fastmqa_run(params, device, 0, 0, None, 0) == 1
