# SPDX-License-Identifier: MIT
"""Each runtime's text is held against PyTorch's, token by token, where there is room for it."""

import pytest
from tiny_models import decoder

from fastmqa_export.compare import ONNXRUNTIME, SequenceCase, compare
from fastmqa_export.huggingface import HuggingFaceSource
from fastmqa_export.pipeline import describe_comparison, export_source
from fastmqa_export.report import summary
from fastmqa_export.runtime import OnnxModel, create_session

PROMPTS = ("ab", "the sea")
NEW = 12


class Ascii:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


class Small(OnnxModel):
    """Has room for the short prompt and its continuation only, and for one sequence."""

    def takes(self, batch: int, prefill: int, length: int) -> bool:
        return batch == 1 and length < len(PROMPTS[0]) + NEW


class Reversed(OnnxModel):
    """Takes the least likely token."""

    def step(self, x):
        return -super().step(x)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    source = HuggingFaceSource.from_model(decoder("llama"), "tiny")
    source.tokenizer = Ascii
    path = tmp_path_factory.mktemp("language") / "model.onnx"
    export_source(source, path, "static")
    return source, path


@pytest.fixture(scope="module")
def comparison(made):
    source, path = made
    session = create_session(path, threads=1)
    return compare(
        source,
        path,
        others={"small": Small(session), "reversed": Reversed(session)},
        prompts=PROMPTS,
        new_tokens=NEW,
        cases=[SequenceCase("short", (3,), 2), SequenceCase("batch", (3, 2), 1)],
        threads=1,
    )


def test_the_text_of_each_runtime_is_judged(comparison):
    good, small, wrong = comparison.language
    assert (good.runtime, small.runtime, wrong.runtime) == (ONNXRUNTIME, "small", "reversed")
    assert [prompt.prompt for prompt in good.prompts] == [*PROMPTS]
    assert good.top1_agreement == small.top1_agreement == 1
    assert 0 <= good.kl_mean <= good.kl_max < 1e-6
    assert all(p.identical and p.text == p.pytorch and p.tokens == NEW for p in good.prompts)
    assert wrong.top1_agreement == 0 and wrong.kl_mean > 1e-3
    assert not any(prompt.identical for prompt in wrong.prompts)
    assert [r for r in comparison.reasons if "continued" in r] == [
        f"reversed, prompt {prompt!r} is continued otherwise than by PyTorch" for prompt in PROMPTS
    ]


def test_prompts_beyond_the_room_of_a_runtime_are_left_out(comparison):
    small = comparison.language[1]
    assert [prompt.prompt for prompt in small.prompts] == [PROMPTS[0]]
    cases = {row.runtime: row.cases for row in comparison.outputs}
    assert cases == {ONNXRUNTIME: 4, "small": 2, "reversed": 4}


def test_the_summary_tells_runtimes_apart(comparison, made):
    text = summary(describe_comparison(comparison, made[0]))
    assert "small, 2 cases\n" in text and "100.0 %, mean KL" in text
    assert "top-1 agreement 0.0 %" in text and "nats in reversed" in text
    assert text.count("(12 tokens, the same as PyTorch's)") == 3
    assert text.count("DIFFERS from PyTorch") == 2


def test_a_stop_token_ends_the_text(made, comparison, monkeypatch):
    source, path = made
    text = comparison.language[0].prompts[0].pytorch
    monkeypatch.setattr(source, "stop_tokens", lambda: frozenset([ord(text[3])]))
    again = compare(source, path, prompts=PROMPTS, new_tokens=NEW, cases=[], threads=1)
    assert again.passed, again.reasons
    assert again.language[0].prompts[0].tokens == text.index(text[3]) + 1 < NEW


def test_prompts_are_continued_together_where_there_is_room(made, monkeypatch):
    source, path = made
    model = OnnxModel(create_session(path, threads=1))
    batches = []
    reset = model.reset
    monkeypatch.setattr(model, "reset", lambda b, c=1: (batches.append(b), reset(b, c)))
    compare(source, path, others={"x": model}, prompts=PROMPTS, new_tokens=3, cases=[], threads=1)
    assert batches == [1, 1, 2], "each prompt as a case, then both as text"
