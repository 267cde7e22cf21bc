from __future__ import annotations
import numpy as np
import onnx_ir as ir
from fastmqa_export.config import *
NEUTRAL = {
    "attn_mask": np.ones((1, 1, 1, 1), np.bool_),
    # Clamped to [0, T], the largest int32 means T.
    "kv_lengths": np.full((1,), 2**31 - 1, np.int32),
    "q_start": np.zeros((1,), np.int32),
}
def set_neutral_inputs(graph):
    made = {}
    for node in graph:
        if (node.domain, node.op_type) != (OP_DOMAIN, OP_NAME): continue
        for i, name in enumerate(OP_INPUTS):
            if node.inputs[i] is None:
                if name not in made:
                    t = ir.tensor(NEUTRAL[name], name=f"fastmqa.neutral.{name}")
                    made[name] = ir.Value(name=t.name, shape=t.shape, type=ir.TensorType(t.dtype), const_value=t)
                    graph.register_initializer(made[name])
                node.replace_input_with(i, made[name])
