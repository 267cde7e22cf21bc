# SPDX-License-Identifier: MIT
"""A program for test_rtx.py: gives a file to TensorRT-RTX's ONNX parser and prints its log.

Arguments: the ONNX file, and who implements its op: "nobody", "python" (a creator that makes no
plugin), or the path of a plugin library. TensorRT-RTX runs no plugins, and its parser ends the
process once it has chosen one of a library: hence a program, which flushes each line.
"""

import sys
from pathlib import Path
from typing import Any

import onnx
import tensorrt_rtx as trt

from fastmqa_export.config import OP_DOMAIN, OP_NAME, OP_VERSION


class Log(trt.ILogger):
    def __init__(self) -> None:
        super().__init__()

    def log(self, severity: Any, message: str) -> None:
        print(message, flush=True)


class Creator(trt.IPluginCreatorV3One):
    def __init__(self) -> None:
        super().__init__()
        self.name, self.plugin_version, self.plugin_namespace = OP_NAME, str(OP_VERSION), OP_DOMAIN
        self.field_names = trt.PluginFieldCollection([])

    def create_plugin(self, name: str, fields: Any, phase: Any) -> None:
        print("create_plugin was called", flush=True)


def main(path: str, implementation: str) -> None:
    log = Log()
    registry = trt.get_plugin_registry()
    if implementation == "python":
        registry.register_creator(creator := Creator(), OP_DOMAIN)
        assert registry.get_creator(OP_NAME, str(OP_VERSION), OP_DOMAIN) is not None, creator
    elif implementation != "nobody":
        registry.load_library(implementation)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    model = onnx.load(Path(path))
    print("parsed:", parser.parse(model.SerializeToString()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
