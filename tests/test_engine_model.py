# SPDX-License-Identifier: MIT
"""An engine is loaded, bound and run as TensorRT asks, and its cache stays in place.

TensorRT is not at hand: `fake_tensorrt` stands for it, which runs the file on the memory that is
bound. That it has no name that TensorRT lacks is tested with the real module `tensorrt_lean`.
"""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import fake_tensorrt
import numpy as np
import onnx
import pytest
import torch

from fastmqa_export import engine_session, plugins
from fastmqa_export.builtin import BuiltinOptions, create
from fastmqa_export.cli import main
from fastmqa_export.compare import ONNXRUNTIME, compare
from fastmqa_export.engine_model import EngineModel, EngineOneShot, engine_model
from fastmqa_export.engine_record import EngineRecord, Ingredients, digest, record_path
from fastmqa_export.engine_session import EngineSession
from fastmqa_export.errors import ConfigError, EngineError, MissingDependencyError
from fastmqa_export.inspect import fused_nodes
from fastmqa_export.pipeline import export_source
from fastmqa_export.runtime import OnnxModel, OnnxOneShot, create_session, generate

KEY = "past_key_values.0.key"
CAPACITY = 48
PREFILL = {"batch": (1, 2), "sequence": (1, 16)}
DECODE = {"batch": (1, 4), "sequence": (1, 1)}


@pytest.fixture(autouse=True)
def tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    fake_tensorrt.reset()
    return fake_tensorrt


def source(dtype: torch.dtype = torch.float32):
    return create("mqa", BuiltinOptions(hidden=32, heads=4), dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def files(folder):
    """The exported file of each dtype, with and without a cache."""
    made = {}
    for dtype, cache in [("float32", "static"), ("float16", "static"), ("float32", "none")]:
        path = folder / f"{dtype}_{cache}.onnx"
        export_source(source(getattr(torch, dtype)), path, cache)
        made[dtype, cache] = path
    return made


@pytest.fixture
def plan(files, tmp_path):
    def write(profiles=(PREFILL, DECODE), dtype="float32", cache="static", **options):
        capacity = options.pop("capacity", CAPACITY if cache == "static" else None)
        path = tmp_path / "model.plan"
        return fake_tensorrt.write_plan(
            path, files[dtype, cache], capacity, list(profiles), **options
        )

    return write


def load(path, **options) -> EngineModel | EngineOneShot:
    return engine_model(EngineSession(path, device="cpu", **options))


def write_record(plan: Path, model: Path, **ingredients) -> None:
    made_from = Ingredients(
        backend="tensorrt",
        sms=(75,),
        model={model.name: digest(model)},
        capacity=CAPACITY,
        profiles={},
        workspace_mib=1,
        optimization_level=3,
        **{"plugins": {}, "version_compatible": False} | ingredients,
    )
    record = EngineRecord(
        tensorrt="10.15.0.1",
        bytes=plan.stat().st_size,
        sha256=digest(plan),
        made_from=made_from,
    )
    record_path(plan).write_text(record.to_json())


def hidden(batch: int, tokens: int, dtype=np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, tokens, 32)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_steps_give_what_onnxruntime_gives(plan, files, dtype):
    ours = load(plan(dtype=dtype))
    theirs = OnnxModel(create_session(files[dtype, "static"], threads=1))
    for model in (ours, theirs):
        model.reset(2, CAPACITY)
    for tokens, counts in [(5, [5, 3]), (1, [1, 1]), (4, [2, 4]), (1, [1, 1])]:
        x = hidden(2, tokens, dtype, seed=tokens)
        y, expected = ours.step(x), theirs.step(x)
        assert y.dtype == expected.dtype
        np.testing.assert_array_equal(y, expected)
        ours.advance(counts)
        theirs.advance(counts)
    np.testing.assert_array_equal(ours.position, [9, 9])
    for name in theirs.cache_names:
        capacity = min(ours.capacity, theirs.capacity)
        cached = ours.cache(name)
        np.testing.assert_array_equal(cached[:, :, :capacity], theirs.cache(name)[:, :, :capacity])
        assert cached.any()


def test_the_cache_stays_where_it_is(plan):
    model = load(plan())
    model.reset(2)
    address = model.buffer_address(KEY)
    model.step(hidden(2, 3))
    before = model.cache(KEY)
    model.advance(3)
    model.step(hidden(2, 1))
    assert model.buffer_address(KEY) == address
    np.testing.assert_array_equal(model.cache(KEY)[:, :, :3], before[:, :, :3])
    assert not model.cache(KEY)[:, :, 4:].any()
    model.reset(2)
    assert model.buffer_address(KEY) == address
    assert not model.cache(KEY).any()


def test_prefill_and_decode_take_their_profiles(plan, tensorrt):
    model = load(plan())
    model.step(hidden(1, 5))
    model.advance(5)
    model.step(hidden(1, 1))
    assert [profile for profile, _ in tensorrt.calls] == [0, 1]


def test_more_sequences_than_a_profile_takes_are_run_in_parts(plan, tensorrt):
    x = hidden(5, 7)
    model = load(plan([{**PREFILL, "batch": (1, 8)}]))
    model.reset(5)
    whole, cache = model.step(x), model.cache(KEY)
    tensorrt.calls.clear()
    model = load(plan())
    model.reset(5)
    np.testing.assert_array_equal(model.step(x), whole)
    np.testing.assert_array_equal(model.cache(KEY), cache)
    assert [shapes["position"] for _, shapes in tensorrt.calls] == [(1,), (2,), (2,)]


def test_generate_takes_an_engine(plan, files):
    class Logits:
        """The file's output as logits, of embeddings of tokens."""

        def __init__(self, model):
            self.model, self.table = model, hidden(1, 64)[0]
            self.reset, self.advance = model.reset, model.advance

        def step(self, tokens):
            return self.model.step(self.table[tokens]) @ self.table.T

    prompts = [[3, 1, 4, 1, 5], [9, 2], [6]]
    expected = generate(
        Logits(OnnxModel(create_session(files["float32", "static"], threads=1))), prompts, 12
    )
    assert generate(Logits(load(plan())), prompts, 12) == expected
    assert len({token for new in expected for token in new}) > 3


def test_a_full_cache_is_refused(plan):
    model = load(plan(capacity=10))
    model.step(hidden(1, 9))
    model.advance(9)
    with pytest.raises(ConfigError, match=r"11 tokens do not fit .* holds 10 .*--capacity 11 or"):
        model.step(hidden(1, 2))
    model.step(hidden(1, 1))
    with pytest.raises(ConfigError, match="11 tokens do not fit"):
        model.reset(1, 11)


def test_what_fits_in_no_profile_is_refused(plan):
    model = load(plan([{"batch": (2, 4), "sequence": (2, 8)}]))
    model.reset(3)
    with pytest.raises(ConfigError, match=r"3 sequences of 9 tokens .* from \(2, 2\) to \(4, 8\)"):
        model.step(hidden(3, 9))
    with pytest.raises(ConfigError, match="3 sequences of 1 tokens fit in no profile"):
        model.step(hidden(3, 1))
    model.reset(1)
    with pytest.raises(ConfigError, match="1 sequences of 8 tokens fit in no profile"):
        model.step(hidden(1, 8))
    with pytest.raises(ConfigError, match=r"2 sequences given to a cache of 1; call reset\(\)"):
        model.step(hidden(2, 8))


def test_parts_that_cannot_be_bound_are_refused(plan):
    model = load(plan(capacity=9))
    model.reset(3)
    with pytest.raises(ConfigError, match=r"is 288 bytes, .* multiples of 256: build the engine"):
        model.step(hidden(3, 2))


def test_an_engine_without_a_cache(plan, files):
    model = load(plan([PREFILL], cache="none"))
    assert isinstance(model, EngineOneShot)
    x, lengths = hidden(3, 8), np.array([8, 2, 5], np.int32)
    expected = OnnxOneShot(create_session(files["float32", "none"], threads=1)).run(x, lengths)
    y = model.run(x, lengths)
    for row, expected_row, length in zip(y, expected, lengths, strict=True):
        np.testing.assert_array_equal(row[:length], expected_row[:length])
    assert model.takes(3, 1, 16) and not model.takes(3, 1, 17)
    with pytest.raises(ConfigError, match="3 sequences of 17 tokens fit in no profile"):
        model.run(hidden(3, 17), lengths)


@pytest.mark.parametrize(
    ("profiles", "cache", "cases"),
    [
        pytest.param([PREFILL, DECODE], "static", 6, id="cache"),
        pytest.param([PREFILL], "none", 6, id="one shot"),
    ],
)
def test_an_engine_is_a_third_column(plan, files, profiles, cache, cases):
    said = []
    others = {"engine": load(plan(profiles, cache=cache))}
    path = files["float32", cache]
    comparison = compare(source(), path, others=others, threads=1, progress=said.append)
    assert comparison.passed, comparison.reasons
    rows = {(row.runtime, row.output): row for row in comparison.outputs}
    ours = {output: row for (runtime, output), row in rows.items() if runtime == "engine"}
    assert len(ours) == (3 if cache == "static" else 1) == len(rows) / 2
    for output, row in ours.items():
        theirs = rows[ONNXRUNTIME, output]
        assert (row.cases, theirs.cases) == (cases, 7)
        assert 0 < row.max_abs <= theirs.max_abs
    assert list(comparison.distribution) == ["PyTorch, same dtype", ONNXRUNTIME, "engine"]
    assert "6 cases in engine; no room for the cache grows" in said


def test_a_wrong_engine_fails_by_name(plan, files, tmp_path):
    other = onnx.load(files["float32", "static"])
    (node,) = fused_nodes(other)
    next(a for a in node.attribute if a.name == "scale").f *= 1.01
    onnx.save(other, tmp_path / "other.onnx")
    path = fake_tensorrt.write_plan(
        tmp_path / "x.plan", tmp_path / "other.onnx", CAPACITY, [PREFILL]
    )
    comparison = compare(source(), files["float32", "static"], others={"engine": load(path)})
    assert [reason.split(":")[0] for reason in comparison.reasons] == ["engine, output"]
    wrong = {(row.runtime, row.output) for row in comparison.outputs if not row.passed}
    assert wrong == {("engine", "output")}


def test_an_engine_that_takes_no_case_is_refused(plan, files):
    small = load(plan([{"batch": (1, 1), "sequence": (40, 48)}]))
    with pytest.raises(ConfigError, match="engine has room for none of the cases: one token, odd"):
        compare(source(), files["float32", "static"], others={"engine": small})


# Loading


def test_a_plan_beside_its_record_is_checked(plan, files):
    path, model = plan(), files["float32", "static"]
    write_record(path, model)
    load(path, model=model)
    with pytest.raises(EngineError, match=r"is stale: .*float16_static\.onnx is not what"):
        load(path, model=files["float16", "static"])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(EngineError, match=r"model\.plan is cut short: \d+ bytes of \d+"):
        load(path)
    with pytest.raises(EngineError, match=r"gone\.plan does not exist"):
        load(path.with_name("gone.plan"))


REFUSALS = {
    "another GPU": (
        "engine",
        "The engine plan file is generated on an incompatible device, expecting compute 8.6 got "
        "compute 7.5, please rebuild.",
        r"10\.15\.0\.1 refuses .*model\.plan, which version 10\.15\.0\.1 built: .*expecting compute"
        r" 8\.6.*\n→ an engine runs on the kind of GPU that built it",
    ),
    "another version": (
        "engine",
        "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does "
        "not match. Note: Current Version: 240, Serialized Engine Version: 239",
        r"\n→ an engine runs in the version that built it: install that version",
    ),
    "no plugin": (
        "engine",
        "Cannot deserialize plugin since corresponding IPluginCreator not found in Plugin Registry",
        r"\n→ the engine holds layers of a plugin: give its library with --plugin",
    ),
    "no GPU": (
        "runtime",
        "createInferRuntime: Error Code 6: API Usage Error (CUDA initialization failure with "
        "error: 35)",
        r"tensorrt 10\.15\.0\.1 cannot start: .*CUDA initialization failure",
    ),
    "no memory": (
        "context",
        "Requested amount of GPU memory (8589934592 bytes) could not be allocated. OutOfMemory",
        r"no execution context for profile 0 .*\n→ close other programs on the GPU",
    ),
    "not in place": ("alias", "", r"does not write past_key_values\.0\.key in place; build it"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_tensorrt_says_is_told_with_what_to_do(name, plan, tensorrt):
    where, said, message = REFUSALS[name]
    tensorrt.refusals[where] = said
    with pytest.raises(EngineError, match=f"(?s){message}"):
        load(plan())


def test_a_run_that_fails_says_why(plan, tensorrt):
    model = load(plan())
    tensorrt.refusals["run"] = "fastmqa: an illegal memory access was encountered"
    with pytest.raises(EngineError, match=r"model\.plan cannot be run: fastmqa: an illegal memory"):
        model.step(hidden(1, 1))


def test_a_null_runtime_of_the_binding(plan, tensorrt, monkeypatch):
    def null(log):
        log.log(1, "no CUDA-capable device is detected")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(tensorrt, "Runtime", null)
    with pytest.raises(EngineError, match="cannot start: no CUDA-capable device"):
        load(plan())


def test_code_for_the_cpu_runs_only_when_it_is_allowed(plan):
    path = plan(host_code=True)
    with pytest.raises(EngineError, match=r"→ .*if you trust who built it, give --allow-host-code"):
        load(path)
    load(path, allow_host_code=True)


def test_a_dynamic_capacity_is_refused(plan):
    with pytest.raises(EngineError, match=r"the capacity .* is dynamic; build the engine with"):
        load(plan([{**PREFILL, "capacity": (1, 9)}], capacity=None))


def test_a_plan_without_a_cache_is_no_step_model(plan):
    session = EngineSession(plan([PREFILL], cache="none"), device="cpu")
    with pytest.raises(EngineError, match=r"has no KV cache .*--cache static"):
        EngineModel(session)


def test_the_plugin_is_loaded_before_the_engine(plan, files, tmp_path, tensorrt, monkeypatch):
    library = tmp_path / "libfastmqa_trt.so"
    library.write_bytes(b"FusedAttention")
    path = plan()
    load(path)
    assert not tensorrt.registry.creators
    load(path, plugin=library)
    assert tensorrt.registry.creators
    tensorrt.reset()
    write_record(path, files["float32", "static"], plugins={library.name: digest(library)})
    monkeypatch.setenv(plugins.TRT_VARIABLE, str(library))
    load(path)
    assert tensorrt.registry.creators, "found by itself, since the record asks for it"
    tensorrt.reset()
    write_record(
        path,
        files["float32", "static"],
        plugins={library.name: digest(library)},
        version_compatible=True,
    )
    load(path)
    assert not tensorrt.registry.creators, "such an engine carries it"


def test_plugins_that_are_missing_or_none(plan, files, tmp_path, monkeypatch):
    with pytest.raises(MissingDependencyError, match=r"plugin library .*gone\.so does not exist"):
        load(plan(), plugin=tmp_path / "gone.so")
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF")
    with pytest.raises(EngineError, match=r"finds no fastmqa::FusedAttention in .*other\.so"):
        load(plan(), plugin=other)
    path = plan()
    write_record(path, files["float32", "static"], plugins={"libfastmqa_trt.so": "0"})
    monkeypatch.setenv(plugins.TRT_VARIABLE, str(tmp_path / "gone.so"))
    with pytest.raises(MissingDependencyError, match=r"FASTMQA_TRT_PLUGIN is .*gone\.so"):
        load(path)


def test_tensorrt_rtx_takes_no_plugin(tmp_path):
    path = tmp_path / "x.plan"
    path.write_bytes(b"vtrt" + bytes(12) + (28).to_bytes(8, "little") + bytes(4))
    with pytest.raises(ConfigError, match="but tensorrt-rtx takes no plugins; leave it out"):
        load(path, plugin=tmp_path / "x.so")


def test_without_tensorrt_or_a_gpu(plan, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match=r"needs a GPU, and PyTorch finds no CUDA device"):
            EngineSession(plan())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"TensorRT, which runs .*fastmqa_export\[ten"):
        load(plan())


def test_an_engine_of_another_model_is_refused(plan):
    session = EngineSession(plan(), device="cpu")
    with pytest.raises(EngineError, match=r"has inputs .*position.*; one without a cache has a"):
        EngineOneShot(session)


# The command


@pytest.fixture
def on_the_cpu(monkeypatch):
    signature = inspect.signature(EngineSession.__init__)
    default = {**EngineSession.__init__.__kwdefaults__, "device": "cpu"}
    assert set(default) == set(signature.parameters) - {"self", "plan"}
    monkeypatch.setattr(EngineSession.__init__, "__kwdefaults__", default)


def test_the_command_compares_an_engine(runner, plan, files, on_the_cpu):
    model = str(files["float32", "static"])
    command = ["compare", model, "--source", "mqa", "--hidden", "32", "--heads", "4"]
    command += ["--engine", str(plan()), "--threads", "1"]
    result = runner.invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "TensorRT engine, 6 cases" in result.stdout
    assert "onnxruntime (function body), 7 cases" in result.stdout
    assert "verdict: PASS" in result.stdout
    rows = json.loads(runner.invoke(main, [*command, "--json"]).stdout)["accuracy"]
    assert [row["runtime"] for row in rows].count("TensorRT engine") == 3


def test_the_command_tells_what_is_wrong(runner, plan, files, on_the_cpu, tmp_path):
    command = ["compare", str(files["float32", "static"]), "--source", "mqa"]
    result = runner.invoke(main, [*command, "--plugin", "x.so"])
    assert result.exit_code == 2
    assert "--plugin and --allow-host-code are for an --engine" in result.stderr
    result = runner.invoke(main, [*command, "--engine", str(tmp_path / "gone.plan")])
    assert result.exit_code == 1
    assert "gone.plan does not exist; `fastmqa-export build` writes engines" in result.stderr
    gone = ["--plugin", str(tmp_path / "gone.so")]
    result = runner.invoke(main, [*command, "--engine", str(plan()), *gone])
    assert result.exit_code == 3


# The real module


def public(thing) -> list[str]:
    """Names that a class of the fake has, attributes of its instances included."""
    attributes = inspect.getsource(thing).split("self.")[1:]
    names = {text.split(" = ")[0] for text in attributes if " = " in text.split("\n")[0]}
    names |= set(vars(thing))
    return sorted(n for n in names if n.isidentifier() and not n.startswith("_"))


def test_every_name_is_one_of_tensorrts():
    pytest.importorskip("tensorrt_lean", reason="needs tensorrt-lean-cu13")
    fake = fake_tensorrt
    classes = (fake.ILogger, fake.Runtime, fake.ICudaEngine, fake.IExecutionContext)
    wanted = {
        "": ["get_plugin_registry", "__version__"],
        **{thing.__name__: public(thing) for thing in classes},
        **{e.__name__: list(e.__members__) for e in (fake.DataType, fake.TensorIOMode)},
        "IPluginRegistry": ["load_library", "get_creator"],
    }
    assert "set_tensor_address" in wanted["IExecutionContext"]
    assert "engine_host_code_allowed" in wanted["Runtime"]
    assert "num_io_tensors" in wanted["ICudaEngine"]
    assert set(engine_session._DTYPES) == set(wanted["DataType"])
    code = """
import json, sys
import tensorrt_lean as trt
for owner, names in json.load(sys.stdin).items():
    thing = getattr(trt, owner) if owner else trt
    assert not (absent := [n for n in names if not hasattr(thing, n)]), (owner, absent)
"""
    subprocess.run([sys.executable, "-c", code], input=json.dumps(wanted), text=True, check=True)


def test_a_plan_that_is_cut_short_by_tensorrt_rtx(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    path = tmp_path / "x.plan"
    path.write_bytes(b"vtrt" + bytes(200))
    # In a process of its own: the real runtime, which would meet the plugin of other tests.
    code = """
import sys
from pathlib import Path
from fastmqa_export.engine_session import EngineSession
from fastmqa_export.errors import EngineError
try:
    EngineSession(Path(sys.argv[1]), device="cpu")
except EngineError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert "x.plan, which version 0.0.0.0 built: IRuntime::deserializeCudaEngine" in done.stdout
    assert "→ the file is cut short: copy it again, or build it anew" in done.stdout
