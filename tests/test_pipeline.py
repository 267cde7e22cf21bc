# SPDX-License-Identifier: MIT
"""What the report says of caches and graphs, by hand-made numbers."""

import pytest
import torch
from tiny_models import decoder

from fastmqa_export.builtin import BuiltinOptions, create
from fastmqa_export.huggingface import HuggingFaceSource
from fastmqa_export.pipeline import count_ops, export_source, kv_cache_table, versions
from fastmqa_export.source import AttentionShape


def rows(shape: AttentionShape, dtype: torch.dtype = torch.float32) -> dict:
    return {row["attention"]: row for row in kv_cache_table(shape, dtype)["rows"]}


def test_smollm2():
    table = rows(AttentionShape(30, 9, 3, 64))
    assert [kind for kind, row in table.items() if row["is_source"]] == ["GQA"]
    assert {kind: row["bytes_per_token"] for kind, row in table.items()} == {
        "MHA": 30 * 2 * 9 * 64 * 4,
        "GQA": 30 * 2 * 3 * 64 * 4,
        "MQA": 30 * 2 * 64 * 4,
        "MLA": 30 * 64 * 4,
    }
    assert table["GQA"]["users_factor"] == 3
    assert table["GQA"]["bytes_per_sequence"] == 4096 * table["GQA"]["bytes_per_token"]


def test_deepseek_v2_lite():
    table = rows(AttentionShape(27, 16, 1, 192, 512 + 64), torch.float16)
    assert table["MLA"]["is_source"]
    assert table["MLA"]["bytes_per_token"] == 27 * 1152
    assert table["MLA"]["layout"] == "latent, 576 columns"


@pytest.mark.parametrize(("kv_heads", "kind"), [(1, "MQA"), (2, "GQA"), (4, "MHA")])
def test_the_row_of_the_source_is_marked(kv_heads, kind):
    source = create("mqa", BuiltinOptions(hidden=64, heads=4, kv_heads=kv_heads), torch.float32)
    marked = [name for name, row in rows(source.shape()).items() if row["is_source"]]
    assert marked == [kind]


def test_a_latent_model_is_not_taken_for_mqa():
    shape = HuggingFaceSource.from_model(decoder("deepseek_v3"), "deepseek").shape()
    assert (shape.head_dim, shape.latent_columns) == (24, 32 + 8)


def test_ops_are_counted_with_and_without_the_node(tmp_path):
    source = create("mqa", BuiltinOptions(hidden=64, heads=4), torch.float32)
    graph = count_ops(export_source(source, tmp_path / "m.onnx", "static").path)
    assert graph["fused"]["FusedAttention"] == 1
    assert "FusedAttention" not in graph["unfused"]
    assert graph["unfused"]["Softmax"] == 1
    assert graph["unfused"]["MatMul"] == graph["fused"]["MatMul"] + 2


def test_versions_name_what_made_the_file():
    assert {"python", "torch", "onnx", "onnxruntime"} <= set(versions())
