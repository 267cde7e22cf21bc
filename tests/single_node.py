# SPDX-License-Identifier: MIT
"""A model of one ``FusedAttention`` node with its function: the smallest file that can be run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch

from fastmqa_export.config import OP_DOMAIN, OP_INPUTS, OP_NAME, OP_VERSION, AttentionAttributes
from fastmqa_export.function_body import (
    NodeUse,
    fused_attention_function,
    node_attributes,
    set_neutral_inputs,
)

DTYPES = {
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float32: ir.DataType.FLOAT,
    torch.bool: ir.DataType.BOOL,
    torch.int32: ir.DataType.INT32,
}


def single_node_model(
    attributes: AttentionAttributes,
    tensors: Mapping[str, torch.Tensor],
    *,
    dynamic: bool = True,
    union: Sequence[AttentionAttributes] = (),
) -> ir.Model:
    """One node whose live inputs are graph inputs of the tensors' types.

    ``union`` adds other nodes' attributes to those that the function body must serve.
    """
    values = {}
    for name, tensor in tensors.items():
        shape = [f"{name}{axis}" for axis in range(tensor.dim())] if dynamic else tensor.shape
        values[name] = ir.val(name, dtype=DTYPES[tensor.dtype], shape=shape)
    q, k = tensors["q"], tensors["k"]
    inputs = [values.get(name) for name in OP_INPUTS]
    inputs[2] = inputs[2] or values["k"]
    lse = attributes.features & 16
    node = ir.node(
        OP_NAME, inputs, node_attributes(attributes), domain=OP_DOMAIN, num_outputs=2 if lse else 1
    )
    for value, name in zip(node.outputs, ("y", "lse"), strict=False):
        value.name = name
        value.dtype = ir.DataType.FLOAT if name == "lse" else DTYPES[q.dtype]
        value.shape = ir.Shape([f"{name}{axis}" for axis in range(4 if name == "y" else 3)])
    graph = ir.Graph(
        list(values.values()),
        node.outputs,
        nodes=[node],
        opset_imports={"": 23, OP_DOMAIN: OP_VERSION},
        name="single_node",
    )
    model = ir.Model(graph, ir_version=10)
    set_neutral_inputs(graph)
    mask = tensors.get("attn_mask")
    heads = None if dynamic else q.shape[1 if attributes.layout == 0 else 2]
    uses = [
        NodeUse(
            attributes=each,
            dtype=DTYPES[q.dtype],
            mask_dtype=None if mask is None else DTYPES[mask.dtype],
            heads=heads,
            kv_heads=None if dynamic else k.shape[1],
        )
        for each in (attributes, *union)
    ]
    function = fused_attention_function(uses, opset=23)
    model.functions[function.identifier()] = function
    return model
