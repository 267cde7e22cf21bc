# SPDX-License-Identifier: MIT
"""From an exported ONNX file to a TensorRT engine: what to build, whether to, and its record.

The builder runs in a process of its own, see `fastmqa_export.engine_builder`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fastmqa_export import engine_record, files, plugins
from fastmqa_export.builder_process import run_builder
from fastmqa_export.engine_builder import INSTALL, MODULES, BuildRequest, make_shapes, timings_path
from fastmqa_export.engine_record import EngineRecord, Ingredients, Profile
from fastmqa_export.errors import ConfigError, EngineError, MissingDependencyError, ModelFileError
from fastmqa_export.inspect import inspect_file
from fastmqa_export.progress import Progress
from fastmqa_export.recipe import Recipe

#: ONNX's names of the types of files, and their sizes in bytes.
_DTYPES: Final = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16"}
_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
#: What the dynamic dimensions of an exported file are called.
_DIMENSIONS: Final = ("batch", "sequence", "capacity")


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine that is there.

    Attributes:
        plan: its file; the record lies beside it.
        record: what it was made from.
        is_new: false where an engine made from the same was there already.
    """

    plan: Path
    record: EngineRecord
    is_new: bool


def build(
    model: Path,
    plan: Path,
    *,
    backend: str = "tensorrt",
    recipe: Recipe | None = None,
    sms: Sequence[int] = (),
    use_plugin: bool = True,
    version_compatible: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Engine:
    """Build an engine, unless one that was made from the same is there.

    Args:
        model: an exported ONNX file; its weights lie beside it.
        plan: the engine's file; its record is ``plan``.json, and with "tensorrt" its kernel
            timings are ``plan``.timing. All are replaced together, or none.
        backend: "tensorrt" builds for the GPU present, with the plugin; "tensorrt-rtx" ahead of
            time, without a GPU, from the functions of the file.
        recipe: sizes and limits; None: those of ``Recipe()``.
        sms: compute capabilities to build for, 75 for 7.5; only for "tensorrt-rtx". Empty: that of
            the recipe.
        use_plugin: false builds from the functions of the file with "tensorrt" too.
        version_compatible: later versions of TensorRT may run the engine, which carries its
            plugin inside; only for "tensorrt".
        force: build even if nothing changed.
        progress: told of two stages.

    Returns:
        The engine.

    Raises:
        ConfigError: if the arguments, the recipe and the file contradict each other.
        ModelFileError: if the file is no ONNX model, or one that is not fit for an engine.
        MissingDependencyError: without TensorRT, or the plugin.
        EngineError: if TensorRT refuses the model, with its reason.
        OutputError: if the files cannot be written.
    """
    recipe = recipe or Recipe()
    progress = progress or Progress(2, quiet=True)
    _check_backend(backend, sms, version_compatible)
    with progress.stage(f"read {model}"):
        info = _inspect(model)
        profiles = make_profiles(info["inputs"], recipe)
        _check_recipe(recipe, info, profiles)
        target = tuple(sorted(set(sms))) or _target_sms(recipe, backend)
        takes_plugin = backend == "tensorrt" and use_plugin and bool(info["fused_attention"])
        libraries = [plugins.trt_plugin_path()] if takes_plugin else []
        weights = [model.parent / name for name in info["weights_files"]]
        made_from = Ingredients(
            backend=backend,
            sms=target,
            model={path.name: engine_record.digest(path) for path in (model, *weights)},
            plugins={path.name: engine_record.digest(path) for path in libraries},
            capacity=recipe.capacity if "decode" in profiles else None,
            profiles=profiles,
            workspace_mib=recipe.workspace_mib,
            optimization_level=recipe.optimization_level,
            version_compatible=version_compatible,
        )
    with progress.stage(f"build {plan}"):
        if not force and (record := _up_to_date(plan, made_from)):
            return Engine(plan, record, is_new=False)
        files.check_writable_folder(plan.parent)
        names = [plan.name, engine_record.record_path(plan).name]
        if backend == "tensorrt":
            names.insert(0, timings_path(plan).name)
        with files.staged_folder(plan.parent, names) as folder:
            staged = folder / plan.name
            request = BuildRequest(
                made_from=made_from,
                model=os.fspath(model.absolute()),
                plan=os.fspath(staged),
                plugins=[os.fspath(path.resolve()) for path in libraries],
                timings=os.fspath(timings_path(plan)),
            )
            record = EngineRecord(
                tensorrt=run_builder(request, progress),
                bytes=staged.stat().st_size,
                sha256=engine_record.digest(staged),
                made_from=made_from,
            )
            engine_record.record_path(staged).write_text(record.to_json(), encoding="utf-8")
    return Engine(plan, record, is_new=True)


def describe(engine: Engine) -> str:
    """The engine for people."""
    record, made_from = engine.record, engine.record.made_from
    lines = [
        f"{engine.plan}: {'built' if engine.is_new else 'up to date'}, {record.bytes:,} bytes, "
        f"{made_from.backend} {record.tensorrt}, for {', '.join(f'SM{n}' for n in made_from.sms)}"
    ]
    if made_from.capacity is not None:
        lines.append(f"KV cache: {made_from.capacity} tokens")
    for phase, profile in made_from.profiles.items():
        sizes = (f"{name} {low} to {high}" for name, (low, _, high) in profile.items())
        best = " × ".join(str(best) for _, best, _ in profile.values())
        lines.append(f"{phase}: {', '.join(sizes)}, tuned for {best}")
    return "\n".join(lines)


def _check_backend(backend: str, sms: Sequence[int], version_compatible: bool) -> None:
    if backend not in MODULES:
        raise ConfigError(f"backend is {backend}; it must be one of {', '.join(MODULES)}")
    if sms and backend == "tensorrt":
        raise ConfigError(
            "--sm is given, but the backend tensorrt builds for the GPU that is present; leave "
            "--sm out, or build ahead of time with --backend tensorrt-rtx"
        )
    if version_compatible and backend == "tensorrt-rtx":
        raise ConfigError(
            "--version-compatible is given, but only the backend tensorrt builds such engines; "
            "leave one of the two out"
        )
    if importlib.util.find_spec(MODULES[backend]) is None:
        raise MissingDependencyError(f"{MODULES[backend]} is not installed; {INSTALL[backend]}")


def _inspect(model: Path) -> dict[str, Any]:
    info = inspect_file(model)
    if info["problems"]:
        raise ModelFileError(
            f"{model} is not fit for an engine:\n" + "\n".join(info["problems"]) + "\nexport it "
            "again with `fastmqa-export export`"
        )
    return info


def make_profiles(inputs: Sequence[Mapping[str, Any]], recipe: Recipe) -> dict[str, Profile]:
    """Sizes for prefill, TensorRT's profile 0, and with a cache for decode, its profile 1.

    Args:
        inputs: name and shape of each input of an exported file.
        recipe: the sizes.

    Raises:
        ConfigError: if a dimension has a name that exported files do not have, or a prefill does
            not fit in the cache.
    """
    dims = {(x["name"], d) for x in inputs for d in x["shape"] if isinstance(d, str)}
    if unknown := sorted((name, d) for name, d in dims if d not in _DIMENSIONS):
        raise ConfigError(
            "the size of "
            + ", ".join(f"dimension {d!r} of {name}" for name, d in unknown)
            + f" is not known; dynamic dimensions are called {', '.join(_DIMENSIONS)}, as "
            "`fastmqa-export export` calls them"
        )
    sizes = {
        "batch": dataclasses.astuple(recipe.prefill_batch),
        "sequence": dataclasses.astuple(recipe.prefill_sequence),
    }
    if not any(d == "capacity" for _, d in dims):
        return {"prefill": sizes}
    if recipe.prefill_sequence.max > recipe.capacity:
        raise ConfigError(
            f"a prefill takes up to {recipe.prefill_sequence.max} tokens, and the KV cache holds "
            f"{recipe.capacity}; lower --max-sequence, or raise --capacity"
        )
    decode = {"batch": dataclasses.astuple(recipe.decode_batch), "sequence": (1, 1, 1)}
    return {"prefill": sizes, "decode": decode}


def _check_recipe(recipe: Recipe, info: Mapping[str, Any], profiles: Mapping[str, Profile]) -> None:
    """Refuse a file of another type, and one that does not fit in the GPU's memory."""
    found = (_DTYPES[x["dtype"]] for x in info["outputs"] if x["dtype"] in _DTYPES)
    dtype = next(found, "float32")
    if dtype not in recipe.dtypes:
        raise ConfigError(
            f"the file is of {dtype}, and the recipe for {recipe.gpu} takes "
            f"{', '.join(recipe.dtypes)}; export the model with --dtype {recipe.dtypes[0]}"
        )
    if recipe.memory_gb is None:
        return
    weights = info["inline_bytes"] + info["external_bytes"]
    cache = max(
        sum(
            _BYTES[dtype] * math.prod(largest)
            for name, (_, _, largest) in make_shapes(info["inputs"], p, recipe.capacity).items()
            if name.startswith("past_key_values.")
        )
        for p in profiles.values()
    )
    needed = weights + cache + (recipe.workspace_mib << 20)
    if needed > recipe.memory_gb * 1e9:
        raise ConfigError(
            f"weights of {weights / 1e9:.2f} GB, KV caches of {cache / 1e9:.2f} GB and a workspace "
            f"of {recipe.workspace_mib} MiB do not fit in the {recipe.memory_gb:g} GB of "
            f"{recipe.gpu}; lower --max-batch or --capacity"
        )


def _target_sms(recipe: Recipe, backend: str) -> tuple[int, ...]:
    """The compute capability of the GPU that the recipe, or this machine, has."""
    if backend == "tensorrt":
        sm = device_sm()
        if recipe.sm not in (None, sm):
            raise ConfigError(
                f"the recipe is for {recipe.gpu} (SM{recipe.sm}), and this GPU is SM{sm}; TensorRT "
                "builds for the GPU that is present: choose another recipe"
            )
        return (sm,)
    if recipe.sm is None:
        raise ConfigError(
            "TensorRT-RTX builds ahead of time and must know for which GPUs: give --sm, for "
            "example --sm 75 --sm 86, or a --recipe"
        )
    return (recipe.sm,)


def device_sm() -> int:
    """The compute capability of the GPU that is present, 75 for 7.5.

    Raises:
        EngineError: if there is none.
    """
    import torch  # here: ahead of time, nothing else needs it

    if not torch.cuda.is_available():
        raise EngineError(
            "TensorRT builds on the GPU that it builds for, and PyTorch finds no CUDA device here: "
            "check nvidia-smi, or build without a GPU with --backend tensorrt-rtx --sm ..."
        )
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _up_to_date(plan: Path, made_from: Ingredients) -> EngineRecord | None:
    """The record of an engine that need not be built again."""
    try:
        record = engine_record.check_engine(plan)
    except EngineError:
        return None
    if record is None or record.made_from != made_from:
        return None
    return record if record.tensorrt == _installed_version(made_from.backend) else None


def _installed_version(backend: str) -> str | None:
    """The version that would build; asked in a process of its own, like all of TensorRT."""
    module = MODULES[backend]
    code = f"import {module}; print({module}.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
