# SPDX-License-Identifier: MIT
"""Does an exported language model still say what PyTorch says? Greedy text and distributions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fastmqa_export.runners import Feed
from fastmqa_export.runtime import CachedModel, generate
from fastmqa_export.source import Source

#: What a language model is asked to continue.
PROMPTS: Final = (
    "The capital of France is",
    "The three primary colours are",
    "In mathematics, a prime number is",
    "Write a short poem about the sea:\n",
)


@dataclasses.dataclass(frozen=True)
class PromptResult:
    """Greedy continuations of one prompt, by PyTorch and by one runtime."""

    prompt: str
    pytorch: str
    text: str
    identical: bool
    tokens: int


@dataclasses.dataclass(frozen=True)
class LanguageResult:
    """Whether a language model still says the same in one runtime.

    Attributes:
        runtime: what ran the file.
        top1_agreement: share of positions whose likeliest token is PyTorch's.
        kl_mean: mean Kullback-Leibler divergence from PyTorch's distribution, in nats.
        kl_max: its maximum.
        prompts: the greedy texts.
    """

    runtime: str
    top1_agreement: float
    kl_mean: float
    kl_max: float
    prompts: tuple[PromptResult, ...]


@dataclasses.dataclass(frozen=True)
class Text:
    """A prompt and PyTorch's greedy continuation, as text and as tokens."""

    prompt: str
    prompt_tokens: list[int]
    new: str
    new_tokens: list[int]

    @property
    def feed(self) -> Feed:
        """The prompt at once, then what follows one by one; nothing follows the last token."""
        return {
            "sequence": np.array([[*self.prompt_tokens, *self.new_tokens[:-1]]]),
            "prefill": np.array([len(self.prompt_tokens)]),
            "decode": np.array([len(self.new_tokens) - 1]),
        }


def continue_prompt(source: Source, tokenizer: Any, prompt: str, new_tokens: int) -> Text:
    """Continue a prompt by transformers' own generate()."""
    tokens = tokenizer(prompt)["input_ids"]
    new = source.generate(tokens, new_tokens)
    return Text(prompt, tokens, tokenizer.decode(new), new)


def _generate(model: CachedModel, texts: Sequence[Text], stop: frozenset[int]) -> list[list[int]]:
    """Continue the prompts by as many tokens as PyTorch did, together where there is room."""
    longest = max(len(text.prompt_tokens) for text in texts)
    most = max(len(text.new_tokens) for text in texts)
    together = model.takes(len(texts), longest, longest + most)
    groups = [texts] if together else [[text] for text in texts]
    return [
        tokens
        for group in groups
        for tokens in generate(
            model,
            [text.prompt_tokens for text in group],
            max(len(text.new_tokens) for text in group),
            stop=stop,
        )
    ]


def judge_language(
    runtime: str,
    model: CachedModel,
    source: Source,
    texts: Sequence[Text],
    logits: Sequence[tuple[NDArray[Any], NDArray[Any]]],
) -> LanguageResult:
    """The greedy texts of a runtime, and how its distributions agree along PyTorch's own texts.

    Args:
        runtime: what runs the file.
        model: the file there.
        source: what it was exported from.
        texts: the prompts and PyTorch's continuations.
        logits: of each text (tokens, vocabulary), PyTorch's in the same dtype and the runtime's.
    """
    tokenizer = source.tokenizer()
    assert tokenizer is not None, "there are texts"
    agree, divergences = [], []
    for pair in logits:
        theirs, ours = (torch.from_numpy(x).double().log_softmax(-1) for x in pair)
        agree.append(theirs.argmax(-1) == ours.argmax(-1))
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1))
    divergence = torch.cat(divergences).clamp(min=0)
    continued = _generate(model, texts, source.stop_tokens())
    return LanguageResult(
        runtime=runtime,
        top1_agreement=torch.cat(agree).double().mean().item(),
        kl_mean=divergence.mean().item(),
        kl_max=divergence.max().item(),
        prompts=tuple(
            PromptResult(
                prompt=text.prompt,
                pytorch=text.new,
                text=tokenizer.decode(new),
                identical=new == text.new_tokens,
                tokens=len(text.new_tokens),
            )
            for text, new in zip(texts, continued, strict=True)
        ),
    )
