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
    r"""Export a model to ONNX, each attention as one fused node.

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
@_prompts
@_threads
@_source_options
@_json
def compare(
    model: Path,
    source: str,
    prompts: tuple[str, ...],
    new_tokens: int,
    threads: int,
    as_json: bool,
    **options: Any,
) -> None:
    r"""Compare an exported file with its source in PyTorch and with a float64 oracle.

    Ends with 1 if an output is further from the oracle than the error budget allows, or if greedy
    text differs.

    \b
    Example: fastmqa-export compare mqa.onnx --source mqa-1024
    """
    from fastmqa_export import pipeline, report
    from fastmqa_export.compare import PROMPTS
    from fastmqa_export.compare import compare as run_comparison
    from fastmqa_export.inspect import float_type
    from fastmqa_export.progress import Progress

    dtype = float_type(model)
    progress = Progress(2, quiet=as_json)
    with progress.stage(f"load {source}"):
        loaded = _load(source, dtype, options)
    with progress.stage("compare"):
        comparison = run_comparison(
            loaded,
            model,
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
    r"""Export, compare, time, and write report.html: the whole job.

    Ends with 1 if the comparison fails; the report is written all the same.

    \b
    Example: fastmqa-export run mqa-1024 -o result
    """
    from fastmqa_export import pipeline, report
    from fastmqa_export.compare import PROMPTS

    result = pipeline.run(
        lambda: _load(source, dtype, options),
        output,
        cache=cache,
        prompts=prompts or PROMPTS,
        new_tokens=new_tokens,
        threads=threads,
        quiet=as_json,
    )
    click.echo(json.dumps(report.finite(result), indent=2) if as_json else report.summary(result))
    if not as_json:
        click.echo(f"\nreport: {output / 'report.html'}")
    sys.exit(0 if result["verdict"]["passed"] else 1)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@_json
def inspect(file: Path, as_json: bool) -> None:
    r"""Say what an ONNX file holds.

    \b
    Example: fastmqa-export inspect mqa.onnx
    """
    from fastmqa_export.inspect import describe, inspect_file

    info = inspect_file(file)
    click.echo(json.dumps(info, indent=2) if as_json else describe(info))


@main.command()
@_json
def doctor(as_json: bool) -> None:
    """Say what is installed, what is missing, and what to do about it.

    Ends with 3 if something needed is missing.
    """
    from fastmqa_export.doctor import describe, examine, required_missing

    checks = examine()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        click.echo(describe(checks))
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
    r"""Write the PTX and the launches of the kernels that one call takes.

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
