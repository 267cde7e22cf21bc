# SPDX-License-Identifier: MIT
"""What an ONNX file holds, as far as attention is concerned."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google.protobuf.message
import onnx

from fastmqa_export.config import (
    ALL_FEATURES,
    OP_DOMAIN,
    OP_INPUTS,
    OP_NAME,
    OP_VERSION,
    PLUGIN_ATTRIBUTES,
    AttentionAttributes,
    Feature,
    check_head_sizes,
)
from fastmqa_export.errors import ConfigError, ModelFileError

_TYPE = onnx.TensorProto.DataType


def load_model(path: Path) -> onnx.ModelProto:
    """An ONNX file without its external weights.

    Raises:
        ModelFileError: if there is no such file, or it is no ONNX model.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelFileError(f"{path} {what}; give an .onnx file, as `export -o` writes it")
    if path.suffix in (".plan", ".engine", ".so"):
        raise ModelFileError(f"{path} is an engine or a library; give an .onnx file")
    try:
        # Not by the suffix, which onnx would take as the format.
        model = onnx.load(path, format="protobuf", load_external_data=False)
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
    shapes = dict(_typed(model))
    nodes = [_describe_node(node, shapes, i) for i, node in enumerate(fused_nodes(model))]
    weights = [_Weights.of(tensor) for tensor in model.graph.initializer]
    needed: dict[str, int] = {}
    for w in weights:
        if w.file:
            needed[w.file] = max(needed.get(w.file, 0), w.end)
    problems = [f"{node['name']}: {problem}" for node in nodes for problem in node.pop("problems")]
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if nodes and opsets.get(OP_DOMAIN) != OP_VERSION:
        problems.append(
            f"version {opsets.get(OP_DOMAIN, 'none')} of domain {OP_DOMAIN}; this version knows "
            f"{OP_VERSION}"
        )
    if nodes and not has_function:
        problems.append(
            "no function body: the file runs only where a library of ours is registered"
        )
    for name, size in sorted(needed.items()):
        if not (path.parent / name).is_file():
            problems.append(f"weights file {name} is missing beside the model")
        elif (found := (path.parent / name).stat().st_size) < size:
            problems.append(f"weights file {name} is cut short: {found} bytes of {size}")
    return {
        "file": path.name,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "ir_version": model.ir_version,
        "opsets": opsets,
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
        "inputs": [describe_value(value) for value in model.graph.input],
        "outputs": [describe_value(value) for value in model.graph.output],
        "initializers": len(weights),
        "inline_bytes": sum(w.size for w in weights if not w.file),
        "external_bytes": sum(w.size for w in weights if w.file),
        "weights_files": sorted(needed),
        "ops": dict(collections.Counter(n.op_type for n in model.graph.node).most_common()),
        "functions": [f"{f.domain}::{f.name}" for f in model.functions],
        "has_function": has_function,
        "fused_attention": nodes,
        "problems": problems,
    }


def describe(info: dict[str, Any]) -> str:
    """The same for people."""
    opsets = ", ".join(f"{domain} {version}" for domain, version in info["opsets"].items())
    weights = f"{info['inline_bytes']:,} bytes inside"
    if info["weights_files"]:
        weights += f", {info['external_bytes']:,} in {', '.join(info['weights_files'])}"
    lines = [
        f"{info['file']}: made by {info['producer'] or '?'}, IR {info['ir_version']}, {opsets}",
        *(f"  {key} = {value}" for key, value in info["metadata"].items()),
        *_some("inputs", info["inputs"]),
        *_some("outputs", info["outputs"]),
        f"initializers: {info['initializers']}, {weights}",
        f"ops: {', '.join(f'{op} × {count}' for op, count in info['ops'].items())}",
        f"{OP_DOMAIN}::{OP_NAME}: {len(info['fused_attention'])} nodes, "
        f"{'with' if info['has_function'] else 'without'} a function body",
    ]
    groups: dict[str, list[str]] = {}
    for node in info["fused_attention"]:
        shapes = [f"{k} ({', '.join(map(str, v))})" for k, v in node["shapes"].items()]
        attributes = [f"{key}={value}" for key, value in node["attributes"].items()]
        live = f"live: {', '.join(node['live']) or 'none'}"
        text = "; ".join(filter(None, [", ".join(attributes), " ".join(shapes), live]))
        groups.setdefault(text, []).append(node["name"])
    for text, names in groups.items():
        span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
        lines.append(f"  {span}: {text}")
    lines += [f"problem: {problem}" for problem in info["problems"]]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Where an initializer lies: ``file`` is empty if inside the model, ``end`` is a position."""

    size: int
    file: str = ""
    end: int = 0

    @classmethod
    def of(cls, tensor: onnx.TensorProto) -> _Weights:
        size = len(tensor.raw_data) or math.prod(tensor.dims) * _item_bytes(tensor.data_type)
        where = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location != onnx.TensorProto.EXTERNAL or "location" not in where:
            return cls(size)
        try:
            size = int(where.get("length", size))
            return cls(size, where["location"], int(where.get("offset", 0)) + size)
        except ValueError:
            return cls(size, where["location"])


def _item_bytes(data_type: int) -> int:
    try:
        return onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize
    except (KeyError, TypeError, ValueError):  # a type that this version of onnx does not know
        return 0


def _typed(model: onnx.ModelProto) -> Iterator[tuple[str, list[str | int]]]:
    """Every value of the main graph whose shape the file gives."""
    graph = model.graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            yield value.name, _shape(value)
    for tensor in graph.initializer:
        yield tensor.name, list(tensor.dims)


def _describe_node(
    node: onnx.NodeProto, shapes: Mapping[str, list[str | int]], index: int
) -> dict[str, Any]:
    attributes = {a.name: _plain(a) for a in node.attribute}
    problems = []
    if len(node.input) != len(OP_INPUTS):
        problems.append(f"{len(node.input)} inputs instead of {len(OP_INPUTS)}")
    if left_out := [name for name, x in zip(OP_INPUTS, node.input, strict=False) if not x]:
        problems.append(f"left out: {', '.join(left_out)}; every input must be given")
    for name, value in PLUGIN_ATTRIBUTES.items():
        if attributes.pop(name, None) != value:
            problems.append(f"{name} is not {value!r}: TensorRT's parser would not take the plugin")
    known = {
        name: shapes[x] for name, x in zip(OP_INPUTS[:3], node.input, strict=False) if x in shapes
    }
    features = attributes.get("features", 0)
    return {
        "name": node.name or f"node {index}",
        "attributes": attributes,
        "live": [
            str(b.name).lower() for b in Feature if isinstance(features, int) and features & b
        ],
        "shapes": known,
        "problems": [*problems, *_refused(attributes, known)],
    }


def _plain(attribute: onnx.AttributeProto) -> int | float | str:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, int | float):
        return value
    return str(onnx.AttributeProto.AttributeType.Name(attribute.type).lower())


def _refused(
    attributes: Mapping[str, int | float | str], shapes: Mapping[str, list[str | int]]
) -> Iterator[str]:
    """What version 1 of the op refuses in a node."""
    types = {"int": int, "float": float}
    fields = {f.name: types[str(f.type)] for f in dataclasses.fields(AttentionAttributes)}
    unknown = sorted(attributes.keys() - fields)
    mistyped = [n for n, x in attributes.items() if n in fields and type(x) is not fields[n]]
    features = attributes.get("features", 0)
    if unknown:
        yield f"unknown attributes: {', '.join(unknown)}"
    if mistyped:
        yield f"attributes of another type than the op's: {', '.join(mistyped)}"
    elif bits := int(features) & ~ALL_FEATURES:
        yield f"unknown feature bits {bits:#x}: made by a later version of the op"
    elif "scale" not in attributes:
        yield "the attribute scale is missing"
    else:
        try:
            values: dict[str, Any] = {n: x for n, x in attributes.items() if n in fields}
            node = AttentionAttributes(**values)
            d, v = (shapes[name][-1] if shapes.get(name) else None for name in "kv")
            v = node.v_head_size or v
            if isinstance(d, int) and isinstance(v, int) and d and v:
                check_head_sizes(d, v)
        except ConfigError as error:
            yield str(error)


def describe_value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """Name, type and shape of a graph input or output."""
    dtype = _TYPE.Name(value.type.tensor_type.elem_type).lower()
    return {"name": value.name, "dtype": dtype, "shape": _shape(value)}


def _shape(value: onnx.ValueInfoProto) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _some(title: str, values: list[dict[str, Any]], shown: int = 4) -> list[str]:
    lines = [
        f"  {v['name']}: {v['dtype']} ({', '.join(map(str, v['shape']))})" for v in values[:shown]
    ]
    more = [f"  … {len(values)} in all"] if len(values) > shown else []
    return [f"{title}:", *lines, *more]
