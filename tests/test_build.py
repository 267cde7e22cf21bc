# SPDX-License-Identifier: MIT
"""What builds and measures the kernels: ptxas's words are read right, and the scripts say no."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import kernel_resources  # noqa: E402 (beside the scripts, not in the package)

INSTANTIATIONS = ROOT / "plugins" / "kernels" / "instantiations"

#: As ptxas of CUDA 13.0 writes it; the second kernel spills, the third only has a stack.
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7fastmqa4fineEv' for 'sm_75'
ptxas info    : Function properties for _ZN7fastmqa4fineEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 648 bytes cmem[0], 12 bytes cmem[2]
ptxas info    : Compile time = 182.795 ms
ptxas info    : Compiling entry function '_ZN7fastmqa6spillsEv' for 'sm_80'
ptxas info    : Function properties for _ZN7fastmqa6spillsEv
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 64 bytes smem
ptxas info    : Compiling entry function '_ZN7fastmqa6stacksEv' for 'sm_90a'
ptxas info    : Function properties for _ZN7fastmqa6stacksEv
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 360 bytes cmem[0]
"""


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts" / "kernel_resources.py"
    command = [sys.executable, str(script), "check", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_spills_and_stacks_are_read():
    fine, spills, stacks = kernel_resources.parse_ptxas(LOG)
    assert fine == ("_ZN7fastmqa4fineEv", 75, 168, 0, 0, 0)
    assert spills == ("_ZN7fastmqa6spillsEv", 80, 255, 16, 32, 64)
    assert stacks == ("_ZN7fastmqa6stacksEv", 90, 40, 8, 0, 0)
    assert kernel_resources.with_local_memory([fine, spills, stacks]) == [spills, stacks]


def test_what_ptxas_says_otherwise_is_no_silent_pass():
    with pytest.raises(SystemExit, match="3 kernels, of which 2"):
        kernel_resources.parse_ptxas(LOG.replace("Used 255 registers", "Uses 255 registers"))


def test_a_build_that_spills_fails_and_names_the_kernels(tmp_path):
    (tmp_path / "combine.cu.o.log").write_text(LOG)
    (tmp_path / "removed_long_ago.cu.o.log").write_text(LOG)  # its source is gone: not counted
    done = check(tmp_path)
    assert done.returncode == 1
    assert "2 of 3 kernels" in done.stderr
    assert re.findall(r"sm_\d+: (\w+)", done.stderr) == [
        "_ZN7fastmqa6spillsEv",
        "_ZN7fastmqa6stacksEv",
    ]


def test_a_build_without_spills_passes(tmp_path):
    (tmp_path / "combine.cu.o.log").write_text(LOG[: LOG.index("ptxas info    : Compile time")])
    assert check(tmp_path).stdout == "1 kernels, no spills and no stack\n"


def test_a_folder_without_logs_is_no_build(tmp_path):
    done = check(tmp_path)
    assert done.returncode == 1 and "no log of ptxas" in done.stderr


@pytest.mark.parametrize(
    ("sm", "threads", "registers", "shared_bytes", "blocks"),
    # Of CUDA's cuda_occupancy.h, with which all of 56240 combinations were compared.
    [
        (75, 128, 128, 21_000, 3),
        (75, 128, 255, 0, 2),
        (80, 128, 168, 0, 3),
        (80, 128, 32, 83_000, 1),
        (86, 256, 40, 16_000, 6),
        (89, 64, 24, 99 << 10, 1),
        (90, 512, 64, 100_000, 2),
        (120, 32, 24, 0, 24),
        (120, 128, 255, 101_000, 1),
        (120, 128, 255, 100 << 10, 0),  # more than a block may have
    ],
)
def test_occupancy(sm, threads, registers, shared_bytes, blocks):
    gpu = next(gpu for gpu in kernel_resources.GPUS if gpu.sm == sm)
    assert blocks == kernel_resources.blocks_per_sm(
        gpu, threads=threads, registers=registers, shared_bytes=shared_bytes
    )


def test_each_gpu_gets_the_code_of_its_generation():
    codes = {sm: kernel_resources.code_for(sm) for sm in (75, 80, 86, 87, 89, 90, 100, 103, 121)}
    assert codes == {75: 75, 80: 80, 86: 80, 87: 80, 89: 80, 90: 90, 100: 100, 103: 100, 121: 120}
    assert kernel_resources.code_for(110) == 80  # as PTX


def variants() -> list[dict[str, object]]:
    """The rows of variants.h, by its text: with type and generation, as kVariants has them."""
    text = (ROOT / "plugins" / "kernels" / "variants.h").read_text("utf-8")
    fields = ("head_size", "v_head_size", "block_rows", "block_keys")
    fields += ("warps_rows", "warps_keys", "stages")
    dtypes = {
        "kTuringTiles": ["float16"],
        "kAmpereTiles": ["float16", "bfloat16"],
        "kFloat32Tiles": ["float32"],
        "kFloat32AmpereTiles": ["float32"],
    }
    rows = []
    for name, body in re.findall(r"Tile (k\w+Tiles)\[\] = {(.*?)};", text, re.DOTALL):
        for numbers in re.findall(r"{((?:\d+, ){7})(?:true|false)}", body):
            tile = dict(zip(fields, map(int, numbers.rstrip(", ").split(", ")), strict=True))
            rows += [{"dtype": dtype, **tile} for dtype in dtypes[name]]
    return rows


def test_the_table_lists_every_variant():
    page = (ROOT / "docs" / "kernels-resources.md").read_text("utf-8")
    listed = set(re.findall(r"^\| ([^|]*?) \|", page, re.MULTILINE))
    names = {kernel_resources.variant_name(variant) for variant in variants()}
    assert len(names) > 50
    assert not names - listed, "run scripts/build_all.sh"
    assert {"combine, float16", "combine, bfloat16", "combine, float32"} <= listed


def test_every_source_file_says_for_which_sms_it_is():
    for source in INSTANTIATIONS.glob("*.cu"):
        text = source.read_text("utf-8")
        named = re.search(r"_(turing|ampere)\.cu$", source.name)
        generations = set(re.findall(r"k(Turing|Ampere)>", text))
        if named:
            assert generations == {named[1].title()}, source.name
        else:  # runs everywhere
            assert generations <= {"Turing"}, source.name


def test_a_failing_compiler_is_heard(tmp_path):
    def keep_log(code: int) -> subprocess.CompletedProcess[str]:
        compiler = f"echo said; echo complained >&2; exit {code}"
        command = ["bash", str(ROOT / "plugins" / "keep_log.sh"), "bash", "-c", compiler]
        command += ["-o", str(tmp_path / "a.o")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = keep_log(0)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "a.o.log").read_text() == "said\ncomplained\n"
    done = keep_log(3)
    assert (done.returncode, done.stderr) == (3, "said\ncomplained\n")


@pytest.mark.parametrize("script", ["build_kernels.sh", "build_all.sh", "gpu_check.sh"])
def test_scripts_have_help(script):
    command = ["bash", str(ROOT / "scripts" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: scripts/{script}")


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
