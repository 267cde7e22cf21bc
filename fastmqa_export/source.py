# SPDX-License-Identifier: MIT
"""What every kind of model must offer so that it can be exported and its export be proven."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmqa_export.onnx_export import Exportable
from fastmqa_export.runtime import StepModel


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Sizes of a model's attention, as capacity tables need them.

    Attributes:
        layers: how many attentions there are.
        num_heads: H.
        num_kv_heads: Hkv.
        head_dim: D, of a head that is not compressed.
        latent_columns: what a latent cache holds of a token in one layer; 0: the cache holds keys
            and values.
    """

    layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    latent_columns: int = 0


class Source(abc.ABC):
    """A model in one dtype: what to trace, and what its numbers should be.

    Attributes:
        name: short and without a path; it is written into the exported file.
        kind: "built-in", "hugging-face", "gguf" or "factory".
        description: one line for people.
        dtype: of weights and caches.
        input_name: the graph input that holds the sequence.
        output_name: the first graph output.
    """

    kind: str
    name: str
    description: str
    dtype: torch.dtype
    input_name: str
    output_name: str

    @abc.abstractmethod
    def shape(self) -> AttentionShape:
        """Sizes of the attention."""

    @abc.abstractmethod
    def parameters(self) -> int:
        """Number of weights, shared ones counted once."""

    @abc.abstractmethod
    def traceable(self, cache: str) -> contextlib.AbstractContextManager[Exportable]:
        """The module to trace, ready within the context.

        Args:
            cache: "static" or "none".
        """

    @abc.abstractmethod
    def sample(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        """Random input (B, N, …) of the kind that ``input_name`` takes."""

    @abc.abstractmethod
    def evaluate(self, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """One sequence from its beginning, without a cache, by operators that are not ours.

        Args:
            x: (1, N, …), no padding.
            dtype: ``self.dtype``: PyTorch's own operators in that type; float64: the oracle, with
                the same (rounded) weights.

        Returns:
            By the names of the graph's outputs: ``output_name`` (1, N, …), and what each layer
            would have cached, ``present.*`` (1, Hkv, N, ·).
        """

    @abc.abstractmethod
    def steps(self) -> StepModel:
        """The PyTorch model as its users would run it, for timing: batch 1, no padding."""

    def tokenizer(self) -> Any | None:
        """A transformers tokenizer, None for a model that takes no text."""
        return None

    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a text."""
        return frozenset()

    def generate(self, prompt: list[int], new_tokens: int) -> list[int]:
        """Greedy continuation of one prompt by the model's own library, new tokens only."""
        raise NotImplementedError(f"{self.name} does not generate text")


def to_numpy(x: Tensor) -> NDArray[Any]:
    """A tensor as numpy has it: bfloat16 as float32."""
    array: NDArray[Any] = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return array
