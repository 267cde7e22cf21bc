# SPDX-License-Identifier: MIT
"""What is said of engines without a GPU: header, record, and why layers are not listed."""

import json
import sys
import types
from pathlib import Path

import pytest
from fakes import write_plan, write_record

from fastmqa_export import plugins
from fastmqa_export.errors import EngineError
from fastmqa_export.inspect_any import inspect_any
from fastmqa_export.plan_header import PlanHeader, read_header


@pytest.fixture
def plan(tmp_path) -> Path:
    return write_plan(tmp_path / "m.plan")


@pytest.fixture(autouse=True)
def no_tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)


def test_header_and_record(plan):
    write_record(
        plan,
        model={"m.onnx": "a" * 64, "m.onnx.data": "b" * 64},
        capacity=2048,
        profiles={
            "prefill": {"batch": (1, 1, 1), "sequence": (1, 128, 512)},
            "decode": {"batch": (1, 4, 8), "sequence": (1, 1, 1)},
        },
    )
    info, text = inspect_any(plan)
    assert (info["backend"], info["version"], info["bytes"]) == ("tensorrt", "10.14.1.48", 128)
    assert info["made_from"]["sms"] == (75,)
    assert info["problems"] == []
    assert json.loads(json.dumps(info))["made_from"]["capacity"] == 2048
    assert text.splitlines() == [
        "m.plan: tensorrt 10.14.1.48, 128 bytes",
        "for SM75",
        "from m.onnx (aaaaaaaaaaaa…)",
        "from m.onnx.data (bbbbbbbbbbbb…)",
        "plugin: libfastmqa_trt.so (cccccccccccc…)",
        "KV cache of 2048 tokens, written in place",
        "prefill: batch 1…1 (best 1), sequence 1…512 (best 128)",
        "decode: batch 1…8 (best 4), sequence 1…1 (best 1)",
        "layers: not listed: the Python package tensorrt, whose inspector lists them, is not "
        "installed",
    ]


def test_an_engine_of_another_tool(plan):
    info, text = inspect_any(plan.rename(plan.with_name("model.bin")))  # known by its first bytes
    assert info["made_from"] is None
    assert "no record beside it says what it was made from" in text


def test_a_real_engine_of_tensorrt_rtx(tmp_path):
    """The header of a file that NVIDIA's builder wrote, and what its runtime says without a GPU."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float16, (1, 8))
    network.mark_output(network.add_activation(x, trt.ActivationType.RELU).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    plan = tmp_path / "m.engine"
    plan.write_bytes(builder.build_serialized_network(network, config))
    assert read_header(plan) == PlanHeader("tensorrt-rtx", trt.__version__, plan.stat().st_size)
    info, text = inspect_any(plan)
    assert info["problems"] == []
    assert info["layers"] is not None or "tensorrt_rtx cannot load it here: " in text
    plan.write_bytes(plan.read_bytes()[:-1])
    info, text = inspect_any(plan)
    size = plan.stat().st_size
    assert info["problems"] == [f"{size} bytes of {size + 1}: it is cut short, or changed"]
    assert f"problem: {size} bytes of" in text


def test_layers_by_the_inspector(plan, monkeypatch):
    """With a stand-in for the module: TensorRT lists names, or objects if the engine has them."""
    loaded = []
    layers = [{"Name": f"layer {i}"} for i in range(40)] + ["attention"]
    inspector = types.SimpleNamespace(
        get_engine_information=lambda _: json.dumps({"Layers": layers})
    )
    engine = types.SimpleNamespace(create_engine_inspector=lambda: inspector)
    runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda content: engine)
    trt = types.ModuleType("tensorrt")
    trt.__version__ = "10.15.0"
    trt.ILogger = type("ILogger", (), {"ERROR": 1})
    trt.LayerInformationFormat = types.SimpleNamespace(JSON=1)
    trt.Runtime = lambda log: runtime
    registry = types.SimpleNamespace(load_library=loaded.append, get_creator=lambda *_: "ours")
    trt.get_plugin_registry = lambda: registry
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(plugins, "trt_plugin_path", lambda: Path("p.so"))
    info, text = inspect_any(plan)
    assert loaded == ["p.so"]
    assert info["layers"] == [*(f"layer {i}" for i in range(40)), "attention"]
    assert "layers: 41\n  layer 0\n" in text
    assert "layer 29\n  … all with --json" in text


def test_a_changed_engine_is_a_problem(plan):
    write_record(plan)
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    info, text = inspect_any(plan)
    assert info["made_from"] is None
    assert "problem: " in text and "is not the engine that m.plan.json describes" in text
    assert info["no_layers"] == "the file is damaged"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": b"PK\3\4"}, "it begins with b'PK"),
        ({"serialisation": 7}, "an engine of tensorrt with serialisation 7; this version knows 0"),
    ],
)
def test_files_that_are_no_engines(change, message, tmp_path):
    with pytest.raises(EngineError) as error:
        inspect_any(write_plan(tmp_path / "m.plan", **change))
    assert message in str(error.value)


def test_a_header_that_is_cut_short(plan):
    plan.write_bytes(plan.read_bytes()[:27])
    with pytest.raises(EngineError, match="is no engine of TensorRT, nor of TensorRT-RTX"):
        inspect_any(plan)
    plan.unlink()
    with pytest.raises(EngineError, match="cannot be read: No such file"):
        inspect_any(plan)
