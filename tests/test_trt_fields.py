# SPDX-License-Identifier: MIT
"""The TensorRT plugin's creator: fields of a node and of an engine, clones, timing cache IDs.

`test_trt_plugin.py` runs this file once more, with AddressSanitizer.
"""

import ctypes
import dataclasses
import gc
import math
import random
import re
import struct

import pytest
import trt_driver
from trt_driver import BUILD, FIELD_TYPES, RUNTIME, UNDER_ASAN, RefusedError, field

from fastmqa_export.config import (
    OP_DOMAIN,
    OP_NAME,
    OP_VERSION,
    PLUGIN_ATTRIBUTES,
    AttentionAttributes,
)
from fastmqa_export.errors import ConfigError

pytestmark = pytest.mark.skipif(trt_driver.missing() is not None, reason=trt_driver.missing() or "")

ATTRIBUTES = [f.name for f in dataclasses.fields(AttentionAttributes)]
DEFAULTS = {
    name: x if isinstance(x, float) else int(x)  # no enum
    for name, x in dataclasses.asdict(AttentionAttributes(scale=0.25)).items()
}
ENGINE_FIELDS = {"op_version": OP_VERSION, "sm_count": 2, "shared_bytes": 64 << 10}


@pytest.fixture
def driver():
    with trt_driver.driver_under_test() as driver:
        yield driver


def float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


def test_the_creator_names_the_attributes_of_config(driver):
    kinds = {int: FIELD_TYPES["INT32"], float: FIELD_TYPES["FLOAT32"]}
    assert driver.field_names() == [(name, kinds[type(x)]) for name, x in DEFAULTS.items()]


def test_the_plugin_is_called_as_config_says(driver):
    names = driver.of_attributes({"scale": 1.0}).names()
    assert names[:3] == [OP_DOMAIN, OP_NAME, str(OP_VERSION)]


def test_attributes_that_are_left_out_have_the_defaults_of_config(driver):
    assert driver.of_attributes({"scale": 0.25}).serialise() == DEFAULTS | ENGINE_FIELDS


def test_attributes_for_the_parser_are_ignored_in_a_node_only(driver):
    extra = [field(name, list(map(ord, x)), "CHAR") for name, x in PLUGIN_ATTRIBUTES.items()]
    given = [field("scale", 0.25), *extra]
    assert driver.create(given).serialise()["scale"] == 0.25
    in_engine = [field(n, x) for n, x in (DEFAULTS | ENGINE_FIELDS).items()]
    driver.create(in_engine, RUNTIME)
    with pytest.raises(RefusedError, match=r"field plugin_namespace is unknown; an engine has"):
        driver.create([*in_engine, *extra], RUNTIME)


BAD_FIELDS = {
    "scale_missing": ([], "field scale is missing"),
    "scale_double": ([field("scale", 1.0, "FLOAT64")], "scale is of type FLOAT64; it must be FLO"),
    "scale_int": ([field("scale", 1, "INT32")], "scale is of type INT32; it must be FLOAT32"),
    "layout_float": (
        [field("layout", 1.0, "FLOAT32")],
        "layout is of type FLOAT32; it must be INT",
    ),
    "layout_int64": ([field("layout", 1, "INT64")], "layout is of type INT64; it must be INT32"),
    "layout_int8": ([field("layout", 1, "INT8")], "layout is of type INT8; it must be INT32"),
    "two_values": ([field("layout", [1, 1])], "layout has 2 values; it must have one"),
    "no_value": ([field("layout", 1, length=0)], "layout has 0 values; it must have one"),
    "less_than_none": ([field("layout", 1, length=-1)], "layout has -1 values"),
    "huge_length": ([field("layout", 1, length=2**31 - 1)], "layout has 2147483647 values"),
    "null": ([field("layout", None, length=1)], "layout has 1 values at a null pointer"),
    "twice": ([field("layout", 1), field("layout", 1)], "field layout is given twice"),
    "unknown": ([field("sinks", 1)], "field sinks is unknown; a node has scale, is_causal"),
    "of_engines": ([field("op_version", 1)], "field op_version is unknown; a node has"),
    "other_case": ([field("Scale", 1.0, "FLOAT32")], "field Scale is unknown"),
    "huge_name": ([field("x" * 100_000, 1)], rf"field {'x' * 64} is unknown"),
    "no_name": ([field(None, 1)], "a field has no name"),
    "empty_name": ([field("", 1)], "field  is unknown"),
    "bit_32": ([field("features", 32)], r"features=32 has unknown bits 0x20; version 1 knows 1"),
    "sign_bit": ([field("features", -(2**31))], "unknown bits 0x80000000"),
    "window": ([field("window_left", -2)], "window_left=-2, window_right=-1: a window is a numbe"),
    "causal_and_window": (
        [field("is_causal", 1), field("window_right", 2)],
        "is_causal=1 with window_right=2: is_causal already means window_right=0",
    ),
    "causal_2": ([field("is_causal", 2)], "is_causal=2 is neither 0 nor 1"),
    "softcap": ([field("softcap", math.inf)], "softcap=inf is neither 0 (off) nor a positive"),
    "precision": ([field("softmax_precision", 16)], "softmax_precision=16 is neither 1 (FLOAT) n"),
    "layout": ([field("layout", 2)], "layout=2 is neither 0 (B, H, S, D) nor 1 (B, S, H, D)"),
    "v_head_size": ([field("v_head_size", 64)], "v_head_size=64 with features=0: it is the head"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields_are_refused_and_logged(driver, name):
    fields, message = BAD_FIELDS[name]
    if not name.startswith("scale"):
        fields = [*fields, field("scale", 0.5)]
    with pytest.raises(RefusedError) as refused:
        driver.create(fields)
    line = str(refused.value)
    assert line.startswith("error: fastmqa::FusedAttention a.node, createPlugin: ")
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), line)


def test_without_a_logger_of_its_own_the_process_has_one(driver):
    driver.library.driver_give_logger(False)
    assert driver.library.driver_create(None, None, BUILD) is None
    driver.library.driver_give_logger(True)
    said = driver.tensorrt.logged_by_process().decode()
    assert said == "fastmqa::FusedAttention , createPlugin: there is no list of fields"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_scale_that_is_not_finite_is_refused(driver, value):
    with pytest.raises(RefusedError, match=r"scale=-?(nan|inf) is not finite"):
        driver.of_attributes({"scale": value})


def test_no_list_of_fields_is_refused(driver):
    create = driver.library.driver_create
    for collection in (None, trt_driver.PluginFieldCollection(3, None)):
        for phase in (BUILD, RUNTIME):
            assert create(None, collection and ctypes.byref(collection), phase) is None
            assert "createPlugin: there is no list of fields" in driver.take_log()
    assert create(b"", ctypes.byref(trt_driver.PluginFieldCollection(-1, None)), BUILD) is None
    assert "there is no list of fields" in driver.take_log()


@pytest.mark.parametrize("name", [*DEFAULTS, *ENGINE_FIELDS])
def test_an_engine_has_every_field(driver, name):
    fields = [field(n, x) for n, x in (DEFAULTS | ENGINE_FIELDS).items() if n != name]
    with pytest.raises(RefusedError, match=rf"field {name} is missing; the engine was built by an"):
        driver.create(fields, RUNTIME)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"op_version": 2}, "the engine holds version 2 of the op and this plugin has version 1"),
        ({"sm_count": 0}, "sm_count=0, shared_bytes=65536 describe no GPU"),
        ({"shared_bytes": -1}, "describe no GPU; the engine is damaged"),
        ({"features": 64}, "unknown bits 0x40"),
    ],
    ids=["version", "no_sms", "no_shared_memory", "features"],
)
def test_a_damaged_engine_is_refused(driver, changed, message):
    fields = [field(n, x) for n, x in (DEFAULTS | ENGINE_FIELDS | changed).items()]
    with pytest.raises(RefusedError, match=message):
        driver.create(fields, RUNTIME)


def accepted_by_config(given: dict[str, int | float]) -> bool:
    try:
        AttentionAttributes(**given)
    except (ConfigError, TypeError):  # TypeError: no scale
        return False
    return True


def test_the_creator_accepts_exactly_what_config_accepts(driver):
    draw = random.Random(20261124)
    edges = [-(2**31), -2, -1, 0, 1, 2, 5, 8, 9, 10, 16, 31, 32, 64, 512, 2**31 - 1]
    likely = {
        "is_causal": [0, 1],
        "window_left": [-1, 0, 511],
        "window_right": [-1, 0, 7],
        "softmax_precision": [1, 10],
        "v_head_size": [0, 0, 512],
        "layout": [0, 1],
        "features": [0, 3, 8, 24, 31],
    }
    floats = [0.0, -0.0, 1e-45, 0.125, -2.0, 3.4e38, 50.0, 50.0, math.inf, -math.inf, math.nan]
    counts = {True: 0, False: 0}
    for _ in range(3000):
        names = draw.sample(ATTRIBUTES, draw.randint(0, len(ATTRIBUTES)))
        if draw.random() < 0.9:
            names = ["scale", *(name for name in names if name != "scale")]
        given = {}
        for name in names:
            if name in ("scale", "softcap"):
                given[name] = float32(draw.choice(floats[: 8 if draw.random() < 0.9 else None]))
            else:
                given[name] = draw.choice(edges if draw.random() < 0.05 else likely[name])
        expected = accepted_by_config(given)
        counts[expected] += 1
        if expected:
            plugin = driver.of_attributes(given)
            assert plugin.serialise() == DEFAULTS | given | ENGINE_FIELDS
            assert plugin.through_an_engine().serialise() == plugin.serialise()
        else:
            with pytest.raises(RefusedError):
                driver.of_attributes(given)
    assert min(counts.values()) > 500, counts


# Clones, engines, the timing cache


FULL = {
    **{"scale": 0.3, "is_causal": 0, "window_left": 7, "window_right": 3, "softcap": 30.0},
    **{"softmax_precision": 1, "v_head_size": 256, "layout": 1, "features": 31},
}


def test_clones_and_engines_hold_the_same_plugin(driver):
    plugin = driver.of_attributes(FULL)
    expected = {n: float32(x) if isinstance(x, float) else x for n, x in FULL.items()}
    copies = [plugin.clone(), plugin.clone().clone(), plugin.attach(), plugin.through_an_engine()]
    copies.append(copies[-1].attach().clone())
    names = plugin.names()
    del plugin
    gc.collect()
    for one in copies:
        assert one.serialise() == expected | ENGINE_FIELDS
        assert one.names() == names
        assert one.outputs == 2


@pytest.mark.parametrize("sm_count", [1, 100])
def test_an_engine_keeps_the_gpu_that_it_was_built_on(driver, sm_count):
    plugin = driver.of_attributes(FULL).through_an_engine()
    driver.set_device(80, sm_count)
    for one in (plugin.clone(), plugin.attach(), plugin.through_an_engine()):
        assert one.serialise()["sm_count"] == 2


def test_each_context_asks_for_its_gpu_once(driver):
    plugin = driver.of_attributes(FULL)
    assert plugin.serialise()["sm_count"] == 2
    driver.set_device(80, 7)
    attached = plugin.attach()
    driver.set_device(80, 9)
    found = [one.serialise()["sm_count"] for one in (plugin, plugin.clone(), attached)]
    assert found == [2, 2, 7]


@pytest.mark.parametrize(
    "changed",
    [
        {"scale": float32(0.3) + 2**-25},  # the next float
        {"is_causal": 1, "window_right": -1},
        {"window_left": 8},
        {"window_right": 2},
        {"softcap": 0.0},
        {"softmax_precision": 10},
        {"v_head_size": 512},
        {"layout": 0},
        {"features": 15},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_timings_are_shared_exactly_between_equal_attributes(driver, changed):
    timing_id = driver.of_attributes(FULL).names()[3]
    assert timing_id.startswith("kernels tests, op 1: scale=0.300000012 ")
    assert driver.of_attributes(FULL | changed).names()[3] != timing_id
    driver.set_device(80, 7)  # TensorRT adds the GPU itself
    assert driver.of_attributes(FULL).names()[3] == timing_id


@pytest.mark.skipif(not UNDER_ASAN, reason="memory is counted by AddressSanitizer")
def test_plugins_leave_no_memory_behind(driver):
    allocated = ctypes.CDLL(None).__sanitizer_get_current_allocated_bytes
    allocated.restype = ctypes.c_size_t

    def live() -> None:
        plugin = driver.of_attributes(FULL)
        plugin.clone().attach().through_an_engine().serialise()
        with pytest.raises(RefusedError):
            driver.of_attributes(FULL | {"layout": 7})

    live()
    gc.collect()
    before = allocated()
    for _ in range(50):
        live()
    gc.collect()
    assert allocated() - before < 50 * 200  # a plugin has more
