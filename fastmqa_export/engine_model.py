# SPDX-License-Identifier: MIT
"""An engine as a model: with its KV cache on the GPU, step by step, or whole sequences at once.

The same interfaces as `fastmqa_export.runtime` has for onnxruntime, so that `generate` and
`compare` take either.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmqa_export.engine_session import EngineSession
from fastmqa_export.errors import ConfigError, EngineError
from fastmqa_export.runtime import PAST, present_name

#: What TensorRT asks of every address that is bound to it, in bytes.
_ALIGNMENT: Final = 256


class EngineModel:
    """An engine with a static cache; past and present of the cache are one buffer.

    The capacity is what the engine was built with: a full cache does not grow. A step of more
    sequences than a profile takes is run in parts.

    Attributes:
        position: int64 (B,), tokens cached in each sequence.
        capacity: T.
    """

    def __init__(self, session: EngineSession) -> None:
        """Wrap a session.

        Raises:
            EngineError: if the engine has no static cache that is written in place.
        """
        self.session = session
        self._past = [name for name in session.input_names if PAST.fullmatch(name)]
        if not self._past or "position" not in session.input_names:
            raise EngineError(
                f"{session.plan} has no KV cache (inputs position and past_key_values.*); export "
                "the model with --cache static"
            )
        for past in self._past:
            if session.alias(present_name(past)) != past:
                raise EngineError(
                    f"{session.plan} does not write {past} in place; build it anew from a file of "
                    "`fastmqa-export export`, with TensorRT 10.15 or newer"
                )
        self.capacity = session.shape(self._past[0])[2]
        if self.capacity < 0:
            raise EngineError(
                f"the capacity of the KV cache in {session.plan} is dynamic; build the engine with "
                "`fastmqa-export build`, which fixes it"
            )
        self.input_name = next(
            name for name in session.input_names if name not in self._past and name != "position"
        )
        (self.output_name,) = set(session.output_names) - {present_name(n) for n in self._past}
        self._buffers: dict[str, Tensor] = {}
        self.reset(1)

    def reset(self, batch: int, capacity: int = 1) -> None:
        """Forget everything; ``batch`` sequences of ``capacity`` tokens must fit.

        Raises:
            ConfigError: if they do not.
        """
        self._check_room(capacity)
        self.position = np.zeros(batch, np.int64)
        for name in self._past:
            if name in self._buffers and len(self._buffers[name]) == batch:
                self._buffers[name].zero_()
                continue
            self._buffers[name] = torch.zeros(
                (batch, *self.session.shape(name)[1:]),
                dtype=self.session.dtype(name),
                device=self.session.device,
            )

    def step(self, x: NDArray[Any]) -> NDArray[Any]:
        """Feed x (B, S, …) at ``position``; give the first output (B, S, …).

        The caller advances, since only it knows how much of x is padding.

        Raises:
            ConfigError: if x does not fit in the cache, or in any profile of the engine.
        """
        if x.shape[0] != len(self.position):
            raise ConfigError(
                f"{x.shape[0]} sequences given to a cache of {len(self.position)}; call reset()"
            )
        self._check_room(int(self.position.max()) + x.shape[1])
        profile, parts = _choose_profile(self.session, self.input_name, *x.shape[:2])
        return np.concatenate([self._run(profile, x, rows) for rows in parts])

    def advance(self, counts: Sequence[int] | NDArray[Any] | int) -> None:
        """Keep that many of the last step's tokens of each sequence; the rest was padding."""
        self.position = self.position + np.asarray(counts, np.int64)

    def takes(self, batch: int, prefill: int, length: int) -> bool:
        """Whether ``batch`` sequences fit: ``prefill`` tokens at once, ``length`` in all."""
        steps = {prefill, 1} if length > prefill else {prefill}
        return length <= self.capacity and all(
            _fits(self.session, self.input_name, batch, tokens) for tokens in steps
        )

    @property
    def cache_names(self) -> list[str]:
        """Names of the inputs ``past_key_values.*``, in order."""
        return list(self._past)

    def cache(self, name: str) -> NDArray[Any]:
        """The buffer behind an input ``past_key_values.*``, (B, Hkv, T, ·); a copy."""
        return _to_numpy(self._buffers[name]).copy()

    def buffer_address(self, name: str) -> int:
        """Where that buffer lies: the same as long as the number of sequences is."""
        return self._buffers[name].data_ptr()

    def _check_room(self, tokens: int) -> None:
        if tokens > self.capacity:
            raise ConfigError(
                f"{tokens} tokens do not fit in the KV cache of {self.session.plan}, which holds "
                f"{self.capacity} of a sequence; build the engine with --capacity {tokens} or more"
            )

    def _run(self, profile: int, x: NDArray[Any], rows: slice) -> NDArray[Any]:
        past = {name: self._buffers[name][rows] for name in self._past}
        for name, buffer in past.items():
            if rows.start and buffer.stride(0) * buffer.element_size() % _ALIGNMENT:
                raise ConfigError(
                    f"{name} of one sequence is {buffer.stride(0) * buffer.element_size()} bytes, "
                    f"and TensorRT binds multiples of {_ALIGNMENT}: build the engine with a "
                    "--capacity that is a multiple of 16, or a larger --max-batch"
                )
        inputs = {
            self.input_name: _to_device(self.session, self.input_name, x[rows]),
            "position": _to_device(self.session, "position", self.position[rows]),
            **past,
        }
        present = {present_name(name): buffer for name, buffer in past.items()}
        return _to_numpy(self.session.run(profile, inputs, present)[self.output_name])


class EngineOneShot:
    """An engine without a cache: whole sequences, padded on the right, in one run."""

    def __init__(self, session: EngineSession) -> None:
        """Wrap a session.

        Raises:
            EngineError: if the engine takes or gives something else than one sequence.
        """
        self.session = session
        if len(session.input_names) != 2 or len(session.output_names) != 1:
            raise EngineError(
                f"{session.plan} has inputs {', '.join(session.input_names)} and outputs "
                f"{', '.join(session.output_names)}; one without a cache has a sequence, what is "
                "padding in it, and one output: build it from a file of `fastmqa-export export`"
            )
        self.input_name, self.padding_name = session.input_names
        (self.output_name,) = session.output_names

    def run(self, x: NDArray[Any], padding: NDArray[Any]) -> NDArray[Any]:
        """Whole sequences x (B, N, …), padded on the right, to the output (B, N, …).

        Raises:
            ConfigError: if x fits in no profile of the engine.
        """
        profile, parts = _choose_profile(self.session, self.input_name, *x.shape[:2])
        outputs = []
        for rows in parts:
            inputs = {
                self.input_name: _to_device(self.session, self.input_name, x[rows]),
                self.padding_name: _to_device(self.session, self.padding_name, padding[rows]),
            }
            outputs.append(_to_numpy(self.session.run(profile, inputs, {})[self.output_name]))
        return np.concatenate(outputs)

    def takes(self, batch: int, prefill: int, length: int) -> bool:
        """Whether ``batch`` sequences of ``length`` tokens fit."""
        return _fits(self.session, self.input_name, batch, length)


def engine_model(session: EngineSession) -> EngineModel | EngineOneShot:
    """The model in an engine, with a cache or without."""
    if "position" in session.input_names:
        return EngineModel(session)
    return EngineOneShot(session)


def _choose_profile(
    session: EngineSession, name: str, batch: int, tokens: int
) -> tuple[int, list[slice]]:
    """The profile for x (batch, tokens, …), and the parts in which it takes the sequences.

    The last profile is made for single tokens (decode), the first for more (prefill).

    Raises:
        ConfigError: if there is none.
    """
    limits = [session.limits(name, profile) for profile in range(session.profiles)]
    order = range(session.profiles)
    for profile in reversed(order) if tokens == 1 else order:
        low, high = limits[profile]
        parts = -(-batch // high[0])
        if low[1] <= tokens <= high[1] and batch // parts >= low[0]:
            edges = [batch * i // parts for i in range(parts + 1)]
            return profile, [slice(*pair) for pair in itertools.pairwise(edges)]
    taken = " or ".join(f"{low[:2]} to {high[:2]}" for low, high in limits)
    raise ConfigError(
        f"{batch} sequences of {tokens} tokens fit in no profile of {session.plan}, which takes "
        f"(batch, tokens) from {taken}; build it with a larger --max-sequence, or feed less at once"
    )


def _fits(session: EngineSession, name: str, batch: int, tokens: int) -> bool:
    try:
        _choose_profile(session, name, batch, tokens)
    except ConfigError:
        return False
    return True


def _to_device(session: EngineSession, name: str, array: NDArray[Any]) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.to(session.device, session.dtype(name))


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    """Waits for the GPU; bfloat16 as float32, which holds it."""
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    array: NDArray[Any] = tensor.cpu().numpy()
    return array
