# SPDX-License-Identifier: MIT
"""The comparison passes what is right and fails what was damaged on purpose."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch

from fastmqa_export.accuracy import ErrorBudget, measure
from fastmqa_export.builtin import BuiltinOptions, create
from fastmqa_export.compare import CASES, _judge, compare
from fastmqa_export.errors import ConfigError, ModelFileError
from fastmqa_export.pipeline import export_source

OPTIONS = BuiltinOptions(hidden=64, heads=4, window=6)


def source(name: str = "mqa", dtype: torch.dtype = torch.float32, **options):
    return create(name, dataclasses.replace(OPTIONS, **options), dtype)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "model.onnx"
    export_source(source(), path, "static")
    return path


VARIANTS = {
    "mqa": {},
    "gqa": {"kv_heads": 2, "softcap": 4.0},
    "mla absorbed": {"name": "mla"},
    "mla expanded": {"name": "mla", "form": "expanded"},
    "no rotation": {"rope_theta": 0.0, "window": 0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("cache", ["static", "none"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_good_file_passes(name, cache, dtype, tmp_path):
    model = source(dtype=dtype, **VARIANTS[name])
    export_source(model, tmp_path / "m.onnx", cache)
    comparison = compare(model, tmp_path / "m.onnx", threads=1)
    assert comparison.passed, comparison.reasons
    outputs = {row.output: row for row in comparison.outputs}
    cached = {"present.*.key", "present.*.value"} if cache == "static" else set()
    assert set(outputs) == {"output"} | cached
    assert all(row.cases == len(CASES) for row in outputs.values())
    assert all(0 < row.max_abs <= row.limit for row in outputs.values())
    assert comparison.language == ()
    assert sum(comparison.distribution["PyTorch, same dtype"]) > 0


def damage(path, target, change) -> None:
    model = onnx.load(path)
    node = next(n for n in model.graph.node if n.op_type == "FusedAttention")
    change(model, {a.name: a for a in node.attribute})
    onnx.save(model, target)


def scaled(model, attributes):
    attributes["scale"].f *= 1.01


def not_causal(model, attributes):
    attributes["is_causal"].i = 0


def wider(model, attributes):
    attributes["window_left"].i += 1


def perturbed(model, attributes):
    weight = next(x for x in model.graph.initializer if x.name.endswith("weight.T"))
    array = onnx.numpy_helper.to_array(weight).copy()
    array[0, 0] += 1e-3
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))


def poisoned(model, attributes):
    weight = next(x for x in model.graph.initializer if x.name.endswith("weight.T"))
    array = onnx.numpy_helper.to_array(weight).copy()
    array[0, 0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))


@pytest.mark.parametrize("change", [scaled, not_causal, wider, perturbed, poisoned])
def test_a_damaged_file_fails(change, exported, tmp_path):
    damage(exported, tmp_path / "m.onnx", change)
    comparison = compare(source(), tmp_path / "m.onnx")
    assert not comparison.passed
    assert any("exceeds" in reason for reason in comparison.reasons)


def test_a_file_that_lacks_an_output_is_refused(exported, tmp_path):
    def drop(model, _):
        del model.graph.output[-1]

    damage(exported, tmp_path / "m.onnx", drop)
    with pytest.raises(ModelFileError, match=r"present\.0\.value"):
        compare(source(), tmp_path / "m.onnx")


def test_another_source_fails(exported):
    assert not compare(source(seed=1), exported).passed


def test_a_source_of_another_kind_is_refused(exported, tmp_path):
    class Text(type(source())):
        input_name = "input_ids"

    other = source()
    other.__class__ = Text
    with pytest.raises(ModelFileError, match="was the file exported from another SOURCE"):
        compare(other, exported)


def test_bfloat16_cannot_be_compared_here(exported):
    with pytest.raises(ConfigError, match=r"no bfloat16 MatMul.*--dtype float32 or float16"):
        compare(source(dtype=torch.bfloat16), exported)


def statistics(error: float):
    oracle = torch.ones(4, dtype=torch.float64)
    return measure(oracle + torch.tensor([error, 0, 0, 0]), oracle, torch.float32)


def test_one_case_cannot_hide_behind_the_larger_error_of_another():
    good = ("good", {"y": statistics(1e-2)}, {"y": statistics(1e-2)})
    bad = ("bad", {"y": statistics(1e-4)}, {"y": statistics(1e-6)})
    (row,) = _judge("runtime", [good, bad], ErrorBudget())
    assert row.max_abs == pytest.approx(1e-2)
    assert "(bad)" in row.reason
    (row,) = _judge("runtime", [good, good], ErrorBudget())
    assert row.passed


def test_layers_are_judged_together():
    same = {"present.0.key": statistics(1e-6), "present.1.key": statistics(1e-6)}
    ours = {"present.0.key": statistics(1e-6), "present.1.key": statistics(9e-6)}
    (row,) = _judge("runtime", [("case", ours, same)], ErrorBudget())
    assert row.output == "present.*.key"
    assert "present.1.key" in row.reason
