# SPDX-License-Identifier: MIT
"""Imports of the package point one way, and the command line is light."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "fastmqa_export"

#: A module may import those of the layers above it, and of its own layer what SIBLINGS allows.
#: `reference` and `accuracy` come right after `config`: they cannot import what they judge.
LAYERS = (
    ("errors",),
    ("config",),
    ("accuracy", "reference"),
    ("engine_record", "plan_header", "recipe", "shared_library", "tensorrt_log"),
    ("kernels",),
    ("cpu_kernels",),
    ("plugins",),
    ("op",),
    ("cache", "modules"),
    ("files", "progress", "runtime"),
    ("function_body",),
    ("onnx_export", "pattern"),
    ("source", "polygraphy_plugins"),
    ("absorbed", "builtin", "falcon", "huggingface"),
    ("load_source",),
    ("runners", "timing"),
    ("language",),
    ("compare",),
    ("report", "inspect", "inspect_library", "emit", "known_failures"),
    ("triton_client", "triton_config"),
    ("bundle",),
    ("tensorrt_plugins",),
    ("engine_builder",),
    ("builder_process",),
    ("engine", "engine_session"),
    ("engine_model", "inspect_engine"),
    ("doctor", "inspect_any"),
    ("pipeline",),
)
SIBLINGS = {
    "modules": {"cache"},
    "huggingface": {"absorbed", "falcon"},
}
#: `cli` stands outside the layers: it imports anything, but inside its commands.
CLI_AT_MODULE_LEVEL = {"click", f"{PACKAGE}.errors", f"{PACKAGE}.config"}

#: What `import fastmqa_export` and its command line must not load.
HEAVY = ("jinja2", "numpy", "onnx", "onnxruntime", "polygraphy", "torch", "transformers")


def allowed_imports() -> dict[str, set[str]]:
    """For each module, the modules of the package that it may import."""
    allowed: dict[str, set[str]] = {"__init__": set(), "__main__": {"cli"}}
    above: set[str] = set()
    for layer in LAYERS:
        allowed |= {module: above | SIBLINGS.get(module, set()) for module in layer}
        above = above | set(layer)
    return allowed | {"cli": above}


def module_of(path: Path) -> str:
    """`config` for config.py, and `huggingface` for all files of a folder of that name."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Absolute names of what the imports in a tree name, functions' own imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full, from {PACKAGE}"
            if node.module == PACKAGE:
                yield from (f"{PACKAGE}.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def module_level(tree: ast.Module) -> Iterator[str]:
    """The same of what runs on import: without functions, and without `if TYPE_CHECKING:`."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from imported(node)


FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def test_the_table_names_every_module_and_no_other() -> None:
    twice = {name for name, times in Counter(sum(LAYERS, ())).items() if times > 1}
    assert not twice, f"more than once in LAYERS: {twice}"
    named, present = set(allowed_imports()), {module_of(path) for path in FILES}
    assert not present - named, f"add to LAYERS in tests/test_imports.py: {present - named}"
    assert not named - present, f"not in {PACKAGE}/, remove it from LAYERS: {named - present}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    module, tree = module_of(path), ast.parse(path.read_text(encoding="utf-8"))
    names = module_level(tree) if module == "__init__" else imported(tree)
    own = {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")}
    wrong = own - allowed_imports().get(module, set()) - {module, "__version__"}
    assert not wrong, f"{module} may not import {wrong}: see LAYERS in tests/test_imports.py"


def test_cli_imports_inside_its_commands() -> None:
    tree = ast.parse((ROOT / PACKAGE / "cli.py").read_text(encoding="utf-8"))
    names = {
        name for name in module_level(tree) if name.split(".")[0] not in sys.stdlib_module_names
    }
    assert names <= CLI_AT_MODULE_LEVEL | {f"{PACKAGE}.__version__"}


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.cli"])
def test_import_is_light(module: str) -> None:
    loaded = python(f"import sys, {module}; print(*sys.modules)").split()
    assert not set(HEAVY) & set(loaded)


#: Lets Python find the standard library, click and this package, as if nothing else were installed.
ONLY_CLICK = f"""
import sys

class OnlyClick:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in sys.stdlib_module_names | {{"click", "{PACKAGE}"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, OnlyClick())
"""


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]], ids=" ".join)
def test_help_needs_only_click(arguments: list[str]) -> None:
    code = f"from {PACKAGE}.cli import main; main({arguments}, prog_name='fastmqa-export')"
    assert "fastmqa-export" in python(ONLY_CLICK + code)


def python(code: str) -> str:
    """What a fresh interpreter prints; from the root, so that no installed package is needed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
