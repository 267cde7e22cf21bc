# SPDX-License-Identifier: MIT
"""Is the exported file as exact as PyTorch? Every output, many shapes, one rule.

Polygraphy runs PyTorch in float64 (the oracle), PyTorch in the file's own dtype and the file in
onnxruntime on the same sequences. `fastmqa_export.accuracy` says how far each is from the oracle
and how far it may be. For language models, greedy text must be the same too.
"""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.comparator import Comparator, RunResults
from polygraphy.comparator.compare import BaseCompareFunc
from polygraphy.logger import G_LOGGER

from fastmqa_export.accuracy import ErrorBudget, ErrorStatistics, measure
from fastmqa_export.errors import ConfigError, ModelFileError
from fastmqa_export.runners import Feed, OneShotRunner, OnnxRunner, TorchRunner
from fastmqa_export.runtime import OnnxModel, create_session, generate
from fastmqa_export.source import Source, to_numpy

ORACLE: Final = "PyTorch float64 (oracle)"
SAME_DTYPE: Final = "PyTorch, same dtype"
ONNXRUNTIME: Final = "onnxruntime (function body)"

#: What a language model is asked to continue.
PROMPTS: Final = (
    "The capital of France is",
    "The three primary colours are",
    "In mathematics, a prime number is",
    "Write a short poem about the sea:\n",
)

#: Bins of the error distribution, log10 of the absolute error; smaller errors count as the first.
_DECADES: Final = np.arange(-12.0, 1.01, 0.25)


@dataclasses.dataclass(frozen=True)
class SequenceCase:
    """A batch of sequences: how many tokens are fed at once, and how many one by one after."""

    name: str
    prefill: tuple[int, ...]
    decode: int


CASES: Final = (
    SequenceCase("one token", (1,), 0),
    SequenceCase("odd prefill", (7,), 0),
    SequenceCase("prefill, then decode", (5,), 6),
    SequenceCase("decode from one token", (1,), 9),
    SequenceCase("two sequences", (6, 6), 3),
    SequenceCase("three padded sequences", (9, 1, 4), 4),
    SequenceCase("the cache grows", (30,), 5),
)


@dataclasses.dataclass(frozen=True)
class OutputAccuracy:
    """How exact one output (or the caches of all layers) is, over all cases.

    Attributes:
        output: its name; ``*`` stands for the layer.
        cases: how many cases were run.
        max_abs: largest absolute error of the file against the oracle.
        mean_abs: mean of the cases' mean absolute errors.
        max_ulp: ``max_abs`` in units in the last place at that case's largest value.
        cosine: smallest cosine similarity of any case.
        same_dtype_max_abs: largest error of PyTorch in the file's dtype.
        limit: what ``max_abs`` may be.
        worst_case: where ``max_abs`` is.
        reason: why it failed; empty if it passed.
    """

    output: str
    cases: int
    max_abs: float
    mean_abs: float
    max_ulp: float
    cosine: float
    same_dtype_max_abs: float
    limit: float
    worst_case: str
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the file is within the budget here."""
        return not self.reason

    @property
    def error_ratio(self) -> float:
        """Error of the file over that of PyTorch in the same dtype."""
        if self.same_dtype_max_abs:
            return self.max_abs / self.same_dtype_max_abs
        return 1.0 if self.max_abs == 0 else float("inf")


@dataclasses.dataclass(frozen=True)
class PromptResult:
    """Greedy continuations of one prompt."""

    prompt: str
    pytorch: str
    onnxruntime: str
    identical: bool
    tokens: int


@dataclasses.dataclass(frozen=True)
class LanguageResult:
    """Whether a language model still says the same.

    Attributes:
        top1_agreement: share of positions whose likeliest token is PyTorch's.
        kl_mean: mean Kullback-Leibler divergence from PyTorch's distribution, in nats.
        kl_max: its maximum.
        prompts: the greedy texts.
    """

    top1_agreement: float
    kl_mean: float
    kl_max: float
    prompts: tuple[PromptResult, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The whole result; ``reasons`` is empty if and only if it passed."""

    outputs: tuple[OutputAccuracy, ...]
    distribution: dict[str, list[int]]
    decades: list[float]
    language: LanguageResult | None
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every output is within its budget and every greedy text the same."""
        return not self.reasons


def compare(
    source: Source,
    path: Path,
    *,
    budget: ErrorBudget | None = None,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = 48,
    cases: Sequence[SequenceCase] = CASES,
    threads: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Compare an exported file with its source.

    Args:
        source: the model the file was made from, in the file's dtype.
        path: the ONNX file.
        budget: what decides; None: the rule for the source's dtype.
        prompts: continued greedily if the source has a tokenizer.
        new_tokens: tokens per prompt.
        cases: shapes to run.
        threads: for onnxruntime; 0: as many as cores.
        progress: told what is being done.

    Raises:
        ModelFileError: if the file does not run, or takes other inputs than the source gives.
        ConfigError: if onnxruntime on this machine cannot run the file's dtype.
    """
    if source.dtype == torch.bfloat16:
        raise ConfigError(
            "onnxruntime's CPU provider has no bfloat16 MatMul, so a bfloat16 file cannot be "
            "compared here; export with --dtype float32 or float16"
        )
    budget = budget or ErrorBudget.of(source.dtype)
    session = create_session(path, threads=threads)
    names = [x.name for x in session.get_inputs()]
    if source.input_name not in names:
        raise ModelFileError(
            f"{path} takes {', '.join(names[:3])}…, but {source.name} gives {source.input_name}: "
            "was the file exported from another SOURCE?"
        )
    with_cache = "position" in names
    model = OnnxModel(session) if with_cache else None
    runners = [
        TorchRunner(ORACLE, source, torch.float64, with_cache=with_cache),
        TorchRunner(SAME_DTYPE, source, source.dtype, with_cache=with_cache),
        OnnxRunner(ONNXRUNTIME, source, model)
        if model
        else OneShotRunner(ONNXRUNTIME, source, session),
    ]

    language, texts = None, []
    tokenizer = source.tokenizer() if model else None
    if model and tokenizer and prompts:
        progress("greedy text")
        texts = _greedy(source, model, tokenizer, prompts, new_tokens)
    feeds = [_feed(source, case) for case in cases]
    text_cases = [SequenceCase(f"prompt {i + 1}", (t.prompt,), t.new) for i, t in enumerate(texts)]
    feeds += [
        {
            "sequence": np.array([t.tokens]),
            "prefill": np.array([t.prompt]),
            "decode": np.array([t.new]),
        }
        for t in texts
    ]
    named = [*cases, *text_cases]

    progress(f"{len(named)} cases in PyTorch float64, PyTorch and onnxruntime")
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(runners, data_loader=feeds)
        measured = _Measure(source.dtype)
        Comparator.compare_accuracy(results, comparisons=[(0, 1), (0, 2)], compare_func=measured)
    progress("judging")
    same, ours = measured.errors[SAME_DTYPE], measured.errors[ONNXRUNTIME]
    outputs = tuple(_judge(named, same, ours, budget))
    reasons = [f"{o.output}: {o.reason}" for o in outputs if not o.passed]
    if texts:
        language = _language(texts, results, len(cases), source.output_name)
        reasons += [
            f"prompt {i + 1} is continued otherwise than by PyTorch"
            for i, p in enumerate(language.prompts)
            if not p.identical
        ]
    return Comparison(
        outputs,
        measured.distribution(source.output_name),
        _DECADES.tolist(),
        language,
        tuple(reasons),
    )


def _feed(source: Source, case: SequenceCase) -> Feed:
    generator = torch.Generator().manual_seed(sum(case.prefill) * 100 + case.decode)
    longest = max(case.prefill) + case.decode
    x = source.sample(len(case.prefill), longest, generator)
    return {
        "sequence": to_numpy(x),
        "prefill": np.array(case.prefill, np.int64),
        "decode": np.array([case.decode], np.int64),
    }


class _Measure(BaseCompareFunc):  # type: ignore[misc]
    """Measures each pair (oracle, runner); what passes is decided afterwards."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.errors: dict[str, list[dict[str, ErrorStatistics]]] = {}
        self.histograms: dict[tuple[str, str], NDArray[np.int64]] = {}

    def __call__(self, iter_result0: Any, iter_result1: Any) -> OrderedDict[str, bool]:
        found: OrderedDict[str, ErrorStatistics] = OrderedDict()
        for name, oracle in iter_result0.items():
            if name not in iter_result1:
                raise ModelFileError(f"the file has no output {name}; was it exported otherwise?")
            actual = iter_result1[name]
            found[name] = measure(torch.from_numpy(actual), torch.from_numpy(oracle), self.dtype)
            error = np.abs(actual.astype(np.float64) - oracle).ravel()
            decade = np.log10(np.maximum(error, 10.0 ** _DECADES[0]))
            counts, _ = np.histogram(np.clip(decade, _DECADES[0], _DECADES[-1]), _DECADES)
            key = (iter_result1.runner_name, name)
            self.histograms[key] = self.histograms.get(key, 0) + counts
        self.errors.setdefault(iter_result1.runner_name, []).append(found)
        return OrderedDict((name, np.isfinite(e.max_abs)) for name, e in found.items())

    def distribution(self, output: str) -> dict[str, list[int]]:
        """Counts per bin of one output, by runner."""
        return {
            runner: counts.tolist()
            for (runner, name), counts in self.histograms.items()
            if name == output
        }


def _judge(
    cases: Sequence[SequenceCase],
    same: list[dict[str, ErrorStatistics]],
    ours: list[dict[str, ErrorStatistics]],
    budget: ErrorBudget,
) -> Iterator[OutputAccuracy]:
    """One row per output; the layers' caches are one row for keys and one for values."""
    groups: dict[str, list[str]] = {}
    for name in ours[0]:
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    for group, members in groups.items():
        rows = [
            (our[name], their[name], case.name if name == group else f"{case.name}, {name}")
            for case, our, their in zip(cases, ours, same, strict=True)
            for name in members
        ]
        worst, _, where = max(rows, key=lambda row: row[0].max_abs)
        worst_same = max((row[1] for row in rows), key=lambda error: error.max_abs)
        reason = ""
        if not budget.accepts(worst, worst_same):
            reason = f"error {worst.max_abs:.2e} exceeds {budget.limit(worst_same):.2e} ({where})"
        for error, their, case in rows:
            if not reason and not budget.accepts_case(error, their):
                reason = (
                    f"error {error.max_abs:.2e} exceeds {budget.case_limit(their):.2e} ({case})"
                )
        yield OutputAccuracy(
            output=group,
            cases=len(cases),
            max_abs=worst.max_abs,
            mean_abs=sum(row[0].mean_abs for row in rows) / len(rows),
            max_ulp=worst.max_ulp,
            cosine=min(row[0].cosine for row in rows),
            same_dtype_max_abs=worst_same.max_abs,
            limit=budget.limit(worst_same),
            worst_case=where,
            reason=reason,
        )


# Language


@dataclasses.dataclass(frozen=True)
class _Text:
    """A prompt with PyTorch's continuation as tokens, and both continuations as text."""

    text: str
    tokens: list[int]
    prompt: int
    new: int
    pytorch: str
    onnxruntime: str
    identical: bool


def _greedy(
    source: Source, model: OnnxModel, tokenizer: Any, prompts: Sequence[str], new_tokens: int
) -> list[_Text]:
    """Continue the prompts by transformers' own generate() and by the file, and compare."""
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    stop = source.stop_tokens()
    ours = generate(model, encoded, new_tokens, stop=stop)
    texts = []
    for prompt, tokens, our in zip(prompts, encoded, ours, strict=True):
        their = source.generate(tokens, new_tokens)
        texts.append(
            _Text(
                text=prompt,
                tokens=[*tokens, *their[:-1]],
                prompt=len(tokens),
                new=len(their) - 1,
                pytorch=tokenizer.decode(their),
                onnxruntime=tokenizer.decode(our),
                identical=their == our,
            )
        )
    return texts


def _language(
    texts: Sequence[_Text], results: RunResults, first: int, output: str
) -> LanguageResult:
    """Agreement of the distributions along PyTorch's own texts."""
    agree, divergences = [], []
    for index in range(first, first + len(texts)):
        theirs, ours = (
            torch.from_numpy(results[name][index][output]).double().log_softmax(-1)
            for name in (SAME_DTYPE, ONNXRUNTIME)
        )
        agree.append(theirs.argmax(-1) == ours.argmax(-1))
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1))
    divergence = torch.cat(divergences).clamp(min=0)
    return LanguageResult(
        top1_agreement=torch.cat(agree).double().mean().item(),
        kl_mean=divergence.mean().item(),
        kl_max=divergence.max().item(),
        prompts=tuple(
            PromptResult(t.text, t.pytorch, t.onnxruntime, t.identical, t.new + 1) for t in texts
        ),
    )
