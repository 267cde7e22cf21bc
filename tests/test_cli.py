# SPDX-License-Identifier: MIT
"""The command line: results on stdout, people on stderr, exit codes, and every bad input."""

import errno
import json
import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import fastmqa_export
from fastmqa_export import onnx_export
from fastmqa_export.accuracy import ErrorBudget
from fastmqa_export.cli import main

SMALL = ["--hidden", "64", "--heads", "4"]


@pytest.fixture
def invoke(runner):
    def call(*arguments, code=0):
        result = runner.invoke(main, [str(x) for x in arguments])
        assert result.exit_code == code, result.output
        if result.exception is not None:
            assert isinstance(result.exception, SystemExit), result.exception
        return result

    return call


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    from click.testing import CliRunner

    path = tmp_path_factory.mktemp("cli") / "mqa.onnx"
    result = CliRunner().invoke(main, ["export", "mqa", *SMALL, "-o", str(path)])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{path}: 1 FusedAttention nodes, opset 24\n"
    assert "[2/2] export to ONNX" in result.stderr
    return path


def test_compare_passes_and_fails_with_its_exit_code(invoke, exported):
    text = invoke("compare", exported, "--source", "mqa", *SMALL).stdout
    assert "verdict: PASS" in text
    text = invoke("compare", exported, "--source", "mqa", *SMALL, "--seed", "1", code=1).stdout
    assert "verdict: FAIL" in text


def test_json_is_all_that_is_on_stdout(invoke, exported, tmp_path):
    out = tmp_path / "m.onnx"
    result = invoke("export", "mla", *SMALL, "--form", "expanded", "-o", out, "--json")
    assert json.loads(result.stdout)["fused_nodes"] == 1
    assert result.stderr == ""
    result = invoke("compare", exported, "--source", "mqa", *SMALL, "--json")
    assert json.loads(result.stdout)["verdict"] == {"passed": True, "reasons": []}
    assert json.loads(invoke("inspect", exported, "--json").stdout)["has_function"]
    assert {x["name"] for x in json.loads(invoke("doctor", "--json").stdout)} >= {"torch"}


def test_a_preset_makes_the_round_trip(invoke, tmp_path):
    path = tmp_path / "m.onnx"
    invoke("export", "mqa-512", "-o", path)
    assert "verdict: PASS" in invoke("compare", path, "--source", "mqa-512").stdout
    assert "fastmqa.source = mqa-512" in invoke("inspect", path).stdout


def test_inspect_and_doctor_speak_to_people(invoke, exported):
    assert "FusedAttention: 1 nodes" in invoke("inspect", exported).stdout
    assert "onnxruntime" in invoke("doctor").stdout


def test_doctor_ends_with_3_if_something_needed_is_missing(invoke, monkeypatch):
    from fastmqa_export import doctor

    monkeypatch.setattr(doctor, "required_missing", lambda checks: True)
    invoke("doctor", code=3)


def test_run_writes_everything(invoke, tmp_path):
    folder = tmp_path / "a" / "result"
    result = invoke("run", "mqa", *SMALL, "-o", folder, "--dtype", "float16")
    assert "verdict: PASS" in result.stdout
    assert f"report: {folder / 'report.html'}" in result.stdout
    assert sorted(x.name for x in folder.iterdir()) == ["model.onnx", "report.html", "report.json"]
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert report["verdict"]["passed"]
    assert report["source"]["dtype"] == "float16"
    assert report["graph"]["fused"]["FusedAttention"] == 1
    assert "FusedAttention" not in report["graph"]["unfused"]
    assert {row["attention"]: row["is_source"] for row in report["kv_cache"]["rows"]}["MQA"]
    assert {t["what"] for t in report["timings"]} >= {"decode, 64 cached tokens"}


def test_run_without_a_cache(invoke, tmp_path):
    invoke("run", "mqa", *SMALL, "--no-causal", "--cache", "none", "-o", tmp_path / "r")
    report = json.loads((tmp_path / "r" / "report.json").read_text("utf-8"))
    assert report["verdict"]["passed"]
    assert report["timings"] == []


def test_a_failed_run_ends_with_1_and_still_writes_its_report(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(ErrorBudget, "accepts", lambda *_: False)
    result = invoke("run", "mqa", *SMALL, "--cache", "none", "-o", tmp_path / "r", code=1)
    assert "verdict: FAIL" in result.stdout
    report = json.loads((tmp_path / "r" / "report.json").read_text("utf-8"))
    assert not report["verdict"]["passed"]
    assert (tmp_path / "r" / "report.html").is_file()


# Bad input: what was given, what is accepted, what to do; nothing left behind


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    yield folder / "m.onnx"
    assert not list(folder.iterdir())


def test_an_unknown_source(invoke, place):
    message = invoke("export", "mqa-51", "-o", place, code=2).stderr
    assert "'mqa-51' is no built-in" in message
    assert "accepted is a built-in (mqa, mla" in message
    assert "Did you mean mqa-512" in message


def test_heads_that_do_not_divide(invoke, place):
    message = invoke("export", "mqa", *SMALL, "--kv-heads", 3, "-o", place, code=2).stderr
    assert "num_heads=4 is not a multiple of num_kv_heads=3" in message


@pytest.mark.parametrize("options", [["--compression", "nan"], ["--seed", 10**20]])
def test_numbers_beyond_reason(invoke, place, options):
    assert options[0] in invoke("export", "mla", *SMALL, *options, "-o", place, code=2).stderr


def test_half_a_checkpoint(invoke, place, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    message = invoke("export", tmp_path / "model", "-o", place, code=2).stderr
    assert "has no *.safetensors: the weights are missing" in message


def test_an_output_that_is_no_onnx_file(invoke, place):
    message = invoke("export", "mqa", "-o", place.with_suffix(".txt"), code=2).stderr
    assert "does not end in .onnx" in message


def test_an_output_folder_that_cannot_be_written(invoke, tmp_path):
    (tmp_path / "file").write_text("")
    for command in (["export", "mqa", "-o", tmp_path / "file" / "m.onnx"],
                    ["run", "mqa", "-o", tmp_path / "file"]):  # fmt: skip
        message = invoke(*command, code=1).stderr
        assert "cannot write to" in message
        assert "choose another place" in message


def test_a_disk_that_fills(invoke, place, monkeypatch):
    def save(model, target, **options):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir, "save", save)
    message = invoke("export", "mqa", *SMALL, "-o", place, code=1).stderr
    assert "the disk is full; free some space" in message


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_a_file_that_is_no_onnx(invoke, command, tmp_path):
    (tmp_path / "m.onnx").write_text("this is no model")
    arguments = ["--source", "mqa"] if command == "compare" else []
    message = invoke(command, tmp_path / "m.onnx", *arguments, code=2).stderr
    assert "is no ONNX model" in message


def test_an_onnx_file_without_fused_attention(invoke, tmp_path):
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    message = invoke("compare", tmp_path / "m.onnx", "--source", "mqa", code=2).stderr
    assert "has no fastmqa::FusedAttention node" in message


def test_weights_that_are_not_beside_the_file(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "INLINE_WEIGHTS_BYTES", 1000)
    invoke("export", "mqa", *SMALL, "-o", tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").unlink()
    message = invoke("compare", tmp_path / "m.onnx", "--source", "mqa", *SMALL, code=2).stderr
    assert "m.onnx.data" in message
    text = invoke("inspect", tmp_path / "m.onnx").stdout
    assert "problem: weights file m.onnx.data is missing" in text


def test_a_package_that_is_missing(invoke, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fastmqa_export.pipeline", None)
    monkeypatch.delattr(fastmqa_export, "pipeline", raising=False)
    message = invoke("export", "mqa", "-o", tmp_path / "m.onnx", code=3).stderr
    assert "fastmqa-export doctor" in message


def test_wrong_usage_is_clicks_own(invoke):
    assert "Missing option '-o'" in invoke("export", "mqa", code=2).stderr


@pytest.mark.parametrize("command", [*main.commands, "kernels emit"])
def test_help_keeps_its_examples_on_lines_of_their_own(invoke, command):
    result = invoke(*command.split(), "--help")
    assert "\\b" not in result.stdout
    if command not in ("doctor", "kernels"):
        assert "\n  Example: fastmqa-export " in result.stdout
