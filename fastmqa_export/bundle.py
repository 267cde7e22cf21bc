# SPDX-License-Identifier: MIT
"""A model repository for Triton Inference Server, from an exported file and engines of it.

What Triton does was read in its source of summer 2026 (2.73); no server has run it here.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fastmqa_export import __version__, plugins, triton_config
from fastmqa_export.engine_record import EngineRecord, check_engine, digest, record_path
from fastmqa_export.errors import ConfigError, EngineError, ModelFileError, OutputError
from fastmqa_export.files import place, staged_tree, write_text
from fastmqa_export.inspect import inspect_file
from fastmqa_export.plan_header import read_header
from fastmqa_export.progress import Progress

#: Without engines, whose profiles say it.
MAX_BATCH: Final = 8

_MANIFEST: Final = "bundle.json"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PLAN: Final = re.compile(r"(?:(?P<major>\d+)\.(?P<minor>\d)=)?(?P<path>.+)")


@dataclasses.dataclass(frozen=True)
class Plan:
    """An engine for one compute capability.

    Attributes:
        path: the file.
        sm: 75 for compute capability 7.5.
        tensorrt: version that built it.
        record: what lies beside it; None if nothing does.
    """

    path: Path
    sm: int
    tensorrt: str
    record: EngineRecord | None

    @property
    def capability(self) -> str:
        """As Triton writes it: "7.5"."""
        return f"{self.sm // 10}.{self.sm % 10}"

    @property
    def version_compatible(self) -> bool:
        """Whether later versions of TensorRT run it, with the plugin that it holds."""
        return self.record is not None and self.record.made_from.version_compatible

    @property
    def wants_plugin(self) -> bool:
        """Whether the server must load a plugin for it."""
        if self.record is None:
            return True
        return bool(self.record.made_from.plugins) and not self.version_compatible


def write_bundle(
    model: Path,
    target: Path,
    *,
    capacity: int,
    plans: Sequence[str] = (),
    plugin: Path | None = None,
    name: str = "",
    max_batch: int | None = None,
    force: bool = False,
    progress: Progress,
) -> dict[str, Any]:
    """Write the repository.

    Args:
        model: an exported ONNX file, with its weights beside it.
        target: the folder; what is there must be nothing, empty, or with ``force`` such a bundle.
        capacity: T, tokens that a sequence's cache has room for.
        plans: engines of that file, "7.5=t4.plan", or "t4.plan" where its record says the SM.
        plugin: the TensorRT plugin that they were built with; None: the installed one.
        name: of the model; its CPU variant is ``name``_cpu. Empty: that of the file.
        max_batch: most requests in a batch, and most caches kept at once; None: what the engines
            allow.
        force: replace an older bundle.
        progress: has a stage for the files.

    Returns:
        What ``bundle.json`` in the folder says.

    Raises:
        ConfigError: if a name or an option is not possible.
        ModelFileError: if ``model`` is no exported file.
        EngineError: if an engine does not belong to the model, or Triton could not run it.
        OutputError: if ``target`` is in use, or cannot be written.
        MissingDependencyError: if there are engines but no plugin.
    """
    _check_target(target, force)
    name = name or model.stem
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name for a folder; give --name of letters, digits, _.-")
    info = inspect_file(model)
    interface = triton_config.interface_of(info, capacity)
    engines = [_read_plan(given, model) for given in plans]
    _check_together(engines)
    if engines and interface.states:
        raise EngineError(
            f"{model} has a KV cache that TensorRT writes in place: past and present must lie at "
            "one address, and Triton's TensorRT backend gives every input and output a buffer of "
            "its own, so the cache would be lost. Export with --cache none for engines in Triton; "
            "without --plan the file is served on the CPU; an engine with a cache runs in "
            "Python or C++ (docs/deployment.md)"
        )
    library = None
    if any(engine.wants_plugin for engine in engines):
        library = plugin or plugins.trt_plugin_path()
        _check_plugin(engines, library)
    max_batch = _max_batch(engines, max_batch)
    on_cpu = all(t.data_type != "TYPE_BF16" for t in (*interface.inputs, *interface.outputs))
    if not on_cpu and not engines:
        raise ConfigError(
            f"{model} is bfloat16, which onnxruntime cannot multiply on the CPU; give engines with "
            "--plan, or export with --dtype float32 or float16"
        )

    variants = {name: engines} if engines else {}
    if on_cpu:
        variants[f"{name}_cpu"] = []
    manifest = {
        "made_by": f"fastmqa_export {__version__}",
        "model": model.name,
        "models": {
            variant: "tensorrt" if served else "onnxruntime" for variant, served in variants.items()
        },
        "max_batch": max_batch,
        "capacity": capacity if interface.states else None,
        "tensorrt": engines[0].tensorrt if engines else None,
        "version_compatible": bool(engines) and all(e.version_compatible for e in engines),
        "sms": [engine.sm for engine in engines],
        "plugin": library.name if library else None,
    }
    with progress.stage("write the repository"), staged_tree(target) as folder:
        for variant, served in variants.items():
            files = {engine.capability: f"model_cc{engine.sm}.plan" for engine in served}
            text = triton_config.config_text(
                variant, interface, model=model.name, max_batch=max_batch, plans=files
            )
            version = folder / variant / "1"
            version.mkdir(parents=True)
            write_text(version.parent / "config.pbtxt", text)
            for source, to in _files_of(served, files) if served else _files_of_model(model, info):
                progress.say(source.name)
                place(source, version / to)
        if library:
            place(library, folder / library.name)
        write_text(folder / "client.py", Path(__file__).with_name("triton_client.py").read_text())
        write_text(folder / "start.sh", _start_script(engines, library))
        (folder / "start.sh").chmod(0o755)
        write_text(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def describe(manifest: dict[str, Any], target: Path) -> str:
    """What was written, for people."""
    lines = [f"{target}: {', '.join(f'{m} ({b})' for m, b in manifest['models'].items())}"]
    if manifest["tensorrt"]:
        sms = ", ".join(f"SM{sm}" for sm in manifest["sms"])
        or_later = " or later" if manifest["version_compatible"] else ""
        lines.append(
            f"engines for {sms}; the server's TensorRT must be {manifest['tensorrt']}{or_later}"
        )
    if manifest["capacity"]:
        lines.append(f"{manifest['max_batch']} sequences of {manifest['capacity']} tokens at once")
    lines.append(f"start it: {target}/start.sh; then check it: python {target}/client.py")
    return "\n".join(lines)


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"cannot write to {target}: it is a file; choose another name")
    if not any(target.iterdir()):
        return
    if not _is_bundle(target):
        raise OutputError(f"{target} holds other files; choose an empty or a new folder")
    if not force:
        raise OutputError(f"{target} holds a bundle already; replace it with --force")


def _is_bundle(folder: Path) -> bool:
    try:
        text = (folder / _MANIFEST).read_text(encoding="utf-8")
        return str(json.loads(text)["made_by"]).startswith("fastmqa_export ")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_plan(given: str, model: Path) -> Plan:
    match = _PLAN.fullmatch(given)
    path = Path(match["path"] if match else given)
    sm = 10 * int(match["major"]) + int(match["minor"]) if match and match["major"] else None
    record = check_engine(path, model)
    header = read_header(path)
    if header.backend != "tensorrt":
        raise EngineError(
            f"{path} is an engine of TensorRT-RTX, which Triton has no backend for; build it with "
            "--backend tensorrt"
        )
    if record is None:
        if sm is None:
            raise ConfigError(
                f"--plan {given}: no {record_path(path).name} says which GPU it is for; give its "
                f"compute capability, as in 7.5={given}"
            )
        return Plan(path, sm, header.version, None)
    sms = record.made_from.sms
    if sm is None and len(sms) == 1:
        sm = sms[0]
    if sm not in sms:
        raise ConfigError(
            f"--plan {given}: the engine is for SM{', SM'.join(map(str, sms))}"
            + ("; say which, as in 7.5=t4.plan" if sm is None else f", not for SM{sm}")
        )
    return Plan(path, sm, record.tensorrt, record)


def _check_together(engines: Sequence[Plan]) -> None:
    """Refuse engines that one server cannot hold: two for a GPU, or of two TensorRTs."""
    by_sm: dict[int, Plan] = {}
    for engine in engines:
        if (other := by_sm.setdefault(engine.sm, engine)) is not engine:
            raise ConfigError(
                f"{other.path} and {engine.path} are both for SM{engine.sm}; give one of them"
            )
        if engine.tensorrt != engines[0].tensorrt:
            raise EngineError(
                f"{engines[0].path} is of TensorRT {engines[0].tensorrt} and {engine.path} of "
                f"{engine.tensorrt}; a server has one TensorRT: build both with its version"
            )


def _check_plugin(engines: Sequence[Plan], library: Path) -> None:
    if not library.is_file():
        raise ConfigError(f"--plugin {library} is no file")
    found = digest(library)
    for engine in engines:
        built_with = engine.record.made_from.plugins.values() if engine.record else ()
        if engine.wants_plugin and built_with and found not in built_with:
            raise EngineError(
                f"{engine.path} was built with another plugin than {library}; give that one with "
                "--plugin, or build the engine anew"
            )


def _max_batch(engines: Sequence[Plan], asked: int | None) -> int:
    """The batch that every engine takes.

    Raises:
        ConfigError: if more is asked for.
    """
    largest = [
        profile["batch"][2]
        for engine in engines
        if engine.record
        for profile in engine.record.made_from.profiles.values()
    ]
    if asked and largest and asked > min(largest):
        raise ConfigError(
            f"--max-batch {asked} is more than the engines' {min(largest)}; build them for more"
        )
    return asked or min(largest, default=MAX_BATCH)


def _files_of(engines: Sequence[Plan], names: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    """Engines and their records, and what they are called in the repository."""
    for engine in engines:
        name = names[engine.capability]
        yield engine.path, name
        if engine.record:
            yield record_path(engine.path), record_path(Path(name)).name


def _files_of_model(model: Path, info: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """An ONNX file and its weights, likewise."""
    for name in info["weights_files"]:
        if Path(name).name != name:
            raise ModelFileError(f"{model} keeps weights in {name}, not beside it; export it again")
        yield model.parent / name, name
    yield model, "model.onnx"


def _start_script(engines: Sequence[Plan], library: Path | None) -> str:
    options = []
    if library:
        # Quoted in the script: Triton separates several libraries by semicolons.
        options.append(f'--backend-config=tensorrt,plugins="$here"/{shlex.quote(library.name)}')
    if any(engine.version_compatible for engine in engines):
        options.append("--backend-config=tensorrt,version-compatible=true")
    arguments = " ".join(['--model-repository="$here"', *options, '"$@"'])
    return (
        "#!/bin/sh\n"
        "# Serves the models of this folder; arguments are passed on. In a container of Triton:\n"
        '#   docker run --gpus all --rm -p 8001:8001 -v "$PWD:/models:ro" IMAGE /models/start.sh\n'
        'here=$(cd "$(dirname "$0")" && pwd)\n'
        f"exec tritonserver {arguments}\n"
    )
