# SPDX-License-Identifier: MIT
"""The benchmark's engines: the three files mean the same, and TensorRT's parser takes them."""

import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import check_tensorrt  # noqa: E402 (beside the scripts, not in the package)
import tensorrt_contenders  # noqa: E402 (likewise)
from tensorrt_contenders import Case, native_node, our_node  # noqa: E402 (likewise)

CASES = [
    Case(name="decode_gqa", B=2, H=8, Hkv=2, S=1, T=40, D=32, V=32),
    Case(name="prefill_mqa", B=1, H=4, Hkv=1, S=24, T=24, D=64, V=64, is_causal=True),
]

PARSE = """
import sys, tensorrt_rtx as trt
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
for path in sys.argv[1:]:
    network = builder.create_network()
    assert trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR)).parse_from_file(path), path
"""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_contenders_compute_the_same(case):
    feed = {name: x.half().numpy() for name, x in case.tensors(torch.float16).items()}
    results = []
    for model in (
        our_node(case, torch.float16, plugin=True),
        our_node(case, torch.float16, plugin=False),
        native_node(case, torch.float16),
    ):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        results.append(torch.from_numpy(session.run(["y"], feed)[0]))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=4e-3)


def test_only_the_plugins_file_names_the_plugin():
    names = {"plugin_namespace", "plugin_version"}
    for plugin in (True, False):
        (node,) = our_node(CASES[0], torch.float16, plugin=plugin).graph.node
        assert (names <= {a.name for a in node.attribute}) == plugin


def test_tensorrts_parser_takes_them(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx, whose parser this is")
    paths = []
    for case in CASES:
        for kind in tensorrt_contenders.KINDS[1:]:
            native = kind == tensorrt_contenders.NATIVE
            model = (
                native_node(case, torch.float16)
                if native
                else our_node(case, torch.float16, plugin=False)
            )
            paths.append(tmp_path / f"{case.name}_{kind.replace(' ', '_')}.onnx")
            paths[-1].write_bytes(model.SerializeToString())
    subprocess.run([sys.executable, "-c", PARSE, *map(str, paths)], check=True)


def test_a_copy_around_the_plugin_is_found():
    layers = [
        "node_fused_attention",
        "Reformatting CopyNode for Input Tensor 1 to node_fused_attention",
        "copy of present.0.key",
        "Reformatting CopyNode for Output Tensor 0 to node_linear",
    ]
    assert check_tensorrt.copies(layers) == layers[1:3]
