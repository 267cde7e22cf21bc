# SPDX-License-Identifier: MIT
"""Recipes: for which sizes an engine is tuned on a GPU, and what its builder may use.

A recipe is a TOML file whose keys are the fields of `Recipe`; engines/README.md describes them.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

from fastmqa_export.errors import ConfigError

DTYPES: Final = ("float16", "bfloat16", "float32")

_PACKAGE: Final = Path(__file__).resolve().parent
#: The recipes that ship: of the wheel, or beside the package in a clone.
_FOLDERS: Final = (_PACKAGE / "recipes", _PACKAGE.parent / "engines" / "recipes")


@dataclasses.dataclass(frozen=True)
class Span:
    """The sizes of a dimension that a profile takes.

    Attributes:
        min: the smallest.
        opt: the one that kernels are chosen for.
        max: the largest.

    Raises:
        ConfigError: unless 1 ≤ min ≤ opt ≤ max.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        """Refuse what is no span."""
        if not 1 <= self.min <= self.opt <= self.max:
            raise ConfigError(
                f"[{self.min}, {self.opt}, {self.max}] is [min, opt, max] of a dimension; it must "
                "hold that 1 ≤ min ≤ opt ≤ max"
            )

    def up_to(self, limit: int) -> Span:
        """The same, with ``limit`` as its largest size."""
        return Span(self.min, min(self.opt, limit), limit)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to build an engine for.

    Attributes:
        gpu: the GPU that the recipe was written for.
        sm: its compute capability, 75 for 7.5; None: any.
        memory_gb: its memory in 10^9 bytes, which weights, KV cache and workspace must fit in;
            None: not checked.
        dtypes: the types of files that the recipe is for.
        capacity: T, tokens of a sequence that the KV cache holds.
        prefill_batch: sequences that a prefill takes at once.
        prefill_sequence: tokens of each that a prefill takes at once.
        decode_batch: sequences that a decode step, of one token each, takes at once.
        workspace_mib: the most scratch memory, in 2^20 bytes, that a kernel may ask for.
        optimization_level: 0 (built fastest) to 5 (searched longest).
    """

    gpu: str = "any"
    sm: int | None = None
    memory_gb: float | None = None
    dtypes: tuple[str, ...] = DTYPES
    capacity: int = 2048
    prefill_batch: Span = Span(1, 1, 1)
    prefill_sequence: Span = Span(1, 512, 2048)
    decode_batch: Span = Span(1, 1, 8)
    workspace_mib: int = 2048
    optimization_level: int = 3

    @classmethod
    def read(cls, path: Path) -> Self:
        """The recipe in a TOML file.

        Raises:
            ConfigError: if it cannot be read, or is no recipe; the message names file and key.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
            return cls.parse(values)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:  # no UTF-8, or no TOML
            raise ConfigError(f"{path} is no TOML file: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """The recipe that a TOML file's keys describe; a key that is not given has its default.

        Raises:
            ConfigError: naming the key, what was given and what is accepted.
        """
        if unknown := [key for key in values if key not in _KEYS]:
            raise ConfigError(
                f"unknown key {', '.join(unknown)}; a recipe may have {', '.join(_KEYS)}"
            )
        fields = {}
        for key, value in values.items():
            holds, accepted = _KEYS[key]
            if not holds(value):
                raise ConfigError(f"{key} is {value!r}; it must be {accepted}")
            try:
                fields[key] = _CONVERTED.get(key, lambda x: x)(value)
            except ConfigError as error:
                raise ConfigError(f"{key} = {error}") from error
        return cls(**fields)

    def limited(
        self,
        *,
        max_batch: int | None = None,
        max_sequence: int | None = None,
        capacity: int | None = None,
    ) -> Recipe:
        """The recipe with other limits.

        Args:
            max_batch: most sequences at once, of prefill and decode.
            max_sequence: most tokens of a sequence in one prefill.
            capacity: T; a prefill that would not fit is shortened to it.

        Raises:
            ConfigError: if a limit is below the smallest size of what it limits.
        """
        changes: dict[str, Any] = {}
        if capacity is not None:
            changes["capacity"] = capacity
            max_sequence = max_sequence or min(self.prefill_sequence.max, capacity)
        limits = {
            "prefill_batch": max_batch,
            "prefill_sequence": max_sequence,
            "decode_batch": max_batch,
        }
        for key, limit in limits.items():
            if limit is not None:
                try:
                    changes[key] = getattr(self, key).up_to(limit)
                except ConfigError as error:
                    raise ConfigError(f"{key} = {error}") from error
        return dataclasses.replace(self, **changes)


def find_recipe(name: str) -> Path:
    """The file of a recipe that ships, given its name, or ``name`` itself where it is a path.

    Raises:
        ConfigError: naming the recipes that there are.
    """
    if Path(name).suffix or len(Path(name).parts) > 1:
        return Path(name)
    for path in (folder / f"{name}.toml" for folder in _FOLDERS):
        if path.is_file():
            return path
    known = sorted(path.stem for folder in _FOLDERS for path in folder.glob("*.toml"))
    raise ConfigError(
        f"no recipe named {name}; there are {', '.join(known) or 'none'}, and a path to a .toml "
        "file is one too"
    )


def _is_int(low: int, high: int = 2**31 - 1) -> Callable[[Any], bool]:
    return lambda x: type(x) is int and low <= x <= high


def _is_span(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 3 and all(map(_is_int(1), x))


def _are_dtypes(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(name in DTYPES for name in x)


_Rule = tuple[Callable[[Any], bool], str]
_SPAN: Final[_Rule] = (_is_span, "[min, opt, max], three integers from 1 on")
#: For each key of a recipe: what its value must be.
_KEYS: Final[Mapping[str, _Rule]] = {
    "gpu": (lambda x: isinstance(x, str) and bool(x), "the name of a GPU"),
    "sm": (_is_int(75, 999), "a compute capability without its point, 75 or more"),
    "memory_gb": (lambda x: type(x) in (int, float) and 0 < x < 1e6, "a number above 0"),
    "dtypes": (_are_dtypes, f"a list of {', '.join(DTYPES)}"),
    "capacity": (_is_int(1), "an integer from 1 on"),
    "prefill_batch": _SPAN,
    "prefill_sequence": _SPAN,
    "decode_batch": _SPAN,
    "workspace_mib": (_is_int(1, 2**20), "an integer from 1 to 2^20"),
    "optimization_level": (_is_int(0, 5), "an integer from 0 to 5"),
}
_CONVERTED: Final[Mapping[str, Callable[[Any], Any]]] = {
    "dtypes": tuple,
    **{key: lambda x: Span(*x) for key, rule in _KEYS.items() if rule is _SPAN},
}
