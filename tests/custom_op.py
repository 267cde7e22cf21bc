# SPDX-License-Identifier: MIT
"""One node in onnxruntime with our library, from tensors to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnxruntime import OrtValue
from single_node import DTYPES, single_node_model
from torch import Tensor

from fastmqa_export.config import AttentionAttributes


def single_node(
    attributes: AttentionAttributes, tensors: Mapping[str, Tensor], *, dynamic: bool = True
) -> onnx.ModelProto:
    """The model of `single_node`, for onnx to change."""
    return ir.to_proto(single_node_model(attributes, tensors, dynamic=dynamic))


def create(
    model: onnx.ModelProto,
    library: Path | None,
    *,
    threads: int = 1,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    **config: str,
) -> onnxruntime.InferenceSession:
    """A session; ``config`` are entries of its configuration."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    for key, value in config.items():
        options.add_session_config_entry(f"session.{key}", value)
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=list(providers)
    )


def run(
    session: onnxruntime.InferenceSession,
    attributes: AttentionAttributes,
    tensors: Mapping[str, Tensor],
) -> list[Tensor]:
    """Y and, if the model has it, lse."""
    q, v = tensors["q"], tensors.get("v")
    batch, *rows, _ = q.shape
    y = torch.full((*q.shape[:3], attributes.v_head_size if v is None else v.shape[3]), torch.nan)
    outputs = [y.to(q.dtype)]
    if attributes.features & 16:
        outputs.append(torch.full((batch, *(rows[::-1] if attributes.layout else rows)), torch.nan))
    # By memory, since numpy has no bfloat16.
    binding = session.io_binding()
    for name, tensor in tensors.items():
        binding.bind_ortvalue_input(name, _value(tensor))
    for name, tensor in zip(("y", "lse"), outputs, strict=False):
        binding.bind_ortvalue_output(name, _value(tensor))
    session.run_with_iobinding(binding)
    return outputs


def _value(tensor: Tensor) -> OrtValue:
    """The tensor's own memory."""
    number = DTYPES[tensor.dtype].value
    array = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return OrtValue.ortvalue_from_numpy_with_onnx_type(np.asarray(array), number)
