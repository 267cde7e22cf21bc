# SPDX-License-Identifier: MIT
"""The contract of ``fastmqa::FusedAttention``, version 1, stated once.

Everything that must agree on the op reads it here: the torch op, the exporter, the function body,
``inspect`` and the tests. Shape letters: B batch, H query heads, Hkv key/value heads, S queries,
T keys, D head size of q and k, V head size of v. Nothing but the standard library is imported.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any, Final

from fastmqa_export.errors import ConfigError

OP_DOMAIN: Final = "fastmqa"
OP_NAME: Final = "FusedAttention"
OP_VERSION: Final = 1

#: The six inputs of a node, by position; all are given (an unused one is a neutral constant).
OP_INPUTS: Final = ("q", "k", "v", "attn_mask", "kv_lengths", "q_start")
OP_OUTPUTS: Final = ("y", "lse")


class Feature(enum.IntFlag):
    """Bits of the attribute ``features``: which inputs and outputs of a node are live."""

    MASK = 1
    LENGTHS = 2
    Q_START = 4
    VALUES_IN_K = 8
    LSE = 16


class SoftmaxPrecision(enum.IntEnum):
    """Type of scores and exponentials; the numbers are ONNX ``TensorProto.DataType`` codes."""

    FLOAT = 1
    FLOAT16 = 10


class Layout(enum.IntEnum):
    """Order of the axes of ``q`` and ``y``; ``k`` and ``v`` are (B, Hkv, T, ·) in both."""

    BHSD = 0
    BSHD = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionAttributes:
    """The attributes of one ``FusedAttention`` node, in the order in which they are written.

    Attributes:
        scale: multiplies q·k; usually 1/sqrt(D), for absorbed MLA of the *unabsorbed* head.
        is_causal: 1: the query at position p sees keys at positions ≤ p (``window_right`` = 0).
        window_left: sees keys at positions ≥ p − window_left; −1 = unbounded.
        window_right: sees keys at positions ≤ p + window_right; −1 = unbounded.
        softcap: c > 0: the scaled score x becomes c·tanh(x / c), before masks; 0 = none.
        softmax_precision: type of scores and exponentials, see `SoftmaxPrecision`.
        v_head_size: V where the values are the first V columns of k (``Feature.VALUES_IN_K``);
            otherwise 0.
        layout: order of the axes of q and y, see `Layout`.
        features: which inputs and outputs are live, see `Feature`.

    Raises:
        ConfigError: if a value, or a combination, is one that version 1 refuses.
    """

    scale: float
    is_causal: int = 0
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    softmax_precision: int = SoftmaxPrecision.FLOAT
    v_head_size: int = 0
    layout: int = Layout.BHSD
    features: int = 0

    def __post_init__(self) -> None:
        """Refuse what version 1 of the op refuses."""
        if not math.isfinite(self.scale):
            raise ConfigError(f"scale={self.scale} is not finite; usual is 1/sqrt(D)")
        if self.is_causal not in (0, 1):
            raise ConfigError(f"is_causal={self.is_causal} is neither 0 nor 1")
        if self.window_left < -1 or self.window_right < -1:
            raise ConfigError(
                f"window_left={self.window_left}, window_right={self.window_right}: a window is a "
                "number of keys ≥ 0, or -1 for unbounded"
            )
        if self.is_causal and self.window_right != -1:
            raise ConfigError(
                f"is_causal=1 with window_right={self.window_right}: is_causal already means "
                "window_right=0; give one of the two"
            )
        if not (math.isfinite(self.softcap) and self.softcap >= 0):
            raise ConfigError(
                f"softcap={self.softcap} is neither 0 (off) nor a positive finite number"
            )
        if self.softmax_precision not in tuple(SoftmaxPrecision):
            raise ConfigError(
                f"softmax_precision={self.softmax_precision} is neither 1 (FLOAT) nor 10 (FLOAT16)"
            )
        if self.layout not in tuple(Layout):
            raise ConfigError(f"layout={self.layout} is neither 0 (B, H, S, D) nor 1 (B, S, H, D)")
        if unknown := self.features & ~ALL_FEATURES:
            raise ConfigError(
                f"features={self.features} has unknown bits {unknown:#x}; version {OP_VERSION} "
                f"knows {', '.join(f'{bit.value} ({bit.name})' for bit in Feature)}"
            )
        if bool(self.features & Feature.VALUES_IN_K) != (self.v_head_size > 0):
            raise ConfigError(
                f"v_head_size={self.v_head_size} with features={self.features}: it is the head "
                "size of the values exactly where they lie in k (feature 8), and 0 otherwise"
            )

    @classmethod
    def of_call(
        cls,
        values: Mapping[str, Any],
        *,
        v: Any,
        attn_mask: Any,
        kv_lengths: Any,
        q_start: Any,
        lse: bool = False,
    ) -> AttentionAttributes:
        """The attributes of a call of the torch op, ``features`` by which tensors are given.

        Args:
            values: the other attributes; those that have a default may be left out, and bools
                count as ints.
            v: the tensor, or None: the values lie in k.
            attn_mask: the tensor, or None, like the next two.
            kv_lengths: lengths.
            q_start: positions.
            lse: whether the log-sum-exp is asked for.
        """
        live = {
            Feature.MASK: attn_mask is not None,
            Feature.LENGTHS: kv_lengths is not None,
            Feature.Q_START: q_start is not None,
            Feature.VALUES_IN_K: v is None,
            Feature.LSE: lse,
        }
        return cls(
            **{name: int(x) if isinstance(x, bool) else x for name, x in values.items()},
            features=sum(bit for bit, is_live in live.items() if is_live),
        )

    @property
    def reach_right(self) -> int:
        """How far to the right of its own position a query sees: 0 if causal, −1 = unbounded."""
        return 0 if self.is_causal else self.window_right


ALL_FEATURES: Final = int(sum(Feature))

#: What TensorRT's ONNX parser needs to take the plugin instead of the function of the same name.
PLUGIN_ATTRIBUTES: Final[Mapping[str, str]] = {
    "plugin_namespace": OP_DOMAIN,
    "plugin_version": str(OP_VERSION),
}

#: Head sizes beyond 256 that kernels have, as (D, V): absorbed MLA with a rotary part.
MLA_HEAD_SIZES: Final = ((576, 512), (288, 256))


def check_head_sizes(d: int, v: int) -> None:
    """Check that version 1 of the op covers head sizes D and V.

    Raises:
        ConfigError: if they are neither multiples of 8 up to 256 nor one of the MLA pairs.
    """
    if (d, v) in MLA_HEAD_SIZES or all(0 < size <= 256 and size % 8 == 0 for size in (d, v)):
        return
    raise ConfigError(
        f"head sizes D={d}, V={v} are not covered by {OP_DOMAIN}::{OP_NAME} version {OP_VERSION}; "
        "accepted are multiples of 8 up to 256, and D/V of "
        f"{' or '.join(f'{a}/{b}' for a, b in MLA_HEAD_SIZES)}"
    )
