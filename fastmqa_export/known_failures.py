# SPDX-License-Identifier: MIT
"""What is known to go wrong with the runtimes around us, and what to do about each.

`doctor` finds those that show in what is installed; these show only when something is run. Each was
met with the versions named, or stands in NVIDIA's documentation or source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final


@dataclasses.dataclass(frozen=True)
class KnownFailure:
    """One of them.

    Attributes:
        where: the program that fails.
        sign: what is seen.
        cause: why.
        remedy: what to do.
    """

    where: str
    sign: str
    cause: str
    remedy: str


KNOWN_FAILURES: Final = (
    KnownFailure(
        "onnxruntime",
        "loading a file with a KV cache ends with `Opset 24 is under development`, or with `Failed "
        "to find kernel for TensorScatter(24)`",
        "releases up to 1.23 do not know opset 24, and 1.24 lacks that op",
        "update to 1.28 or newer, or export with --cache none",
    ),
    KnownFailure(
        "onnxruntime",
        "a session that asked for CUDA is as slow as the CPU",
        "a provider that cannot start is replaced by the CPU with no more than a log line",
        "look at session.get_providers(); `doctor` says which providers really start",
    ),
    KnownFailure(
        "onnxruntime",
        "`Could not find an implementation for MatMul` in a bfloat16 file",
        "onnxruntime multiplies no bfloat16 on the CPU",
        "export with --dtype float32 or float16; TensorRT takes bfloat16 from SM80 on",
    ),
    KnownFailure(
        "TensorRT",
        "the engine builds, but the inspector shows no plugin layer",
        "the parser takes a node's function in standard ops where the plugin is not registered, or "
        "where the node lacks the attribute plugin_namespace",
        "build with `fastmqa-export build`, which counts the plugin layers; other builders need "
        "the library loaded before they parse (trtexec --staticPlugins)",
    ),
    KnownFailure(
        "TensorRT",
        "a plugin library is refused, or an engine ends with an error about its version",
        "libraries are for one major version of TensorRT, and engines for the version (and GPU) "
        "that built them",
        "compile the library with the headers of the TensorRT in use, and build the engine anew; "
        "build --version-compatible gives engines for later versions too",
    ),
    KnownFailure(
        "TensorRT",
        "`The KV cache tensor must have a static sequence length dimension`",
        "the layer that writes a cache in place wants to know its size",
        "give --capacity to `build`; for other builders, fix the dimension `capacity` in the file",
    ),
    KnownFailure(
        "TensorRT",
        "answers get worse once a sequence is longer than the cache",
        "rows written beyond the capacity are dropped without an error",
        "stop there, or build with a larger --capacity",
    ),
    KnownFailure(
        "TensorRT",
        "an engine built hardware-compatible (kAMPERE_PLUS) finds no kernel",
        "such engines may use 48 KB of shared memory, and most of the kernels need more",
        "build one engine for each GPU",
    ),
    KnownFailure(
        "TensorRT",
        "other exporters' files: softcap or a softmax precision is refused in ONNX `Attention`, or "
        "the numbers are wrong with lengths, windows or a causal mask over past keys",
        "TensorRT's own attention lacks the former, and its parser ignores the latter (seen in "
        "TensorRT-RTX 1.7.1)",
        "export with `fastmqa-export export`, whose files hold no `Attention` node",
    ),
    KnownFailure(
        "TensorRT",
        "pip install tensorrt fails without the internet",
        "that package only fetches the real one from NVIDIA's own index",
        "install the wheels of that index by hand, or use NVIDIA's containers",
    ),
    KnownFailure(
        "TensorRT-RTX",
        "`FP32 GEMM is not supported`, or a type is refused, for SM75",
        "it has no float32 and no bfloat16 products on SM75",
        "export with --dtype float16, or build for SM80 and newer",
    ),
    KnownFailure(
        "TensorRT-RTX",
        "the process aborts while it parses a file",
        "it supports no plugins, and ends the process when a registered one matches a node",
        "never load the plugin in that process; `fastmqa-export build` does it in its own",
    ),
    KnownFailure(
        "Triton",
        "a model with a KV cache and a TensorRT engine forgets what it was told",
        "TensorRT writes the cache in place, at the address of its input, and Triton's TensorRT "
        "backend gives inputs and outputs different buffers",
        "`bundle` refuses such engines: export with --cache none, serve the file by onnxruntime, "
        "or run the engine from a program of your own",
    ),
    KnownFailure(
        "Triton",
        "`deserialization of the engine failed`, or the plugin is not found",
        "the container's TensorRT is another than the one that built the engine, or the server was "
        "started without the plugin",
        "take the container whose TensorRT `bundle` names, and start it with start.sh",
    ),
)


def describe_failures(failures: Sequence[KnownFailure] = KNOWN_FAILURES) -> str:
    """The list for people."""
    return "\n\n".join(f"{x.where}: {x.sign}\n  {x.cause}\n  → {x.remedy}" for x in failures)
