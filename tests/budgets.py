# SPDX-License-Identifier: MIT
"""Assertions of the error budget (`fastmqa_export.accuracy`), shared by tests and benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fastmqa_export import reference
from fastmqa_export.accuracy import ErrorBudget, ErrorStatistics, measure
from fastmqa_export.config import OP_INPUTS, AttentionAttributes, SoftmaxPrecision

BUDGET = ErrorBudget()


def oracle(tensors: Mapping[str, Tensor], attributes: AttentionAttributes) -> tuple[Tensor, Tensor]:
    """Y and lse of the op in float64, its softmax too.

    A FLOAT16 softmax is judged against the exact one, as its yardstick is: where scores are rounded
    to float16, two right results can differ by a whole step of a score.
    """
    attributes = dataclasses.replace(attributes, softmax_precision=SoftmaxPrecision.FLOAT)
    return reference.attention(*(tensors.get(n) for n in OP_INPUTS), attributes=attributes)  # type: ignore[arg-type]


def same_dtype_error(
    tensors: Mapping[str, Tensor], attributes: AttentionAttributes, expected: Tensor
) -> ErrorStatistics:
    """Error of PyTorch in the same dtype; in float32 the worse of two orders of summation."""
    dtype = tensors["q"].dtype
    errors = [
        measure(
            reference.attention_in_dtype(
                *(tensors.get(n) for n in OP_INPUTS),  # type: ignore[arg-type]
                attributes=attributes,
                sequential=sequential,
            ),
            expected,
            dtype,
        )
        for sequential in ((False, True) if dtype == torch.float32 else (False,))
    ]
    return max(errors, key=lambda error: error.max_abs)


def assert_within_budget(
    actual: Tensor, tensors: Mapping[str, Tensor], attributes: AttentionAttributes
) -> None:
    """``actual`` is y of the op for these inputs, within the budget."""
    expected, _ = oracle(tensors, attributes)
    error = measure(actual, expected, tensors["q"].dtype)
    same = same_dtype_error(tensors, attributes, expected)
    assert BUDGET.accepts(error, same), (
        f"error {error.max_abs:.3e} ({error.max_ulp:.1f} ulp) at {error.worst_index}: got "
        f"{error.worst_actual!r}, the oracle says {error.worst_oracle!r}; the budget is "
        f"{BUDGET.limit(same):.3e}, of which same-dtype PyTorch has {same.max_abs:.3e}"
    )
