# SPDX-License-Identifier: MIT
"""Named cases of the op: what every implementation is run on, by tests and benchmarks alike."""

from __future__ import annotations

import dataclasses

import torch

from fastmqa_export.config import AttentionAttributes, Feature


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the op. Letters as everywhere: B H Hkv S T D V."""

    name: str
    B: int = 2
    H: int = 8
    Hkv: int = 1
    S: int = 5
    T: int = 11
    D: int = 16
    V: int = 16
    scale: float | None = None  # None: 1/sqrt(D)
    is_causal: bool = False
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    softmax_precision: int = 1
    mask: str = ""  # "", "bool" or "float"
    mask_shape: str = "BHST"  # a dimension that is left out has length 1: "T", "BT", "ST"
    kv_lengths: tuple[int, ...] | None = None
    q_start: tuple[int, ...] | None = None
    values_in_k: bool = False
    layout: int = 0
    lse: bool = False
    magnitude: float = 1.0  # standard deviation of q and k
    seed: int = 0

    def attributes(self) -> AttentionAttributes:
        live = {
            Feature.MASK: self.mask != "",
            Feature.LENGTHS: self.kv_lengths is not None,
            Feature.Q_START: self.q_start is not None,
            Feature.VALUES_IN_K: self.values_in_k,
            Feature.LSE: self.lse,
        }
        return AttentionAttributes(
            scale=self.D**-0.5 if self.scale is None else self.scale,
            is_causal=int(self.is_causal),
            window_left=self.window_left,
            window_right=self.window_right,
            softcap=self.softcap,
            softmax_precision=self.softmax_precision,
            v_head_size=self.V if self.values_in_k else 0,
            layout=self.layout,
            features=sum(bit for bit, is_live in live.items() if is_live),
        )

    def tensors(self, dtype: torch.dtype, *, poison: bool = False) -> dict[str, torch.Tensor]:
        """The live inputs by name. ``poison`` puts NaN where k and v lie beyond the lengths."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        q = normal(self.B, self.H, self.S, self.D) * self.magnitude
        k = normal(self.B, self.Hkv, self.T, self.D) * self.magnitude
        tensors = {"q": q.transpose(1, 2).contiguous() if self.layout else q, "k": k}
        if not self.values_in_k:
            tensors["v"] = normal(self.B, self.Hkv, self.T, self.V)
        if self.kv_lengths is not None and poison:
            beyond = torch.arange(self.T) >= torch.tensor(self.kv_lengths)[:, None]
            for name in set(tensors) - {"q"}:
                tensors[name].masked_fill_(beyond[:, None, :, None], torch.nan)
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        if self.mask:
            full = {"B": self.B, "H": self.H, "S": self.S, "T": self.T}
            noise = normal(*(full[d] if d in self.mask_shape else 1 for d in "BHST"))
            tensors["attn_mask"] = noise > -0.5
            if self.mask == "float":
                tensors["attn_mask"] = noise.masked_fill(noise < -1, -torch.inf).float()
        for name in ("kv_lengths", "q_start"):
            if (given := getattr(self, name)) is not None:
                tensors[name] = torch.tensor(given, dtype=torch.int32)
        return tensors


def _product() -> list[Case]:
    """Every feature alone, and the combinations that interact, at sizes that leave tails."""
    features: list[tuple[str, dict[str, object]]] = [
        ("plain", {}),
        ("causal", {"is_causal": True}),
        ("causal_decode", {"is_causal": True, "S": 1}),
        ("causal_one_key", {"is_causal": True, "S": 1, "T": 1}),
        ("causal_more_queries_than_keys", {"is_causal": True, "S": 7, "T": 4}),
        ("window_left", {"window_left": 3}),
        ("window_right", {"window_right": 2}),
        ("window_both", {"window_left": 2, "window_right": 1}),
        ("window_zero", {"window_left": 0, "window_right": 0}),
        ("window_causal", {"window_left": 2, "is_causal": True}),
        ("softcap", {"softcap": 2.0, "magnitude": 2.0}),
        ("scale", {"scale": 0.37}),
        ("mask_bool", {"mask": "bool"}),
        ("mask_bool_keys", {"mask": "bool", "mask_shape": "BT"}),
        ("mask_bool_causal", {"mask": "bool", "mask_shape": "BT", "is_causal": True}),
        ("mask_float", {"mask": "float"}),
        ("mask_float_shared", {"mask": "float", "mask_shape": "ST"}),
        ("mask_float_window", {"mask": "float", "window_left": 2, "is_causal": True}),
        ("lengths", {"kv_lengths": (7, 11)}),
        ("lengths_zero", {"kv_lengths": (0, 3)}),
        ("lengths_clamped", {"kv_lengths": (-4, 99)}),
        ("lengths_causal", {"kv_lengths": (6, 9), "is_causal": True}),
        ("lengths_causal_short", {"kv_lengths": (2, 9), "is_causal": True}),
        ("lengths_causal_decode", {"kv_lengths": (6, 9), "is_causal": True, "S": 1}),
        ("lengths_window", {"kv_lengths": (6, 9), "is_causal": True, "window_left": 2}),
        ("start_causal", {"q_start": (0, 4), "is_causal": True}),
        ("start_negative", {"q_start": (-3, 2), "is_causal": True}),
        ("start_beyond", {"q_start": (20, 9), "window_left": 3}),
        ("prefill_padded", {"q_start": (0, 0), "kv_lengths": (3, 5), "is_causal": True, "T": 5}),
        ("softcap_causal_mask", {"softcap": 3.0, "mask": "bool", "is_causal": True}),
        ("lse", {"lse": True}),
        ("lse_empty_rows", {"lse": True, "kv_lengths": (0, 7), "is_causal": True}),
        ("lse_mask", {"lse": True, "mask": "float", "softcap": 5.0}),
        ("values_in_k", {"values_in_k": True, "D": 24, "V": 16}),
        ("values_in_k_causal", {"values_in_k": True, "D": 24, "V": 16, "is_causal": True}),
        ("values_in_k_lengths", {"values_in_k": True, "D": 72, "V": 64, "kv_lengths": (4, 9)}),
        ("v_larger", {"D": 16, "V": 40}),
        ("v_smaller", {"D": 40, "V": 16, "is_causal": True}),
        ("large_scores", {"magnitude": 6.0, "is_causal": True}),
    ]
    ratios = {"mqa": (8, 1), "gqa": (9, 3), "mha": (4, 4)}
    cases = [
        Case(
            name=f"{name}_{ratio}_{'bshd' if layout else 'bhsd'}", H=h, Hkv=hkv, layout=layout, **kw
        )  # type: ignore[arg-type]
        for name, kw in features
        for ratio, (h, hkv) in ratios.items()
        for layout in (0, 1)
    ]
    extremes: dict[str, dict[str, object]] = {
        "falcon_71_1": {"H": 71, "Hkv": 1, "D": 64, "V": 64, "B": 1, "is_causal": True},
        "starcoder_48_1": {"H": 48, "Hkv": 1, "D": 128, "V": 128, "B": 1, "is_causal": True},
        "heads_10_1": {"H": 10, "Hkv": 1, "D": 256, "V": 256},
        "mla_576_512": {"H": 16, "D": 576, "V": 512, "values_in_k": True, "scale": 192**-0.5},
        "mla_288_256": {"H": 40, "D": 288, "V": 256, "values_in_k": True, "scale": 96**-0.5},
        "long_decode": {"H": 32, "S": 1, "T": 300, "D": 128, "V": 128, "kv_lengths": (257, 300)},
        "long_window": {"S": 33, "T": 129, "window_left": 16, "is_causal": True},
    }
    return cases + [Case(name=name, **kw) for name, kw in extremes.items()]  # type: ignore[arg-type]


CASES = _product()
#: For float16 only: scores and exponentials rounded to float16.
HALF_SOFTMAX_CASES = [
    dataclasses.replace(case, name=f"half_softmax_{case.name}", softmax_precision=10)
    for case in CASES
    if case.Hkv == 1 and case.layout == 0
]


def _kernel_cases() -> list[Case]:
    """Sizes at the edges of the kernels' tiles: 16, 64 and 128 rows, 16, 32 and 64 keys."""
    sizes = ((32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
    calls: list[tuple[str, dict[str, object]]] = [
        ("decode_mha", {"H": 2, "Hkv": 2, "S": 1, "T": 130, "lse": True}),
        ("decode_9_3", {"H": 9, "Hkv": 3, "S": 1, "T": 63, "is_causal": True}),
        ("decode_10_1", {"H": 10, "S": 1, "T": 64, "q_start": (50,), "is_causal": True}),
        ("decode_16_1", {"H": 16, "S": 1, "T": 65, "kv_lengths": (64,), "lse": True}),
        ("decode_17_1", {"H": 17, "S": 1, "T": 31, "lse": True}),
        ("decode_48_1", {"H": 48, "S": 1, "T": 257, "kv_lengths": (255,), "lse": True}),
        ("decode_64_1", {"H": 64, "S": 1, "T": 16, "mask": "bool", "mask_shape": "BT"}),
        ("decode_71_1", {"H": 71, "S": 1, "T": 129, "is_causal": True, "lse": True}),
        ("prefill_15", {"H": 3, "S": 5, "T": 15, "is_causal": True, "window_left": 3}),
        ("prefill_63", {"H": 1, "S": 63, "T": 63, "is_causal": True, "lse": True}),
        ("prefill_65", {"H": 1, "S": 65, "T": 97, "is_causal": True, "window_left": 20}),
        ("prefill_129", {"H": 3, "S": 43, "T": 129, "mask": "float", "softcap": 7.0}),
        ("prefill_257", {"H": 2, "S": 129, "T": 160, "is_causal": True, "layout": 1}),
        ("prefill_windows", {"H": 2, "S": 70, "T": 70, "window_left": 17, "window_right": 5}),
    ]
    cases = [
        Case(
            name=f"{name}_d{d}" + (f"_v{v}" if v != d else ""),
            **{"B": 1, "Hkv": 1, "D": d, "V": v, **call},  # type: ignore[arg-type]
        )
        for d, v in sizes
        for name, call in calls
    ]
    latent: list[tuple[str, dict[str, object]]] = [
        ("decode_16", {"H": 16, "S": 1, "T": 97, "kv_lengths": (95,), "lse": True}),
        ("decode_40", {"H": 40, "S": 1, "T": 33, "is_causal": True}),
        ("decode_128", {"H": 128, "S": 1, "T": 64, "lse": True}),
        ("prefill_causal", {"H": 16, "S": 9, "T": 40, "is_causal": True, "layout": 1}),
        ("prefill_mask", {"H": 3, "S": 7, "T": 17, "mask": "float", "softcap": 9.0}),
    ]
    return cases + [
        Case(
            name=f"latent_{name}_d{d}_v{v}",
            scale=(d // 3) ** -0.5,
            **{"B": 1, "Hkv": 1, "D": d, "V": v, "values_in_k": True, **call},  # type: ignore[arg-type]
        )
        for d, v in ((288, 256), (576, 512))
        for name, call in latent
    ]


KERNEL_CASES = CASES + _kernel_cases()
