# SPDX-License-Identifier: MIT
"""Model repositories for Triton: by its schema, and by its client against a stand-in."""

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

pytest.importorskip("tritonclient.grpc", reason="Triton's schema: pip install tritonclient[grpc]")

import torch
from fakes import write_plan, write_record
from tiny_models import DECODERS, make
from triton_server import read_config, serve, type_name

from fastmqa_export import bundle, onnx_export, plugins
from fastmqa_export.builtin import BuiltinOptions
from fastmqa_export.bundle import describe, write_bundle
from fastmqa_export.engine_record import digest
from fastmqa_export.errors import ConfigError, EngineError, ModelFileError, OutputError
from fastmqa_export.huggingface import HuggingFaceSource
from fastmqa_export.inspect import inspect_file
from fastmqa_export.load_source import load_source
from fastmqa_export.progress import Progress


def write(model: Path, target: Path, **options) -> dict:
    defaults = {"capacity": 32, "progress": Progress(1, quiet=True)}
    return write_bundle(model, target, **defaults | options)


def export(path: Path, source="mqa", dtype=torch.float32, cache="static") -> Path:
    options = BuiltinOptions(hidden=64, heads=4)
    with load_source(source, dtype, options=options).traceable(cache) as exportable:
        return onnx_export.export(exportable, path).path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Exported files: with a cache in float16, without one, and latent attention in bfloat16."""
    folder = tmp_path_factory.mktemp("exported")
    export(folder / "cached.onnx", dtype=torch.float16)
    export(folder / "plain.onnx", cache="none")
    export(folder / "bfloat16.onnx", source="mla", dtype=torch.bfloat16, cache="none")
    return folder


def fake_plan(path: Path, exported: Path, plugin: Path, *, record=True, **changes) -> Path:
    """An engine of an exported file as far as a bundle looks at it."""
    version = changes.pop("version", (10, 14, 1, 48))
    write_plan(path, changes.pop("tag", b"ftrt"), version=version)
    if record:
        made_from = {
            "model": {exported.name: digest(exported)},
            "plugins": {plugin.name: digest(plugin)},
        }
        write_record(path, ".".join(map(str, version)), **made_from | changes)
    return path


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "libfastmqa_trt.so"
    path.write_bytes(b"a plugin")
    monkeypatch.setenv(plugins.TRT_VARIABLE, str(path))
    return path


def run_client(repository: Path, address: str) -> subprocess.CompletedProcess:
    command = [sys.executable, repository / "client.py", "--url", address, "--wait", "1"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


# The configuration, by Triton's schema


def shape_of(tensor) -> list[int]:
    return list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)


@pytest.mark.parametrize("name", ["cached", "plain"])
def test_the_configuration_has_every_input_and_output_of_the_file(name, folder, tmp_path):
    write(folder / f"{name}.onnx", tmp_path / "r")
    config = read_config(tmp_path / "r" / f"{name}_cpu")
    assert (config.name, config.backend) == (f"{name}_cpu", "onnxruntime")
    assert config.max_batch_size == 8
    states = config.sequence_batching.state
    found = {
        **{x.name: (type_name(x.data_type), shape_of(x)) for x in (*config.input, *config.output)},
        **{x.input_name: (type_name(x.data_type), list(x.dims)) for x in states},
        **{x.output_name: (type_name(x.data_type), list(x.dims)) for x in states},
    }
    info = inspect_file(folder / f"{name}.onnx")
    types = {"float": "FP32", "float16": "FP16", "int64": "INT64", "int32": "INT32"}
    sizes = {"sequence": -1, "capacity": 32}
    assert found == {
        x["name"]: (types[x["dtype"]], [sizes.get(d, d) for d in x["shape"][1:]])
        for x in (*info["inputs"], *info["outputs"])
    }
    assert all(dim != 0 for x in config.input for dim in x.dims)  # Triton wants no empty dims


def test_a_cache_is_implicit_state_and_a_graph_without_one_is_batched(folder, tmp_path):
    write(folder / "cached.onnx", tmp_path / "c", max_batch=3)
    config = read_config(tmp_path / "c" / "cached_cpu")
    assert config.sequence_batching.oldest.max_candidate_sequences == 3
    assert not config.sequence_batching.control_input
    assert [(s.input_name, s.output_name) for s in config.sequence_batching.state] == [
        ("past_key_values.0.key", "present.0.key"),
        ("past_key_values.0.value", "present.0.value"),
    ]
    for state in config.sequence_batching.state:
        assert state.use_same_buffer_for_input_output
        assert list(state.dims) == [1, 32, 16]
    assert not config.HasField("dynamic_batching")
    write(folder / "plain.onnx", tmp_path / "p")
    config = read_config(tmp_path / "p" / "plain_cpu")
    assert config.HasField("dynamic_batching")
    assert not config.HasField("sequence_batching")


def test_triton_pairs_states_in_the_order_of_their_names(folder):
    """It looks for an output's input at the same place of two maps that are sorted by name."""
    names = [f"past_key_values.{i}.{kind}" for i in range(30) for kind in ("key", "value")]
    paired = {name: name.replace("past_key_values", "present") for name in names}
    assert [paired[name] for name in sorted(names)] == sorted(paired.values())


# The client, against the stand-in


def test_the_client_finds_that_caches_are_kept_and_that_they_are_lost(folder, tmp_path):
    repository = tmp_path / "r"
    write(folder / "cached.onnx", repository)
    with serve(repository, "cached_cpu") as address:
        done = run_client(repository, address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok   cached_cpu in two steps: differs by ")
    with serve(repository, "cached_cpu", forgetful=True) as address:
        done = run_client(repository, address)
    assert done.returncode == 1
    assert done.stdout.startswith("FAIL cached_cpu in two steps")


def test_the_client_compares_the_engine_with_the_cpu(folder, tmp_path, plugin):
    repository, model = tmp_path / "r", folder / "plain.onnx"
    plan = fake_plan(tmp_path / "t4.plan", model, plugin)
    write(model, repository, plans=[str(plan)], name="m")
    with serve(repository, "m", "m_cpu") as address:
        done = run_client(repository, address)
    assert done.returncode == 0, done.stderr
    lines = [line.partition(": ")[0] for line in done.stdout.splitlines()]
    assert lines == ["ok   m padded", "ok   m_cpu padded", "ok   m against m_cpu"]
    with serve(repository, "m_cpu") as address:
        done = run_client(repository, address)
    assert done.returncode == 1
    assert "not all models are ready" in done.stderr


@pytest.mark.parametrize(
    ("model", "auto", "cache"),
    [
        (DECODERS["deepseek_v3"][:2], "AutoModelForCausalLM", "static"),
        (("BertConfig", {}), "AutoModel", "none"),
    ],
    ids=["deepseek_v3", "bert"],
)
def test_the_client_sends_tokens(model, auto, cache, tmp_path):
    """Language models: several layers of caches, and a mask of padding."""
    source = HuggingFaceSource.from_model(make(*model, auto), "m")
    with source.traceable(cache) as exportable:
        exported = onnx_export.export(exportable, tmp_path / "m.onnx").path
    write(exported, tmp_path / "r", capacity=16)
    with serve(tmp_path / "r", "m_cpu") as address:
        done = run_client(tmp_path / "r", address)
    assert done.returncode == 0, done.stderr or done.stdout


def test_the_client_says_when_nobody_answers(folder, tmp_path):
    write(folder / "plain.onnx", tmp_path / "r")
    done = run_client(tmp_path / "r", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("FAIL 127.0.0.1:1: ")


# Engines


def test_engines_are_named_by_their_compute_capability(folder, tmp_path, plugin):
    model, repository = folder / "plain.onnx", tmp_path / "r"
    t4 = fake_plan(tmp_path / "t4.plan", model, plugin)
    new = fake_plan(tmp_path / "new.plan", model, plugin, record=False)
    manifest = write(model, repository, plans=[str(t4), f"12.0={new}"])
    config = read_config(repository / "plain")
    assert config.backend == "tensorrt"
    files = {"7.5": "model_cc75.plan", "12.0": "model_cc120.plan"}
    assert dict(config.cc_model_filenames) == files
    assert [g.Kind.Name(g.kind) for g in config.instance_group] == ["KIND_GPU"]
    assert config.max_batch_size == 4  # the engine's profile
    for file in files.values():
        assert (repository / "plain" / "1" / file).is_file()
    assert (repository / "plain" / "1" / "model_cc75.plan.json").is_file()
    assert (repository / "libfastmqa_trt.so").read_bytes() == b"a plugin"
    start = (repository / "start.sh").read_text()
    assert '--backend-config=tensorrt,plugins="$here"/libfastmqa_trt.so' in start
    assert manifest["models"] == {"plain": "tensorrt", "plain_cpu": "onnxruntime"}
    text = describe(manifest, repository)
    assert "engines for SM75, SM120; the server's TensorRT must be 10.14.1.48\n" in text


def test_the_start_script_gives_triton_its_arguments(folder, tmp_path, plugin):
    model, repository = folder / "plain.onnx", tmp_path / "a folder"
    plan = fake_plan(tmp_path / "t4.plan", model, plugin)
    write(model, repository, plans=[str(plan)])
    triton = tmp_path / "bin" / "tritonserver"
    triton.parent.mkdir()
    triton.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    triton.chmod(0o755)
    command = [repository / "start.sh", "--http-port=80"]
    environment = {"PATH": f"{triton.parent}:/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == [
        f"--model-repository={repository}",
        f"--backend-config=tensorrt,plugins={repository}/libfastmqa_trt.so",
        "--http-port=80",
    ]


def test_a_version_compatible_engine_holds_its_plugin(folder, tmp_path, plugin):
    model, repository = folder / "plain.onnx", tmp_path / "r"
    plan = fake_plan(tmp_path / "t4.plan", model, plugin, version_compatible=True)
    manifest = write(model, repository, plans=[str(plan)])
    assert not (repository / "libfastmqa_trt.so").exists()
    start = (repository / "start.sh").read_text()
    assert "--backend-config=tensorrt,version-compatible=true" in start
    assert "plugins=" not in start
    assert "must be 10.14.1.48 or later" in describe(manifest, repository)


def test_bfloat16_has_no_cpu_variant(folder, tmp_path, plugin):
    model = folder / "bfloat16.onnx"
    with pytest.raises(ConfigError, match="onnxruntime cannot multiply on the CPU; give engines"):
        write(model, tmp_path / "r")
    plan = fake_plan(tmp_path / "a10.plan", model, plugin, sms=(86,))
    manifest = write(model, tmp_path / "r", plans=[str(plan)])
    assert list(manifest["models"]) == ["bfloat16"]


def test_an_engine_with_a_cache_is_refused(folder, tmp_path, plugin):
    plan = fake_plan(tmp_path / "t4.plan", folder / "cached.onnx", plugin)
    with pytest.raises(EngineError, match="past and present must lie at one address") as error:
        write(folder / "cached.onnx", tmp_path / "r", plans=[str(plan)])
    assert "--cache none" in str(error.value)
    assert not (tmp_path / "r").exists()


def test_engines_without_a_plugin_need_none(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(plugins.TRT_VARIABLE, "/nowhere.so")
    model = folder / "plain.onnx"
    plan = fake_plan(tmp_path / "t4.plan", model, model, plugins={})
    manifest = write(model, tmp_path / "r", plans=[str(plan)])
    assert manifest["plugin"] is None


REFUSED_PLANS = {
    "two_of_one_gpu": ({}, {}, "are both for SM75; give one of them"),
    "two_tensorrts": (
        {},
        dict(sms=(86,), version=(10, 15, 0, 1)),
        "10.15.0.1; a server has one TensorRT",
    ),
    "another_model": (dict(model={"m.onnx": "0"}), None, "is stale"),
    "another_plugin": (dict(plugins={"p.so": "0"}), None, "was built with another plugin"),
    "rtx": (dict(tag=b"vtrt"), None, "Triton has no backend for"),
    "no_engine": (dict(tag=b"PK\3\4"), None, r"it begins with b'PK\x03\x04'"),
    "no_record": (dict(record=False), None, "give its compute capability, as in 7.5="),
    "several_sms": (dict(sms=(75, 86)), None, "for SM75, SM86; say which"),
}


@pytest.mark.parametrize("case", REFUSED_PLANS)
def test_engines_that_cannot_be_served(case, folder, tmp_path, plugin):
    first, second, message = REFUSED_PLANS[case]
    model = folder / "plain.onnx"
    given = [
        fake_plan(tmp_path / f"{i}.plan", model, plugin, **changes)
        for i, changes in enumerate((first, second))
        if changes is not None
    ]
    with pytest.raises((ConfigError, EngineError)) as error:
        write(model, tmp_path / "r", plans=list(map(str, given)))
    assert message in str(error.value)
    assert not (tmp_path / "r").exists()


def test_a_compute_capability_that_the_engine_is_not_for(folder, tmp_path, plugin):
    plan = fake_plan(tmp_path / "t4.plan", folder / "plain.onnx", plugin)
    with pytest.raises(ConfigError, match="the engine is for SM75, not for SM86"):
        write(folder / "plain.onnx", tmp_path / "r", plans=[f"8.6={plan}"])


def test_a_batch_that_the_engine_does_not_take(folder, tmp_path, plugin):
    plan = fake_plan(tmp_path / "t4.plan", folder / "plain.onnx", plugin)
    with pytest.raises(ConfigError, match="--max-batch 5 is more than the engines' 4"):
        write(
            folder / "plain.onnx",
            tmp_path / "r",
            plans=[str(plan)],
            max_batch=5,
        )


# Files


def test_weights_beside_the_model_are_taken_along(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "INLINE_WEIGHTS_BYTES", 1000)
    model = export(tmp_path / "big.onnx")
    repository = tmp_path / "r"
    write(model, repository, name="m")
    copied = repository / "m_cpu" / "1" / "big.onnx.data"
    assert copied.read_bytes() == (tmp_path / "big.onnx.data").read_bytes()
    assert copied.samefile(tmp_path / "big.onnx.data")  # a link: no second copy on the disk
    with serve(repository, "m_cpu") as address:
        assert run_client(repository, address).returncode == 0


def test_a_copy_where_there_are_no_links(folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    write(folder / "plain.onnx", tmp_path / "r")
    copied = tmp_path / "r" / "plain_cpu" / "1" / "model.onnx"
    assert copied.read_bytes() == (folder / "plain.onnx").read_bytes()
    assert not copied.samefile(folder / "plain.onnx")


def test_only_a_bundle_is_replaced_and_only_by_force(folder, tmp_path):
    target = tmp_path / "r"
    target.mkdir()
    write(folder / "plain.onnx", target)  # empty: nothing is lost
    with pytest.raises(OutputError, match="holds a bundle already; replace it with --force"):
        write(folder / "cached.onnx", target)
    write(folder / "cached.onnx", target, force=True)
    assert sorted(x.name for x in target.iterdir()) == [
        "bundle.json",
        "cached_cpu",
        "client.py",
        "start.sh",
    ]
    (target / "bundle.json").write_text("[]")
    with pytest.raises(OutputError, match="holds other files; choose an empty or a new folder"):
        write(folder / "plain.onnx", target, force=True)
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_leaves_the_old_bundle(folder, tmp_path, monkeypatch):
    target = tmp_path / "r"
    write(folder / "plain.onnx", target)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "place", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write(folder / "cached.onnx", target, force=True)
    assert (target / "plain_cpu" / "1" / "model.onnx").is_file()
    assert list(tmp_path.iterdir()) == [target]


# Other bad input


def test_a_file_in_the_way(folder, tmp_path):
    (tmp_path / "r").touch()
    with pytest.raises(OutputError, match="it is a file; choose another name"):
        write(folder / "plain.onnx", tmp_path / "r")


def test_a_name_that_is_no_folder(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"'\.\./m' is no name for a folder"):
        write(folder / "plain.onnx", tmp_path / "r", name="../m")


def changed(source: Path, path: Path, change) -> Path:
    model = onnx.load(source)
    change(model)
    onnx.save(model, path)
    return path


def other_input(model):
    model.graph.input.append(onnx.helper.make_tensor_value_info("bias", 1, ["batch", 3]))


def fixed_batch(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def other_type(model):
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE


def no_attention(model):
    (node,) = (n for n in model.graph.node if n.op_type == "FusedAttention")
    model.graph.node.remove(node)


def weights_elsewhere(model):
    tensor = model.graph.initializer.add(name="w", data_type=1, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../w")


REFUSED_MODELS = {
    other_input: "served are files with one output, and beside the sequence only attention_mask",
    fixed_batch: "whose first dimension is `batch`",
    other_type: "hidden_states of m.onnx is double",
    no_attention: "it has no FusedAttention node",
    weights_elsewhere: "keeps weights in ../w, not beside it",
}


@pytest.mark.parametrize("change", REFUSED_MODELS)
def test_files_that_cannot_be_served(change, folder, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "w").write_bytes(b"1234")
    model = changed(folder / "plain.onnx", tmp_path / "in" / "m.onnx", change)
    with pytest.raises(ModelFileError) as error:
        write(model, tmp_path / "r")
    assert REFUSED_MODELS[change] in str(error.value)


def test_the_command(runner, folder, tmp_path):
    from fastmqa_export.cli import main

    arguments = ["bundle", str(folder / "cached.onnx"), "-o", str(tmp_path / "r")]
    result = runner.invoke(main, [*arguments, "--capacity", "64"])
    assert result.exit_code == 0, result.output
    assert "cached_cpu (onnxruntime)\n8 sequences of 64 tokens at once" in result.stdout
    result = runner.invoke(main, [*arguments, "--force", "--json"])
    assert json.loads(result.stdout)["models"] == {"cached_cpu": "onnxruntime"}
    result = runner.invoke(main, [*arguments, "--plan", str(tmp_path / "gone.plan"), "--force"])
    assert result.exit_code == 1
    assert "gone.plan does not exist; `fastmqa-export build` writes engines" in result.stderr
