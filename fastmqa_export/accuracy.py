# SPDX-License-Identifier: MIT
"""How far a result is from the float64 oracle, and how far it may be.

The rule is that of FlashAttention's tests: an implementation may be at most twice as far from the
oracle as PyTorch's own operators in the same dtype, plus one unit in the last place of the output.
No tolerance is chosen per shape, and a NaN can never pass.

In float16 and bfloat16 sums are kept in float32, so that rounding the results is the error, and
twice is generous. In float32 the order of summation is most of the error. It is fixed by no
standard: summing 1024 terms one after the other is as right as PyTorch's blocks of 16, and about
three times as far off. There the factor is 4.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class ErrorStatistics:
    """Distance of a tensor from the oracle.

    Attributes:
        max_abs: largest absolute error; inf where NaN or infinity differ in place or sign.
        mean_abs: mean absolute error.
        max_ulp: ``max_abs`` in units in the last place of the dtype at the oracle's largest
            magnitude.
        cosine: cosine similarity of the flattened tensors; 1 for two zero tensors.
        worst_index: where ``max_abs`` is.
        worst_actual: the value there.
        worst_oracle: the oracle's value there.
        ulp: the unit that ``max_ulp`` counts.
    """

    max_abs: float
    mean_abs: float
    max_ulp: float
    cosine: float
    worst_index: tuple[int, ...]
    worst_actual: float
    worst_oracle: float
    ulp: float


def unit_in_last_place(magnitude: float, dtype: torch.dtype) -> float:
    """Spacing of the dtype's numbers at this magnitude, float64 included."""
    info = torch.finfo(dtype)
    exponent = math.floor(math.log2(max(magnitude, info.smallest_normal)))
    return math.ldexp(info.eps, exponent)


def measure(actual: Tensor, oracle: Tensor, dtype: torch.dtype) -> ErrorStatistics:
    """Compare ``actual`` with the float64 ``oracle`` of the same shape.

    Args:
        actual: any floating dtype.
        oracle: float64.
        dtype: whose units in the last place count, the dtype in which ``actual`` was computed.
    """
    if actual.shape != oracle.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(oracle.shape)}")
    actual, oracle = actual.detach().double(), oracle.detach().double()
    same = (actual == oracle) | (actual.isnan() & oracle.isnan())
    error = (actual - oracle).abs().masked_fill(same, 0)
    # NaN or infinity on one side only: infinitely wrong, whatever a maximum would make of NaN.
    error = error.masked_fill(~(actual.isfinite() & oracle.isfinite()) & ~same, math.inf)
    finite = oracle.abs().masked_fill(~oracle.isfinite(), 0)
    largest = finite.max().item() if finite.numel() else 0.0
    ulp = unit_in_last_place(largest, dtype)
    if not error.numel():
        return ErrorStatistics(0.0, 0.0, 0.0, 1.0, (), math.nan, math.nan, ulp)
    worst = int(error.argmax())
    a, o = actual.nan_to_num(0, 0, 0).flatten(), oracle.nan_to_num(0, 0, 0).flatten()
    norms = (a.norm() * o.norm()).item()
    index = torch.unravel_index(torch.tensor(worst), error.shape)
    return ErrorStatistics(
        max_abs=error.max().item(),
        mean_abs=error.mean().item(),
        max_ulp=error.max().item() / ulp,
        cosine=(a @ o).item() / norms if norms else float(bool((a == o).all())),
        worst_index=tuple(int(i) for i in index),
        worst_actual=actual.flatten()[worst].item(),
        worst_oracle=oracle.flatten()[worst].item(),
        ulp=ulp,
    )


@dataclasses.dataclass(frozen=True)
class ErrorBudget:
    """Largest error accepted, beside the error of PyTorch in the same dtype.

    The rule speaks of samples large enough for their maxima to be comparable. A single small case
    is not: which order a product is summed in makes a factor of 3 or 4 there. It has a looser
    limit of its own, so that no other case's larger error can hide what is wrong with it.

    Attributes:
        factor: times the same-dtype error, over all cases together.
        case_factor: the same for one case by itself.
        ulps: units in the last place of the output, added to both.
    """

    factor: float = 2.0
    case_factor: float = 8.0
    ulps: float = 1.0

    @classmethod
    def of(cls, dtype: torch.dtype) -> ErrorBudget:
        """The rule for whole models in this dtype."""
        return cls(factor=4.0, case_factor=16.0) if dtype == torch.float32 else cls()

    def limit(self, same_dtype: ErrorStatistics) -> float:
        """The largest absolute error accepted beside this same-dtype error."""
        return self.factor * same_dtype.max_abs + self.ulps * same_dtype.ulp

    def case_limit(self, same_dtype: ErrorStatistics) -> float:
        """The same for one case by itself."""
        return self.case_factor * same_dtype.max_abs + self.ulps * same_dtype.ulp

    def accepts(self, error: ErrorStatistics, same_dtype: ErrorStatistics) -> bool:
        """Whether ``error`` is within the budget over all cases; never true for NaN."""
        return math.isfinite(error.max_abs) and error.max_abs <= self.limit(same_dtype)

    def accepts_case(self, error: ErrorStatistics, same_dtype: ErrorStatistics) -> bool:
        """The same for one case by itself."""
        return math.isfinite(error.max_abs) and error.max_abs <= self.case_limit(same_dtype)
