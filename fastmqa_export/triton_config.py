# SPDX-License-Identifier: MIT
"""Triton's ``config.pbtxt`` for an exported file.

A static KV cache becomes Triton's implicit state: Triton keeps past and present of each sequence,
so that a client sends tokens and their position only. The state begins as zeros, since the function
body must not meet NaN beyond what is cached; Triton would begin with whatever lies in memory.
Sequences are batched by the ``oldest`` strategy, which runs requests only (``direct`` fills the
slots of idle sequences with made-up ones) and needs no control inputs, which our files lack.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
from collections.abc import Mapping
from typing import Any, Final

import jinja2

from fastmqa_export import __version__
from fastmqa_export.errors import ModelFileError

#: How long Triton keeps the cache of a sequence that nobody continues.
IDLE_SECONDS: Final = 60

#: Inputs that the smoke-test client knows how to fill, beside the sequence itself.
_KNOWN_INPUTS: Final = {"position", "lengths", "attention_mask"}
_DATA_TYPES: Final = {
    "float": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
}
_PAST: Final = re.compile(r"past_key_values\.(\d+\.(?:key|value))")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output as Triton sees it.

    Attributes:
        name: in the model.
        data_type: "TYPE_FP16" and so on.
        dims: shape without the batch, −1 where it varies.
    """

    name: str
    data_type: str
    dims: list[int]


@dataclasses.dataclass(frozen=True)
class State(Tensor):
    """A cache: the input of that name, and the output that is its next value."""

    output: str


@dataclasses.dataclass(frozen=True)
class Interface:
    """What a served model takes, gives and keeps."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    states: list[State]


def interface_of(info: Mapping[str, Any], capacity: int) -> Interface:
    """The interface of an exported file.

    Args:
        info: what `fastmqa_export.inspect.inspect_file` found.
        capacity: T, tokens of a sequence that the cache has room for.

    Raises:
        ModelFileError: if the file is none that `fastmqa-export export` writes.
    """
    if not info["fused_attention"] or info["problems"]:
        reason = "; ".join(info["problems"]) or "it has no FusedAttention node"
        raise ModelFileError(f"{info['file']} cannot be served: {reason}")
    tensors = {v["name"]: _tensor(v, capacity, info["file"]) for v in info["inputs"]}
    present = {v["name"]: _tensor(v, capacity, info["file"]) for v in info["outputs"]}
    states = [
        State(**dataclasses.asdict(tensors.pop(past[0])), output=f"present.{past[1]}")
        for past in map(_PAST.fullmatch, list(tensors))
        if past
    ]
    outputs = [present[name] for name in present.keys() - {s.output for s in states}]
    _, *others = tensors
    if len(outputs) != 1 or not set(others) <= _KNOWN_INPUTS:
        raise ModelFileError(
            f"{info['file']} has inputs {', '.join(tensors)} and outputs "
            f"{', '.join(t.name for t in outputs)}; served are files with one output, and beside "
            f"the sequence only {', '.join(sorted(_KNOWN_INPUTS))} and past_key_values.*"
        )
    return Interface(list(tensors.values()), outputs, states)


def _tensor(value: Mapping[str, Any], capacity: int, file: str) -> Tensor:
    sizes = {"sequence": -1, "capacity": capacity}
    batch, *shape = value["shape"] or [""]
    if batch != "batch" or value["dtype"] not in _DATA_TYPES:
        raise ModelFileError(
            f"{value['name']} of {file} is {value['dtype']} {value['shape']}; served are tensors "
            f"of {', '.join(_DATA_TYPES)} whose first dimension is `batch`"
        )
    dims = [sizes.get(size, -1) if isinstance(size, str) else size for size in shape]
    return Tensor(value["name"], _DATA_TYPES[value["dtype"]], dims)


def config_text(
    name: str,
    interface: Interface,
    *,
    model: str,
    max_batch: int,
    plans: Mapping[str, str],
) -> str:
    """The text of ``config.pbtxt``.

    Args:
        name: of the model, and of its folder.
        interface: see `interface_of`.
        model: name of the ONNX file, for a comment.
        max_batch: most requests in a batch, and most sequences whose caches are kept at once.
        plans: file names of engines by compute capability, "7.5"; empty: the ONNX file on the CPU.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quoted"] = json.dumps
    template = importlib.resources.files("fastmqa_export").joinpath("triton_config.pbtxt.j2")
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        version=__version__,
        name=name,
        model=model,
        backend="tensorrt" if plans else "onnxruntime",
        max_batch=max_batch,
        inputs=interface.inputs,
        outputs=interface.outputs,
        states=interface.states,
        idle_seconds=IDLE_SECONDS,
        plans=plans,
    )
