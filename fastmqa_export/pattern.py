# SPDX-License-Identifier: MIT
"""Attention written out in ONNX ops, found and replaced by ``FusedAttention`` nodes.

For `polygraphy plugin match|list|replace --shape-inference --plugin-dir PLUGIN_DIR`, on files that
another exporter wrote: MatMul, scale, mask, Softmax and MatMul, with keys and values repeated over
their query heads (as transformers' ``repeat_kv`` does) or broadcast. Nothing is taken on trust:
where shape inference does not prove that it is attention, it is left as it is. The file that
`replace` writes holds the function as well, so that onnxruntime runs it like one of `export`.

A query whose keys are all masked gives 0 then, also where Softmax gave NaN.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from fastmqa_export.config import (
    OP_DOMAIN,
    OP_INPUTS,
    OP_NAME,
    AttentionAttributes,
    Feature,
    check_head_sizes,
)
from fastmqa_export.errors import ConfigError
from fastmqa_export.function_body import (
    NEUTRAL_INPUTS,
    NodeUse,
    fused_attention_function,
    node_attributes,
)

#: What ``--plugin-dir`` must be.
PLUGIN_DIR: Final = Path(__file__).resolve().parent / "polygraphy_plugins"

#: The function's ReduceMax takes its axes as an input from this version on.
MIN_OPSET: Final = 18

_FLOATS: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def get_plugin_metadata() -> dict[str, str]:
    """The plugin's folder and its op."""
    return {"name": OP_NAME, "op": OP_NAME}


def get_matching_subgraphs(graph: gs.Graph) -> list[dict[str, Any]]:
    """The attentions of a graph whose shapes have been inferred.

    Returns:
        Of each the names of its inputs q, k, v and, where there is one, the mask; of its output;
        and the attributes of its node.
    """
    if graph.opset < MIN_OPSET:
        return []
    found = (_match(node) for node in graph.nodes if node.op == "MatMul")
    return [
        {
            "inputs": [tensor.name for tensor in match.inputs],
            "outputs": [match.output.name],
            "attributes": node_attributes(match.attributes),
        }
        for match in found
        if match is not None
    ]


def replace_with_plugin(
    graph: gs.Graph,
    input_tensors: Sequence[gs.Tensor],
    output_tensors: Sequence[gs.Tensor],
    attrs: Mapping[str, Any],
    op: str,
) -> bool:
    """Put one node in the place of one match, and the function of all of them into the file.

    Raises:
        ConfigError: if the shape of an input is not known.
        ExportError: if the nodes differ in something that one function cannot express.
    """
    for tensor in input_tensors:
        if tensor.shape is None or tensor.dtype is None:
            raise ConfigError(
                f"type and shape of {tensor.name} are not known; give --shape-inference to "
                "`polygraphy plugin replace`, as to match"
            )
    q, k, v, *masks = input_tensors
    (y,) = output_tensors
    y.inputs.clear()
    inputs = [q, k, v, *(_of_rank_4(graph, mask) for mask in masks)]
    inputs += [_neutral(graph, name) for name in OP_INPUTS[len(inputs) :]]
    node = gs.Node(op, f"{y.name}.{op}", dict(attrs), inputs, [y], domain=OP_DOMAIN)
    graph.nodes.append(node)
    graph.cleanup().toposort()
    _attach_function(graph)
    return True


@dataclasses.dataclass(frozen=True)
class _Match:
    inputs: tuple[gs.Tensor, ...]
    output: gs.Tensor
    attributes: AttentionAttributes


@dataclasses.dataclass(frozen=True)
class _Scores:
    """Scores q · k^T · scale, (B, H, S, T)."""

    q: gs.Tensor
    k: gs.Tensor
    scale: float


def _match(product: gs.Node) -> _Match | None:
    """The attention that ends with this MatMul."""
    weights, values = product.inputs
    softmax = _producer(_without_nan_guard(_uncast(weights)), "Softmax")
    if softmax is None or softmax.attrs.get("axis", -1) not in (-1, 3):
        return None
    scores, mask = _masked_scores(_uncast(softmax.inputs[0]))
    if scores is None:
        return None
    q, k, v, y = scores.q, _unrepeated(scores.k), _unrepeated(values), product.outputs[0]
    if any(_rank(x) != 4 for x in (q, k, v)) or not _fit(q, k, v, mask):
        return None
    return _Match(
        inputs=(q, k, v) if mask is None else (q, k, v, mask),
        output=y,
        attributes=AttentionAttributes(
            scale=scores.scale, features=0 if mask is None else Feature.MASK
        ),
    )


def _fit(q: gs.Tensor, k: gs.Tensor, v: gs.Tensor, mask: gs.Tensor | None) -> bool:
    """Whether the op takes these shapes and types, and gives what the written-out ops gave."""
    (batch, heads, queries, d), (_, kv_heads, keys, _) = q.shape, k.shape
    sizes = (heads, kv_heads, d, v.shape[3])
    if not all(isinstance(size, int) for size in sizes) or heads % kv_heads:
        return False
    if k.shape != [batch, kv_heads, keys, d] or v.shape[:3] != [batch, kv_heads, keys]:
        return False
    try:
        check_head_sizes(d, v.shape[3])
    except ConfigError:
        return False
    dtype = _dtype(q)
    if dtype not in _FLOATS or {_dtype(k), _dtype(v)} != {dtype}:
        return False
    if mask is None:
        return True
    full = [batch, heads, queries, keys]
    return (
        mask.shape is not None
        and _dtype(mask) in (ir.DataType.BOOL, ir.DataType.FLOAT, dtype)
        and len(mask.shape) <= 4
        and all(
            m in (1, size) for m, size in zip(reversed(mask.shape), reversed(full), strict=False)
        )
    )


def _masked_scores(x: gs.Tensor) -> tuple[_Scores | None, gs.Tensor | None]:
    """Scores, and the mask that was added to them or chose between them and −inf."""
    if scores := _scores(x):
        return scores, None
    if add := _producer(x, "Add"):
        for side, mask in (add.inputs, reversed(add.inputs)):
            if scores := _scores(_uncast(side)):
                return scores, _boolean(mask)
    if where := _producer(x, "Where"):
        condition, kept, dropped = where.inputs
        if negation := _producer(condition, "Not"):
            (condition,), kept, dropped = negation.inputs, dropped, kept
        if _scalar(dropped) == -math.inf and (scores := _scores(_uncast(kept))):
            return scores, condition
    return None, None


def _boolean(mask: gs.Tensor) -> gs.Tensor:
    """The condition of a mask that is 0 where it holds and −inf elsewhere."""
    where = _producer(mask, "Where")
    if where and [_scalar(x) for x in where.inputs[1:]] == [0.0, -math.inf]:
        return where.inputs[0]
    return mask


def _without_nan_guard(weights: gs.Tensor) -> gs.Tensor:
    """What is replaced by 0 where it is NaN: the weights of a row without keys."""
    if where := _producer(weights, "Where"):
        condition, zero, guarded = where.inputs
        is_nan = _producer(condition, "IsNaN")
        if is_nan and is_nan.inputs[0] is guarded and _scalar(zero) == 0:
            return guarded
    return weights


def _scores(x: gs.Tensor) -> _Scores | None:
    x, scale = _unscaled(x)
    product = _producer(x, "MatMul")
    if product is None:
        return None
    q, q_scale = _unscaled(product.inputs[0])
    transposed, k_scale = _unscaled(product.inputs[1])
    k = _untransposed(transposed)
    return None if k is None else _Scores(q, k, scale * q_scale * k_scale)


def _unscaled(x: gs.Tensor) -> tuple[gs.Tensor, float]:
    """What was multiplied or divided by constants, and by how much."""
    if node := _producer(x, "Mul", "Div"):
        first, second = node.inputs
        if node.op == "Mul" and _scalar(second) is None:
            first, second = second, first
        factor = _scalar(second)
        if factor:
            inner, scale = _unscaled(first)
            return inner, scale * factor if node.op == "Mul" else scale / factor
    return x, 1.0


def _untransposed(x: gs.Tensor) -> gs.Tensor | None:
    """What x (B, H, D, T) is the transpose of, (B, H, T, D)."""
    if transpose := _producer(x, "Transpose"):
        return transpose.inputs[0] if transpose.attrs.get("perm") == [0, 1, 3, 2] else None
    # torch.onnx.export goes through (B · H, T, D).
    _, transpose, inner = _chain(x, "Reshape", "Transpose", "Reshape")
    if inner is None or transpose.attrs.get("perm") != [0, 2, 1]:
        return None
    k, packed = inner.inputs[0], inner.outputs[0]
    if _rank(k) != 4 or _rank(packed) != 3 or _rank(x) != 4:
        return None
    b, h, t, d = k.shape
    return k if packed.shape[1:] == [t, d] and x.shape == [b, h, d, t] else None


def _unrepeated(x: gs.Tensor) -> gs.Tensor:
    """What x (B, H, T, D) repeats for each group of heads, (B, Hkv, T, D); x if it repeats none."""
    reshape, expand, unsqueeze = _chain(x, "Reshape", "Expand", "Unsqueeze")
    if unsqueeze is None:
        return x
    narrow, wide, repeated = (node.outputs[0] for node in (unsqueeze, expand, reshape))
    inner = unsqueeze.inputs[0]
    if (_rank(inner), _rank(narrow), _rank(wide), _rank(repeated)) != (4, 5, 5, 4):
        return x
    b, kv_heads, t, d = inner.shape
    group = wide.shape[2]
    if not isinstance(kv_heads, int) or not isinstance(group, int):
        return x
    shapes = [[b, kv_heads, 1, t, d], [b, kv_heads, group, t, d], [b, kv_heads * group, t, d]]
    return inner if [narrow.shape, wide.shape, repeated.shape] == shapes else x


def _uncast(x: gs.Tensor) -> gs.Tensor:
    """What was cast from one type of floats to another."""
    cast = _producer(x, "Cast")
    if cast and _dtype(x) in _FLOATS and _dtype(cast.inputs[0]) in _FLOATS:
        inner: gs.Tensor = cast.inputs[0]
        return inner
    return x


def _producer(x: gs.Tensor, *ops: str) -> gs.Node | None:
    """The node that gives x, if it is one of these ops."""
    node = x.inputs[0] if x.inputs else None
    return node if node is not None and node.op in ops else None


def _chain(x: gs.Tensor, *ops: str) -> list[Any]:
    """The nodes that give x one after the other, the last first; None from where they differ."""
    nodes: list[Any] = []
    for op in ops:
        node = _producer(x, op) if x is not None else None
        nodes.append(node)
        x = None if node is None else node.inputs[0]
    return nodes


def _scalar(x: gs.Tensor) -> float | None:
    """The value of a constant of one element."""
    constant = _producer(x, "Constant")
    if constant is not None:
        x = constant.attrs.get("value", x)
    if not isinstance(x, gs.Constant) or x.values.size != 1:
        return None
    return float(x.values.item())


def _rank(x: gs.Tensor) -> int | None:
    """None where a size has neither a number nor a name."""
    return None if x.shape is None or None in x.shape else len(x.shape)


def _dtype(x: gs.Tensor) -> ir.DataType | None:
    """Graphsurgeon has numpy's types, and ONNX's numbers where numpy has none."""
    if x.dtype is None or isinstance(x.dtype, int):
        return None if x.dtype is None else ir.DataType(x.dtype)
    return ir.DataType.from_numpy(np.dtype(x.dtype))


def _of_rank_4(graph: gs.Graph, mask: gs.Tensor) -> gs.Tensor:
    """A mask of fewer dimensions with leading ones, made once for all layers."""
    missing = 4 - len(mask.shape)
    name = f"{mask.name}.of_rank_4"
    if not missing:
        return mask
    if (made := graph.tensors().get(name)) is not None:
        return made
    output = gs.Variable(name, mask.dtype, [1] * missing + list(mask.shape))
    axes = gs.Constant(f"{name}.axes", np.arange(missing))
    graph.nodes.append(gs.Node("Unsqueeze", name, {}, [mask, axes], [output]))
    return output


def _neutral(graph: gs.Graph, name: str) -> gs.Tensor:
    """The constant for an input that is not live, one for all nodes."""
    constant = gs.Constant(f"fastmqa.neutral.{name}", NEUTRAL_INPUTS[name].copy())
    return graph.tensors().get(constant.name, constant)


def _attach_function(graph: gs.Graph) -> None:
    """Give the file the function that all its nodes call."""
    nodes = [node for node in graph.nodes if (node.domain, node.op) == (OP_DOMAIN, OP_NAME)]
    uses = [_use(node) for node in nodes]
    function = ir.serde.serialize_function(fused_attention_function(uses, graph.opset))
    # A node without a mask gets a neutral one of the type that the function expects.
    if {use.mask_dtype for use in uses} - {None, ir.DataType.BOOL}:
        neutral = _neutral(graph, "attn_mask")
        mask = next(n.inputs[3] for n, use in zip(nodes, uses, strict=True) if use.mask_dtype)
        neutral.values = np.zeros(neutral.shape, mask.dtype)
    others = [f for f in graph.functions if (f.domain, f.name) != (OP_DOMAIN, OP_NAME)]
    graph.functions = [*others, OnnxImporter.import_function(function)]


def _use(node: gs.Node) -> NodeUse:
    names = [field.name for field in dataclasses.fields(AttentionAttributes)]
    attributes = AttentionAttributes(**{name: node.attrs[name] for name in names})
    q, k, _, mask, *_ = node.inputs
    dtype = _dtype(q)
    assert dtype is not None, "_fit saw to it"
    return NodeUse(
        attributes=attributes,
        dtype=dtype,
        mask_dtype=_dtype(mask) if attributes.features & Feature.MASK else None,
        heads=q.shape[1],
        kv_heads=k.shape[1],
    )
