# SPDX-License-Identifier: MIT
"""The TensorRT plugin's life, as TensorRT leads it, without TensorRT (`trt/driver.cpp`).

Its kernels are the emulated ones; under AddressSanitizer, naive ones.
"""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trt_driver
from budgets import assert_within_budget, oracle
from cases import HALF_SOFTMAX_CASES, KERNEL_CASES, Case
from emulated import Guarded
from trt_driver import (
    CHANNELS_LAST,
    LINEAR,
    TYPES,
    UNDER_ASAN,
    Dims,
    Driver,
    DynamicTensorDesc,
    Plugin,
    RefusedError,
    TensorDesc,
    driver_library,
)

from fastmqa_export.config import OP_INPUTS, OP_OUTPUTS

pytestmark = [
    pytest.mark.skipif(trt_driver.missing() is not None, reason=trt_driver.missing() or ""),
    pytest.mark.usefixtures("one_thread"),
]
needs_real_kernels = pytest.mark.skipif(UNDER_ASAN, reason="naive kernels take float32 only")

TYPE_OF = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
TYPE_OF |= {torch.bool: "bool", torch.int32: "int32"}


@pytest.fixture
def driver():
    with trt_driver.driver_under_test() as driver:
        yield driver


# Shapes, types, formats

B, H, HKV, S, T, D, V = 2, 6, 3, 5, 11, 64, 64
SHAPES = {
    "q": (B, H, S, D),
    "k": (B, HKV, T, D),
    "v": (B, HKV, T, V),
    "attn_mask": (B, 1, S, T),
    "kv_lengths": (B,),
    "q_start": (B,),
    "y": (B, H, S, V),
    "lse": (B, H, S),
}
NAMES = [*OP_INPUTS, *OP_OUTPUTS]


def types_of(dtype: str = "float32", mask: str = "bool") -> dict[str, str]:
    types = dict.fromkeys(("q", "k", "v", "y"), dtype)
    return types | {"attn_mask": mask, "kv_lengths": "int32", "q_start": "int32", "lse": "float32"}


def desc(shape: tuple[int, ...], type_name: str, layout: int = LINEAR) -> TensorDesc:
    return TensorDesc(Dims.of(shape), TYPES[type_name], layout, -1.0)


def static(plugin: Plugin, shapes=None, types=None) -> list[TensorDesc]:
    shapes, types = SHAPES | (shapes or {}), types_of() | (types or {})
    return [desc(shapes[name], types[name]) for name in NAMES[: 6 + plugin.outputs]]


def dynamic(plugin: Plugin, shapes=None, types=None, at=None) -> list[DynamicTensorDesc]:
    """A profile; ``at``: shapes at its ends, by ``min``, ``opt`` and ``max``, where they differ."""
    tensors = []
    for name, one in zip(NAMES, static(plugin, shapes, types), strict=False):
        ends = {
            end: Dims.of((SHAPES | (shapes or {}) | (at or {}).get(end, {}))[name])
            for end in ("min", "opt", "max")
        }
        one.dims = Dims.of(
            [
                x if x == y else -1
                for x, y in zip(*(ends[e].sizes() for e in ("min", "max")), strict=True)
            ]
        )
        tensors.append(DynamicTensorDesc(one, ends["min"], ends["max"], ends["opt"]))
    return tensors


@pytest.mark.parametrize("lse", [False, True], ids=["y", "y_lse"])
@pytest.mark.parametrize("values_in_k", [False, True], ids=["v", "values_in_k"])
@pytest.mark.parametrize("layout", [0, 1], ids=["bhsd", "bshd"])
def test_output_shapes_are_expressions_of_the_inputs(driver, layout, values_in_k, lse):
    batch, queries, keys = -1, -2, -3  # known when the engine runs
    q = (batch, queries, 8, 576) if layout else (batch, 8, queries, 576)
    k = (batch, 1, keys, 576)
    v = k if values_in_k else (batch, 1, keys, 128)
    plugin = driver.of_attributes(
        {
            "scale": 1.0,
            "layout": layout,
            "v_head_size": 512 if values_in_k else 0,
            "features": 8 * values_in_k + 16 * lse,
        }
    )
    shapes = plugin.output_shapes([q, k, v, (1, 1, 1, 1), (1,), (1,)])
    assert shapes[0] == (*q[:3], 512 if values_in_k else 128)
    assert shapes[1:] == ([(batch, 8, queries)] if lse else [])


def test_output_types(driver):
    plugin = driver.of_attributes({"scale": 1.0, "features": 16})
    for dtype in ("float16", "bfloat16", "float32"):
        inputs = [types_of(dtype)[name] for name in OP_INPUTS]
        assert plugin.output_types(inputs) == [dtype, "float32"]


def test_other_numbers_of_tensors_are_refused(driver):
    plugin = driver.of_attributes({"scale": 1.0})
    types = [types_of()[name] for name in OP_INPUTS]
    with pytest.raises(
        RefusedError, match="7 inputs and 1 outputs; with features=0 it has 6 and 1"
    ):
        plugin.output_types([*types, "int32"])
    with pytest.raises(RefusedError, match="6 inputs and 2 outputs"):
        plugin.output_types(types, count=2)
    with pytest.raises(RefusedError, match="5 inputs and 1 outputs"):
        plugin.output_shapes([SHAPES[name] for name in OP_INPUTS[:5]])
    with pytest.raises(RefusedError, match="6 inputs and 2 outputs"):
        plugin.configure(dynamic(driver.of_attributes({"scale": 1.0, "features": 16})))
    with pytest.raises(RefusedError, match="q has 3 dimensions and v has 4; both must have 4"):
        plugin.output_shapes([(1, 2, 3), *(SHAPES[name] for name in OP_INPUTS[1:])])


def formats(driver: Driver, attributes, types, position: int, layout: int = LINEAR) -> bool:
    plugin = driver.of_attributes({"scale": 1.0} | attributes)
    tensors = dynamic(plugin, types=types)
    tensors[position].desc.format = layout
    return plugin.supports_format(position, tensors)


@needs_real_kernels
@pytest.mark.parametrize("sm", [75, 80, 86, 90])
def test_formats_follow_the_variants(driver, sm):
    driver.set_device(sm)
    for dtype in TYPES:
        covered = dtype in ("float16", "float32") or (dtype == "bfloat16" and sm >= 80)
        for attributes in ({}, {"v_head_size": 256, "features": 8}):
            assert formats(driver, attributes, types_of(dtype), 0) == covered
        if dtype == "bfloat16" and not covered:
            assert "bfloat16 needs SM80" in driver.take_log()
        half = {"softmax_precision": 10}
        assert formats(driver, half, types_of(dtype), 0) == (dtype == "float16")
        driver.take_log()


@needs_real_kernels
def test_every_tensor_has_its_types(driver):
    driver.set_device(80)
    for q in ("float16", "bfloat16", "float32"):
        for position, name in enumerate(NAMES):
            expected = {q}
            if name == "attn_mask":
                expected = {"bool", "float32", q}
            elif name in ("kv_lengths", "q_start"):
                expected = {"int32"}
            elif name == "lse":
                expected = {"float32"}
            for features in (16, 23):  # what is not live has a type all the same
                found = {
                    one
                    for one in TYPES
                    if position > 0
                    and formats(driver, {"features": features}, types_of(q) | {name: one}, position)
                }
                assert found == (expected if position > 0 else set())


def test_only_linear_formats(driver):
    for position in range(7):
        assert formats(driver, {}, {}, position)
        assert not formats(driver, {}, {}, position, layout=CHANNELS_LAST)


@needs_real_kernels
def test_the_profile_may_change_batch_and_lengths(driver):
    plugin = driver.of_attributes({"scale": 1.0, "features": 7})
    ends = {
        end: {
            "q": (b, H, s, D),
            "k": (b, HKV, t, D),
            "v": (b, HKV, t, V),
            "attn_mask": (b, 1, 1, t),
            "kv_lengths": (b,),
            "q_start": (b,),
            "y": (b, H, s, V),
        }
        for end, (b, s, t) in {"min": (1, 1, 1), "opt": (2, 1, 900), "max": (8, 512, 4096)}.items()
    }
    shapes = {"attn_mask": (B, 1, 1, T)}
    tensors = dynamic(plugin, shapes, types_of("float16"), at=ends)
    assert tensors[0].desc.dims.sizes() == (-1, H, -1, D)
    plugin.configure(tensors)
    assert plugin.tactics()[0] == 1
    assert len(set(plugin.tactics())) == len(plugin.tactics()) > 1
    for end in ("min", "opt"):
        less = dynamic(plugin, shapes, types_of("float16"), at=ends | {"max": ends[end]})
        assert 0 < plugin.workspace(less) < plugin.workspace(tensors)
    assert plugin.clone().tactics() == plugin.tactics()
    with pytest.raises(RefusedError, match=r"0 tactics asked for, of \d"):
        plugin._check("tactics", None, 0)


SHAPE_ERRORS = {
    "rank_q": ({"q": (B, H, D)}, r"q has rank 3; it must be (B, H, S, D)"),
    "rank_k": ({"k": (1, B, HKV, T, D)}, r"k has rank 5; it must be (B, Hkv, T, D)"),
    "rank_v": ({"v": (B, D)}, r"v has rank 2; it must be (B, Hkv, T, V)"),
    "rank_mask": ({"attn_mask": (S, T)}, r"attn_mask has rank 2; it must be (B, H, S, T), each"),
    "rank_lengths": ({"kv_lengths": (B, 1)}, r"kv_lengths has rank 2; it must be (B,)"),
    "rank_start": ({"q_start": ()}, r"q_start has rank 0; it must be (B,)"),
    "batch_k": ({"k": (3, HKV, T, D)}, r"k is (3, 3, 11, 64): its dimension 0 is B of the other"),
    "batch_v": ({"v": (3, HKV, T, V)}, r"v is (3, 3, 11, 64): its dimension 0 is B of the other"),
    "head_size": ({"k": (B, HKV, T, 72)}, r"its dimension 3 is D of the other tensors, 64"),
    "kv_heads": ({"v": (B, 2, T, V)}, r"its dimension 1 is Hkv of the other tensors, 3"),
    "keys": ({"v": (B, HKV, 12, V)}, r"its dimension 2 is T of the other tensors, 11"),
    "mask_batch": (
        {"attn_mask": (3, 1, S, T)},
        r"its dimension 0 is B of the other tensors, 2, or",
    ),
    "mask_heads": (
        {"attn_mask": (B, 3, S, T)},
        r"its dimension 1 is H of the other tensors, 6, or",
    ),
    "mask_rows": ({"attn_mask": (B, 1, 4, T)}, r"its dimension 2 is S of the other tensors, 5, or"),
    "mask_keys": ({"attn_mask": (B, 1, S, 12)}, r"its dimension 3 is T of the other tensors, 11, "),
    "lengths": ({"kv_lengths": (1,)}, r"kv_lengths is (1): its dimension 0 is B of the other tens"),
    "starts": ({"q_start": (3,)}, r"q_start is (3): its dimension 0 is B of the other tensors, 2"),
}


@pytest.mark.parametrize("name", SHAPE_ERRORS)
def test_shapes_that_contradict_each_other_are_refused(driver, name):
    shapes, message = SHAPE_ERRORS[name]
    message = re.escape(message)
    plugin = driver.of_attributes({"scale": 1.0, "features": 7})
    plugin.configure(dynamic(plugin))
    assert plugin.tactics() != []
    with pytest.raises(RefusedError, match=f"a.node, configurePlugin: .*{message}"):
        plugin.configure(dynamic(plugin, shapes))
    with pytest.raises(RefusedError, match=f"a.node, onShapeChange: .*{message}"):
        plugin.shape_change(static(plugin, shapes))
    assert plugin.tactics() == []


def test_inputs_that_are_not_live_have_any_shape(driver):
    plugin = driver.of_attributes({"scale": 1.0})
    shapes = {"attn_mask": (7, 7), "kv_lengths": (), "q_start": (9, 9)}
    plugin.configure(dynamic(plugin, shapes))
    plugin.shape_change(static(plugin, shapes))


@needs_real_kernels
@pytest.mark.parametrize(
    ("shapes", "types", "message"),
    [
        ({"q": (B, 7, S, D)}, {}, "H=7 query heads are not a multiple of Hkv=3"),
        ({"v": (B, HKV, T, 60)}, {}, "head sizes D=64, V=60: both must be multiples of 8"),
        (
            {"q": (B, H, S, 264), "k": (B, HKV, T, 264)},
            types_of("float16"),
            "float16 with head sizes D=264, V=64 is not built for SM75 .* built for float16 there, "
            "D/V: 32/32, 64/64, 80/80, .*; smaller sizes run in the next larger",
        ),
        ({}, types_of("bfloat16"), "bfloat16 with head sizes .*bfloat16 needs SM80"),
        (
            {},
            {"attn_mask": "int32"},
            "attn_mask is int32; it must be bool, float32 or float32 as q",
        ),
        ({}, {"k": "float16"}, "k is float16; it must be float32 as q"),
        ({}, {"kv_lengths": "int64"}, "kv_lengths is int64; it must be int32"),
        ({}, types_of("int8"), "q is int8; it must be float16, bfloat16 or float32"),
        ({"q": (B, H, 0, D)}, {}, r"S \(queries\) is 0; it must be at least 1"),
        (
            {"q": (2**31, H, S, D), "k": (2**31, HKV, T, D), "v": (2**31, HKV, T, V)},
            {},
            "B is 2147",
        ),
    ],
    ids=[
        *("heads", "multiple_of_8", "head_size", "bfloat16", "mask_type", "k_type"),
        *("lengths_type", "q_type", "empty", "huge"),
    ],
)
def test_what_no_variant_covers_is_refused_as_the_engine_is_built(driver, shapes, types, message):
    plugin = driver.of_attributes({"scale": 1.0, "features": 0 if shapes else 7})
    with pytest.raises(RefusedError, match=f"a.node, configurePlugin: {message}"):
        plugin.configure(dynamic(plugin, shapes, types))


@pytest.mark.parametrize("end", ["min", "max"])
def test_heads_may_not_change_within_a_profile(driver, end):
    plugin = driver.of_attributes({"scale": 1.0})
    with pytest.raises(RefusedError, match=r"H goes from \d to \d; only B, S and T may change"):
        plugin.configure(dynamic(plugin, at={end: {"q": (B, 9 if end == "max" else 3, S, D)}}))


@needs_real_kernels
def test_every_end_of_the_profile_is_checked(driver):
    plugin = driver.of_attributes({"scale": 1.0})
    for end, queries in {"min": 0, "opt": 0, "max": 1 << 29}.items():
        with pytest.raises(RefusedError, match=r"S \(queries\) is 0|at most 2\^30"):
            plugin.configure(dynamic(plugin, at={end: {"q": (B, H, queries, D)}}))


def test_tactics_are_taken_by_their_numbers(driver):
    plugin = driver.of_attributes({"scale": 1.0})
    for tactic in range(7):
        plugin.set_tactic(tactic)
    for tactic in (-1, 7):
        with pytest.raises(RefusedError, match=f"tactic {tactic}; there are 1 to 6, and 0 for the"):
            plugin.set_tactic(tactic)


def test_without_a_gpu_nothing_is_built_or_run(driver):
    driver.set_device(0)
    plugin = driver.of_attributes({"scale": 1.0})
    for call in (plugin.attach, plugin.serialise, lambda: plugin.configure(dynamic(plugin))):
        with pytest.raises(RefusedError, match="there is no CUDA device: no device"):
            call()
    assert not plugin.supports_format(0, dynamic(plugin))
    assert "there is no CUDA device" in driver.take_log()


# Running


CASES = {case.name: case for case in [*KERNEL_CASES, *HALF_SOFTMAX_CASES]}
RUNS = {
    "causal_mqa_bhsd": (torch.float16, 75),
    "window_both_gqa_bshd": (torch.float16, 80),
    "softcap_causal_mask_mqa_bshd": (torch.bfloat16, 86),
    "mask_bool_keys_gqa_bhsd": (torch.float32, 75),
    "mask_float_shared_mha_bshd": (torch.float16, 75),
    "lengths_causal_mqa_bshd": (torch.float16, 80),
    "start_causal_gqa_bhsd": (torch.bfloat16, 80),
    "lse_mask_mqa_bshd": (torch.float16, 80),
    "lse_empty_rows_mqa_bhsd": (torch.float32, 75),
    "values_in_k_lengths_gqa_bhsd": (torch.float16, 75),
    "v_smaller_mqa_bshd": (torch.float32, 80),
    "half_softmax_lengths_window_mqa_bhsd": (torch.float16, 75),
    "mla_576_512": (torch.float16, 90),
    "long_decode": (torch.float16, 75),
    "decode_48_1_d128": (torch.bfloat16, 86),
    "latent_prefill_causal_d288_v256": (torch.float16, 75),
}


class Node:
    """A node of a case, with what TensorRT tells the plugin of its tensors."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.attributes = case.attributes()
        live = case.tensors(dtype, poison=True)
        neutral = {
            "v": live["k"],
            "attn_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool),
            "kv_lengths": torch.full((1,), -7, dtype=torch.int32),  # never looked at
            "q_start": torch.full((1,), -7, dtype=torch.int32),
        }
        self.inputs = {name: live.get(name, neutral.get(name)) for name in OP_INPUTS}
        self.is_live = {name: name in live for name in OP_INPUTS}
        y = (*live["q"].shape[:3], case.V)
        self.outputs = {"y": torch.full(y, torch.nan, dtype=dtype)}
        if case.lse:
            self.outputs["lse"] = torch.full((case.B, case.H, case.S), torch.nan)
        self.tensors = self.inputs | self.outputs

    def descs(self) -> list[TensorDesc]:
        return [desc(t.shape, TYPE_OF[t.dtype]) for t in self.tensors.values()]

    def profile(self, case: Case) -> list[DynamicTensorDesc]:
        """From 1 to twice the case's sizes."""
        letters = dict(
            zip(NAMES, ("BHSD", "BGTD", "BGTV", "BHST", "B", "B", "BHSV", "BHS"), strict=True)
        )
        if case.layout:
            letters |= {"q": "BSHD", "y": "BSHV"}
        profile = []
        for (name, tensor), one in zip(self.tensors.items(), self.descs(), strict=True):
            # A mask's dimension of 1 stays 1, and so do inputs that are not live.
            free = [
                letter in "BST"
                and self.is_live.get(name, True)
                and not (name == "attn_mask" and n == 1)
                for letter, n in zip(letters[name], tensor.shape, strict=True)
            ]
            least = [1 if f else n for f, n in zip(free, tensor.shape, strict=True)]
            most = [2 * n if f else n for f, n in zip(free, tensor.shape, strict=True)]
            one.dims = Dims.of([-1 if f else n for f, n in zip(free, tensor.shape, strict=True)])
            ends = (Dims.of(least), Dims.of(most), Dims.of(tensor.shape))
            profile.append(DynamicTensorDesc(one, *ends))
        return profile


def execute(plugin: Plugin, node: Node, workspace_bytes: int) -> dict[str, torch.Tensor]:
    """One step of an engine; all that lies around tensors and workspace is guarded."""
    guarded = {name: Guarded(tensor) for name, tensor in node.tensors.items()}
    space = Guarded(torch.full((workspace_bytes,), 0xFF, dtype=torch.uint8))
    plugin.shape_change(node.descs())
    addresses = [one.tensor.data_ptr() for one in guarded.values()]
    plugin.enqueue(node.descs(), addresses, space.tensor.data_ptr() if workspace_bytes else 0)
    for one in (*guarded.values(), space):
        one.check()
    return {name: guarded[name].tensor for name in node.outputs}


def check_outputs(outputs: dict[str, torch.Tensor], case: Case, tensors, attributes) -> None:
    assert_within_budget(outputs["y"], tensors, attributes)
    if case.lse:
        expected = oracle(tensors, attributes)[1].float()
        torch.testing.assert_close(outputs["lse"], expected, rtol=1e-5, atol=4e-5)


@pytest.mark.parametrize("name", RUNS)
def test_an_engine_computes_what_the_oracle_computes(driver, name):
    case = CASES[name]
    dtype, sm = RUNS[name]
    if UNDER_ASAN:
        dtype, case = torch.float32, dataclasses.replace(case, softmax_precision=1)
    sm_count = 16 if name.startswith(("long", "decode", "mla")) else 2  # 16: keys are split
    driver.set_device(sm, sm_count)
    node = Node(case, dtype)
    built = driver.of_attributes(dataclasses.asdict(node.attributes))
    profile = node.profile(case)
    assert all(built.supports_format(i, profile) for i in range(len(profile)))
    built.configure(profile)
    workspace_bytes, tactics = built.workspace(profile), built.tactics()
    plugin = built.through_an_engine().attach()
    del built
    for tactic in (tactics if case.S == 1 else tactics[:1]) + [0]:
        plugin.set_tactic(tactic)
        outputs = execute(plugin, node, workspace_bytes)
        check_outputs(outputs, case, case.tensors(dtype), node.attributes)
    if sm_count == 16 and not UNDER_ASAN:
        assert len(tactics) > 1


@needs_real_kernels
def test_a_mask_may_have_the_type_of_the_queries(driver):
    case = CASES["mask_float_mqa_bhsd"]
    node = Node(case, torch.float16)
    node.tensors["attn_mask"] = node.inputs["attn_mask"] = node.inputs["attn_mask"].half()
    plugin = driver.of_attributes(dataclasses.asdict(node.attributes))
    plugin.configure(node.profile(case))
    outputs = execute(plugin, node, plugin.workspace(node.profile(case)))
    tensors = case.tensors(torch.float16)
    tensors["attn_mask"] = tensors["attn_mask"].half().float()
    check_outputs(outputs, case, tensors, node.attributes)


@needs_real_kernels
def test_on_a_larger_gpu_an_engine_stays_in_its_workspace(driver):
    """Hardware-compatible engines run where more SMs would make more parts of the keys."""
    case = CASES["long_decode"]
    node, profile = Node(case, torch.float16), Node(case, torch.float16).profile(case)
    driver.set_device(86, 1)
    built = driver.of_attributes(dataclasses.asdict(node.attributes))
    built.configure(profile)
    small = built.workspace(profile)
    driver.set_device(90, 132)
    there = driver.of_attributes(dataclasses.asdict(node.attributes))
    there.configure(profile)
    assert there.workspace(profile) > small
    plugin = built.through_an_engine().attach()
    plugin.configure(profile)
    assert plugin.workspace(profile) == small
    for tactic in plugin.tactics():
        plugin.set_tactic(tactic)
        execute(plugin, node, small)


def test_a_failed_run_is_logged(driver):
    case = CASES["plain_mqa_bhsd"]
    node = Node(case, torch.float32)
    plugin = driver.of_attributes(dataclasses.asdict(node.attributes)).attach()
    addresses = [tensor.data_ptr() for tensor in node.tensors.values()]
    if not UNDER_ASAN:  # the naive kernels check no sizes
        with pytest.raises(RefusedError, match=r"a.node, enqueue: B \(batch\) is 0"):
            plugin.enqueue(node.descs(), addresses, 0)
        plugin.shape_change(node.descs())
        with pytest.raises(RefusedError, match=r"a.node, enqueue: q at 0x.* is not aligned to 16"):
            plugin.enqueue(node.descs(), [addresses[0] + 4, *addresses[1:]], 0)
    bad = node.descs()
    bad[1] = desc((9, 9, 9, 9), "float32")
    with pytest.raises(RefusedError, match="onShapeChange: k is"):
        plugin.shape_change(bad)
    with pytest.raises(RefusedError, match=r"a\.node, enqueue: "):  # not with the shapes before
        plugin.enqueue(node.descs(), addresses, 0)


# Registration


FAKE_TENSORRT = """
import _ctypes, ctypes, shutil, sys
fake, plugin, copy = sys.argv[1:]
def counts():
    return tensorrt.registered_now(), tensorrt.registered_ever()
def opened(path):
    return ctypes.CDLL(path)
tensorrt = opened(fake)
one = opened(plugin)
print(*counts())
shutil.copy(plugin, copy)
two = opened(copy)  # the same plugin from another place
print(*counts())
count = ctypes.c_int32()
two.getCreators(ctypes.byref(count))  # not registered by this one
print(*counts())
one.getCreators(ctypes.byref(count))  # loadLibrary() registers what it is given
print(*counts(), count.value)
three = opened(plugin)
print(*counts())
for library in (one, two, three):
    _ctypes.dlclose(library._handle)
again = opened(plugin)
print(*counts())
_ctypes.dlclose(again._handle)
print(*counts())
"""


@pytest.mark.skipif(not UNDER_ASAN, reason="emulated kernels stay loaded")
def test_opening_the_library_registers_it_once(tmp_path):
    """With a registry of the major version that the plugin is compiled for."""
    libraries = [trt_driver.fake_tensorrt(), driver_library(), tmp_path / "copy.so"]
    command = [sys.executable, "-c", FAKE_TENSORRT, *libraries]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 1", "1 1", "1 1", "0 1 1", "0 1", "1 2", "0 2"]


@pytest.mark.skipif(UNDER_ASAN, reason="this is it")
def test_all_of_this_under_asan():
    # With libstdc++, which throws: AddressSanitizer looks for it as the process starts.
    libraries = [library_of_compiler(name) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(map(Path.is_file, libraries)):
        pytest.skip("g++ has no AddressSanitizer")
    driver_library(under_asan=True)  # here: g++ is not to run with it
    environment = os.environ | {
        "FASTMQA_TRT_DRIVER": "asan",
        "LD_PRELOAD": " ".join(map(str, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own; see the test above
    }
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    command += [__file__, str(Path(__file__).with_name("test_trt_fields.py"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[:6000]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100


def library_of_compiler(name: str) -> Path:
    command = ["g++", f"-print-file-name={name}"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
