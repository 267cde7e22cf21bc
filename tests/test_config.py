# SPDX-License-Identifier: MIT
"""The op's attributes refuse what version 1 refuses, and say so."""

import dataclasses

import pytest

from fastmqa_export.config import (
    ALL_FEATURES,
    OP_DOMAIN,
    OP_INPUTS,
    OP_NAME,
    OP_OUTPUTS,
    OP_VERSION,
    PLUGIN_ATTRIBUTES,
    AttentionAttributes,
    Feature,
    check_head_sizes,
)
from fastmqa_export.errors import ConfigError

REFUSED = {
    "scale": ({"scale": float("nan")}, "scale=nan is not finite"),
    "scale_infinite": ({"scale": float("inf")}, "scale=inf is not finite; usual is 1/sqrt(D)"),
    "is_causal": ({"is_causal": 2}, "is_causal=2 is neither 0 nor 1"),
    "window_left": ({"window_left": -2}, "a window is a number of keys ≥ 0"),
    "window_right": ({"window_right": -7}, "a window is a number of keys ≥ 0"),
    "causal_and_window": ({"is_causal": 1, "window_right": 3}, "give one of the two"),
    "softcap": ({"softcap": -1.0}, "softcap=-1.0 is neither 0 (off) nor a positive"),
    "softcap_nan": ({"softcap": float("nan")}, "softcap=nan"),
    "softcap_infinite": ({"softcap": float("inf")}, "softcap=inf"),
    "softmax_precision": ({"softmax_precision": 16}, "neither 1 (FLOAT) nor 10 (FLOAT16)"),
    "layout": ({"layout": 2}, "layout=2 is neither 0 (B, H, S, D) nor 1 (B, S, H, D)"),
    "features": ({"features": 32}, "unknown bits 0x20"),
    "features_negative": ({"features": -1}, "unknown bits"),
    "v_head_size": ({"v_head_size": 8}, "v_head_size=8 with features=0"),
    "values_in_k": ({"features": 8}, "v_head_size=0 with features=8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_attributes_are_named(name):
    values, message = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        AttentionAttributes(**{"scale": 1.0, **values})
    assert message in str(error.value)


def test_all_that_version_1_knows_is_accepted():
    every = {"window_left": 2, "window_right": 0, "softcap": 5.0, "softmax_precision": 10}
    attributes = AttentionAttributes(scale=1.0, v_head_size=8, layout=1, features=31, **every)
    assert attributes.features == ALL_FEATURES == 31


def test_the_contract_does_not_move():
    """What files and libraries in the world depend on; a change here is a new version."""
    assert (OP_DOMAIN, OP_NAME, OP_VERSION) == ("fastmqa", "FusedAttention", 1)
    assert OP_INPUTS == ("q", "k", "v", "attn_mask", "kv_lengths", "q_start")
    assert OP_OUTPUTS == ("y", "lse")
    assert dict(PLUGIN_ATTRIBUTES) == {"plugin_namespace": "fastmqa", "plugin_version": "1"}
    assert {bit.name: bit.value for bit in Feature} == {
        "MASK": 1, "LENGTHS": 2, "Q_START": 4, "VALUES_IN_K": 8, "LSE": 16,
    }  # fmt: skip
    assert dataclasses.asdict(AttentionAttributes(scale=0.5)) == {
        "scale": 0.5, "is_causal": 0, "window_left": -1, "window_right": -1, "softcap": 0.0,
        "softmax_precision": 1, "v_head_size": 0, "layout": 0, "features": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "reach"), [({"is_causal": 1}, 0), ({"window_right": 3}, 3), ({}, -1)]
)
def test_causality_is_a_right_window_of_zero(values, reach):
    assert AttentionAttributes(scale=1.0, **values).reach_right == reach


@pytest.mark.parametrize("sizes", [(8, 8), (64, 64), (256, 256), (40, 16), (576, 512), (288, 256)])
def test_covered_head_sizes(sizes):
    check_head_sizes(*sizes)


@pytest.mark.parametrize("sizes", [(20, 20), (0, 8), (264, 264), (576, 576), (512, 512), (64, 7)])
def test_other_head_sizes_are_refused(sizes):
    with pytest.raises(ConfigError, match=r"accepted are multiples of 8 up to 256"):
        check_head_sizes(*sizes)
