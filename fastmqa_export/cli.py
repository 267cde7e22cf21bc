# SPDX-License-Identifier: MIT
"""The command ``fastmqa-export``: parse, call one function, print.

Results go to stdout, everything for people who watch to stderr. Nothing heavy is imported before a
command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fastmqa_export import __version__
from fastmqa_export.errors import FastMqaError, MissingDependencyError

_SOURCE = """SOURCE is a built-in (mqa, mla, or a preset: mqa-512, mqa-1024, mqa-2048, mqa-4096,
    mla-512 …), a Hugging Face folder, a .gguf file, or package.module:factory."""


class _Group(click.Group):
    """Turns this package's errors into a message and an exit code, in one place."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FastMqaError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except ImportError as error:
            missing = MissingDependencyError(
                f"{error.name or error} cannot be imported ({error}); `fastmqa-export doctor` says "
                "what is missing and how to install it"
            )
            click.echo(f"Error: {missing}", err=True)
            ctx.exit(missing.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastmqa-export")
def main() -> None:
    """MQA, GQA and MLA attention from PyTorch to ONNX, with one fused op and its proof."""
    # Progress bars of the libraries beneath would write over ours; they read this when imported.
    os.environ.setdefault("TQDM_DISABLE", "1")


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_dtype = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of weights, caches and products.",
)
_cache = click.option(
    "--cache",
    type=click.Choice(["static", "none"]),
    default="static",
    show_default=True,
    help="KV cache in buffers written in place, or a graph without a cache.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout.")
_threads = click.option(
    "--threads", type=click.IntRange(min=0), default=0, help="0: as many as cores."
)


def _limit(name: str, help: str) -> Callable[..., Any]:
    return click.option(name, type=click.IntRange(min=1), help=f"{help} Default: the recipe's.")


_prompts = _options(
    click.option("--prompt", "prompts", multiple=True, help="Text to continue; repeatable."),
    click.option("--new-tokens", type=click.IntRange(min=1), default=48, show_default=True),
)
_source_options = _options(
    click.option("--hidden", type=int, default=512, show_default=True, help="Built-in: width."),
    click.option("--heads", type=int, default=8, show_default=True, help="Built-in: query heads."),
    click.option("--kv-heads", type=int, default=1, show_default=True, help="mqa: KV heads."),
    click.option("--head-dim", type=int, default=0, help="Built-in: 0 means hidden / heads."),
    click.option(
        "--compression", type=float, default=0.5, show_default=True, help="mla: latent / head size."
    ),
    click.option(
        "--form", type=click.Choice(["absorbed", "expanded"]), default="absorbed", help="mla."
    ),
    click.option("--causal/--no-causal", default=True, help="Built-in."),
    click.option("--window", type=click.IntRange(min=0), default=0, help="Built-in: keys seen."),
    click.option("--softcap", type=float, default=0.0, help="Built-in: cap of the scores."),
    click.option(
        "--rope-theta", type=float, default=10000.0, show_default=True, help="Built-in; 0: none."
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**63 - 1),
        default=0,
        help="Built-in: of the random weights.",
    ),
    click.option(
        "--allow-pickle",
        is_flag=True,
        help="Also load pickled checkpoints, which can run code of their author.",
    ),
)


@main.command()
@click.argument("source")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The .onnx file."
)
@_dtype
@_cache
@_source_options
@_json
def export(
    source: str, output: Path, dtype: str, cache: str, as_json: bool, **options: Any
) -> None:
    """Export a model to ONNX, each attention as one fused node.

    \b
    Example: fastmqa-export export mqa-1024 -o mqa.onnx
    """
    from fastmqa_export import files, pipeline
    from fastmqa_export.progress import Progress

    if output.suffix != ".onnx":
        raise click.BadParameter(f"{output} does not end in .onnx", param_hint="-o")
    files.check_writable_folder(output.parent)
    progress = Progress(2, quiet=as_json)
    with progress.stage(f"load {source}"):
        loaded = _load(source, dtype, options)
    with progress.stage("export to ONNX"):
        exported = pipeline.export_source(loaded, output, cache)
    info = pipeline.describe_file(exported, cache)
    if as_json:
        click.echo(json.dumps(info, indent=2))
        return
    weights = f" and {exported.data_path.name}" if exported.data_path else ""
    click.echo(
        f"{output}{weights}: {exported.fused_nodes} FusedAttention nodes, opset {exported.opset}"
    )


export.help = f"{export.help}\n\n    {_SOURCE}"


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--source", required=True, help="What the file was exported from.")
@click.option("--engine", type=click.Path(path_type=Path), help="Also judge this .plan of it.")
@click.option(
    "--plugin", type=click.Path(path_type=Path), help="Library that the engine needs; else found."
)
@click.option(
    "--allow-host-code", is_flag=True, help="Run a version-compatible engine's code for the CPU."
)
@_prompts
@_threads
@_source_options
@_json
def compare(
    model: Path,
    source: str,
    engine: Path | None,
    plugin: Path | None,
    allow_host_code: bool,
    prompts: tuple[str, ...],
    new_tokens: int,
    threads: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare an exported file with its source in PyTorch and with a float64 oracle.

    onnxruntime runs the file, also with the custom op where that is built, and with --engine
    TensorRT its engine. Ends with 1 if an output is further from the oracle than the error budget
    allows, or if greedy text differs.

    \b
    Example: fastmqa-export compare mqa.onnx --source mqa-1024
    """
    from fastmqa_export import pipeline, report
    from fastmqa_export.compare import compare as run_comparison
    from fastmqa_export.inspect import float_type
    from fastmqa_export.language import PROMPTS
    from fastmqa_export.plugins import ort_library_if_built
    from fastmqa_export.progress import Progress

    if engine is None and (plugin or allow_host_code):
        raise click.UsageError("--plugin and --allow-host-code are for an --engine")
    dtype = float_type(model)
    others = {}
    progress = Progress(3 if engine else 2, quiet=as_json)
    if engine:
        from fastmqa_export.engine_model import engine_model
        from fastmqa_export.engine_session import EngineSession

        with progress.stage(f"load {engine}"):
            session = EngineSession(
                engine, plugin=plugin, model=model, allow_host_code=allow_host_code
            )
            others[session.label] = engine_model(session)
    with progress.stage(f"load {source}"):
        loaded = _load(source, dtype, options)
    with progress.stage("compare"):
        comparison = run_comparison(
            loaded,
            model,
            library=ort_library_if_built(),
            others=others,
            prompts=prompts or PROMPTS,
            new_tokens=new_tokens,
            threads=threads,
            progress=progress.say,
        )
    result = pipeline.describe_comparison(comparison, loaded)
    click.echo(json.dumps(report.finite(result), indent=2) if as_json else report.summary(result))
    sys.exit(0 if comparison.passed else 1)


@main.command()
@click.argument("source")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the results."
)
@_dtype
@_cache
@_prompts
@_threads
@_source_options
@_json
def run(
    source: str,
    output: Path,
    dtype: str,
    cache: str,
    prompts: tuple[str, ...],
    new_tokens: int,
    threads: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Export, compare, time, and write report.html: the whole job.

    Ends with 1 if the comparison fails; the report is written all the same.

    \b
    Example: fastmqa-export run mqa-1024 -o result
    """
    from fastmqa_export import pipeline, report
    from fastmqa_export.language import PROMPTS
    from fastmqa_export.plugins import ort_library_if_built

    result = pipeline.run(
        lambda: _load(source, dtype, options),
        output,
        cache=cache,
        prompts=prompts or PROMPTS,
        new_tokens=new_tokens,
        threads=threads,
        library=ort_library_if_built(),
        quiet=as_json,
    )
    click.echo(json.dumps(report.finite(result), indent=2) if as_json else report.summary(result))
    if not as_json:
        click.echo(f"\nreport: {output / 'report.html'}")
    sys.exit(0 if result["verdict"]["passed"] else 1)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The .plan file."
)
@click.option(
    "--backend",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    default="tensorrt",
    show_default=True,
    help="With the plugin, for the GPU present; or ahead of time, without a GPU or the plugin.",
)
@click.option("--recipe", help="t4, a10, l4, a100, h100, rtx4090, or a .toml file.")
@click.option(
    "--sm", "sms", type=int, multiple=True, help="tensorrt-rtx: build for SM 75, 86 …; repeatable."
)
@_limit("--max-batch", help="Most sequences at once.")
@_limit("--max-sequence", help="Most tokens of a sequence in one prefill.")
@_limit("--capacity", help="Tokens of a sequence that the KV cache holds.")
@click.option("--plugin/--no-plugin", default=True, help="tensorrt: or the functions of the file.")
@click.option(
    "--version-compatible", is_flag=True, help="tensorrt: later versions may run the engine."
)
@click.option("--force", is_flag=True, help="Build even if nothing changed.")
@_json
def build(
    model: Path,
    output: Path,
    backend: str,
    recipe: str | None,
    sms: tuple[int, ...],
    max_batch: int | None,
    max_sequence: int | None,
    capacity: int | None,
    plugin: bool,
    version_compatible: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Build a TensorRT engine from an exported file.

    A .json file beside the engine says what it was made from; nothing is built again if that is
    the same.

    \b
    Example: fastmqa-export build mqa.onnx -o mqa.plan --backend tensorrt-rtx --sm 75 --sm 86
    """
    from fastmqa_export import engine
    from fastmqa_export.progress import Progress
    from fastmqa_export.recipe import Recipe, find_recipe

    if output.suffix not in (".plan", ".engine"):
        raise click.BadParameter(f"{output} ends in neither .plan nor .engine", param_hint="-o")
    base = Recipe.read(find_recipe(recipe)) if recipe else Recipe()
    built = engine.build(
        model,
        output,
        backend=backend,
        recipe=base.limited(max_batch=max_batch, max_sequence=max_sequence, capacity=capacity),
        sms=sms,
        use_plugin=plugin,
        version_compatible=version_compatible,
        force=force,
        progress=Progress(2, quiet=as_json),
    )
    if as_json:
        info = {"plan": str(output), "is_new": built.is_new, **dataclasses.asdict(built.record)}
        click.echo(json.dumps(info, indent=2))
    else:
        click.echo(engine.describe(built))


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@_json
def inspect(file: Path, as_json: bool) -> None:
    """Say what an ONNX file, an engine or a compiled library holds.

    \b
    Example: fastmqa-export inspect mqa.onnx
    """
    from fastmqa_export.inspect_any import inspect_any

    info, text = inspect_any(file)
    click.echo(json.dumps(info, indent=2) if as_json else text)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the models."
)
@click.option(
    "--plan",
    "plans",
    multiple=True,
    metavar="[CC=]PLAN",
    help="Engine of MODEL, 7.5=t4.plan; repeatable. None: on the CPU only.",
)
@click.option(
    "--plugin", type=click.Path(path_type=Path), help="TensorRT plugin. Default: the installed one."
)
@click.option("--name", default="", help="Of the model in Triton. Default: that of the file.")
@click.option(
    "--max-batch", type=click.IntRange(min=1), default=None, help="Default: the engines', or 8."
)
@click.option(
    "--capacity",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Tokens of a sequence that the KV cache holds.",
)
@click.option("--force", is_flag=True, help="Replace an older bundle.")
@_json
def bundle(model: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Write a model repository for Triton Inference Server.

    Engines are served by Triton's TensorRT backend, one per compute capability, and the ONNX file
    itself by its onnxruntime backend on the CPU; client.py checks the running server.

    \b
    Example: fastmqa-export bundle mqa.onnx -o models --plan t4.plan --plan 8.6=a10.plan
    """
    from fastmqa_export.bundle import describe, write_bundle
    from fastmqa_export.progress import Progress

    manifest = write_bundle(model, output, progress=Progress(1, quiet=as_json), **options)
    click.echo(json.dumps(manifest, indent=2) if as_json else describe(manifest, output))


@main.command()
@click.option("--explain", is_flag=True, help="List what is known to fail, and what to do.")
@_json
def doctor(explain: bool, as_json: bool) -> None:
    """Say what is installed, what is missing, and what to do about it.

    Ends with 3 if something needed is missing.
    """
    if explain:
        from fastmqa_export.known_failures import KNOWN_FAILURES, describe_failures

        failures = [dataclasses.asdict(failure) for failure in KNOWN_FAILURES]
        click.echo(json.dumps(failures, indent=2) if as_json else describe_failures())
        return
    from fastmqa_export.doctor import describe, examine, required_missing

    checks = examine()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        click.echo(describe(checks))
        click.echo("\nWhat is known to fail, and what to do: fastmqa-export doctor --explain")
    sys.exit(3 if required_missing(checks) else 0)


@main.group()
def kernels() -> None:
    """Look at the CUDA kernels."""


@kernels.command()
@click.option("--arch", required=True, help="sm_75, sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120.")
@click.option(
    "--case", "case_file", type=click.Path(path_type=Path), required=True, help="JSON: one call."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the results."
)
@_json
def emit(arch: str, case_file: Path, output: Path, as_json: bool) -> None:
    """Write the PTX and the launches of the kernels that one call takes.

    Needs nvcc, but no GPU. DIR/kernel.ptx holds the very code that ships, and DIR/launch.json all
    that an emulator, debugger or profiler must know to run it.

    \b
    Example: fastmqa-export kernels emit --arch sm_75 --case case.json -o emitted
    """
    from fastmqa_export.emit import describe, read_case
    from fastmqa_export.emit import emit as write
    from fastmqa_export.progress import Progress

    emitted = write(read_case(case_file), arch, output, Progress(2, quiet=as_json))
    click.echo(json.dumps(emitted, indent=2) if as_json else describe(emitted, output))


def _load(source: str, dtype: str, options: dict[str, Any]) -> Any:
    """The model that the options of a command describe."""
    from fastmqa_export.builtin import BuiltinOptions
    from fastmqa_export.load_source import DTYPES, load_source

    allow_pickle = options.pop("allow_pickle")
    return load_source(
        source, DTYPES[dtype], options=BuiltinOptions(**options), allow_pickle=allow_pickle
    )
