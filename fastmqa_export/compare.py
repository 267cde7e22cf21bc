# SPDX-License-Identifier: MIT
"""Is the exported file as exact as PyTorch? Every output, many shapes, one rule.

Polygraphy runs PyTorch in float64 (the oracle), PyTorch in the file's own dtype and the file in
onnxruntime, and in other runtimes that are given, on the same sequences. `fastmqa_export.accuracy`
says how far each is from the oracle and how far it may be. For language models, greedy text must be
the same too.
"""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from fastmqa_export.language import PROMPTS, LanguageResult, Text, continue_prompt, judge_language
from fastmqa_export.runners import Feed, TorchRunner, file_runner
from fastmqa_export.runtime import (
    CachedModel,
    OneShotModel,
    OnnxModel,
    OnnxOneShot,
    create_session,
)
from fastmqa_export.source import Source, to_numpy

ORACLE: Final = "PyTorch float64 (oracle)"
SAME_DTYPE: Final = "PyTorch, same dtype"
ONNXRUNTIME: Final = "onnxruntime (function body)"
WITH_KERNEL: Final = "onnxruntime + fastmqa kernel"

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
    """How exact one output (or the caches of all layers) is in one runtime, over all cases.

    Attributes:
        runtime: what ran the file.
        output: its name; ``*`` stands for the layer.
        cases: how many cases were run: those that the runtime has room for.
        max_abs: largest absolute error of the file against the oracle.
        mean_abs: mean of the cases' mean absolute errors.
        max_ulp: ``max_abs`` in units in the last place at that case's largest value.
        cosine: smallest cosine similarity of any case.
        same_dtype_max_abs: largest error of PyTorch in the file's dtype.
        limit: what ``max_abs`` may be.
        worst_case: where ``max_abs`` is.
        reason: why it failed; empty if it passed.
    """

    runtime: str
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
class Comparison:
    """The whole result; ``reasons`` is empty if and only if it passed.

    Attributes:
        outputs: a row per runtime and output.
        distribution: counts of the first output's errors per bin, by runner.
        decades: the bins' edges, log10 of the absolute error.
        language: one result per runtime; empty for a model that takes no text.
        reasons: why it failed.
    """

    outputs: tuple[OutputAccuracy, ...]
    distribution: dict[str, list[int]]
    decades: list[float]
    language: tuple[LanguageResult, ...]
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every output is within its budget and every greedy text the same."""
        return not self.reasons


def compare(
    source: Source,
    path: Path,
    *,
    library: Path | None = None,
    others: Mapping[str, CachedModel | OneShotModel] | None = None,
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
        path: the ONNX file, which onnxruntime runs.
        library: the custom op, with which onnxruntime runs it too.
        others: the same file in more runtimes, by the names that the result gives them; judged by
            the same rule, on the cases that they have room for.
        budget: what decides; None: the rule for the source's dtype.
        prompts: continued greedily if the source has a tokenizer.
        new_tokens: tokens per prompt.
        cases: shapes to run.
        threads: for onnxruntime; 0: as many as cores.
        progress: told what is being done.

    Raises:
        ModelFileError: if the file does not run, or takes other inputs than the source gives.
        ConfigError: if onnxruntime on this machine cannot run the file's dtype, or a runtime has
            room for none of the cases.
    """
    if source.dtype == torch.bfloat16:
        raise ConfigError(
            "onnxruntime's CPU provider has no bfloat16 MatMul, so a bfloat16 file cannot be "
            "compared here; export with --dtype float32 or float16"
        )
    budget = budget or ErrorBudget.of(source.dtype)
    models = {ONNXRUNTIME: _in_onnxruntime(path, threads)}
    if library is not None:
        models[WITH_KERNEL] = _in_onnxruntime(path, threads, library)
    models |= others or {}
    for name, model in models.items():
        if model.input_name != source.input_name:
            raise ModelFileError(
                f"{path} in {name} takes {model.input_name}, but {source.name} gives "
                f"{source.input_name}: was the file exported from another SOURCE?"
            )
    with_cache = isinstance(models[ONNXRUNTIME], CachedModel)
    feeds = [(case.name, _feed(source, case)) for case in cases]
    texts: dict[int, Text] = {}  # by the index of their feed
    tokenizer = source.tokenizer() if with_cache else None
    if tokenizer and prompts:
        progress("greedy text of PyTorch")
        for number, prompt in enumerate(prompts, 1):
            text = texts[len(feeds)] = continue_prompt(source, tokenizer, prompt, new_tokens)
            feeds.append((f"prompt {number}", text.feed))
    trials = _Trials(source, feeds, progress, with_cache=with_cache)
    outputs: list[OutputAccuracy] = []
    language: list[LanguageResult] = []
    for name, model in models.items():
        results = trials.run(name, model)
        outputs += _judge(name, trials.errors(name, results), budget)
        said = [i for i in texts if i in results]
        if said and isinstance(model, CachedModel):
            progress(f"greedy text of {name}")
            output = source.output_name
            logits = [(trials.same_dtype[i][output], results[i][output]) for i in said]
            language.append(judge_language(name, model, source, [texts[i] for i in said], logits))
    reasons = [f"{row.runtime}, {row.output}: {row.reason}" for row in outputs if not row.passed]
    reasons += [
        f"{result.runtime}, prompt {prompt.prompt!r} is continued otherwise than by PyTorch"
        for result in language
        for prompt in result.prompts
        if not prompt.identical
    ]
    return Comparison(
        tuple(outputs),
        trials.measured.distribution(source.output_name),
        _DECADES.tolist(),
        tuple(language),
        tuple(reasons),
    )


def _in_onnxruntime(
    path: Path, threads: int, library: Path | None = None
) -> CachedModel | OneShotModel:
    session = create_session(path, threads=threads, library=library)
    is_cached = any(x.name == "position" for x in session.get_inputs())
    return OnnxModel(session) if is_cached else OnnxOneShot(session)


def _feed(source: Source, case: SequenceCase) -> Feed:
    generator = torch.Generator().manual_seed(sum(case.prefill) * 100 + case.decode)
    longest = max(case.prefill) + case.decode
    x = source.sample(len(case.prefill), longest, generator)
    return {
        "sequence": to_numpy(x),
        "prefill": np.array(case.prefill, np.int64),
        "decode": np.array([case.decode], np.int64),
    }


_Errors = dict[str, ErrorStatistics]


class _Trials:
    """Sequences for every runtime, with what PyTorch makes of them.

    Attributes:
        same_dtype: PyTorch's outputs in the source's own dtype, by feed.
        measured: the errors of all that was run.
    """

    def __init__(
        self,
        source: Source,
        feeds: Sequence[tuple[str, Feed]],
        progress: Callable[[str], None],
        *,
        with_cache: bool,
    ) -> None:
        self.source, self.feeds, self.progress = source, feeds, progress
        self.measured = _Measure(source.dtype)
        progress(f"{len(feeds)} cases in PyTorch float64 and PyTorch")
        runners = [
            TorchRunner(ORACLE, source, torch.float64, with_cache=with_cache),
            TorchRunner(SAME_DTYPE, source, source.dtype, with_cache=with_cache),
        ]
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            results = Comparator.run(runners, data_loader=[feed for _, feed in feeds])
            Comparator.compare_accuracy(results, compare_func=self.measured)
        self.oracle, self.same_dtype = results[ORACLE], results[SAME_DTYPE]

    def run(self, name: str, model: CachedModel | OneShotModel) -> dict[int, Any]:
        """The outputs of a runtime by feed, of those that it has room for."""
        runner = file_runner(name, self.source, model)
        taken = [i for i, (_, feed) in enumerate(self.feeds) if runner.takes(feed)]
        skipped = ", ".join(x for i, (x, _) in enumerate(self.feeds) if i not in taken)
        if not taken:
            raise ConfigError(f"{name} has room for none of the cases: {skipped}")
        self.progress(
            f"{len(taken)} cases in {name}" + (f"; no room for {skipped}" if skipped else "")
        )
        oracle = RunResults([(ORACLE, [self.oracle[i] for i in taken])])
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            results = Comparator.run([runner], data_loader=[self.feeds[i][1] for i in taken])
            Comparator.compare_accuracy([oracle, results], compare_func=self.measured)
        return dict(zip(taken, results[name], strict=True))

    def errors(self, name: str, taken: Iterable[int]) -> list[tuple[str, _Errors, _Errors]]:
        """Of each feed that a runtime took its name, that runtime's errors and PyTorch's."""
        same = self.measured.errors[SAME_DTYPE]
        return [
            (self.feeds[i][0], ours, same[i])
            for i, ours in zip(taken, self.measured.errors[name], strict=True)
        ]


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
    runtime: str, cases: Sequence[tuple[str, _Errors, _Errors]], budget: ErrorBudget
) -> Iterator[OutputAccuracy]:
    """One row per output; the layers' caches are one row for keys and one for values.

    Args:
        runtime: what ran the file.
        cases: of each its name, our errors by output, and those of PyTorch in the same dtype.
        budget: how far ours may be beyond theirs.
    """
    groups: dict[str, list[str]] = {}
    for name in cases[0][1]:
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    for group, members in groups.items():
        rows = [
            (our[name], their[name], case if name == group else f"{case}, {name}")
            for case, our, their in cases
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
            runtime=runtime,
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
