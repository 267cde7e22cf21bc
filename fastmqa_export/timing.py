# SPDX-License-Identifier: MIT
"""How long a model takes, step by step: medians of one process, for the report."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch

from fastmqa_export.runtime import StepModel
from fastmqa_export.source import Source, to_numpy


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one kind of step, in milliseconds.

    Attributes:
        what: prefill or decode, with sizes.
        milliseconds: median.
        p10: tenth percentile.
        p90: ninetieth percentile.
        tokens_per_second: tokens of a step over its median time.
    """

    what: str
    milliseconds: float
    p10: float
    p90: float
    tokens_per_second: float


def time_steps(
    model: StepModel, source: Source, cached: int, *, prefills: int = 2, decodes: int = 12
) -> list[Timing]:
    """Time prefills of ``cached`` tokens and decode steps after them, batch 1.

    The first prefill and the first decode step are not counted.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = to_numpy(source.sample(1, cached, generator))
    token = to_numpy(source.sample(1, 1, generator))
    prefill, decode = [], []
    for _ in range(prefills + 1):
        model.reset(1, cached)
        start = time.perf_counter()
        model.step(prompt)
        prefill.append(time.perf_counter() - start)
        model.advance([cached])
    for _ in range(decodes + 1):
        start = time.perf_counter()
        model.step(token)
        decode.append(time.perf_counter() - start)
        model.advance([1])
    return [
        _timing(f"prefill, {cached} tokens", prefill[1:], cached),
        _timing(f"decode, {cached} cached tokens", decode[1:], 1),
    ]


def _timing(what: str, seconds: list[float], tokens: int) -> Timing:
    p10, median, p90 = (float(x) * 1e3 for x in np.percentile(seconds, (10, 50, 90)))
    return Timing(what, median, p10, p90, tokens / median * 1e3)
