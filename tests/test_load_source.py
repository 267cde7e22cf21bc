# SPDX-License-Identifier: MIT
"""From the SOURCE argument to a model, and what each wrong one is told."""

import dataclasses
import sys
import types

import pytest
import torch
from tiny_models import decoder

from fastmqa_export.builtin import PRESETS, BuiltinOptions, create
from fastmqa_export.errors import ConfigError, MissingDependencyError, SourceError
from fastmqa_export.load_source import load_source
from fastmqa_export.modules import MultiQueryAttention

FLOAT32 = torch.float32


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_four_sizes(preset):
    kind, size = preset.split("-")
    heads = {"512": 8, "1024": 16, "2048": 32, "4096": 32}[size]
    _, options = PRESETS[preset]
    assert (options.hidden, options.heads) == (int(size), heads)
    if size == "512":
        shape = load_source(preset, FLOAT32).shape()
        assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (8, 1, 64)
        assert shape.latent_columns == (2 * 32 if kind == "mla" else 0)


def test_the_seed_makes_the_weights():
    def weights(seed: int) -> list[torch.Tensor]:
        options = BuiltinOptions(hidden=32, heads=4, seed=seed)
        return list(load_source("mqa", FLOAT32, options=options).module.parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(0), weights(0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(0), weights(1), strict=True))


def test_descriptions_name_the_kind():
    def description(name: str, **options) -> str:
        return create(name, BuiltinOptions(hidden=64, heads=4, **options), FLOAT32).description

    assert description("mqa") == "MQA, hidden 64, 4 heads of 16"
    assert description("mqa", kv_heads=2).startswith("GQA")
    assert description("mqa", kv_heads=4).startswith("MHA")
    assert description("mla").startswith("MLA")


def test_a_cache_needs_causal_attention():
    source = create("mqa", BuiltinOptions(hidden=64, heads=4, causal=False), FLOAT32)
    with (
        pytest.raises(ConfigError, match="export it with --cache none"),
        source.traceable("static"),
    ):
        pass


BAD_OPTIONS = {
    "heads that do not divide": ({"kv_heads": 3}, "num_kv_heads=3"),
    "hidden that does not divide": ({"hidden": 65}, "65"),
    "no heads": ({"heads": 0}, "both must be ≥ 1"),
    "a latent as large as a head": ({"compression": 1.0}, "between 0 and 1"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_sizes_that_do_not_fit_are_refused(name):
    options, message = BAD_OPTIONS[name]
    kind = "mla" if "latent" in name else "mqa"
    with pytest.raises(ConfigError, match=message):
        create(kind, dataclasses.replace(BuiltinOptions(hidden=64, heads=4), **options), FLOAT32)


def test_a_preset_takes_no_sizes():
    with pytest.raises(SourceError, match="mqa-512 is a preset with sizes of its own"):
        load_source("mqa-512", FLOAT32, options=BuiltinOptions(heads=4))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mqa-51", "Did you mean mqa-512"),
        ("no/such/folder", "no such file or folder exists"),
        ("nonsense", "accepted is a built-in"),
    ],
)
def test_an_unknown_source_is_told_what_is_accepted(source, message):
    with pytest.raises(SourceError, match=message):
        load_source(source, FLOAT32)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=r"neither a folder nor a \.gguf file"):
        load_source(str(tmp_path / "model.bin"), FLOAT32)


@pytest.fixture
def factories(monkeypatch):
    def broken():
        raise RuntimeError("no weights")

    module = types.ModuleType("my_models")
    module.attention = lambda: MultiQueryAttention(64, 4)
    module.language_model = lambda: decoder("llama")
    module.number = lambda: 3
    module.broken = broken
    monkeypatch.setitem(sys.modules, "my_models", module)


@pytest.mark.usefixtures("factories")
def test_a_factory_gives_a_module_or_a_model():
    assert load_source("my_models:attention", torch.float16).dtype == torch.float16
    source = load_source("my_models:language_model", FLOAT32)
    assert source.shape().layers == 3
    assert source.tokenizer() is None


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("my_models:number", "returned int; a factory returns"),
        ("my_models:broken", "failed: RuntimeError: no weights"),
        ("my_models:absent", "failed: AttributeError"),
        ("no_such_package:make", "failed: ModuleNotFoundError.*PYTHONPATH"),
    ],
)
def test_a_factory_that_does_not_work_is_explained(source, message):
    with pytest.raises(SourceError, match=message):
        load_source(source, FLOAT32)


def test_hugging_face_needs_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fastmqa_export.huggingface", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fastmqa_export\[hf\]'"):
        load_source(str(tmp_path), FLOAT32)
