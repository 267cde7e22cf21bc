# SPDX-License-Identifier: MIT
"""The meaning of ``fastmqa::FusedAttention`` in standard ONNX ops: the function in each file.

Where no library of ours is registered this body is what runs, so it is written for speed: the query
heads that share a KV head become rows of one matrix (K and V are then read once per KV head), and
the body is generated per file from what its nodes use, so that an unused feature costs nothing. A
feature that only some nodes use is switched by an attribute of the call.

Only plain MatMul, Softmax and elementwise ops are used. The standard ``Attention`` is avoided: on
several runtimes it ignores lengths and windows without a word, and it knows neither V ≠ D nor a
causal mask that is aligned to the last key.

In float16 and bfloat16 files products are in that type with the scale folded into q, and scores
and softmax in float32. Scores beyond the range of float16 become infinite there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from fastmqa_export.config import (
    OP_DOMAIN,
    OP_INPUTS,
    OP_NAME,
    OP_OUTPUTS,
    PLUGIN_ATTRIBUTES,
    AttentionAttributes,
    Feature,
    Layout,
    SoftmaxPrecision,
)
from fastmqa_export.errors import ExportError

#: What stands at an input that is not live; clamped to [0, T], the largest length means T.
NEUTRAL_INPUTS: Final[Mapping[str, np.ndarray[Any, Any]]] = {
    "attn_mask": np.ones((1, 1, 1, 1), np.bool_),
    "kv_lengths": np.full((1,), 2**31 - 1, np.int32),
    "q_start": np.zeros((1,), np.int32),
}

_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeUse:
    """What the body must know of one node: its attributes, types and head counts.

    Attributes:
        attributes: the node's attributes.
        dtype: type of q, k, v and y.
        mask_dtype: type of ``attn_mask``, None where it is not live.
        heads: H, None if it is not a fixed number.
        kv_heads: Hkv, likewise.
    """

    attributes: AttentionAttributes
    dtype: ir.DataType
    mask_dtype: ir.DataType | None = None
    heads: int | None = None
    kv_heads: int | None = None

    def has(self, feature: Feature) -> bool:
        """Whether that input or output of the node is live."""
        return bool(self.attributes.features & feature)


def fused_attention_function(uses: Sequence[NodeUse], opset: int) -> ir.Function:
    """The function for a file with these nodes.

    Args:
        uses: every ``FusedAttention`` node of the file.
        opset: version of the standard domain that the file imports, ≥ 23.

    Returns:
        A function of six inputs and one output, two if log-sum-exps are live.

    Raises:
        ExportError: if the nodes differ in something that one body cannot express.
    """
    body = _Body(uses)
    outputs = body.build()
    graph = ir.Graph(
        list(body.inputs.values()),
        outputs,
        nodes=body.nodes,
        opset_imports={"": opset},
        name=OP_NAME,
    )
    return ir.Function(OP_DOMAIN, OP_NAME, graph=graph, attributes=_declared_attributes())


def set_neutral_inputs(graph: ir.Graph) -> None:
    """Give every absent input of the ``FusedAttention`` nodes a constant that changes nothing."""
    neutral: dict[str, ir.Value] = {}
    mask_dtypes = {
        node.inputs[3].dtype for node in fused_nodes(graph) if node.inputs[3] is not None
    }
    for node in fused_nodes(graph):
        for index, name in enumerate(OP_INPUTS):
            if node.inputs[index] is not None:
                continue
            if name not in neutral:
                array = NEUTRAL_INPUTS[name]
                if name == "attn_mask" and mask_dtypes - {ir.DataType.BOOL, None}:
                    array = np.zeros(array.shape, next(iter(mask_dtypes)).numpy())  # type: ignore[union-attr]
                tensor = ir.tensor(array, name=f"fastmqa.neutral.{name}")
                neutral[name] = ir.Value(
                    name=tensor.name,
                    shape=tensor.shape,  # type: ignore[arg-type]
                    type=ir.TensorType(tensor.dtype),
                    const_value=tensor,
                )
                graph.register_initializer(neutral[name])
            node.replace_input_with(index, neutral[name])


def fused_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """The ``FusedAttention`` nodes of a graph, in order."""
    return (n for n in graph.all_nodes() if (n.domain, n.op_type) == (OP_DOMAIN, OP_NAME))


def node_attributes(attributes: AttentionAttributes) -> dict[str, float | int | str]:
    """All attributes of a node as plain values, the two for TensorRT's parser included."""
    values: dict[str, float | int | str] = {}
    for field in dataclasses.fields(attributes):
        value = getattr(attributes, field.name)
        values[field.name] = float(value) if field.type == "float" else int(value)
    return {**values, **PLUGIN_ATTRIBUTES}


def _declared_attributes() -> list[ir.Attr]:
    kinds = {"float": ir.AttributeType.FLOAT, "int": ir.AttributeType.INT}
    names = [(f.name, kinds[str(f.type)]) for f in dataclasses.fields(AttentionAttributes)]
    names += [(name, ir.AttributeType.STRING) for name in PLUGIN_ATTRIBUTES]
    return [ir.Attr(name, kind, None) for name, kind in names]


class _Body(ir.tape.Tape):
    """Writes the nodes of one body; the methods are its steps, in order."""

    def __init__(self, uses: Sequence[NodeUse]) -> None:
        super().__init__()
        self.uses = uses
        self.inputs = {name: ir.Value(name=name) for name in OP_INPUTS}
        self.dtype = self._same("type of q, k and v", (use.dtype for use in uses))
        self.layout = self._same("layout", (use.attributes.layout for use in uses))
        self.half_softmax = (
            self._same("softmax_precision", (use.attributes.softmax_precision for use in uses))
            == SoftmaxPrecision.FLOAT16
        )
        self.with_lse = self._same("log-sum-exp output", (use.has(Feature.LSE) for use in uses))
        masks = [use.mask_dtype for use in uses if use.has(Feature.MASK)]
        self.mask_dtype = self._same("type of attn_mask", masks) if masks else None

    # Small vocabulary

    def _same(self, what: str, values: Iterable[Any]) -> Any:
        found = sorted(set(values))
        if len(found) != 1:
            raise ExportError(
                f"the {OP_NAME} nodes of one file must agree in their {what}, and these have "
                f"{', '.join(str(value) for value in found)}: a file holds one function body for "
                "all of them. Make the layers agree, or export them to separate files."
            )
        return found[0]

    def _uses(self, name: str, off: float) -> tuple[bool, bool]:
        """Whether any node sets the attribute to something but ``off``, and whether all do."""
        live = [getattr(use.attributes, name) != off for use in self.uses]
        return any(live), all(live)

    def _has(self, feature: Feature) -> tuple[bool, bool]:
        live = [use.has(feature) for use in self.uses]
        return any(live), all(live)

    def do(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.op(op_type, inputs, attributes)

    def ints(self, *values: int) -> ir.Value:
        return self.do("Constant", value_ints=list(values))

    def int_(self, value: int) -> ir.Value:
        return self.do("Constant", value_int=value)

    def float_(self, value: float) -> ir.Value:
        return self.do("Constant", value_float=value)

    def attribute(self, name: str) -> ir.Value:
        """The value that the calling node gives to an attribute, as a scalar."""
        is_float = AttentionAttributes.__dataclass_fields__[name].type == "float"
        kind = ir.AttributeType.FLOAT if is_float else ir.AttributeType.INT
        constant = "value_float" if is_float else "value_int"
        return self.op("Constant", (), {constant: ir.RefAttr(constant, name, kind)})

    def cast(self, x: ir.Value, to: ir.DataType) -> ir.Value:
        return self.do("Cast", x, to=int(to))

    def size(self, x: ir.Value, axis: int) -> ir.Value:
        """Length of an axis, as a scalar."""
        return self.do("Squeeze", self.do("Shape", x, start=axis, end=axis + 1))

    def heads_of(self, name: str, known: set[int | None]) -> ir.Value:
        """Number of heads of q or k as (1,): a constant where all nodes have the same."""
        if len(known) == 1 and (heads := next(iter(known))) is not None:
            return self.ints(heads)
        axis = 2 if name == "q" and self.layout == Layout.BSHD else 1
        return self.do("Shape", self.inputs[name], start=axis, end=axis + 1)

    def with_heads(self, x: ir.Value, heads: ir.Value) -> ir.Value:
        """(B, a, b, c) to (B, heads, a · b / heads, c): moves between head and packed rows."""
        shape = self.do("Concat", self.ints(0), heads, self.ints(-1, 0), axis=0)
        return self.do("Reshape", x, shape)

    # The steps

    def build(self) -> list[ir.Value]:
        q, k, v = (self.inputs[name] for name in ("q", "k", "v"))
        self.heads = self.heads_of("q", {use.heads for use in self.uses})
        self.kv_heads = self.heads_of("k", {use.kv_heads for use in self.uses})
        if self.layout == Layout.BSHD:
            q = self.do("Transpose", q, perm=[0, 2, 1, 3])

        scores = self.capped_scores(q, k)
        by_head = self.masks_something() or self.with_lse
        if by_head:
            scores = self.with_heads(scores, self.heads)
        scores, empty = self.mask(scores, q, k)
        weights, lse = self.softmax(scores, empty)
        weights = self.to_dtype(weights)
        if by_head:
            weights = self.with_heads(weights, self.kv_heads)
        y = self.do("MatMul", weights, v)
        y = self.with_heads(self.leading_columns(y), self.heads)
        if empty is not None:
            y = self.do("Where", empty, self.to_dtype(self.float_(0.0)), y)
        if self.layout == Layout.BSHD:
            y = self.do("Transpose", y, perm=[0, 2, 1, 3])
        outputs = [y] if lse is None else [y, lse]
        for value, name in zip(outputs, OP_OUTPUTS, strict=False):
            value.name = name
        return outputs

    def to_dtype(self, x: ir.Value) -> ir.Value:
        return x if self.dtype == _FLOAT else self.cast(x, self.dtype)

    def to_float(self, x: ir.Value) -> ir.Value:
        return x if self.dtype == _FLOAT else self.cast(x, _FLOAT)

    def capped_scores(self, q: ir.Value, k: ir.Value) -> ir.Value:
        """Float32 scores (B, Hkv, G · S, T): the heads of a group are rows of one matrix."""
        # The scale is applied in float32, since it need not be a power of 2.
        scaled = self.to_dtype(self.do("Mul", self.to_float(q), self.attribute("scale")))
        keys = self.do("Transpose", k, perm=[0, 1, 3, 2])
        scores = self.do("MatMul", self.with_heads(scaled, self.kv_heads), keys)
        scores = self.to_float(scores)
        some, every = self._uses("softcap", 0.0)
        if not some:
            return scores
        cap = divisor = self.attribute("softcap")
        if not every:
            is_on = self.do("Greater", cap, self.float_(0.0))
            divisor = self.do("Where", is_on, cap, self.float_(1.0))
        capped = self.do("Mul", self.do("Tanh", self.do("Div", scores, divisor)), divisor)
        return capped if every else self.do("Where", is_on, capped, scores)

    def masks_something(self) -> bool:
        """Whether any node excludes keys: by position, by length or by a mask."""
        features = (Feature.LENGTHS, Feature.MASK)
        windows = ("reach_right", "window_left")
        return any(self._has(x)[0] for x in features) or any(self._uses(x, -1)[0] for x in windows)

    def mask(self, scores: ir.Value, q: ir.Value, k: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """Scores with excluded keys at −inf, and which rows see none: bool, (B|1, H|1, S|1, 1)."""
        keep, empty = self.visible_keys(q, k)
        has_mask = self.mask_dtype is not None
        if has_mask and self.mask_dtype == ir.DataType.BOOL:
            mask = self.inputs["attn_mask"]
            keep = mask if keep is None else self.do("And", keep, mask)
        elif has_mask:
            scores = self.do("Add", scores, self.cast(self.inputs["attn_mask"], _FLOAT))
        if keep is not None:
            # Min against ±inf costs one pass over the scores, Where three in onnxruntime; adding
            # −inf would make NaN of a score that overflowed beyond the valid keys.
            infinity = self.float_(float("inf"))
            bound = self.do("Where", keep, infinity, self.float_(float("-inf")))
            scores = self.do("Min", scores, bound)
        if has_mask:
            row_max = self.do("ReduceMax", scores, self.ints(-1), keepdims=1)
            empty = self.do("Equal", row_max, self.float_(float("-inf")))
        return scores, empty

    def visible_keys(self, q: ir.Value, k: ir.Value) -> tuple[ir.Value | None, ir.Value | None]:
        """Which keys each query sees by position, (B|1, 1, S|1, T), and which rows see none.

        Query s sees keys in [low, high): positions make the interval, lengths cut it.
        """
        lengths, _ = self._has(Feature.LENGTHS)
        right, right_always = self._uses("reach_right", -1)
        left, left_always = self._uses("window_left", -1)
        if not (lengths or right or left):
            return None, None
        keys = self.size(k, 2)
        zero, one = self.int_(0), self.int_(1)
        length = keys
        if lengths:
            length = self.per_sequence("kv_lengths")
            length = self.do("Min", self.do("Max", length, zero), keys)
        high, low = length, None
        if right:
            reach = self.attribute("window_right")
            if self._uses("is_causal", 0)[0]:  # is_causal means window_right = 0, and excludes it
                reach = self.do("Add", reach, self.attribute("is_causal"))
            high = self.positions(length, q, self.do("Add", reach, one))
            # The last query stands at the last key unless q_start says otherwise.
            if self._has(Feature.Q_START)[0] or any(
                u.attributes.reach_right > 0 for u in self.uses
            ):
                high = self.do("Min", length, high)
            if not right_always:
                high = self.do("Where", self.do("Less", reach, zero), length, high)
        if left:
            reach = self.attribute("window_left")
            low = self.positions(length, q, self.do("Neg", reach))
            low = self.do("Max", low, zero)
            if not left_always:
                low = self.do("Where", self.do("Less", reach, zero), zero, low)
        key = self.do("Range", zero, keys, one)
        keep = self.do("Less", key, high)
        if low is not None:
            keep = self.do("And", keep, self.do("GreaterOrEqual", key, low))
        return keep, self.do("LessOrEqual", high, zero if low is None else low)

    def positions(self, length: ir.Value, q: ir.Value, offset: ir.Value) -> ir.Value:
        """Position of each query plus an offset, (B|1, 1, S, 1)."""
        queries = self.size(q, 2)
        some, every = self._has(Feature.Q_START)
        if some:
            start = self.per_sequence("q_start")
            if not every:
                bit = self.do("Div", self.attribute("features"), self.int_(Feature.Q_START))
                is_live = self.do("Equal", self.do("Mod", bit, self.int_(2)), self.int_(1))
                start = self.do("Where", is_live, start, self.do("Sub", length, queries))
            first, end = offset, self.do("Add", queries, offset)
        else:
            start, first, end = length, self.do("Sub", offset, queries), offset
        query = self.do("Range", first, end, self.int_(1))
        return self.do("Add", start, self.do("Reshape", query, self.ints(-1, 1)))

    def per_sequence(self, name: str) -> ir.Value:
        """An int32 (B,) input as int64 (B, 1, 1, 1)."""
        shape = self.ints(-1, 1, 1, 1)
        return self.do("Reshape", self.cast(self.inputs[name], _INT64), shape)

    def softmax(self, scores: ir.Value, empty: ir.Value | None) -> tuple[ir.Value, ir.Value | None]:
        """Float32 weights of scores' shape, NaN in an empty row, and the log-sum-exp (B, H, S)."""
        if not (self.half_softmax or self.with_lse):
            return self.do("Softmax", scores, axis=-1), None
        last = self.ints(-1)

        def wide(x: ir.Value) -> ir.Value:
            return self.cast(x, _FLOAT) if self.half_softmax else x

        if self.half_softmax:
            scores = self.cast(scores, ir.DataType.FLOAT16)
        row_max = self.do("ReduceMax", scores, last, keepdims=1)
        weights = wide(self.do("Exp", self.do("Sub", scores, row_max)))
        row_sum = self.do("ReduceSum", weights, last, keepdims=1)
        weights = self.do("Div", weights, row_sum)
        if not self.with_lse:
            return weights, None
        lse = self.do("Add", wide(row_max), self.do("Log", row_sum))
        if empty is not None:
            lse = self.do("Where", empty, self.float_(float("-inf")), lse)
        return weights, self.do("Squeeze", lse, last)

    def leading_columns(self, y: ir.Value) -> ir.Value:
        """The first V columns where the values lie in k: slicing the result beats slicing k."""
        some, every = self._has(Feature.VALUES_IN_K)
        if not some:
            return y
        end = self.attribute("v_head_size")
        if not every:
            everything = self.int_(2**31 - 1)
            end = self.do("Where", self.do("Greater", end, self.int_(0)), end, everything)
        end = self.do("Reshape", end, self.ints(1))
        return self.do("Slice", y, self.ints(0), end, self.ints(3))
