# SPDX-License-Identifier: MIT
"""Engine builds: what TensorRT is asked for, when nothing is built, what is found out.

TensorRT itself cannot be installed where these tests run. Its Python module is replaced by
recording/tensorrt.py, which writes down how it is called; that all its names exist is compared with
TensorRT-RTX's module, and tests/test_rtx.py runs the same code with that.
"""

import dataclasses
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import torch

from fastmqa_export import engine
from fastmqa_export.builtin import BuiltinOptions, create
from fastmqa_export.cli import main
from fastmqa_export.engine import build
from fastmqa_export.engine_record import check_engine, read_record, record_path
from fastmqa_export.errors import (
    ConfigError,
    EngineError,
    MissingDependencyError,
    OutputError,
)
from fastmqa_export.inspect_library import FACT_SHEET
from fastmqa_export.pipeline import export_source
from fastmqa_export.progress import Progress
from fastmqa_export.recipe import Recipe, Span

RECORDING = Path(__file__).parent / "recording"


class Recorded:
    """The stand-in: what it is to do, and the calls that it has noted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._file, self._monkeypatch = folder / "calls.jsonl", monkeypatch
        monkeypatch.setenv("RECORDING", str(self._file))
        self.behave()

    def behave(self, **behaviour) -> None:
        self._monkeypatch.setenv("BEHAVIOUR", json.dumps(behaviour))

    def calls(self) -> list[list]:
        """Those since the last time."""
        if not self._file.exists():
            return []
        lines = self._file.read_text(encoding="utf-8").splitlines()
        self._file.unlink()
        return [json.loads(line) for line in lines]


@pytest.fixture
def trt(tmp_path, monkeypatch):
    return pretend_tensorrt(tmp_path, monkeypatch)


def pretend_tensorrt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """TensorRT on a machine with a T4, and a plugin library in the folder."""
    monkeypatch.syspath_prepend(RECORDING)
    monkeypatch.setenv("PYTHONPATH", str(RECORDING))
    monkeypatch.setattr(engine, "device_sm", lambda: 75)
    library = folder / "libfastmqa_trt.so"
    library.write_bytes(b"a plugin")
    monkeypatch.setenv("FASTMQA_TRT_PLUGIN", str(library))
    return Recorded(folder, monkeypatch)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Files with and without a KV cache."""
    folder = tmp_path_factory.mktemp("exports")
    source = create("mqa", BuiltinOptions(hidden=64, heads=4), torch.float16)
    return {
        cache: export_source(source, folder / f"{cache}.onnx", cache).path
        for cache in ("static", "none")
    }


@pytest.fixture(scope="module")
def built_once(exports, tmp_path_factory):
    """A file with a KV cache, its weights beside it, and an engine made from it."""
    folder = tmp_path_factory.mktemp("built")
    loaded, model = onnx.load(exports["static"]), folder / "model.onnx"
    onnx.save(loaded, model, save_as_external_data=True, location="model.data", size_threshold=0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = pretend_tensorrt(folder, monkeypatch)
        build(model, folder / "m.plan", recipe=RECIPE)
        assert calls.calls()
    return folder


@pytest.fixture
def there(trt, built_once, tmp_path):
    """A folder with the file and the engine."""
    shutil.copytree(built_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def model(built_once, tmp_path):
    """The file alone."""
    for name in ("model.onnx", "model.data"):
        shutil.copy(built_once / name, tmp_path)
    return tmp_path / "model.onnx"


RECIPE = Recipe(
    capacity=64,
    prefill_batch=Span(1, 2, 3),
    prefill_sequence=Span(4, 16, 32),
    decode_batch=Span(1, 4, 8),
    workspace_mib=16,
    optimization_level=1,
)


BUILD = "build_serialized_network"

# What TensorRT is asked for


def test_the_stand_in_has_no_name_that_tensorrt_lacks(trt):
    real = pytest.importorskip("tensorrt_rtx", reason="pip install 'fastmqa_export[rtx]'")
    spec = importlib.util.spec_from_file_location("stand_in", RECORDING / "tensorrt.py")
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    public = {
        name: x for name, x in vars(fake).items() if getattr(x, "__module__", "") == "stand_in"
    }
    classes = {name: cls for name, cls in public.items() if inspect.isclass(cls)}
    assert {"Builder", "OnnxParser", "IBuilderConfig"} <= set(classes)
    for name in (name for name in public if not name.startswith("_")):
        assert hasattr(real, name), name
        members = vars(classes[name]) if name in classes else {}
        if name == "ParserError":
            members = vars(fake.ParserError("", "", ""))
        for member in (member for member in members if not member.startswith("_")):
            assert hasattr(getattr(real, name), member), f"{name}.{member}"


def test_what_tensorrt_is_asked_for(trt, model, tmp_path):
    said = []
    progress = Progress(2, quiet=True)
    progress.say = said.append
    built = build(model, tmp_path / "m.plan", recipe=RECIPE, progress=progress)
    library = str(tmp_path / "libfastmqa_trt.so")
    cache = [["batch", 1, 64, 16]] * 2
    prefill = [[1, 4, 64], [2, 16, 64], [3, 32, 64]]
    decode = [[1, 1, 64], [4, 1, 64], [8, 1, 64]]

    def shapes(hidden):
        past = [[batch, 1, 64, 16] for batch, _, _ in hidden]
        yield ["set_shape", "hidden_states", *hidden]
        yield ["set_shape", "position", *([batch] for batch, _, _ in hidden)]
        yield ["set_shape", "past_key_values.0.key", *past]
        yield ["set_shape", "past_key_values.0.value", *past]
        yield ["add_optimization_profile"]

    calls = trt.calls()
    parsed = next(call for call in calls if call[0] == "parse")
    dims = parsed.pop()
    assert [dims[f"past_key_values.0.{name}"] for name in ("key", "value")] == cache
    assert [dims[f"present.0.{name}"] for name in ("key", "value")] == cache
    assert dims["hidden_states"] == ["batch", "sequence", 64]
    assert calls[-1].pop() != os.getpid()
    assert calls == [
        ["load_library", library],
        ["get_creator", "FusedAttention", "1", "fastmqa"],
        ["create_network", 1 << 1],  # strongly typed
        ["parse", str(model)],
        ["set_memory_pool_limit", "WORKSPACE", 16 << 20],
        ["builder_optimization_level", 1],
        ["clear_flag", "TF32"],
        *shapes(prefill),
        *shapes(decode),
        ["progress_monitor", "Monitor"],
        ["create_timing_cache", ""],
        [BUILD],
    ]
    assert [text for text in said if text.startswith("Timing")] == ["Timing: 1 of 2"]
    assert "parse the model" in said
    assert built.is_new
    assert built.plan.read_bytes() == b"plan of the stand-in"
    assert (tmp_path / "m.plan.timing").read_bytes() == b"timings of the stand-in"
    assert built.record == read_record(built.plan)
    made_from = dataclasses.asdict(built.record.made_from)
    assert list(made_from.pop("model")) == ["model.onnx", "model.data"]
    assert list(made_from.pop("plugins")) == ["libfastmqa_trt.so"]
    assert made_from == {
        "backend": "tensorrt",
        "sms": (75,),
        "capacity": 64,
        "profiles": {
            "prefill": {"batch": (1, 2, 3), "sequence": (4, 16, 32)},
            "decode": {"batch": (1, 4, 8), "sequence": (1, 1, 1)},
        },
        "workspace_mib": 16,
        "optimization_level": 1,
        "version_compatible": False,
    }
    assert built.record.tensorrt == "10.16.1.11"


def test_a_file_without_a_cache_has_one_profile(trt, exports, tmp_path):
    trt.behave(version="10.10.0.31")
    built = build(exports["none"], tmp_path / "m.plan")
    shapes = [call for call in trt.calls() if call[0] == "set_shape"]
    assert [call[1] for call in shapes] == ["hidden_states", "lengths"]
    assert shapes[0][2:] == [[1, 1, 64], [1, 512, 64], [1, 2048, 64]]
    assert list(built.record.made_from.profiles) == ["prefill"]
    assert built.record.made_from.capacity is None


def test_a_version_compatible_engine_carries_the_plugin(trt, model, tmp_path):
    build(model, tmp_path / "m.plan", version_compatible=True)
    calls = trt.calls()
    flag = calls.index(["set_flag", "VERSION_COMPATIBLE"])
    assert calls[flag + 1] == ["plugins_to_serialize", [str(tmp_path / "libfastmqa_trt.so")]]


def test_without_the_plugin_the_functions_are_taken(trt, model, tmp_path):
    trt.behave(taken=0)
    built = build(model, tmp_path / "m.plan", use_plugin=False)
    assert "load_library" not in {call[0] for call in trt.calls()}
    assert built.record.made_from.plugins == {}


def test_kernel_timings_are_used_again(trt, model, tmp_path):
    plan = tmp_path / "m.plan"
    build(model, plan)
    trt.calls()
    build(model, plan, force=True)
    assert ["create_timing_cache", "timings of the stand-in"] in trt.calls()


def test_timings_of_another_gpu_are_left_alone(trt, model, tmp_path):
    (tmp_path / "m.plan.timing").write_bytes(b"of another GPU")
    trt.behave(fresh_timings=True)
    build(model, tmp_path / "m.plan")
    created = [call[1] for call in trt.calls() if call[0] == "create_timing_cache"]
    assert created == ["of another GPU", ""]


# When nothing is built


def change_model(there):
    loaded = onnx.load(there / "model.onnx", load_external_data=False)
    loaded.producer_version = "later"
    onnx.save(loaded, there / "model.onnx")


def change_weights(there):
    weights = (there / "model.data").read_bytes()
    (there / "model.data").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))


CHANGES = {
    "the model": change_model,
    "the weights": change_weights,
    "the plugin": lambda there: (there / "libfastmqa_trt.so").write_bytes(b"another"),
    "the plan's length": lambda there: (there / "m.plan").write_bytes(b"plan of the stand-i"),
    "the plan": lambda there: (there / "m.plan").write_bytes(b"PLAN OF THE STAND-IN"),
    "no plan": lambda there: (there / "m.plan").unlink(),
    "the record": lambda there: (there / "m.plan.json").write_text("{}"),
    "no record": lambda there: (there / "m.plan.json").unlink(),
}
ARGUMENTS = {
    "the capacity": {"recipe": dataclasses.replace(RECIPE, capacity=128)},
    "the workspace": {"recipe": dataclasses.replace(RECIPE, workspace_mib=17)},
    "compatibility": {"version_compatible": True},
    "no plugin": {"use_plugin": False},
    "force": {"force": True},
}


def test_nothing_is_built_if_nothing_changed(trt, there):
    before = {path: path.stat().st_mtime_ns for path in there.iterdir()}
    recipe = dataclasses.replace(RECIPE, gpu="another name")
    built = build(there / "model.onnx", there / "m.plan", recipe=recipe)
    assert trt.calls() == []
    assert not built.is_new
    assert built.record == read_record(there / "m.plan")
    assert {path: path.stat().st_mtime_ns for path in there.iterdir()} == before


@pytest.mark.parametrize("what", [*CHANGES, *ARGUMENTS, "TensorRT"])
def test_an_engine_is_built_again_after_a_change_of(trt, there, what):
    if what in CHANGES:
        CHANGES[what](there)
    if what == "TensorRT":
        trt.behave(version="10.16.2.0")
    if what == "no plugin":
        trt.behave(taken=0)
    arguments = {"recipe": RECIPE, **ARGUMENTS.get(what, {})}
    built = build(there / "model.onnx", there / "m.plan", **arguments)
    assert built.is_new
    assert trt.calls()[-1][0] == BUILD
    assert check_engine(there / "m.plan", there / "model.onnx") == built.record


# What is found out about an engine


def test_an_engine_fits_its_model_whatever_that_is_called(there):
    record = check_engine(there / "m.plan", there / "model.onnx")
    assert record == read_record(there / "m.plan")
    (there / "model.onnx").rename(there / "renamed.onnx")
    assert check_engine(there / "m.plan", there / "renamed.onnx") == record


def test_an_engine_without_a_record_is_taken_as_it_is(there):
    record_path(there / "m.plan").unlink()
    assert check_engine(there / "m.plan", there / "model.onnx") is None


UNFIT = {
    "plan removed": (lambda f: (f / "m.plan").unlink(), r"m\.plan does not exist"),
    "plan is a folder": (
        lambda f: [(f / "m.plan").unlink(), (f / "m.plan").mkdir()],
        r"m\.plan is a folder",
    ),
    "plan empty, no record": (
        lambda f: [(f / "m.plan").write_bytes(b""), (f / "m.plan.json").unlink()],
        r"m\.plan is cut short: 0 bytes; copy it again",
    ),
    "plan cut short": (
        lambda f: (f / "m.plan").write_bytes(b"plan"),
        r"m\.plan is cut short: 4 bytes of 20; copy it again",
    ),
    "plan changed": (
        lambda f: (f / "m.plan").write_bytes(b"PLAN OF THE STAND-IN"),
        r"m\.plan is not the engine that m\.plan\.json describes",
    ),
    "model changed": (
        lambda f: (f / "model.onnx").write_bytes(b"another"),
        r"m\.plan is stale: .*model\.onnx is not what it was built from",
    ),
    "weights changed": (
        lambda f: (f / "model.data").write_bytes(b"others"),
        r"m\.plan is stale: .*model\.data is not what it was built from",
    ),
    "weights removed": (lambda f: (f / "model.data").unlink(), r"m\.plan is stale: .*model\.data"),
    "record of a later version": (
        lambda f: (f / "m.plan.json").write_text('{"format": 2}'),
        r"m\.plan\.json has another format than 1; install a newer",
    ),
    "record without a key": (
        lambda f: (f / "m.plan.json").write_text('{"format": 1}'),
        r"m\.plan\.json is no record of an engine \(KeyError: 'made_from'\); delete it",
    ),
    "record is no JSON": (
        lambda f: (f / "m.plan.json").write_text("{"),
        r"m\.plan\.json is no record of an engine \(JSONDecodeError",
    ),
    "record is a list": (
        lambda f: (f / "m.plan.json").write_text("[]"),
        r"m\.plan\.json is no record of an engine",
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_an_engine_that_does_not_fit_is_found_out(there, what):
    damage, message = UNFIT[what]
    damage(there)
    with pytest.raises(EngineError, match=message):
        check_engine(there / "m.plan", there / "model.onnx")


# What TensorRT refuses


FAILURES = {
    "too old for the plugin": (
        {"version": "10.9.0.34"},
        MissingDependencyError,
        r"TensorRT is 10\.9\.0\.34; engines with the plugin need 10\.10 or newer",
    ),
    "too old for the cache": (
        {"version": "10.14.1.48"},
        MissingDependencyError,
        r"a KV cache written in place needs 10\.15 or newer.*--cache none",
    ),
    "no plugin in the library": (
        {"creator": False},
        EngineError,
        r"10\.16\.1\.11 finds no fastmqa::FusedAttention in .*libfastmqa_trt\.so; build the plugin "
        "anew",
    ),
    "plugin passed over": (
        {"taken": 0},
        EngineError,
        r"took the plugin for 0 of 1 FusedAttention nodes.*--no-plugin",
    ),
    "parser": (
        {"parser_errors": [["Foo", "node_7", "Plugin not found, are the name ... correct?"]]},
        EngineError,
        r"cannot parse .*model\.onnx: Foo node 'node_7': Plugin not found.*→ neither a plugin",
    ),
    "out of memory": (
        {"end": "none", "log": ["Requested amount of GPU memory: out of memory"]},
        EngineError,
        r"TensorRT cannot build the engine: Requested amount.*→ close other programs",
    ),
    "out of host memory": (
        {"end": "none", "log": ["Unexpected exception std::bad_alloc"]},
        EngineError,
        r"→ the machine, not the GPU, ran out of memory",
    ),
    "workspace": (
        {"end": "none", "log": ["Tactic Selection: no tactics within workspace limit."]},
        EngineError,
        r"→ lower --max-batch or --max-sequence, or give a recipe with a larger workspace_mib",
    ),
    "driver": (
        {"end": "none", "log": ["x (cudaError 35: CUDA driver version is insufficient)"]},
        EngineError,
        r"→ TensorRT builds on the GPU that it builds for",
    ),
    "library": (
        {"creator": False, "log_load": ["libx.so.3: cannot open shared object file"]},
        EngineError,
        r"finds no fastmqa::FusedAttention .* headers of this TensorRT: libx\.so\.3: cannot open",
    ),
    "something new": (
        {"end": "none", "log": ["something new"]},
        EngineError,
        r"^TensorRT cannot build the engine: something new$",
    ),
    "full disk": ({"end": "full disk"}, OutputError, r"the disk is full"),
    "abort": (
        {"end": "abort"},
        EngineError,
        r"was ended by SIGABRT while it was at: Timing: 1 of 2.*terminate called after",
    ),
    "killed": (
        {"end": "kill"},
        EngineError,
        r"was ended by SIGKILL.*→ most likely the system ran out of memory",
    ),
    "defect": ({"end": "exception"}, EngineError, r"ended with 1 .*ValueError: a defect of ours"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_is_explained_and_leaves_what_was_there(trt, there, what):
    behaviour, error, message = FAILURES[what]
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    trt.behave(**behaviour)
    with pytest.raises(error) as caught:
        build(there / "model.onnx", there / "m.plan", recipe=RECIPE, force=True)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    trt.calls()
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("compiled", ["10.14.1", "11.4.0"])
def test_a_plugin_of_another_major_is_refused(trt, model, tmp_path, compiled):
    code = f"""const char facts[] __attribute__((section("{FACT_SHEET}"), used)) =
        "{{\\"tensorrt\\": \\"{compiled}\\"}}";"""
    library = tmp_path / "libfastmqa_trt.so"
    command = ["cc", "-shared", "-xc", "-", "-o", library]
    subprocess.run(command, input=code, text=True, check=True)
    if compiled.startswith("10."):
        assert build(model, tmp_path / "m.plan").is_new
        return
    with pytest.raises(
        EngineError, match=r"was compiled for TensorRT 11\.4\.0, and this is 10\.16"
    ):
        build(model, tmp_path / "m.plan")


def test_an_interrupt_ends_the_builder(trt, model, tmp_path):
    trt.behave(end="sleep")
    progress = Progress(2, quiet=True)

    def interrupt(text):
        if text.startswith("Timing"):
            raise KeyboardInterrupt

    progress.say = interrupt
    with pytest.raises(KeyboardInterrupt):
        build(model, tmp_path / "out" / "m.plan", progress=progress)
    pid = trt.calls()[-1][1]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_builder_that_nobody_waits_for_ends(trt, model, tmp_path):
    """As when the system kills the command, which then cannot end what it has started."""
    trt.behave(end="steps")
    code = (
        "import sys; from pathlib import Path; from fastmqa_export import engine\n"
        "engine.device_sm = lambda: 75\n"
        "engine.build(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "m.plan")]
    with subprocess.Popen(command) as process:
        pid = wait_for(lambda: dict(c for c in trt.calls() if len(c) == 2).get(BUILD))
        process.kill()
    status = Path(f"/proc/{pid}/status")
    wait_for(lambda: not status.exists() or "State:\tZ" in status.read_text())


def wait_for(condition, seconds=30):
    """What the condition gives, as soon as that is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


# Bad input


def test_the_command_builds_and_says_what(runner, trt, model, tmp_path):
    arguments = ["build", str(model), "-o", str(tmp_path / "m.plan"), "--recipe", "t4"]
    arguments += ["--max-batch", "2", "--capacity", "256"]
    result = runner.invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"{tmp_path / 'm.plan'}: built, 20 bytes, tensorrt 10.16.1.11, for SM75",
        "KV cache: 256 tokens",
        "prefill: batch 1 to 2, sequence 1 to 256, tuned for 1 × 256",
        "decode: batch 1 to 2, sequence 1 to 1, tuned for 2 × 1",
    ]
    assert "[2/2] build " in result.stderr
    result = runner.invoke(main, [*arguments, "--json"])
    assert result.stderr == ""
    info = json.loads(result.stdout)
    assert info["is_new"] is False
    assert info["made_from"]["capacity"] == 256
    assert "up to date" in runner.invoke(main, arguments).stdout


MODEL, TRT, RTX = "MODEL", ["--backend", "tensorrt"], ["--backend", "tensorrt-rtx", "--sm", "86"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none.onnx", *RTX], 2, "none.onnx does not exist; give an .onnx file"),
        (["m.plan", *RTX], 2, "m.plan"),
        ([MODEL, "-o", "m.txt", *RTX], 2, "m.txt ends in neither .plan nor .engine"),
        ([MODEL, "--backend", "onnx"], 2, "'onnx' is not one of 'tensorrt', 'tensorrt-rtx'"),
        ([MODEL, *TRT, "--sm", "75"], 2, "--sm is given, but the backend tensorrt builds for"),
        ([MODEL, *RTX, "--version-compatible"], 2, "--version-compatible is given, but only"),
        ([MODEL, "--backend", "tensorrt-rtx"], 2, "give --sm, for example --sm 75 --sm 86"),
        ([MODEL, *TRT, "--recipe", "a10"], 2, "NVIDIA A10 (SM86), and this GPU is SM75"),
        ([MODEL, *RTX, "--recipe", "v100"], 2, "no recipe named v100; there are a10, a100"),
        ([MODEL, *RTX, "--recipe", "bad.toml"], 2, "unknown key bacth; a recipe may have"),
        ([MODEL, *RTX, "--recipe", "float32.toml"], 2, "is of float16, and the recipe for"),
        ([MODEL, *RTX, "--recipe", "small.toml"], 2, "do not fit in the 0.001 GB of any; lower"),
        ([MODEL, *RTX, "--recipe", "wide.toml"], 2, "decode_batch = [4, 1, 8] is [min, opt, max]"),
        ([MODEL, *RTX, "--max-batch", "0"], 2, "Invalid value for '--max-batch'"),
        ([MODEL, *RTX, "--max-sequence", "4096"], 2, "up to 4096 tokens, and the KV cache holds"),
        (["names.onnx", *RTX], 2, "dimension 'tokens' of hidden_states is not known"),
        (["later.onnx", *RTX], 2, "unknown feature bits 0x100: made by a later version"),
        (["weightless.onnx", *RTX], 2, "weights file model.data is missing beside the model"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_bad_input_is_refused(
    runner, trt, model, exports, tmp_path, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    recipes = {
        "bad": "bacth = 1",
        "float32": 'dtypes = ["float32"]',
        "small": "memory_gb = 0.001\nworkspace_mib = 1",
        "wide": "decode_batch = [4, 1, 8]",
    }
    for name, text in recipes.items():
        Path(f"{name}.toml").write_text(text, encoding="utf-8")
    loaded = onnx.load(exports["static"])
    loaded.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "tokens"
    onnx.save(loaded, "names.onnx")
    loaded = onnx.load(exports["static"])
    node = next(node for node in loaded.graph.node if node.op_type == "FusedAttention")
    next(a for a in node.attribute if a.name == "features").i |= 0x100
    onnx.save(loaded, "later.onnx")
    Path("away").mkdir()
    shutil.copy(model, "away/weightless.onnx")
    arguments = [str(model) if x == MODEL else x for x in arguments]
    arguments = [f"away/{x}" if x == "weightless.onnx" else x for x in arguments]
    output = [] if "-o" in arguments else ["-o", "out/m.plan"]
    result = runner.invoke(main, ["build", *arguments, *output])
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
    assert not Path("out").exists()
    assert trt.calls() == []


def test_what_is_not_installed_is_named(runner, model, tmp_path, monkeypatch):
    arguments = ["build", str(model), "-o", str(tmp_path / "m.plan")]
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    result = runner.invoke(main, arguments)
    assert result.exit_code == 3
    assert "tensorrt is not installed; pip install 'fastmqa_export[tensorrt]'" in result.stderr
    result = runner.invoke(main, [*arguments, "--backend", "tensorrt-rtx", "--sm", "75"])
    assert result.exit_code == 3
    assert "tensorrt_rtx is not installed; pip install 'fastmqa_export[rtx]'" in result.stderr


def test_a_missing_plugin_is_named_before_anything_is_built(trt, model, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMQA_TRT_PLUGIN", str(tmp_path / "none.so"))
    with pytest.raises(MissingDependencyError, match=r"none\.so, which is no file"):
        build(model, tmp_path / "m.plan")
    assert trt.calls() == []


def test_without_a_gpu_tensorrt_is_not_even_asked(trt, model, tmp_path, monkeypatch):
    monkeypatch.undo()  # the pretended GPU
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match=r"finds no CUDA device here.*--backend tensorrt-rtx"):
        engine.device_sm()


def test_a_module_that_cannot_be_loaded_is_named(trt, model, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tensorrt.py").write_text('raise ImportError("libnvinfer.so.10 is missing")')
    monkeypatch.setenv("PYTHONPATH", str(broken))
    with pytest.raises(MissingDependencyError, match=r"TensorRT cannot be imported \(libnvinfer"):
        build(model, tmp_path / "m.plan")


def test_an_unknown_backend_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="backend is cuda; it must be one of tensorrt, tensorrt-"):
        build(model, tmp_path / "m.plan", backend="cuda")
