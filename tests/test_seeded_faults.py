# SPDX-License-Identifier: MIT
"""Breaks the kernels' source in one line at a time: the emulated cases must notice each."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import PLUGINS, ROOT, build, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

_READ_BACK = """#pragma unroll
    for (int i = 0; i < Traits::kRowsPerLane; ++i) {
      values[i] = shared[0]"""

#: Name: (file, what stands there, what is put there).
FAULTS = {
    "missing barrier after the values": (
        "kernels/pipeline.cuh",
        "values_.template land<2 * (kAhead - 1)>(v);\n      __syncthreads();",
        "values_.template land<2 * (kAhead - 1)>(v);",
    ),
    "missing barrier after the keys": (
        "kernels/pipeline.cuh",
        "keys_.template land<2 * (kAhead - 1)>(k);\n      __syncthreads();",
        "keys_.template land<2 * (kAhead - 1)>(k);",
    ),
    "missing barrier between warps that share rows": (
        "kernels/mainloop.cuh",
        "    __syncthreads();\n" + _READ_BACK,
        _READ_BACK,
    ),
    "missing wait": ("include/fastmqa/tile/loader.cuh", "ptx::cp_async_wait<kPending>();", ";"),
    "a wait for one group too few": (
        "include/fastmqa/tile/loader.cuh",
        "ptx::cp_async_wait<kPending>();",
        "ptx::cp_async_wait<kPending + 1>();",
    ),
    "wrong row of the left operand": (
        "include/fastmqa/tile/fragment.cuh",
        "tile.chunk(row + lane % 16, column",
        "tile.chunk(row + (lane + 1) % 16, column",
    ),
    "halves of the right operand swapped": (
        "include/fastmqa/tile/fragment.cuh",
        "lane / 8 % 2));",
        "1 - lane / 8 % 2));",
    ),
    "mask off by one": (
        "include/fastmqa/tile/mask.cuh",
        "return begin <= key && key < end;",
        "return begin <= key && key <= end;",
    ),
    "window off by one": (
        "include/fastmqa/tile/mask.cuh",
        "length : position + window_right + 1",
        "length : position + window_right",
    ),
    "a split forgets to rescale": (
        "kernels/combine.cuh",
        "weights[i] = tile::exponential(weights[i], anchor);",
        "weights[i] = weights[i] == -tile::kInfinity ? 0.0f : 1.0f;",
    ),
    "outputs are not rescaled": (
        "kernels/mainloop.cuh",
        "shrinks |= shrink[i] != 1.0f;",
        "",
    ),
    "empty rows become NaN": (
        "include/fastmqa/tile/softmax.cuh",
        "return max == -kInfinity ? 0.0f : max;",
        "return max;",
    ),
    "padding is not cleared": (
        "kernels/pipeline.cuh",
        "Row{v_ + key * v_stride_, key < key_end_}",
        "Row{v_ + key * v_stride_, true}",
    ),
    "a live fragment is skipped": (
        "include/fastmqa/tile/mask.cuh",
        "return first < end && begin < first + count;",
        "return first < end && begin + 1 < first + count;",
    ),
    "heads of a group are stored one off": (
        "kernels/work.cuh",
        "return kv_head * group + (first_row + row) % group;",
        "return kv_head * group + (first_row + row + 1) % group;",
    ),
}

#: Two variants, so that a fault costs few seconds: warps that share rows, and warps that do not.
_SOURCE = """
#include <utility>
#include "attention.cuh"
#include "registry.h"
namespace fastmqa {
template <int... kIndex>
bool enter(std::integer_sequence<int, kIndex...>) {
  const auto one = [](auto index) {
    constexpr Variant kVariant = kVariants[index];
    if constexpr (kVariant.dtype == DType::kFloat16 && kVariant.min_sm == kAmpere &&
                  kVariant.tile.head_size == 32 && kVariant.tile.block_rows <= 64) {
      registry().attention[index] = &attention_kernel<index>;
      registry().shared_bytes[index] = sizeof(typename Traits<kVariant>::SharedStorage);
    }
  };
  (one(std::integral_constant<int, kIndex>{}), ...);
  return true;
}
[[maybe_unused]] static const bool kEntered =
    enter(std::make_integer_sequence<int, kVariantCount>{});
}  // namespace fastmqa
"""

#: Fails when the library at argv[1] computes a case wrong.
_RUN = """
import sys
import torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from budgets import assert_within_budget
from cases import KERNEL_CASES
from emulated import EmulatedKernels
torch.set_num_threads(1)
kernels = EmulatedKernels(Path(sys.argv[1]))
chosen = [c for c in KERNEL_CASES if c.D <= 32 and c.V <= 32]
chosen = [c for c in chosen if c.name.endswith(("gqa_bshd", "mqa_bhsd", "d32", "window"))]
assert len(chosen) > 60
for case in chosen:
    for sm_count in (1, 40):
        tensors = case.tensors(torch.float16, poison=True)
        y, _, _ = kernels.run(
            tensors, case.attributes(), sm=80, sm_count=sm_count, seed=sm_count
        )
        assert_within_budget(y, case.tensors(torch.float16), case.attributes())
print("all right")
"""


def outcome(folder: Path, plugins: Path) -> str:
    """What the cases say of the kernels in ``plugins``."""
    source = folder / "two_variants.cu"
    source.write_text(_SOURCE)
    library = build([source], plugins=plugins, sanitized=False)
    result = subprocess.run(
        [sys.executable, "-c", _RUN.format(tests=str(ROOT / "tests")), str(library)],
        capture_output=True,
        text=True,
        check=False,
    )
    return "all right" if "all right" in result.stdout else result.stderr


def test_without_a_fault_all_is_right(tmp_path):
    assert outcome(tmp_path, PLUGINS) == "all right"


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(tmp_path, name):
    file, before, after = FAULTS[name]
    plugins = tmp_path / "plugins"
    shutil.copytree(PLUGINS, plugins)
    source = (plugins / file).read_text()
    assert source.count(before) == 1, f"{file} has changed: the fault {name!r} has no place"
    (plugins / file).write_text(source.replace(before, after))
    found = outcome(tmp_path, plugins)
    # What failed is a case, not the build.
    signs = ("the budget is", "launch of the attention kernel", "outside a tensor")
    assert any(sign in found for sign in signs), found
