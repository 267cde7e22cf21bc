# SPDX-License-Identifier: MIT
"""PyTorch to ONNX: each attention one ``fastmqa::FusedAttention`` node with its function behind it.

``torch.onnx.export`` translates the torch op to a bare node; the function is attached afterwards,
because that exporter inlines every function it meets. The same module gives byte-identical files:
no time, path or host is written.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir as ir
import torch
from onnxscript import values as onnxscript_values
from onnxscript.onnx_opset import opset24
from onnxscript.rewriter import onnx_fusions

import fastmqa_export.cache
import fastmqa_export.op  # noqa: F401 - registers torch.ops.fastmqa
from fastmqa_export import __version__
from fastmqa_export.config import (
    OP_DOMAIN,
    OP_INPUTS,
    OP_NAME,
    OP_OUTPUTS,
    OP_VERSION,
    PLUGIN_ATTRIBUTES,
    AttentionAttributes,
    check_head_sizes,
)
from fastmqa_export.errors import ConfigError, ExportError, FastMqaError
from fastmqa_export.files import staged_folder
from fastmqa_export.function_body import (
    NodeUse,
    fused_attention_function,
    fused_nodes,
    node_attributes,
    set_neutral_inputs,
)

#: Files below this keep their weights inside; protobuf cannot hold more than 2 GB, and writing
#: weights to a file of their own needs no second copy of them in memory.
INLINE_WEIGHTS_BYTES: Final = 64 * 2**20

#: onnx's newest IR is too new for the runtimes that users have; every one of them takes 10.
IR_VERSION: Final = 10

# Sizes at which modules are traced: 0 and 1 would be taken as fixed, and no two may coincide.
_TRACE_SIZES: Final = {"batch": 2, "sequence": 3, "capacity": 7}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A graph input: its name, dtype and shape, where a string names a dynamic dimension."""

    name: str
    dtype: torch.dtype
    shape: tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Exportable:
    """A module that is ready to be traced.

    Attributes:
        module: its ``forward`` takes the inputs in order (those from ``first_list`` on as one
            list) and returns a tuple in the order of ``outputs``.
        inputs: graph inputs; dynamic dimensions are ``batch``, ``sequence`` and ``capacity``.
        outputs: names of the graph outputs.
        metadata: written to the file under ``fastmqa.<key>``.
        first_list: index of the first input that belongs to the list; None: there is no list.
        attentions: how many nodes there must be; None: at least one.
    """

    module: torch.nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    first_list: int | None = None
    attentions: int | None = None


@dataclasses.dataclass(frozen=True)
class ExportedFile:
    """What was written.

    Attributes:
        path: the ONNX file.
        data_path: its weights, None where they are inside.
        fused_nodes: number of ``FusedAttention`` nodes.
        opset: version of the standard operators.
    """

    path: Path
    data_path: Path | None
    fused_nodes: int
    opset: int


def export(exportable: Exportable, path: Path) -> ExportedFile:
    """Trace a module and write it to ``path`` (and ``path``.data for large weights).

    Args:
        exportable: the module and its inputs.
        path: an ``.onnx`` file; replaced as a whole if it exists, untouched if anything fails.

    Returns:
        What was written.

    Raises:
        ExportError: if the module cannot be traced, has no attention, or is not valid ONNX then.
        OutputError: if ``path`` cannot be written.
    """
    model = to_onnx(exportable)
    return save(model, path)


def to_onnx(exportable: Exportable) -> ir.Model:
    """Trace a module; the weights stay shared with it until they are written."""
    model = _trace(exportable)
    nodes = list(fused_nodes(model.graph))
    if not nodes:
        raise ExportError(
            f"{type(exportable.module).__name__} was traced, but none of its attentions became a "
            f"{OP_NAME} node; use fastmqa_export's modules or torch.ops.fastmqa.fused_attention"
        )
    if exportable.attentions not in (None, len(nodes)):
        raise ExportError(
            f"only {len(nodes)} of {exportable.attentions} attentions became {OP_NAME} nodes when "
            f"{type(exportable.module).__name__} was traced: its forward takes another path then"
        )
    _fuse_norms_and_rotations(model)
    opset = model.graph.opset_imports[""]
    uses = [_complete(node) for node in nodes]
    set_neutral_inputs(model.graph)
    function = fused_attention_function(uses, opset)
    model.functions[function.identifier()] = function
    _describe(model, exportable.metadata)
    return model


def save(model: ir.Model, path: Path) -> ExportedFile:
    """Write a model in one step: either both of its files are there and valid, or neither.

    Raises:
        ExportError: if the checker refuses the model.
        OutputError: if it cannot be written.
    """
    weights = sum(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
    )
    data_name = f"{path.name}.data" if weights > INLINE_WEIGHTS_BYTES else None
    names = [path.name] if data_name is None else [data_name, path.name]
    with staged_folder(path.parent, names) as folder:
        staged = folder / path.name
        ir.save(model, staged, external_data=data_name)
        try:
            onnx.checker.check_model(os.fspath(staged), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"the exported model is not valid ONNX: {error}") from error
    return ExportedFile(
        path=path,
        data_path=path.parent / data_name if data_name else None,
        fused_nodes=sum(1 for _ in fused_nodes(model.graph)),
        opset=model.graph.opset_imports[""],
    )


# Tracing


def _trace(exportable: Exportable) -> ir.Model:
    dims = {name: torch.export.Dim(name) for name in _TRACE_SIZES}
    arguments, shapes = [], []
    for spec in exportable.inputs:
        sizes = [_TRACE_SIZES[d] if isinstance(d, str) else d for d in spec.shape]
        arguments.append(torch.zeros(sizes, dtype=spec.dtype))
        shapes.append({i: dims[d] for i, d in enumerate(spec.shape) if isinstance(d, str)})
    at = exportable.first_list
    if at is not None:
        arguments[at:] = [arguments[at:]]  # type: ignore[list-item]
        shapes[at:] = [shapes[at:]]  # type: ignore[list-item]
    uses_scatter = any(name.startswith("present") for name in exportable.outputs)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                exportable.module.eval(),
                tuple(arguments),
                dynamo=True,
                opset_version=24 if uses_scatter else 23,
                input_names=[spec.name for spec in exportable.inputs],
                output_names=list(exportable.outputs),
                dynamic_shapes=tuple(shapes),
                custom_translation_table=dict(_TRANSLATIONS),
                verbose=False,
                optimize=True,
            )
        except Exception as error:
            raise _export_error(error) from error
    if program is None:
        raise ExportError("torch.onnx.export returned nothing")
    return program.model


def _export_error(error: BaseException) -> FastMqaError:
    """What went wrong in a few lines; PyTorch's own message is a page with many causes."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FastMqaError):
            return ExportError(str(cause))
        last, cause = cause, cause.__cause__ or cause.__context__
    reason = next((line for line in str(last).splitlines() if line.strip()), type(last).__name__)
    return ExportError(
        f"PyTorch cannot trace this model: {type(last).__name__}: {reason.strip()}. Its forward "
        "must not depend on the values of tensors; torch.export.export gives the full report"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's own progress and deprecation chatter from the user."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


# From the torch ops to nodes


def _operator(outputs: int) -> onnxscript_values.Op:
    """The node with one output, or with the log-sum-exp as the second."""
    schema = onnx.defs.OpSchema
    kinds = {"float": schema.AttrType.FLOAT, "int": schema.AttrType.INT}
    floats = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)"]
    types = {
        "T": floats,
        "attn_mask": ["tensor(bool)", *floats],
        "kv_lengths": ["tensor(int32)"],
        "q_start": ["tensor(int32)"],
        "lse": ["tensor(float)"],
    }
    single, optional = schema.FormalParameterOption.Single, schema.FormalParameterOption.Optional
    definition = schema(
        OP_NAME,
        OP_DOMAIN,
        OP_VERSION,
        inputs=[
            schema.FormalParameter(name, "T", param_option=single)
            if name in ("q", "k", "v")
            else schema.FormalParameter(name, name, param_option=optional)
            for name in OP_INPUTS
        ],
        outputs=[
            schema.FormalParameter(name, "T" if name == "y" else name)
            for name in OP_OUTPUTS[:outputs]
        ],
        type_constraints=[(name, allowed, "") for name, allowed in types.items()],
        attributes=[
            *(
                schema.Attribute(field.name, kinds[str(field.type)], required=False)
                for field in dataclasses.fields(AttentionAttributes)
            ),
            *(
                schema.Attribute(name, schema.AttrType.STRING, required=False)
                for name in PLUGIN_ATTRIBUTES
            ),
        ],
    )
    return onnxscript_values.Op(onnxscript_values.Opset(OP_DOMAIN, OP_VERSION), OP_NAME, definition)


def _translation(outputs: int) -> Callable[..., Any]:
    operator = _operator(outputs)

    def translate(
        q: Any,
        k: Any,
        v: Any = None,
        attn_mask: Any = None,
        kv_lengths: Any = None,
        q_start: Any = None,
        **attributes: Any,
    ) -> Any:
        node = AttentionAttributes.of_call(
            attributes,
            v=v,
            attn_mask=attn_mask,
            kv_lengths=kv_lengths,
            q_start=q_start,
            lse=outputs == 2,
        )
        values = k if v is None else v
        return operator(q, k, values, attn_mask, kv_lengths, q_start, **node_attributes(node))

    return translate


def _tensor_scatter(cache: Any, update: Any, position: Any) -> Any:
    return opset24.TensorScatter(cache, update, position, axis=-2)


_TRANSLATIONS: Final[Mapping[Any, Callable[..., Any]]] = {
    torch.ops.fastmqa.fused_attention.default: _translation(outputs=1),
    torch.ops.fastmqa.fused_attention_with_lse.default: _translation(outputs=2),
    torch.ops.fastmqa.cache_write.default: _tensor_scatter,
}


# From bare nodes to the file


def _fuse_norms_and_rotations(model: ir.Model) -> None:
    """Write RMS norms and rotary embeddings as the standard ops of opset 23.

    The exporter does that at opset 23 and, although the two ops are the same there, not at 24.
    """
    opset = model.graph.opset_imports[""]
    model.graph.opset_imports[""] = 23
    onnx_fusions.fuse(model)
    model.graph.opset_imports[""] = opset


def _complete(node: ir.Node) -> NodeUse:
    """Give a node that the translation made all its inputs, and say what its body must do.

    Raises:
        ExportError: naming the node, if the op does not cover it.
    """
    node.resize_inputs(len(OP_INPUTS))
    attributes = AttentionAttributes(
        **{
            field.name: node.attributes[field.name].value
            for field in dataclasses.fields(AttentionAttributes)
            if field.name in node.attributes
        }
    )
    q, k, v, mask = node.inputs[:4]
    if q is None or k is None or v is None or q.shape is None or k.shape is None:
        raise ExportError(f"{node.name}: q, k and v must be known, with their shapes")
    heads, kv_heads = q.shape[2 if attributes.layout else 1], k.shape[1]
    d, v_size = q.shape[3], attributes.v_head_size or (v.shape[3] if v.shape else None)
    if isinstance(d, int) and isinstance(v_size, int):
        try:
            check_head_sizes(d, v_size)
        except ConfigError as error:
            raise ExportError(f"{node.name}: {error}") from error
    return NodeUse(
        attributes=attributes,
        dtype=q.dtype or k.dtype or ir.DataType.FLOAT,
        mask_dtype=mask.dtype if mask is not None else None,
        heads=heads if isinstance(heads, int) else None,
        kv_heads=kv_heads if isinstance(kv_heads, int) else None,
    )


def _name_weights(graph: ir.Graph) -> None:
    """Give weights the names they have in the source.

    The exporter's optimizer stores a Linear's weight transposed, under a new name, and notes the
    old one; the module that was traced has the source within it as ``model`` or ``module``.
    """
    for value in list(graph.initializers.values()):
        folded = value.metadata_props.pop("pkg.onnxscript.optimizer.folded_from", "")
        value.metadata_props.clear()
        origin = ast.literal_eval(folded) if folded else []
        is_weight = len(origin) == 1 and "." in origin[0] and len(value.shape or ()) == 2
        name = f"{origin[0]}.T" if is_weight else value.name or ""
        name = name.removeprefix("model.").removeprefix("module.")
        if name != value.name and name not in graph.initializers:
            value.name = name


def _describe(model: ir.Model, metadata: Mapping[str, str]) -> None:
    """Say what made the file, and forget what must not be in it: source paths, stack traces."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    _name_weights(model.graph)
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    model.graph.opset_imports[OP_DOMAIN] = OP_VERSION
    model.ir_version = IR_VERSION
    model.producer_name = "fastmqa_export"
    model.producer_version = __version__
    model.metadata_props.clear()
    model.metadata_props["fastmqa.op_version"] = str(OP_VERSION)
    for key, text in sorted(metadata.items()):
        model.metadata_props[f"fastmqa.{key}"] = text
