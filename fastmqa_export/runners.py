# SPDX-License-Identifier: MIT
"""Polygraphy runners that feed whole sequences: PyTorch in one pass, a file in prefill and decode.

Which runtime runs the file is no matter here, see `fastmqa_export.runtime`.

A feed is a batch of sequences: ``sequence`` (B, N, …) padded on the right, ``prefill`` int64 (B,),
how many tokens of each are fed first and at once, and ``decode`` int64 (1,), how many follow one by
one. Every runner returns the outputs of the valid tokens alone, (Σ tokens, …), so that padding
never takes part in a comparison: the model's output, and the keys and values that ended up in the
cache.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from fastmqa_export.runtime import CachedModel, OneShotModel, present_name
from fastmqa_export.source import Source, to_numpy

Feed = Mapping[str, NDArray[Any]]


class _SequenceRunner(BaseRunner):  # type: ignore[misc]
    """What the runners share: the feed they take, and the time they report."""

    def __init__(self, name: str, source: Source) -> None:
        super().__init__(name=name)
        self._sample = to_numpy(source.sample(1, 1, torch.Generator()))

    def get_input_metadata_impl(self) -> TensorMetadata:
        shape = ("batch", "tokens", *self._sample.shape[2:])
        metadata = TensorMetadata()
        metadata.add("sequence", dtype=self._sample.dtype, shape=shape)
        metadata.add("prefill", dtype=np.int64, shape=("batch",))
        metadata.add("decode", dtype=np.int64, shape=(1,))
        return metadata

    def activate_impl(self) -> None:
        pass

    def deactivate_impl(self) -> None:
        pass

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, NDArray[Any]]:
        start = time.perf_counter()
        outputs = self.run(feed_dict["sequence"], feed_dict["prefill"], int(feed_dict["decode"][0]))
        self.inference_time = time.perf_counter() - start
        return OrderedDict(outputs)

    def run(
        self, sequence: NDArray[Any], prefill: NDArray[Any], decode: int
    ) -> dict[str, NDArray[Any]]:
        raise NotImplementedError


class TorchRunner(_SequenceRunner):
    """The source's own PyTorch model, each sequence in one pass without cache or padding."""

    def __init__(self, name: str, source: Source, dtype: torch.dtype, *, with_cache: bool) -> None:
        """Run ``source`` in ``dtype``: its own, or float64 as the oracle."""
        super().__init__(name, source)
        self.source, self.dtype, self.with_cache = source, dtype, with_cache

    def run(
        self, sequence: NDArray[Any], prefill: NDArray[Any], decode: int
    ) -> dict[str, NDArray[Any]]:
        """Outputs in ``dtype`` (bfloat16 as float32, which holds it exactly)."""
        parts: dict[str, list[torch.Tensor]] = {}
        for row, length in zip(sequence, prefill + decode, strict=True):
            x = torch.from_numpy(row[None, :length])
            outputs = self.source.evaluate(_in_dtype(x, self.source.dtype), self.dtype)
            for name, (tensor,) in outputs.items():
                if name == self.source.output_name:
                    parts.setdefault(name, []).append(tensor)
                elif self.with_cache:
                    parts.setdefault(name, []).append(tensor.transpose(0, 1))
        return {name: to_numpy(torch.cat(tensors)) for name, tensors in parts.items()}


class FileRunner(_SequenceRunner):
    """An exported file in some runtime; `file_runner` makes the right one."""

    model: CachedModel | OneShotModel

    def takes(self, feed: Feed) -> bool:
        """Whether the runtime has room for the feed."""
        sequence, prefill, decode = feed["sequence"], feed["prefill"], int(feed["decode"][0])
        return self.model.takes(len(sequence), int(prefill.max()), int(prefill.max()) + decode)


class StepRunner(FileRunner):
    """An exported file with a static cache: a padded prefill, then one token after the other."""

    def __init__(self, name: str, source: Source, model: CachedModel) -> None:
        """Run ``model``, whose buffers start small so that they have to grow where they can."""
        super().__init__(name, source)
        self.model: CachedModel = model

    def run(
        self, sequence: NDArray[Any], prefill: NDArray[Any], decode: int
    ) -> dict[str, NDArray[Any]]:
        """The first output and the caches, of valid tokens."""
        model, batch = self.model, len(sequence)
        model.reset(batch, int(prefill.max()))
        y = model.step(sequence[:, : prefill.max()])
        rows = [[y[b, : prefill[b]]] for b in range(batch)]
        model.advance(prefill)
        for step in range(decode):
            y = model.step(sequence[np.arange(batch), prefill + step][:, None])
            for b in range(batch):
                rows[b].append(y[b])
            model.advance(np.ones(batch, np.int64))
        outputs = {model.output_name: np.concatenate([r for row in rows for r in row])}
        for name in model.cache_names:
            cache = model.cache(name).swapaxes(1, 2)  # (B, T, Hkv, ·)
            valid = [cache[b, : prefill[b] + decode] for b in range(batch)]
            outputs[present_name(name)] = np.concatenate(valid)
        return outputs


class OneShotRunner(FileRunner):
    """An exported file without a cache: whole sequences, padded on the right, in one run."""

    def __init__(self, name: str, source: Source, model: OneShotModel) -> None:
        """Run ``model``."""
        super().__init__(name, source)
        self.model: OneShotModel = model

    def run(
        self, sequence: NDArray[Any], prefill: NDArray[Any], decode: int
    ) -> dict[str, NDArray[Any]]:
        """The only output, of valid tokens."""
        lengths = prefill + decode
        if self.model.padding_name == "attention_mask":
            told = (np.arange(sequence.shape[1]) < lengths[:, None]).astype(np.int64)
        else:
            told = lengths.astype(np.int32)
        y = self.model.run(sequence, told)
        return {self.model.output_name: np.concatenate([y[b, :n] for b, n in enumerate(lengths)])}


def file_runner(name: str, source: Source, model: CachedModel | OneShotModel) -> FileRunner:
    """The runner for a model with or without a cache."""
    if isinstance(model, CachedModel):
        return StepRunner(name, source, model)
    return OneShotRunner(name, source, model)


def _in_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if x.is_floating_point() else x
