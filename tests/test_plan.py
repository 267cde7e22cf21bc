# SPDX-License-Identifier: MIT
"""How a call becomes launches: which tile, how many splits (plugins/kernels/plan.cpp)."""

import random
import re

import pytest
import torch
from emulated import ALL_VARIANTS, ROOT, SHARED_BYTES, build, missing

from fastmqa_export.config import AttentionAttributes
from fastmqa_export.errors import ConfigError
from fastmqa_export.kernels import Device, KernelLibrary, make_call

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

#: SMs of the GPUs that this is for, by their generation's number.
GPUS = {"t4": (75, 40), "a10": (86, 72), "a100": (80, 108), "h100": (90, 132)}


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary(build(ALL_VARIANTS))


def device(gpu):
    sm, count = GPUS[gpu]
    return Device(sm, count, SHARED_BYTES[sm])


def meta_call(b, h, hkv, s, t, d, v=None, *, in_k=False, dtype=torch.float16, **kw):
    k = torch.empty((b, hkv, t, d), dtype=dtype, device="meta")
    return make_call(
        torch.empty((b, h, s, d), dtype=dtype, device="meta"),
        k,
        None if in_k else torch.empty((b, hkv, t, v or d), dtype=dtype, device="meta"),
        None,
        None,
        None,
        attributes=AttentionAttributes(
            scale=1.0, v_head_size=(v or d) if in_k else 0, features=8 if in_k else 0, **kw
        ),
        return_lse=False,
        address=lambda _: 1 << 20,
    )


def plan(library, gpu, *sizes, tactic=0, **kw):
    return library.launches(meta_call(*sizes, **kw), device(gpu), tactic)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(
    ("heads", "rows", "warps_rows"),
    [(1, 16, 1), (16, 16, 1), (17, 64, 4), (48, 64, 4), (64, 64, 4), (71, 128, 8), (128, 128, 8)],
)
def test_decode_reads_keys_once_for_all_heads_that_share_them(
    library, gpu, heads, rows, warps_rows
):
    for d in (64, 128):
        chosen = plan(library, gpu, 1, heads, 1, 1, 4096, d)
        assert chosen["variant"]["block_rows"] == rows
        assert chosen["variant"]["warps_rows"] == warps_rows


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("h", "hkv", "d"), [(32, 1, 128), (71, 1, 64), (48, 1, 128), (9, 3, 64)])
def test_a_long_decode_gives_every_sm_a_part_of_the_keys(library, gpu, h, hkv, d):
    for batch in (1, 2, 5):
        chosen = plan(library, gpu, batch, h, hkv, 1, 65536, d)
        blocks = chosen["launches"][0]["grid"]
        assert blocks >= 0.75 * GPUS[gpu][1]
        assert blocks == chosen["splits"] * batch * hkv


def test_work_that_fills_the_gpu_is_not_split(library):
    for gpu in GPUS:
        assert plan(library, gpu, 32, 32, 8, 1, 4096, 128)["splits"] == 1
        chosen = plan(library, gpu, 4, 32, 8, 1024, 1024, 128, is_causal=1)
        assert chosen["splits"] == 1
        assert len(chosen["launches"]) == 1
        assert chosen["workspace_bytes"] == 0
        # Prefill: the tile whose warps have two fragments of rows each.
        assert (chosen["variant"]["block_rows"], chosen["variant"]["warps_rows"]) == (128, 4)


def test_short_keys_are_not_split(library):
    for t in (1, 64, 127):
        assert plan(library, "a100", 1, 32, 1, 1, t, 128)["splits"] == 1


def test_a_window_limits_the_splits(library):
    chosen = plan(library, "h100", 1, 32, 1, 1, 1 << 20, 128, is_causal=1, window_left=511)
    assert chosen["splits"] <= 5


def test_latent_attention_takes_the_largest_tile_that_fits(library):
    rows = {
        gpu: plan(library, gpu, 1, 128, 1, 1, 8192, 576, 512, in_k=True)["variant"]["block_rows"]
        for gpu in GPUS
    }
    assert rows == {"t4": 16, "a10": 32, "a100": 64, "h100": 64}


def test_every_plan_is_consistent(library):
    draw = random.Random(7)
    for _ in range(300):
        gpu = draw.choice(list(GPUS))
        d = draw.choice([8, 32, 64, 72, 80, 96, 120, 128, 192, 256])
        hkv, group, batch = draw.randint(1, 8), draw.randint(1, 80), draw.randint(1, 9)
        s, t = draw.choice([1, 2, 17, 128, 700]), draw.randint(1, 20000)
        dtype = draw.choice([torch.float16, torch.float32])
        chosen = plan(library, gpu, batch, group * hkv, hkv, s, t, d, dtype=dtype)
        variant, launches = chosen["variant"], chosen["launches"]
        assert variant["head_size"] >= d
        assert variant["shared_bytes"] <= SHARED_BYTES[GPUS[gpu][0]]
        tiles = -(-s * group // variant["block_rows"])
        splits = chosen["splits"]
        assert launches[0]["grid"] == tiles * batch * hkv * splits
        assert launches[0]["block"] == 32 * variant["warps_rows"] * variant["warps_keys"]
        assert 1 <= splits <= max(1, -(-t // variant["block_keys"]) // 2)
        rows = batch * hkv * group * s
        if splits == 1:
            assert len(launches) == 1
        else:
            assert launches[1]["grid"] == -(-rows // 4)
            assert chosen["workspace_bytes"] == splits * rows * (dtype.itemsize * d + 4)


TACTICS = 5


def test_tactics_divide_a_decode_in_their_own_ways(library):
    chosen = [plan(library, "t4", 1, 32, 1, 1, 16384, 128, tactic=i) for i in range(TACTICS + 1)]
    assert [c["splits"] for c in chosen[:4]] == [32, 1, 16, 64]
    assert [c["variant"]["block_rows"] for c in chosen] == [64, 64, 64, 64, 16, 128]
    with pytest.raises(ConfigError, match="tactic 6; there are 0 to 5"):
        plan(library, "t4", 1, 32, 1, 1, 16384, 128, tactic=TACTICS + 1)


@pytest.mark.parametrize("gpu", GPUS)
def test_the_bound_holds_for_all_sizes_and_tactics(library, gpu):
    draw = random.Random(11)
    bytes_for, bound_of = (
        library.library.fastmqa_workspace_bytes,
        library.library.fastmqa_workspace_bound,
    )
    largest = 0.0
    for _ in range(300):
        d, in_k = draw.choice([(64, False), (128, False), (256, False), (576, True)])
        hkv, group = draw.choice([(1, 71), (1, 32), (8, 4), (3, 3), (1, 128), (2, 1)])
        most = draw.randint(1, 12), draw.choice([1, 3, 64, 900]), draw.randint(64, 40000)
        kw = {"v": 512 if d == 576 else d, "in_k": in_k}
        b, s, t = most
        bound = bound_of(meta_call(b, group * hkv, hkv, s, t, d, **kw).params, device(gpu))
        for _ in range(10):
            b, s, t = (draw.randint(1, size) for size in most)
            call = meta_call(b, group * hkv, hkv, s, t, d, **kw)
            for tactic in range(TACTICS + 1):
                needed = bytes_for(call.params, device(gpu), tactic)
                assert needed <= bound
                largest = max(largest, needed / bound)
    assert largest > 0.5, "the bound is far too large"


def test_sizes_that_overflow_are_refused(library):
    with pytest.raises(ConfigError, match="2\\^30"):
        plan(library, "a100", 1, 1, 1, 1, (1 << 30) + 1, 64)
    with pytest.raises(ConfigError, match="2\\^30"):
        plan(library, "a100", 64, 64, 1, 1 << 20, 64, 64)


def test_the_documentation_lists_what_is_built(library):
    built: dict[tuple[str, int], list[str]] = {}
    for v in library.variants():
        row = built.setdefault((v["dtype"], v["min_sm"]), [])
        if (size := f"{v['head_size']}/{v['v_head_size']}") not in row:
            row.append(size)
    # Code for SM75 and for newer GPUs is one row where the sizes are the same.
    if built["float16", 80] == built["float16", 75]:
        del built["float16", 80]
    rows = {f"| {dtype} | SM{sm} | {', '.join(sizes)} |" for (dtype, sm), sizes in built.items()}
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert rows == set(re.findall(r"^\| b?float\d+ \|.*\|$", page, re.MULTILINE))
