# SPDX-License-Identifier: MIT
"""Run an exported file step by step with its KV cache in place, and generate text with it.

Past and present of the cache are one buffer, which the runtime binds as input and as output: then
onnxruntime writes the new rows and copies nothing (0.005 ms a step, whatever the capacity). The
buffer doubles when it is full.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fastmqa_export.errors import ConfigError, KernelError, MissingDependencyError, ModelFileError

_NUMPY: Final = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}

#: Inputs of an exported file that hold its cache; `present_name` gives the outputs.
PAST: Final = re.compile(r"past_key_values\.(\d+)\.(key|value)")


class StepModel(Protocol):
    """A model that takes sequences piece by piece."""

    def reset(self, batch: int, capacity: int = 1) -> None:
        """Forget everything; make room for ``capacity`` tokens of ``batch`` sequences."""

    def step(self, x: NDArray[Any]) -> NDArray[Any]:
        """Feed (B, S, …) after what is cached; give the outputs (B, S, …)."""

    def advance(self, counts: Sequence[int] | NDArray[Any]) -> None:
        """Keep that many of the last step's tokens of each sequence; the rest was padding."""


@runtime_checkable
class CachedModel(StepModel, Protocol):
    """An exported file with a static cache, in some runtime.

    Attributes:
        input_name: the graph input that holds the sequence.
        output_name: the first graph output.
        position: int64 (B,), tokens cached in each sequence.
    """

    input_name: str
    output_name: str
    position: NDArray[Any]

    @property
    def cache_names(self) -> list[str]:
        """Names of the inputs ``past_key_values.*``, in order."""

    def cache(self, name: str) -> NDArray[Any]:
        """The buffer behind an input ``past_key_values.*``, (B, Hkv, T, ·); a copy."""

    def takes(self, batch: int, prefill: int, length: int) -> bool:
        """Whether ``batch`` sequences fit: ``prefill`` tokens at once, ``length`` in all."""


class OneShotModel(Protocol):
    """An exported file without a cache, in some runtime.

    Attributes:
        input_name: the graph input that holds the sequence.
        padding_name: the one that says what is padding.
        output_name: the only graph output.
    """

    input_name: str
    padding_name: str
    output_name: str

    def run(self, x: NDArray[Any], padding: NDArray[Any]) -> NDArray[Any]:
        """Whole sequences x (B, N, …), padded on the right, to the output (B, N, …)."""

    def takes(self, batch: int, prefill: int, length: int) -> bool:
        """Whether ``batch`` sequences of ``length`` tokens fit."""


def present_name(past: str) -> str:
    """The output that holds an input ``past_key_values.*`` after the step."""
    return past.replace("past_key_values", "present")


def next_power_of_two(n: int) -> int:
    """The smallest power of two ≥ n ≥ 1."""
    return 1 << (n - 1).bit_length()


def create_session(path: Path, *, threads: int = 0, library: Path | None = None) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        path: an ONNX file.
        threads: for one op; 0: as many as cores.
        library: our custom op, which then runs instead of the function in the file.

    Raises:
        ModelFileError: if onnxruntime cannot load it.
        KernelError: if it cannot load the library.
        MissingDependencyError: if onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "onnxruntime is not installed: pip install 'fastmqa_export[cpu]', or [gpu] on a "
            "machine with an NVIDIA GPU (never both)"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Warnings about the machine and about initializers that no node reads are not the user's.
    options.log_severity_level = 3
    if library is not None:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # onnxruntime's exceptions share no base class
            first = str(error).splitlines()[0]
            raise KernelError(f"onnxruntime cannot load the library {library}: {first}") from error
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        first = str(error).splitlines()[0]
        raise ModelFileError(f"onnxruntime cannot load {path}: {first}") from error


class OnnxModel:
    """An exported file with a static cache, in onnxruntime.

    Attributes:
        position: int64 (B,), tokens cached in each sequence.
        capacity: T, tokens that the buffers have room for.
    """

    def __init__(self, session: Any) -> None:
        """Wrap a session of `create_session`.

        Raises:
            ModelFileError: if the file has no static cache.
        """
        self.session = session
        inputs = {x.name: x for x in session.get_inputs()}
        self._past = {name: x for name, x in inputs.items() if PAST.fullmatch(name)}
        if not self._past or "position" not in inputs:
            raise ModelFileError(
                "this file has no KV cache (inputs position and past_key_values.*); export it "
                "with --cache static to run it step by step"
            )
        outputs = {x.name for x in session.get_outputs()}
        for name in self._past:
            if (present := present_name(name)) not in outputs:
                raise ModelFileError(f"this file has no output {present}; export it again")
        self.input_name = next(x for x in inputs if x not in self._past and x != "position")
        self.input_type = _NUMPY[inputs[self.input_name].type]
        output = session.get_outputs()[0]
        self.output_name = output.name
        self._output_type, self._output_columns = _NUMPY[output.type], output.shape[2:]
        self._binding: Any = None
        self._output: Any = None
        self.reset(1)

    def reset(self, batch: int, capacity: int = 1) -> None:
        """Forget everything; make room for ``capacity`` tokens of ``batch`` sequences."""
        self.position = np.zeros(batch, np.int64)
        self.capacity = 0
        self._buffers: dict[str, Any] = {}
        self._grow(next_power_of_two(max(1, capacity)))

    def step(self, x: NDArray[Any]) -> NDArray[Any]:
        """Feed x (B, S, …) at ``position``; give the first output (B, S, …).

        The caller advances, since only it knows how much of x is padding.
        """
        if x.shape[0] != len(self.position):
            raise ConfigError(
                f"{x.shape[0]} sequences given to a cache of {len(self.position)}; call reset()"
            )
        needed = int(self.position.max()) + x.shape[1]
        if needed > self.capacity:
            self._grow(next_power_of_two(needed))
        self._binding.bind_cpu_input(self.input_name, np.ascontiguousarray(x, self.input_type))
        self._binding.bind_cpu_input("position", self.position)
        shape = [*x.shape[:2], *self._output_columns]
        if self._output is None or self._output.shape() != shape:
            self._output = self._allocate(np.zeros(shape, self._output_type))
            self._binding.bind_ortvalue_output(self.output_name, self._output)
        self.session.run_with_iobinding(self._binding)
        result: NDArray[Any] = self._output.numpy()  # the buffer itself, which the next step reuses
        return result.copy()

    def advance(self, counts: Sequence[int] | NDArray[Any] | int) -> None:
        """Keep that many of the last step's tokens of each sequence; the rest was padding."""
        self.position = self.position + np.asarray(counts, np.int64)

    @property
    def cache_names(self) -> list[str]:
        """Names of the inputs ``past_key_values.*``, in order."""
        return list(self._past)

    def cache(self, name: str) -> NDArray[Any]:
        """The buffer behind an input ``past_key_values.*``, (B, Hkv, T, ·); a copy."""
        array: NDArray[Any] = self._buffers[name].numpy()
        return array.copy()

    def takes(self, batch: int, prefill: int, length: int) -> bool:
        """Always: the buffers grow."""
        return True

    def buffer_address(self, name: str) -> int:
        """Where that buffer lies: the same as long as it is neither grown nor reset."""
        return int(self._buffers[name].data_ptr())

    @staticmethod
    def _allocate(array: NDArray[Any]) -> Any:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def _grow(self, capacity: int) -> None:
        batch = len(self.position)
        for name, x in self._past.items():
            new = np.zeros((batch, x.shape[1], capacity, x.shape[3]), _NUMPY[x.type])
            if name in self._buffers:
                new[:, :, : self.capacity] = self._buffers[name].numpy()
            self._buffers[name] = self._allocate(new)
        self.capacity = capacity
        self._output = None
        # Past and present bound to one buffer: the write is in place.
        self._binding = self.session.io_binding()
        for name, buffer in self._buffers.items():
            self._binding.bind_ortvalue_input(name, buffer)
            self._binding.bind_ortvalue_output(present_name(name), buffer)


class OnnxOneShot:
    """An exported file without a cache, in onnxruntime."""

    def __init__(self, session: Any) -> None:
        """Wrap a session of `create_session`.

        Raises:
            ModelFileError: if the file takes or gives something else than one sequence.
        """
        self.session = session
        inputs, outputs = (
            [x.name for x in a] for a in (session.get_inputs(), session.get_outputs())
        )
        if len(inputs) != 2 or len(outputs) != 1:
            raise ModelFileError(
                f"the file has inputs {', '.join(inputs)} and outputs {', '.join(outputs)}; one "
                "without a cache has a sequence, what is padding in it, and one output: export it "
                "with `fastmqa-export export --cache none`"
            )
        (self.input_name, self.padding_name), (self.output_name,) = inputs, outputs

    def run(self, x: NDArray[Any], padding: NDArray[Any]) -> NDArray[Any]:
        """Whole sequences x (B, N, …), padded on the right, to the output (B, N, …)."""
        y: NDArray[Any]
        feed = {self.input_name: x, self.padding_name: padding}
        (y,) = self.session.run([self.output_name], feed)
        return y

    def takes(self, batch: int, prefill: int, length: int) -> bool:
        """Always."""
        return True


def generate(
    model: StepModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: frozenset[int] = frozenset(),
) -> list[list[int]]:
    """Greedy decoding of several prompts at once.

    Args:
        model: its output is logits (B, S, vocabulary).
        prompts: token ids, each at least one; padded on the right for the first step.
        max_new_tokens: at most so many per prompt.
        stop: tokens that end a sequence; the one that did is its last.

    Returns:
        The new tokens of each prompt.
    """
    if not prompts or not all(prompts):
        raise ConfigError("every prompt needs at least one token")
    lengths = np.array([len(p) for p in prompts])
    x = np.zeros((len(prompts), lengths.max()), np.int64)
    for row, prompt in zip(x, prompts, strict=True):
        row[: len(prompt)] = prompt
    model.reset(len(prompts), int(lengths.max()))
    logits = model.step(x)
    model.advance(lengths)
    last = logits[np.arange(len(prompts)), lengths - 1]
    new: list[list[int]] = [[] for _ in prompts]
    for remaining in range(max_new_tokens - 1, -1, -1):
        tokens = last.argmax(-1)
        live = [not n or n[-1] not in stop for n in new]
        for n, token, is_live in zip(new, tokens, live, strict=True):
            if is_live:
                n.append(int(token))
        if not remaining or all(n[-1] in stop for n in new):
            break
        last = model.step(tokens[:, None])[:, -1]
        model.advance(np.ones(len(prompts), np.int64))
    return new
