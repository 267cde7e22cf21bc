# SPDX-License-Identifier: MIT
"""onnxruntime with our library: the built one, in the newest onnxruntime and in the oldest.

`test_all_of_this_in_the_oldest_onnxruntime` runs this file once more with that.
"""

import concurrent.futures
import ctypes
import dataclasses
import itertools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import custom_op
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from budgets import assert_within_budget, oracle
from cases import CASES, HALF_SOFTMAX_CASES, KERNEL_CASES, Case
from onnx import TensorProto, helper

from fastmqa_export import plugins
from fastmqa_export.builtin import BuiltinOptions, create
from fastmqa_export.compare import ONNXRUNTIME, WITH_KERNEL, compare
from fastmqa_export.config import AttentionAttributes
from fastmqa_export.errors import ConfigError, KernelError, MissingDependencyError
from fastmqa_export.pipeline import export_source
from fastmqa_export.runtime import OnnxModel, create_session

OLDEST = "1.28.0"
ROOT = Path(__file__).parents[1]
KEPT = ROOT / "tests" / "data"
IS_OLDEST = onnxruntime.__version__ == OLDEST

try:
    LIBRARY = plugins.ort_library_path()
except MissingDependencyError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

BY_NAME = {case.name: case for case in KERNEL_CASES}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: The oldest onnxruntime takes each case in one type: the rest is the same kernel's affair.
EVERY = list(zip((case.name for case in CASES), itertools.cycle(DTYPES), strict=False))
if not IS_OLDEST:
    EVERY += [x for x in itertools.product(BY_NAME, ("float32", "float16")) if x not in EVERY]
CASE = Case(name="plain", B=2, H=6, Hkv=2, S=5, T=11, D=16, V=24)
CASE_WITH_LSE = dataclasses.replace(CASE, lse=True)


def session_of(case: Case, dtype=torch.float32, **options):
    model = custom_op.single_node(case.attributes(), case.tensors(dtype))
    return custom_op.create(model, LIBRARY, **options)


def run(session, case: Case, dtype=torch.float32):
    return custom_op.run(session, case.attributes(), case.tensors(dtype, poison=True))


# Numbers


def check(case: Case, dtype: torch.dtype) -> None:
    """The case is within the budget, with NaN in its padding, and repeats bit by bit."""
    session = session_of(case, dtype)
    y, *lse = run(session, case, dtype)
    tensors, attributes = case.tensors(dtype), case.attributes()
    assert_within_budget(y, tensors, attributes)
    if lse:
        tolerance = 2**-10 if case.softmax_precision == 10 else 1e-5
        expected = oracle(tensors, attributes)[1].float()
        torch.testing.assert_close(lse[0], expected, rtol=tolerance, atol=4 * tolerance)
    assert torch.equal(run(session, case, dtype)[0], y)


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_every_case_is_within_the_budget(name, dtype):
    check(BY_NAME[name], DTYPES[dtype])


@pytest.mark.parametrize("case", HALF_SOFTMAX_CASES, ids=lambda case: case.name)
def test_the_softmax_in_float16_is_within_the_budget(case):
    check(case, torch.float16)


def test_a_mask_may_have_the_type_of_q():
    case = dataclasses.replace(CASE, mask="float", mask_shape="ST")
    tensors, attributes = case.tensors(torch.float16), case.attributes()
    tensors["attn_mask"] = tensors["attn_mask"].half()
    session = custom_op.create(custom_op.single_node(attributes, tensors), LIBRARY)
    assert_within_budget(custom_op.run(session, attributes, tensors)[0], tensors, attributes)


def test_the_file_of_version_1_loads_and_means_the_same():
    session = custom_op.create(onnx.load(KEPT / "fused_attention_v1.onnx"), LIBRARY)
    arrays = dict(np.load(KEPT / "fused_attention_v1.npz"))
    expected = arrays.pop("y")
    np.testing.assert_allclose(session.run(["y"], arrays)[0], expected, rtol=1e-5, atol=1e-6)


def test_inputs_need_no_alignment():
    tensors = CASE.tensors(torch.float32)
    arrays = {}
    for name, tensor in tensors.items():
        memory = np.empty(tensor.numel() + 1, np.float32)
        arrays[name] = memory[1:].reshape(tensor.shape)
        arrays[name][:] = tensor
    session = session_of(CASE)
    assert np.array_equal(session.run(["y"], arrays)[0], run(session, CASE)[0])


@pytest.mark.parametrize("empty", ["B", "S"])
def test_no_queries_give_no_output(empty):
    case = dataclasses.replace(CASE, lse=True, **{empty: 0})
    y, lse = run(session_of(CASE_WITH_LSE), case)
    assert y.shape == (case.B, case.H, case.S, case.V)
    assert lse.shape == (case.B, case.H, case.S)


# Which implementation runs


def nodes_of(session) -> dict[str, list[str]]:
    """Op types by provider."""
    assigned = session.get_provider_graph_assignment_info()
    return {x.ep_name: [node.op_type for node in x.get_nodes()] for x in assigned}


def test_the_library_comes_before_the_function_in_the_file():
    model = custom_op.single_node(CASE.attributes(), CASE.tensors(torch.float32))
    record = {"record_ep_graph_assignment_info": "1"}
    assert nodes_of(custom_op.create(model, LIBRARY, **record)) == {
        "CPUExecutionProvider": ["FusedAttention"]
    }
    without = nodes_of(custom_op.create(model, None, **record))["CPUExecutionProvider"]
    assert "FusedAttention" not in without
    assert without


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "case",
    [
        CASE_WITH_LSE,
        dataclasses.replace(CASE_WITH_LSE, name="bshd", layout=1),
        dataclasses.replace(CASE, name="values_in_k", values_in_k=True, D=24, V=16),
    ],
    ids=lambda case: case.name,
)
def test_onnxruntime_learns_the_shapes_of_the_outputs(case, dynamic):
    tensors = case.tensors(torch.float32)
    model = custom_op.single_node(case.attributes(), tensors, dynamic=dynamic)
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    told = {x.name: x.shape for x in custom_op.create(model, LIBRARY).get_outputs()}
    q = ["q0", "q1", "q2"] if dynamic else list(tensors["q"].shape[:3])
    columns = case.V if case.values_in_k or not dynamic else "v3"
    assert told.pop("y") == [*q, columns]
    assert told == ({"lse": [q[0], *(q[:0:-1] if case.layout else q[1:])]} if case.lse else {})


def test_unknown_dimensions_stay_unknown():
    """A name that onnxruntime does not know would make two sizes one."""
    model = custom_op.single_node(CASE.attributes(), CASE.tensors(torch.float32))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.input[0].type.tensor_type.shape.dim[2].Clear()
    session = custom_op.create(model, LIBRARY)
    assert run(session, CASE)[0].shape == (2, 6, 5, 24)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert run(custom_op.create(model, LIBRARY), CASE)[0].shape == (2, 6, 5, 24)


# Threads and sessions

LARGER = [
    dataclasses.replace(BY_NAME["falcon_71_1"], name="falcon", S=40, T=400),
    dataclasses.replace(BY_NAME["long_decode"], name="decode", T=2000, kv_lengths=(1999, 700)),
    dataclasses.replace(BY_NAME["mla_576_512"], name="latent", S=3, T=300),
]


@pytest.mark.parametrize("case", LARGER, ids=lambda case: case.name)
def test_the_number_of_threads_changes_no_bit(case):
    (one, *_), *others = (run(session_of(case, threads=n), case) for n in (1, 2, 5))
    assert_within_budget(one, case.tensors(torch.float32), case.attributes())
    assert all(torch.equal(other[0], one) for other in others)


def test_sessions_and_their_runs_are_independent():
    """Two sessions per case, one of them shared by two threads, while others come and go."""
    expected = [run(session_of(case), case)[0] for case in LARGER]
    shared = [session_of(case, threads=2) for case in LARGER]
    stop = threading.Event()

    def keep_running(i: int, own: bool) -> int:
        session = session_of(LARGER[i], threads=2) if own else shared[i]
        for count in itertools.count(1):
            assert torch.equal(run(session, LARGER[i])[0], expected[i])
            if stop.is_set():
                return count

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        futures = [
            pool.submit(keep_running, i, own)
            for i, own in itertools.product(range(2), (True, False, False))
        ]
        try:
            for _ in range(20):
                short = session_of(CASE, threads=2)
                assert torch.isfinite(run(short, CASE)[0]).all()
                del short
        finally:
            stop.set()
        assert min(future.result() for future in futures) >= 1


# The cache


@pytest.fixture(scope="module")
def source():
    return create("mqa", BuiltinOptions(hidden=32, heads=4), torch.float32)


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_source(source, path, "static")
    return path


def test_decoding_writes_the_cache_in_place(exported, capfd):
    """Past and present are one buffer; onnxruntime warns when it copies one to the other."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(LIBRARY))
    session = onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    model, plain = OnnxModel(session), OnnxModel(create_session(exported))
    generator = np.random.default_rng(0)
    for each in (model, plain):
        each.reset(2, 64)
    addresses = {name: model.buffer_address(name) for name in model.cache_names}
    for tokens in (7, 1, 1, 3):
        x = generator.standard_normal((2, tokens, 32), np.float32)
        np.testing.assert_allclose(model.step(x), plain.step(x), rtol=1e-4, atol=1e-5)
        for each in (model, plain):
            each.advance([tokens, tokens])
    assert addresses == {name: model.buffer_address(name) for name in model.cache_names}
    for name in addresses:
        np.testing.assert_allclose(model.cache(name), plain.cache(name), rtol=1e-4, atol=1e-5)
    assert "in-place optimization not activated" not in capfd.readouterr().err


def test_compare_judges_the_kernel_beside_the_function(source, exported):
    comparison = compare(source, exported, library=LIBRARY, threads=1)
    assert comparison.passed, comparison.reasons
    rows = [(row.runtime, row.output, row.cases) for row in comparison.outputs]
    functions, kernels = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert {runtime for runtime, *_ in functions} == {ONNXRUNTIME}
    assert kernels == [(WITH_KERNEL, *rest) for _, *rest in functions]


# Bad input

#: Values of attributes, and what is said of them.
BAD_VALUES = {
    "infinite_scale": ({"scale": float("inf")}, "scale=inf is not finite"),
    "causal_2": ({"is_causal": 2}, "is_causal=2 is neither 0 nor 1"),
    "window": ({"window_left": -2}, "window_left=-2, window_right=-1: a window is a number of"),
    "causal_window": ({"is_causal": 1, "window_right": 3}, "is_causal=1 with window_right=3"),
    "softcap": ({"softcap": -1.0}, "softcap=-1 is neither 0"),
    "softcap_nan": ({"softcap": float("nan")}, "softcap=nan is neither 0"),
    "precision": ({"softmax_precision": 16}, "softmax_precision=16 is neither 1"),
    "layout": ({"layout": 2}, "layout=2 is neither 0"),
    "unknown_feature": ({"features": 32}, r"features=32 has unknown bits 0x20; .* update the"),
    "v_head_size": ({"v_head_size": 16}, "v_head_size=16 with features=0: it is the head size"),
    "values_in_k": ({"features": 8}, "v_head_size=0 with features=8"),
}
#: The same of what ONNX tells apart and Python does not; None: left out.
BAD_ATTRIBUTES = BAD_VALUES | {
    "no_scale": ({"scale": None}, "attribute scale is missing"),
    "integer_scale": ({"scale": 1}, "attribute scale is not a float"),
    "causal_float": ({"is_causal": 1.0}, "attribute is_causal is not an int"),
    "huge_window": ({"window_left": 2**31}, "window_left=2147483648; attributes are numbers of 32"),
    "softcap_text": ({"softcap": "1"}, "attribute softcap is not a float"),
    "softcap_list": ({"softcap": [1.0]}, "attribute softcap is not a float"),
    "layout_list": ({"layout": [1]}, "attribute layout is not an int"),
}


@pytest.mark.parametrize("name", BAD_ATTRIBUTES)
def test_bad_attributes_are_refused_when_the_file_is_loaded(name):
    changes, message = BAD_ATTRIBUTES[name]
    model = custom_op.single_node(CASE.attributes(), CASE.tensors(torch.float32))
    (node,) = model.graph.node
    node.name = "layer 7"
    kept = [a for a in node.attribute if a.name not in changes]
    kept += [helper.make_attribute(n, x) for n, x in changes.items() if x is not None]
    del node.attribute[:]
    node.attribute.extend(kept)
    with pytest.raises(Exception, match=f"fastmqa::FusedAttention node 'layer 7': {message}"):
        custom_op.create(model, LIBRARY)


@pytest.mark.parametrize("name", BAD_VALUES)
def test_what_the_library_refuses_config_refuses_too(name):
    with pytest.raises(ConfigError):
        AttentionAttributes(**{"scale": 1.0, **BAD_VALUES[name][0]})


MASKED = dataclasses.replace(CASE, mask="bool")
WITH_LENGTHS = dataclasses.replace(CASE, kv_lengths=(3, 4))
IN_K = dataclasses.replace(CASE, values_in_k=True, V=16)

#: A good case, the shape that one of its tensors gets, and what is said of it.
BAD_SHAPES = {
    "q_rank": (CASE, "q", (2, 6, 5), r"q has rank 3; it must be \(B, H, S, D\)"),
    "k_rank": (CASE, "k", (2, 2, 11, 16, 1), r"k has rank 5; it must be \(B, Hkv, T, D\)"),
    "k_batch": (CASE, "k", (3, 2, 11, 16), r"k is \(3, 2, 11, 16\): its dimension 0 is B of the"),
    "k_columns": (CASE, "k", (2, 2, 11, 24), r"k is .*: its dimension 3 is D of the .*, 16"),
    "v_heads": (CASE, "v", (2, 3, 11, 24), r"v is .*: its dimension 1 is Hkv of the .*, 2"),
    "v_keys": (CASE, "v", (2, 2, 10, 24), r"v is .*: its dimension 2 is T of the .*, 11"),
    "v_columns": (CASE, "v", (2, 2, 11, 20), r"head sizes D=16, V=20: both must be multiples of 8"),
    "heads": (CASE, "q", (2, 5, 5, 16), r"H=5 query heads are not a multiple of Hkv=2"),
    "no_keys": (IN_K, "k", (2, 2, 0, 16), r"T \(keys\) is 0; it must be at least 1"),
    "values_in_k": (
        dataclasses.replace(IN_K, V=24, D=32),
        "k",
        (2, 2, 11, 16),
        r"k is .*: its dimension 3 is D of the .*, 32",
    ),
    "mask_rank": (MASKED, "attn_mask", (6, 5, 11), r"attn_mask has rank 3; it must be \(B, H, S,"),
    "mask_keys": (
        MASKED,
        "attn_mask",
        (2, 6, 5, 10),
        r"attn_mask .* dimension 3 is T .*, 11, or 1",
    ),
    "mask_heads": (
        MASKED,
        "attn_mask",
        (2, 2, 5, 11),
        r"attn_mask .* dimension 1 is H .*, 6, or 1",
    ),
    "lengths": (
        WITH_LENGTHS,
        "kv_lengths",
        (3,),
        r"kv_lengths is \(3\): its dimension 0 is B .*, 2",
    ),
    "lengths_rank": (
        WITH_LENGTHS,
        "kv_lengths",
        (2, 1),
        r"kv_lengths has rank 2; it must be \(B,\)",
    ),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_bad_shapes_are_refused_when_the_node_runs(name):
    case, tensor, shape, message = BAD_SHAPES[name]
    tensors = case.tensors(torch.float32)
    model = custom_op.single_node(case.attributes(), tensors)
    model.graph.node[0].name = "layer 7"
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    session = custom_op.create(model, LIBRARY)
    tensors[tensor] = torch.ones(shape, dtype=tensors[tensor].dtype)
    with pytest.raises(Exception, match=f"fastmqa::FusedAttention node 'layer 7': {message}"):
        session.run(None, {name: x.numpy() for name, x in tensors.items()})
    good = {name: x.numpy() for name, x in case.tensors(torch.float32).items()}
    assert np.isfinite(session.run(["y"], good)[0]).all()


@pytest.mark.parametrize("name", ["k_batch", "mask_rank", "lengths"])
def test_bad_shapes_that_the_file_states_are_refused_when_it_is_loaded(name):
    case, tensor, shape, message = BAD_SHAPES[name]
    tensors = case.tensors(torch.float32)
    tensors[tensor] = torch.ones(shape, dtype=tensors[tensor].dtype)
    model = custom_op.single_node(case.attributes(), tensors, dynamic=False)
    del model.functions[:]
    with pytest.raises(Exception, match=message):
        custom_op.create(model, LIBRARY)


BAD_TYPES = {
    "k": (CASE, TensorProto.FLOAT16, "k is float16; it must be float32 as q"),
    "v": (CASE, TensorProto.DOUBLE, "v is float64; it must be float32 as q"),
    "attn_mask": (MASKED, TensorProto.INT32, "attn_mask is int32; it must be bool, float32 or"),
    "kv_lengths": (WITH_LENGTHS, TensorProto.INT64, r"'tensor\(int64\)' of input parameter"),
}


@pytest.mark.parametrize("name", BAD_TYPES)
def test_bad_types_are_refused_when_the_file_is_loaded(name):
    case, number, message = BAD_TYPES[name]
    model = custom_op.single_node(case.attributes(), case.tensors(torch.float32))
    for value in model.graph.input:
        if value.name == name:
            value.type.tensor_type.elem_type = number
    with pytest.raises(Exception, match=message):
        custom_op.create(model, LIBRARY)


def test_a_second_output_needs_its_feature():
    model = custom_op.single_node(CASE_WITH_LSE.attributes(), CASE.tensors(torch.float32))
    for attribute in model.graph.node[0].attribute:
        if attribute.name == "features":
            attribute.i = 0
    with pytest.raises(Exception, match="it has the output lse, and features=0 lacks bit 16"):
        custom_op.create(model, LIBRARY)


def test_an_output_without_a_name_is_not_wanted():
    model = custom_op.single_node(CASE_WITH_LSE.attributes(), CASE.tensors(torch.float32))
    model.graph.node[0].output[1] = ""
    del model.graph.output[1]
    expected = run(session_of(CASE), CASE)
    assert torch.equal(run(custom_op.create(model, LIBRARY), CASE)[0], expected[0])


@pytest.mark.parametrize("number", [5, 6])
def test_all_six_inputs_are_needed(number):
    model = custom_op.single_node(CASE.attributes(), CASE.tensors(torch.float32))
    inputs = model.graph.node[0].input
    if number == 5:
        del inputs[5]
    else:
        inputs[5] = ""
    with pytest.raises(Exception, match=r"min=6, max=6|input 5 .* has an empty string"):
        custom_op.create(model, LIBRARY)


def test_a_half_softmax_is_for_float16_only():
    case = dataclasses.replace(CASE, softmax_precision=10)
    with pytest.raises(Exception, match=r"softmax_precision 10 with float32"):
        run(session_of(case), case)


def test_a_file_that_is_no_library_is_refused(exported, tmp_path):
    (tmp_path / "empty.so").touch()
    with pytest.raises(KernelError, match=r"onnxruntime cannot load the library .*empty\.so"):
        create_session(exported, library=tmp_path / "empty.so")


# The library itself


def test_the_library_shows_one_function():
    lines = subprocess.run(
        ["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.split()[-1] for line in lines] == ["RegisterCustomOps"]


def test_an_onnxruntime_that_is_too_old_is_told():
    """It knows the first version of its API and no newer one."""
    (runtime,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)
    version = ctypes.create_string_buffer(b"1.0.0")

    class ApiBase(ctypes.Structure):
        _fields_ = [("get_api", get_api), ("get_version", get_version)]

    get_base = ctypes.CDLL(str(runtime)).OrtGetApiBase
    get_base.restype = ctypes.POINTER(ApiBase)
    real = get_base().contents
    old = ApiBase(
        get_api(lambda number: real.get_api(number) if number == 1 else None),
        get_version(lambda: ctypes.addressof(version)),
    )
    register = ctypes.CDLL(str(LIBRARY)).RegisterCustomOps
    register.argtypes, register.restype = (
        (ctypes.c_void_p, ctypes.POINTER(ApiBase)),
        ctypes.c_void_p,
    )
    status = register(None, ctypes.byref(old))
    # The first members of OrtApi: CreateStatus, GetErrorCode, GetErrorMessage.
    functions = ctypes.cast(real.get_api(1), ctypes.POINTER(ctypes.c_void_p))
    get_message = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(functions[2])
    message = get_message(status).decode()
    assert re.fullmatch(
        r"libfastmqa_ort\.so was built for version \d+ of onnxruntime's API, and this is "
        r"onnxruntime 1\.0\.0, which is older: upgrade onnxruntime, or build the library .*",
        message,
    )


# The oldest onnxruntime


@pytest.fixture(scope="session")
def oldest() -> Path:
    """A folder with that onnxruntime alone."""
    folder = ROOT / "build" / f"onnxruntime-{OLDEST}"
    if not (folder / "onnxruntime").is_dir():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        pip += ["--no-deps", "--target", str(folder), f"onnxruntime=={OLDEST}"]
        installed = subprocess.run(pip, capture_output=True, text=True)
        if installed.returncode != 0:
            pytest.skip(f"onnxruntime {OLDEST} cannot be installed: {installed.stderr[-200:]}")
    return folder


@pytest.mark.skipif(IS_OLDEST, reason="this is the run with it")
def test_all_of_this_in_the_oldest_onnxruntime(oldest):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(oldest), str(ROOT)])}
    look = "import onnxruntime; print(onnxruntime.__version__)"
    version = subprocess.run(
        [sys.executable, "-c", look], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert version == OLDEST
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
