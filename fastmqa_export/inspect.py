# SPDX-License-Identifier: MIT
"""What an ONNX file holds, as far as attention is concerned."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import google.protobuf.message
import onnx

from fastmqa_export.config import (
    ALL_FEATURES,
    OP_DOMAIN,
    OP_INPUTS,
    OP_NAME,
    PLUGIN_ATTRIBUTES,
    Feature,
)
from fastmqa_export.errors import ModelFileError

_TYPE = onnx.TensorProto.DataType


def load_model(path: Path) -> onnx.ModelProto:
    """An ONNX file without its external weights.

    Raises:
        ModelFileError: if there is no such file, or it is no ONNX model.
    """
    if path.suffix in (".plan", ".engine", ".so"):
        raise ModelFileError(f"{path}: this version reads ONNX files, not engines or libraries")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelFileError(f"{path} {what}; give an .onnx file, as `export -o` writes it")
    try:
        model = onnx.load(path, load_external_data=False)
    except (google.protobuf.message.DecodeError, ValueError, OSError) as error:
        raise ModelFileError(
            f"{path} is no ONNX model, or a truncated one ({error}); export it again"
        ) from error
    if not model.graph.node or not model.opset_import:
        raise ModelFileError(f"{path} is no ONNX model: it holds no graph; export it again")
    return model


def fused_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The ``FusedAttention`` nodes of the main graph, in order."""
    return [n for n in model.graph.node if (n.domain, n.op_type) == (OP_DOMAIN, OP_NAME)]


def float_type(path: Path) -> str:
    """The type of weights and caches of an exported file: "float32", "float16" or "bfloat16".

    Raises:
        ModelFileError: if the file has no ``FusedAttention`` node, so is none of ours.
    """
    model = load_model(path)
    if not fused_nodes(model):
        raise ModelFileError(
            f"{path} has no {OP_DOMAIN}::{OP_NAME} node, so there is nothing to compare; export "
            "the model with `fastmqa-export export`"
        )
    names = {_TYPE.FLOAT: "float32", _TYPE.FLOAT16: "float16", _TYPE.BFLOAT16: "bfloat16"}
    for value in model.graph.output:
        if (name := names.get(value.type.tensor_type.elem_type)) is not None:
            return name
    raise ModelFileError(f"{path} has no output of type float32, float16 or bfloat16")


def inspect_file(path: Path) -> dict[str, Any]:
    """What `fastmqa-export inspect` shows, as plain values.

    Raises:
        ModelFileError: if it is no ONNX model.
    """
    model = load_model(path)
    has_function = any((f.domain, f.name) == (OP_DOMAIN, OP_NAME) for f in model.functions)
    nodes = [_describe_node(node) for node in fused_nodes(model)]
    external = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    problems = [f"{node['name']}: {problem}" for node in nodes for problem in node.pop("problems")]
    if nodes and not has_function:
        problems.append(
            "no function body: the file runs only where a library of ours is registered"
        )
    problems += [
        f"weights file {name} is missing beside the model"
        for name in sorted(external)
        if not (path.parent / name).is_file()
    ]
    return {
        "file": path.name,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
        "inputs": [_describe_value(value) for value in model.graph.input],
        "outputs": [_describe_value(value) for value in model.graph.output],
        "initializers": len(model.graph.initializer),
        "weights_files": sorted(external),
        "ops": dict(collections.Counter(n.op_type for n in model.graph.node).most_common()),
        "has_function": has_function,
        "fused_attention": nodes,
        "problems": problems,
    }


def describe(info: dict[str, Any]) -> str:
    """The same for people."""
    opsets = ", ".join(f"{domain} {version}" for domain, version in info["opsets"].items())
    weights = ", ".join(info["weights_files"]) or "inside"
    lines = [
        f"{info['file']}: made by {info['producer'] or '?'}, IR {info['ir_version']}, {opsets}",
        *(f"  {key} = {value}" for key, value in info["metadata"].items()),
        *_some("inputs", info["inputs"]),
        *_some("outputs", info["outputs"]),
        f"initializers: {info['initializers']}, weights {weights}",
        f"ops: {', '.join(f'{op} × {count}' for op, count in info['ops'].items())}",
        f"{OP_DOMAIN}::{OP_NAME}: {len(info['fused_attention'])} nodes, "
        f"{'with' if info['has_function'] else 'without'} a function body",
    ]
    groups: dict[str, list[str]] = {}
    for node in info["fused_attention"]:
        text = ", ".join(f"{key}={value}" for key, value in node["attributes"].items())
        groups.setdefault(f"{text}; live: {', '.join(node['live']) or 'none'}", []).append(
            node["name"]
        )
    for text, names in groups.items():
        span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
        lines.append(f"  {span}: {text}")
    lines += [f"problem: {problem}" for problem in info["problems"]]
    return "\n".join(lines)


def _describe_node(node: onnx.NodeProto) -> dict[str, Any]:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    attributes = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
    features = attributes.get("features", 0)
    problems = []
    if unknown := features & ~ALL_FEATURES:
        problems.append(f"unknown feature bits {unknown:#x}: made by a later version of the op")
    if len(node.input) != len(OP_INPUTS):
        problems.append(f"{len(node.input)} inputs instead of {len(OP_INPUTS)}")
    for name, value in PLUGIN_ATTRIBUTES.items():
        if attributes.pop(name, None) != value:
            problems.append(f"{name} is not {value!r}: TensorRT's parser would not take the plugin")
    return {
        "name": node.name,
        "attributes": attributes,
        "live": [str(bit.name).lower() for bit in Feature if features & bit],
        "problems": problems,
    }


def _describe_value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    return {
        "name": value.name,
        "dtype": _TYPE.Name(tensor.elem_type).lower(),
        "shape": [d.dim_param or d.dim_value for d in tensor.shape.dim],
    }


def _some(title: str, values: list[dict[str, Any]], shown: int = 4) -> list[str]:
    lines = [
        f"  {v['name']}: {v['dtype']} ({', '.join(map(str, v['shape']))})" for v in values[:shown]
    ]
    more = [f"  … {len(values)} in all"] if len(values) > shown else []
    return [f"{title}:", *lines, *more]
