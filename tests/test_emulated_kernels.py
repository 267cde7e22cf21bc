# SPDX-License-Identifier: MIT
"""Every case on every generation of the CUDA kernels, their source compiled for the host."""

import dataclasses
import itertools

import pytest
import torch
from budgets import assert_within_budget, oracle
from cases import HALF_SOFTMAX_CASES, KERNEL_CASES, Case
from emulated import ALL_VARIANTS, EmulatedKernels, build, missing

from fastmqa_export.errors import ConfigError

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

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


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    case = BY_NAME[name]
    if (dtype, sm, case.D) == (torch.float32, 75, 576):
        sm = 80  # the only variant that needs it
    check(kernels, case, dtype, sm)


@pytest.mark.parametrize("sm", [75, 80])
@pytest.mark.parametrize("case", HALF_SOFTMAX_CASES, ids=lambda case: case.name)
def test_the_softmax_in_float16_is_within_the_budget(kernels, case, sm):
    check(kernels, case, torch.float16, sm)


HEAD_SIZES = sorted({(case.D, case.V, case.values_in_k) for case in KERNEL_CASES})


@pytest.mark.parametrize("target", [*TARGETS, "float16_sm90", "float32_sm80"])
@pytest.mark.parametrize(("d", "v", "values_in_k"), HEAD_SIZES)
def test_tiles_of_many_rows_are_within_the_budget(kernels, d, v, values_in_k, target):
    """More rows than a tile holds, and as many blocks as SMs: the largest tiles."""
    dtype, sm = {
        **TARGETS,
        "float16_sm90": (torch.float16, 90),
        "float32_sm80": (torch.float32, 80),
    }[target]
    if (dtype, sm, d) == (torch.float32, 75, 576):
        sm = 86  # the only variant that needs SM80
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
    missed = [v for v in kernels.library.variants() if v["index"] not in VARIANTS_SEEN]
    # A bfloat16 tile for an A100's shared memory is the float16 one's source.
    assert not [v for v in missed if not (v["dtype"] == "bfloat16" and v["block_rows"] == 64)]


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


def strided(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same values with the axes in another order in memory, and a gap after each row."""
    stored = tensor.permute(order)
    wide = torch.full((*stored.shape[:-1], stored.shape[-1] + 8), torch.nan, dtype=tensor.dtype)
    wide[..., : stored.shape[-1]] = stored
    back = tuple(order.index(axis) for axis in range(4))
    return wide[..., : stored.shape[-1]].permute(back)


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
    from emulated import SHARED_BYTES

    SHARED_BYTES.setdefault(70, 48 << 10)
    with pytest.raises(ConfigError) as error:
        kernels.run(tensors, case.attributes(), sm=sm)
    assert message in str(error.value)
