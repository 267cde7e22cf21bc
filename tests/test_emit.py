# SPDX-License-Identifier: MIT
"""`kernels emit`: what is written is all that one must know to run the kernels of a case.

`Program` is the few lines that know nothing else. Where the PTX emulator of the developers is at
hand (`import ptxemu`), they run the kernels; everywhere with nvcc they are looked at.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from budgets import assert_within_budget, oracle
from cases import Case

from fastmqa_export import emit, plugins
from fastmqa_export.cli import main
from fastmqa_export.config import OP_INPUTS
from fastmqa_export.errors import ConfigError, KernelError, MissingDependencyError, OutputError
from fastmqa_export.kernels import AttentionParams

SMALL = {
    "B": 1,
    "H": 5,
    "Hkv": 1,
    "S": 1,
    "T": 200,
    "D": 64,
    "V": 64,
    "dtype": "float16",
    "scale": 0.125,
    "is_causal": True,
    "window_left": -1,
    "window_right": -1,
    "softcap": 0.0,
    "softmax_precision": 1,
    "attn_mask": None,
    "kv_lengths": [190],
    "q_start": None,
    "v": True,
    "layout": 1,
    "sm_count": 40,
}
MASKED = SMALL | {
    "H": 4,
    "Hkv": 2,
    "S": 3,
    "T": 19,
    "attn_mask": "float",
    "kv_lengths": None,
    "q_start": [14],
    "layout": 0,
    "lse": False,
    "sm_count": 1,
}
VALUES_IN_K = SMALL | {
    "D": 72,
    "V": 40,
    "v": False,
    "dtype": "bfloat16",
    "T": 70,
    "kv_lengths": [66],
}
RUNS = {
    "split_sm_75": ("sm_75", SMALL),
    "mask_sm_80": ("sm_80", MASKED | {"attn_mask": "bool"}),
    "float32_sm_75": ("sm_75", MASKED | {"dtype": "float32"}),
    "values_in_k_sm_90": ("sm_90", VALUES_IN_K),
}


@pytest.fixture
def nvcc() -> Path:
    try:
        return plugins.find_nvcc()
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.fixture
def write(tmp_path, nvcc):
    def call(case, arch="sm_75"):
        emit.emit(emit.Case.parse(case), arch, tmp_path)
        return Program(tmp_path)

    return call


class Program:
    """Reads what was written, and knows nothing else."""

    def __init__(self, folder: Path) -> None:
        self.ptx = (folder / "kernel.ptx").read_text()
        self.description = json.loads((folder / "launch.json").read_text())
        self.tensors = self.description["tensors"]

    def run(self, ptxemu, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        module = ptxemu.Module(self.ptx)
        memory = {
            name: inputs.get(name, np.full(tensor["bytes"], 0xFF, np.uint8))
            for name, tensor in self.tensors.items()
        }
        assert {name: x.nbytes for name, x in memory.items()} == {
            name: tensor["bytes"] for name, tensor in self.tensors.items()
        }
        addresses = {name: module.alloc(x) for name, x in memory.items()}
        for launch in self.description["launches"]:
            arguments = []
            for param in launch["params"]:
                data = bytearray.fromhex(param["hex"])
                for offset, name in param["pointers"].items():
                    data[int(offset) : int(offset) + 8] = addresses[name].to_bytes(8, "little")
                arguments.append(bytes(data))
            stats = module.launch(
                launch["entry"],
                tuple(launch["grid"]),
                tuple(launch["block"]),
                arguments,
                shared_bytes=launch["shared_bytes"],
            )
            assert not stats.races and not stats.poison_reads
        return {
            name: module.read(addresses[name], np.uint8, (tensor["bytes"],))
            for name, tensor in self.tensors.items()
            if tensor["role"] == "output"
        }


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


@pytest.mark.parametrize(("arch", "case"), RUNS.values(), ids=RUNS)
def test_what_is_written_runs(write, arch, case):
    ptxemu = pytest.importorskip("ptxemu", reason="needs ptxemu, a tool of this op's developers")
    names = {"is_causal", "window_left", "window_right", "softcap", "softmax_precision", "scale"}
    description = Case(
        name="",
        **{key: case[key] for key in names | set("BHSTDV") | {"Hkv", "layout"}},
        mask=case["attn_mask"] or "",
        kv_lengths=case["kv_lengths"] and tuple(case["kv_lengths"]),
        q_start=case["q_start"] and tuple(case["q_start"]),
        values_in_k=not case["v"],
    )
    dtype = getattr(torch, case["dtype"])
    tensors = description.tensors(dtype, poison=True)
    program = write(case, arch)
    assert {name for name, x in program.tensors.items() if x["role"] == "input"} == set(tensors)
    outputs = program.run(ptxemu, {name: bytes_of(x) for name, x in tensors.items()})

    y = torch.from_numpy(outputs["y"]).view(dtype).view(program.tensors["y"]["shape"])
    tensors = description.tensors(dtype)
    assert_within_budget(y, tensors, description.attributes())
    if case.get("lse", True):
        lse = torch.from_numpy(outputs["lse"]).view(torch.float32)
        expected = oracle(tensors, description.attributes())[1]
        torch.testing.assert_close(
            lse.view(expected.shape).double(), expected, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize(("arch", "case"), RUNS.values(), ids=RUNS)
def test_the_launches_fit_the_ptx_and_the_tensors(write, arch, case):
    program = write(case, arch)
    assert re.search(r"^\.target (\w+)", program.ptx, re.MULTILINE)[1] == arch
    launches = program.description["launches"]
    parameter = r"\(\s*\.param \.align 8 \.b8 \w+\[(\d+)\]\s*\)"
    param_bytes = dict(re.findall(rf"\.entry (\w+){parameter}", program.ptx))
    assert {launch["entry"] for launch in launches} == set(param_bytes), "these and no others"
    assert len(launches) == (2 if "workspace" in program.tensors else 1)
    used = set()
    for launch in launches:
        assert launch["grid"][0] >= 1 and launch["grid"][1:] == [1, 1]
        assert launch["block"][0] in (128, 256, 512) and launch["block"][1:] == [1, 1]
        limit = re.search(rf"{launch['entry']}\(.*?\.maxntid (\d+)", program.ptx, re.DOTALL)
        assert launch["block"][0] <= int(limit[1])
        assert launch["shared_bytes"] <= emit.SHARED_KB[arch] << 10
        (param,) = launch["params"]
        assert len(param["hex"]) == 2 * int(param_bytes[launch["entry"]])
        for offset, name in param["pointers"].items():
            assert 0 <= int(offset) <= AttentionParams.workspace.offset and int(offset) % 8 == 0
            assert param["hex"][2 * int(offset) : 2 * int(offset) + 16] == 16 * "0"
            used.add(name)
    assert used == set(program.tensors)


def test_tensors_of_a_split_decode(write):
    tensors = write(SMALL).tensors
    assert {name: (x["role"], x["dtype"], x["shape"]) for name, x in tensors.items()} == {
        "q": ("input", "float16", [1, 1, 5, 64]),
        "k": ("input", "float16", [1, 1, 200, 64]),
        "v": ("input", "float16", [1, 1, 200, 64]),
        "kv_lengths": ("input", "int32", [1]),
        "y": ("output", "float16", [1, 1, 5, 64]),
        "lse": ("output", "float32", [1, 5, 1]),
        "workspace": ("workspace", "uint8", [tensors["workspace"]["bytes"]]),
    }
    assert tensors["q"]["strides"] == [320, 320, 64, 1]
    assert tensors["k"]["bytes"] == 200 * 64 * 2


def test_tensors_of_a_masked_prefill(write):
    tensors = write(MASKED).tensors
    assert list(tensors) == ["q", "k", "v", "attn_mask", "q_start", "y"]
    assert tensors["attn_mask"]["shape"] == [1, 4, 3, 19]
    assert tensors["attn_mask"]["dtype"] == "float32"
    assert tensors["y"]["shape"] == [1, 4, 3, 64]


def test_values_in_k_have_no_v(write):
    program = write(VALUES_IN_K, "sm_80")
    assert "v" not in program.tensors
    # This size has no kernel that shares the tile: k is read a second time in v's place.
    pointers = program.description["launches"][0]["params"][0]["pointers"]
    assert pointers[str(AttentionParams.v.offset)] == "k"


def test_the_flags_are_those_of_the_library():
    options = (plugins.sources() / "nvcc.options").read_text()
    assert options.split()[: len(emit._FLAGS)] == list(emit._FLAGS)
    others = " ".join(options.split()[len(emit._FLAGS) :])
    assert not re.search(r"-O|-I|-D|-std|fast|math|fmad|ftz|prec", others)


REFUSED = {
    "list": ([1], "a case is an object with B, H,"),
    "unknown": (SMALL | {"heads": 3, "T2": 1}, "unknown key 'heads', 'T2' of a case; known: B, H"),
    "missing": ({"B": 1, "H": 2}, "a case lacks Hkv, S, T, D, V, dtype, scale, sm_count; always"),
    "zero": (SMALL | {"S": 0}, "S of a case is 0; it must be an integer from 1"),
    "text": (SMALL | {"H": "71"}, 'H of a case is "71"; it must be an integer'),
    "bool": (SMALL | {"B": True}, "B of a case is true; it must be an integer"),
    "float": (SMALL | {"T": 4.0}, "T of a case is 4.0; it must be an integer"),
    "large": (SMALL | {"T": 2**31}, "T of a case is 2147483648; it must be an integer from 1"),
    "dtype": (SMALL | {"dtype": "fp16"}, 'dtype of a case is "fp16"; it must be one of float16, b'),
    "dtype_list": (SMALL | {"dtype": []}, "dtype of a case is []; it must be one of float16"),
    "mask": (SMALL | {"attn_mask": True}, 'is true; it must be null, "bool" or "float"'),
    "lengths": (SMALL | {"kv_lengths": [1.5]}, "kv_lengths of a case is [1.5]; it must be null or"),
    "lengths_count": (SMALL | {"kv_lengths": [1, 2]}, "kv_lengths of a case has 2 numbers; B is 1"),
    "start_range": (SMALL | {"q_start": [2**31]}, "q_start of a case is [2147483648]; it must be"),
    "v": (SMALL | {"v": None}, "v of a case is null; it must be true, or false for values in k"),
    "layout": (SMALL | {"layout": 2}, "layout of a case is 2; it must be 0 or 1"),
    "causal": (SMALL | {"is_causal": "yes"}, 'is_causal of a case is "yes"; it must be true or'),
    "scale": (SMALL | {"scale": 10**400}, "it must be a number"),
    "scale_nan": (SMALL | {"scale": float("nan")}, "scale=nan is not finite"),
    "precision": (SMALL | {"softmax_precision": 16}, "is 16; it must be 1 (float32) or 10"),
    "bf16_half": (SMALL | {"dtype": "bfloat16", "softmax_precision": 10}, "only for float16 ones"),
    "window": (SMALL | {"window_left": -2}, "window_left of a case is -2; it must be a number"),
    "causal_right": (SMALL | {"window_right": 3}, "give one of the two"),
    "ratio": (SMALL | {"H": 5, "Hkv": 2}, "H=5 query heads are not a multiple of Hkv=2"),
    "v_in_k": (SMALL | {"v": False, "V": 72}, "v_head_size=72 exceeds D=64"),
    "overflow": (
        SMALL | {"B": 2**31 - 1, "T": 2**31 - 1, "kv_lengths": None},
        "the sizes of the case are too large",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_case_is_refused_by_its_key(name):
    case, message = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        emit.Case.parse(case).call()
    assert message in str(caught.value)


def test_what_no_kernel_covers_names_those_that_are_near(write, tmp_path):
    with pytest.raises(ConfigError, match=r"bfloat16 .* is not built for SM75"):
        write(SMALL | {"dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"D=320, V=320 is not built for SM80 .*256/256"):
        write(SMALL | {"D": 320, "V": 320}, "sm_80")
    with pytest.raises(ConfigError, match="D=60, V=64: both must be multiples of 8"):
        write(SMALL | {"D": 60}, "sm_80")
    assert list(tmp_path.iterdir()) == []


def test_causality_may_be_written_as_the_op_writes_it():
    assert emit.Case.parse(SMALL | {"is_causal": 1}) == emit.Case.parse(SMALL)


def test_the_command(runner, nvcc, tmp_path):
    (tmp_path / "case.json").write_text(json.dumps(SMALL))
    command = ["kernels", "emit", "--arch", "sm_75", "--case", str(tmp_path / "case.json")]
    out = tmp_path / "new" / "folder"
    result = runner.invoke(main, [*command, "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "[2/2] compile the kernels for sm_75" in result.stderr
    assert "threads" in result.stdout and "attention_kernel" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["kernel.ptx", "launch.json"]
    result = runner.invoke(main, [*command, "-o", str(out), "--json"])
    assert result.stderr == ""
    assert json.loads(result.stdout) == json.loads((out / "launch.json").read_text())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read case.json: No such file"),
        ("{", "case.json is no JSON file: Expecting property name"),
        ("[" * 100_000, "case.json is no JSON file: maximum recursion"),
        ("\ud800", "case.json is no JSON file: 'utf-8'"),
    ],
    ids=["absent", "cut", "deep", "encoding"],
)
def test_files_that_are_no_case(runner, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("case.json").write_text(text, errors="surrogatepass")
    command = ["kernels", "emit", "--arch", "sm_75", "--case", "case.json", "-o", "out"]
    result = runner.invoke(main, command)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not Path("out").exists()


def test_an_unknown_architecture(tmp_path):
    with pytest.raises(ConfigError, match="arch is sm_70; it must be one of sm_75, sm_80"):
        emit.emit(emit.Case.parse(SMALL), "sm_70", tmp_path)


def test_without_nvcc_the_exit_code_is_3(runner, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDACXX", "gone")
    (tmp_path / "case.json").write_text(json.dumps(SMALL))
    command = ["kernels", "emit", "--arch", "sm_75", "--case", str(tmp_path / "case.json")]
    result = runner.invoke(main, [*command, "-o", str(tmp_path / "out")])
    assert result.exit_code == 3
    assert 'pip install "cuda-toolkit' in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_failing_nvcc_is_quoted_and_leaves_nothing(tmp_path, monkeypatch):
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\necho no such architecture >&2\nexit 7\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(fake))
    with pytest.raises(KernelError, match=r"nvcc ended with 7 .*\nno such architecture"):
        emit.emit(emit.Case.parse(SMALL), "sm_75", tmp_path / "out")
    fake.write_text("not a program")
    with pytest.raises(KernelError, match=r"cannot run .*nvcc"):
        emit.emit(emit.Case.parse(SMALL), "sm_75", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_in_the_way(write, tmp_path):
    (tmp_path / "launch.json").mkdir()
    with pytest.raises(OutputError, match=r"launch\.json"):
        write(SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["launch.json"]


@pytest.mark.parametrize("count", [0, 2])
def test_exactly_one_entry_is_looked_for(count):
    ptx = ".visible .entry _Z16attention_kernel(\n" * count
    with pytest.raises(KernelError, match=f"the PTX holds {count} entries of the attention"):
        emit.entry_of("attention", ptx)


def test_the_keys_are_those_of_the_case():
    assert set(emit._KEYS) == set(emit.Case.__dataclass_fields__)
    assert {"kv_lengths", "q_start", "attn_mask"} < set(OP_INPUTS) & set(emit._KEYS)
