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


@pytest.mark.parametrize(
    ("actual", "oracle", "cosine"),
    [
        ([0.0, 0.0], [0.0, 0.0], 1.0),
        ([0.0, 0.0], [1.0, 0.0], 0.0),
        ([3.0, 4.0], [6.0, 8.0], 1.0),
        ([3.0, 4.0], [-3.0, -4.0], -1.0),
        ([3.0, 4.0], [4.0, -3.0], 0.0),
    ],
)
def test_cosine(actual, oracle, cosine):
    both = (torch.tensor(x, dtype=torch.float64) for x in (actual, oracle))
    assert measure(*both, torch.float32).cosine == pytest.approx(cosine)


def test_infinities_in_the_oracle_do_not_widen_the_unit():
    error = measure(with_value(math.inf), with_value(math.inf), torch.float16)
    assert error.ulp == 2**-10


def test_subnormal_errors_count_in_subnormal_units():
    tiny = torch.full((2,), 2.0**-24, dtype=torch.float64)
    error = measure(3 * tiny, tiny, torch.float16)
    assert (error.max_ulp, error.ulp) == (2.0, 2.0**-24)


@pytest.mark.parametrize("actual", [math.nan, math.inf])
def test_a_budget_that_is_itself_broken_lets_nothing_pass(actual):
    """Not even beside a same-dtype error that is infinite."""
    broken = measure(with_value(math.nan), ONES, torch.float32)
    assert not ErrorBudget().accepts(measure(with_value(actual), ONES, torch.float32), broken)


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
