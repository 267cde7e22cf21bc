# SPDX-License-Identifier: MIT
"""The report holds every figure, in JSON and in one self-contained page."""

import copy
import html.parser
import json
import math

import pytest

from fastmqa_export.report import human_bytes, render, summary, write_report

RESULT = {
    "tool": {"name": "fastmqa_export", "version": "0.1.0"},
    "source": {
        "name": "tiny <b>",
        "kind": "gguf",
        "description": "LlamaForCausalLM, 2 layers",
        "layers": 2,
        "num_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 64,
        "parameters": 1234567,
        "dtype": "float32",
    },
    "export": {
        "file": "model.onnx",
        "bytes": 2048,
        "data_bytes": 3 * 2**20,
        "seconds": 1.25,
        "peak_memory_bytes": 2**30,
        "opset": 24,
        "ir_version": 10,
        "cache": "static",
        "fused_nodes": 2,
        "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}],
        "outputs": [{"name": "logits", "dtype": "float", "shape": ["batch", "sequence", 99]}],
    },
    "graph": {"unfused": {"MatMul": 7, "Softmax": 2}, "fused": {"MatMul": 3, "FusedAttention": 2}},
    "accuracy": [
        {
            "runtime": "onnxruntime (function body)",
            "dtype": "float32",
            "output": "logits",
            "cases": 7,
            "max_abs": 1.5e-6,
            "mean_abs": 1e-7,
            "max_ulp": 12.5,
            "cosine": 1.0,
            "same_dtype_max_abs": 1e-6,
            "error_ratio": 1.5,
            "limit": 4e-6,
            "passed": True,
            "worst_case": "odd prefill",
        }
    ],
    "error_distribution": [
        {"label": "PyTorch float32", "edges": [-8.0, -7.0, -6.0], "counts": [10, 30]},
        {"label": "onnxruntime", "edges": [-8.0, -7.0, -6.0], "counts": [20, 20]},
    ],
    "language": [
        {
            "runtime": "onnxruntime (function body)",
            "top1_agreement": 1.0,
            "kl_mean": 1e-11,
            "kl_max": 2e-11,
            "prompts": [
                {
                    "prompt": "<script>alert(1)</script>",
                    "pytorch": " yes",
                    "text": " yes",
                    "identical": True,
                    "tokens": 48,
                }
            ],
        }
    ],
    "kv_cache": {
        "dtype": "float32",
        "context": 4096,
        "rows": [
            {
                "attention": "GQA",
                "layout": "3 × 64",
                "bytes_per_token": 46080,
                "bytes_per_sequence": 188743680,
                "reduction": 2 / 3,
                "users_factor": 3.0,
                "is_source": True,
            }
        ],
    },
    "timings": [
        {
            "what": "decode, 64 cached tokens",
            "runtime": "onnxruntime",
            "milliseconds": 21.25,
            "p10": 20.0,
            "p90": 23.0,
            "tokens_per_second": 47.1,
            "threads": 2,
        }
    ],
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "machine": {"cpu": "AMD EPYC", "cores": 2, "gpu": None},
    "verdict": {"passed": True, "reasons": []},
}


def failing() -> dict:
    result = copy.deepcopy(RESULT)
    result["accuracy"][0] |= {"max_abs": math.nan, "error_ratio": math.inf, "passed": False}
    result["language"][0]["prompts"][0] |= {"text": " no", "identical": False}
    result["verdict"] = {"passed": False, "reasons": ["logits: error nan exceeds 4.0e-06"]}
    return result


class Balanced(html.parser.HTMLParser):
    """Fails where tags are not closed in order."""

    VOID = ("meta", "br", "line", "polyline")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop() == tag


@pytest.mark.parametrize("result", [RESULT, failing()], ids=["pass", "fail"])
def test_the_page_is_well_formed_and_loads_nothing(result):
    page = render(result)
    Balanced(page)
    for loading in ("http://", "https://", "src=", "@import", "url("):
        assert loading not in page


def test_the_page_holds_the_figures():
    page = render(RESULT)
    figures = ("1.5e-06", "1.50", "12.5", "4.0e-06", "1,234,567", "3 MiB", "45 KiB", "66.7 %")
    for figure in (*figures, "21.25", "47.1", "AMD EPYC", "torch 2.13.0", "Pass."):
        assert figure in page, figure
    assert page.count("<polyline") == 2


def test_what_users_give_is_escaped():
    page = render(RESULT)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "tiny &lt;b&gt;" in page


def test_a_failure_is_seen_first():
    page = render(failing())
    assert "Pass." not in page
    assert "<strong>Fail.</strong>" in page
    assert "logits: error nan exceeds" in page
    assert "PyTorch continues otherwise" in page


def test_a_report_without_language_or_timings():
    result = {**RESULT, "language": [], "timings": [], "error_distribution": []}
    page = render(result)
    Balanced(page)
    assert "Language" not in page
    assert "<svg" not in page


def test_runtimes_are_told_apart():
    result = copy.deepcopy(RESULT)
    (row,), (language,) = result["accuracy"], result["language"]
    result["accuracy"].append({**row, "runtime": "an engine", "cases": 6})
    result["language"].append({**language, "runtime": "an engine"})
    result["error_distribution"].append({**result["error_distribution"][0], "label": "an engine"})
    page, text = render(result), summary(result)
    Balanced(page)
    assert "Every output in onnxruntime (function body) and in an engine is as close" in page
    assert page.count('<td colspan="10">an engine</td>') == 1
    assert page.count("<h2>Language, ") == 2
    assert '<polyline class="l2"' in page and '<span class="k2">┅' in page
    assert "onnxruntime (function body), 7 cases\nok   logits" in text
    assert "an engine, 6 cases\nok   logits" in text
    assert "mean KL 1.0e-11 nats in an engine" in text
    assert "cases" not in summary(RESULT), "with one runtime nothing needs a heading"


def test_both_files_are_written_and_json_has_no_nan(tmp_path):
    data, page = write_report(failing(), tmp_path)
    assert page.read_text("utf-8").startswith("<!doctype html>")
    found = json.loads(data.read_text("utf-8"), parse_constant=pytest.fail)
    assert found["accuracy"][0]["max_abs"] == "nan"
    assert found["accuracy"][0]["error_ratio"] == "inf"
    assert found["source"] == RESULT["source"]


def test_the_summary_says_what_matters():
    text = summary(RESULT)
    assert "verdict: PASS" in text
    assert "max error 1.5e-06, 1.50 × PyTorch float32, limit 4.0e-06" in text
    assert "(48 tokens, the same as PyTorch's)" in text
    text = summary(failing())
    assert "verdict: FAIL" in text
    assert "FAIL logits" in text
    assert "DIFFERS from PyTorch: yes" in text


def test_the_plot_has_axes_and_a_description():
    page = render(RESULT)
    for text in (
        'role="img"',
        "<title id=",
        "<desc id=",
        "75.0 %",
        "1e-7",
        "absolute error against",
    ):
        assert text in page, text


HISTOGRAMS = {
    "no values in one": [
        {"edges": [-8.0, -7.0], "counts": [0]},
        {"edges": [-8.0, -7.0], "counts": [3]},
    ],
    "edges of their own": [
        {"edges": [-8.0, -7.0], "counts": [4]},
        {"edges": [-7.5, -7.0, -6.0], "counts": [1, 1]},
    ],
}


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("no values in one", ["0.0,200.0 0.0,0.0 640.0,0.0 640.0,200.0"]),
        (
            "edges of their own",
            [
                "0.0,200.0 0.0,0.0 320.0,0.0 320.0,200.0",
                "160.0,200.0 160.0,100.0 320.0,100.0 320.0,100.0 640.0,100.0 640.0,200.0",
            ],
        ),
    ],
)
def test_each_histogram_is_drawn_by_its_own_edges(name, points):
    series = [{**s, "label": str(i)} for i, s in enumerate(HISTOGRAMS[name])]
    page = render({**RESULT, "error_distribution": series})
    assert [line.split('"')[0] for line in page.split('points="')[1:]] == points


def test_a_report_without_fused_nodes_or_accuracy():
    graph = {"unfused": {"MatMul": 7}, "fused": {"MatMul": 7, "Identity": 1}}
    page = render({**RESULT, "graph": graph, "accuracy": []})
    Balanced(page)
    assert "<code>Identity</code></td><td>0</td><td>1</td>" in page


def test_texts_that_no_terminal_or_file_should_obey(tmp_path):
    result = copy.deepcopy(RESULT)
    result["language"][0]["prompts"][0] |= {"prompt": "a\udc80", "text": "\x1b[2Jé\n日"}
    text = summary(result)
    assert "\\x1b[2Jé\n日" in text
    text.encode("utf-8")
    data, page = write_report(result, tmp_path)
    assert json.loads(data.read_text("utf-8"))["language"] == result["language"]
    assert "a&#56448;" in page.read_text("utf-8")


def test_json_is_sorted(tmp_path):
    data, _ = write_report(RESULT, tmp_path)
    again, _ = write_report(dict(reversed(RESULT.items())), tmp_path)
    assert data.read_bytes() == again.read_bytes()
    assert list(json.loads(data.read_text("utf-8"))) == sorted(RESULT)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (4 * 2**30, "4 GiB"), (2**43, "8192 GiB")],
)
def test_bytes_for_people(count, text):
    assert human_bytes(count) == text
