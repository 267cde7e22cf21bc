# SPDX-License-Identifier: MIT
"""The cache is written in place, grows by doubling, and generation pads and stops right."""

import numpy as np
import onnxruntime
import pytest
import torch

from fastmqa_export.builtin import BuiltinOptions, create
from fastmqa_export.errors import ConfigError, ModelFileError
from fastmqa_export.pipeline import export_source
from fastmqa_export.runtime import (
    OnnxModel,
    OnnxOneShot,
    create_session,
    generate,
    next_power_of_two,
)

KEY = "past_key_values.0.key"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    source = create("mqa", BuiltinOptions(hidden=32, heads=4), torch.float32)
    target = tmp_path_factory.mktemp("runtime") / "model.onnx"
    export_source(source, target, "static")
    return target


@pytest.fixture
def model(path):
    return OnnxModel(create_session(path, threads=1))


def hidden(batch: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, tokens, 32)).astype(np.float32)


@pytest.mark.parametrize(("n", "power"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_two(n, power):
    assert next_power_of_two(n) == power


def test_a_step_writes_its_rows_in_place_and_no_other(model):
    model.reset(2, 8)
    address = model.buffer_address(KEY)
    model.step(hidden(2, 3))
    first = model.cache(KEY).copy()
    assert first[:, :, :3].any(axis=(1, 2, 3)).all()
    assert not first[:, :, 3:].any()
    model.advance([3, 1])
    model.step(hidden(2, 1, seed=1))
    second = model.cache(KEY)
    assert model.buffer_address(KEY) == address
    np.testing.assert_array_equal(second[0, :, :3], first[0, :, :3])
    np.testing.assert_array_equal(second[1, :, 2:3], first[1, :, 2:3])  # still the padding
    assert second[0, :, 3].any()
    assert (second[1, :, 1] != first[1, :, 1]).any()


def test_a_full_cache_doubles_and_keeps_its_contents(model):
    model.reset(1, 4)
    assert model.capacity == 4
    model.step(hidden(1, 4))
    model.advance([4])
    before = model.cache(KEY).copy()
    model.step(hidden(1, 1))
    assert model.capacity == 8
    np.testing.assert_array_equal(model.cache(KEY)[:, :, :4], before)


def test_pieces_give_what_the_whole_gives(model):
    x = hidden(1, 9)
    model.reset(1)
    whole = model.step(x)
    model.reset(1)
    parts = []
    for piece in (x[:, :5], x[:, 5:6], x[:, 6:9]):
        parts.append(model.step(piece))
        model.advance([piece.shape[1]])
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_onnxruntime_copies_only_if_past_and_present_are_two_buffers(path, capfd):
    """Its TensorScatter warns whenever it has to copy."""
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    model = OnnxModel(session)
    model.reset(1, 64)
    model.step(hidden(1, 1))
    assert "in-place optimization not activated" not in capfd.readouterr().err
    feed = {"hidden_states": hidden(1, 1), "position": np.zeros(1, np.int64)}
    feed |= {name: model.cache(name) for name in model.cache_names}
    session.run(None, feed)
    assert "in-place optimization not activated" in capfd.readouterr().err


def test_the_batch_is_fixed_until_reset(model):
    model.reset(2, 8)
    with pytest.raises(ConfigError, match=r"3 sequences given to a cache of 2; call reset\(\)"):
        model.step(hidden(3, 1))


def test_a_file_without_a_cache_cannot_be_stepped(tmp_path):
    source = create("mqa", BuiltinOptions(hidden=32, heads=4), torch.float32)
    export_source(source, tmp_path / "m.onnx", "none")
    with pytest.raises(ModelFileError, match="has no KV cache"):
        OnnxModel(create_session(tmp_path / "m.onnx"))


def test_a_file_with_a_cache_is_not_run_at_once(path):
    with pytest.raises(ModelFileError, match=r"has inputs .*position.*--cache none"):
        OnnxOneShot(create_session(path))


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ModelFileError, match=r"onnxruntime cannot load .*m\.onnx"):
        create_session(tmp_path / "m.onnx")


class Counting:
    """A model whose next token is the last one plus one, in a vocabulary of 10."""

    def reset(self, batch, capacity=1):
        self.seen = [0] * batch

    def step(self, x):
        return np.eye(10)[(x + 1) % 10]

    def advance(self, counts):
        self.seen = [a + b for a, b in zip(self.seen, counts, strict=True)]


def test_generation_continues_prompts_of_different_lengths():
    model = Counting()
    assert generate(model, [[1, 2], [7], [3, 4, 5]], 3) == [[3, 4, 5], [8, 9, 0], [6, 7, 8]]
    assert model.seen == [4, 3, 5]  # the last token is never fed


def test_generation_stops_each_prompt_at_its_stop_token():
    assert generate(Counting(), [[1], [7]], 6, stop=frozenset({9})) == [[2, 3, 4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_empty_prompts_are_refused(prompts):
    with pytest.raises(ConfigError, match="at least one token"):
        generate(Counting(), prompts, 3)
