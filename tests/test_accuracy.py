# SPDX-License-Identifier: MIT
"""Errors are measured right, and a NaN can never pass."""

import math

import pytest
import torch

from fastmqa_export.accuracy import ErrorBudget, measure, unit_in_last_place

ONES = torch.ones(2, 3, dtype=torch.float64)


def with_value(value: float) -> torch.Tensor:
    x = ONES.clone()
    x[1, 2] = value
    return x


@pytest.mark.parametrize(
    ("magnitude", "dtype", "ulp"),
    [
        (1.0, torch.float32, 2**-23),
        (1.999, torch.float32, 2**-23),
        (2.0, torch.float32, 2**-22),
        (1.0, torch.float16, 2**-10),
        (0.5, torch.float16, 2**-11),
        (300.0, torch.bfloat16, 2.0),
        (0.0, torch.float16, 2**-24),
        (0.0, torch.float32, 2**-149),
    ],
)
def test_unit_in_last_place(magnitude, dtype, ulp):
    assert unit_in_last_place(magnitude, dtype) == ulp


def test_the_worst_element_is_found():
    error = measure(with_value(1.25), ONES, torch.float32)
    assert (error.max_abs, error.worst_index) == (0.25, (1, 2))
    assert (error.worst_actual, error.worst_oracle) == (1.25, 1.0)
    assert error.mean_abs == pytest.approx(0.25 / 6)
    assert error.max_ulp == 0.25 * 2**23
    assert 0.9 < error.cosine < 1


@pytest.mark.parametrize(
    ("actual", "oracle"),
    [
        (math.nan, 1.0),
        (1.0, math.nan),
        (math.inf, 1.0),
        (-math.inf, math.inf),
        (math.nan, math.inf),
    ],
)
def test_nan_and_infinity_on_one_side_are_infinitely_wrong(actual, oracle):
    error = measure(with_value(actual), with_value(oracle), torch.float32)
    assert error.max_abs == math.inf
    assert error.worst_index == (1, 2)
    assert not ErrorBudget().accepts(error, error)
    assert not ErrorBudget().accepts_case(error, error)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_on_both_sides_are_equal(value):
    assert measure(with_value(value), with_value(value), torch.float32).max_abs == 0


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match="shapes differ"):
        measure(ONES, ONES[:1], torch.float32)


def test_an_empty_tensor_has_no_error():
    assert measure(ONES[:0], ONES[:0], torch.float32).max_abs == 0


def test_the_budget_is_twice_the_same_dtype_error_and_an_ulp():
    same = measure(with_value(1.5), ONES, torch.float32)
    budget = ErrorBudget()
    assert budget.limit(same) == 1.0 + 2**-23
    assert budget.accepts(measure(with_value(2.0), ONES, torch.float32), same)
    assert not budget.accepts(measure(with_value(2.001), ONES, torch.float32), same)
    assert budget.accepts_case(measure(with_value(4.9), ONES, torch.float32), same)
    assert not budget.accepts_case(measure(with_value(5.1), ONES, torch.float32), same)


def test_float32_models_may_sum_in_another_order():
    assert ErrorBudget.of(torch.float32).factor == 4
    assert ErrorBudget.of(torch.float16) == ErrorBudget.of(torch.bfloat16) == ErrorBudget()
