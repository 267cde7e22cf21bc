# SPDX-License-Identifier: MIT
"""The documentation is true: its examples run and print what it shows, its links lead to files.

An example is a ``console``, ``sh``, ``bash`` or ``python`` block. In a ``console`` block, lines
that start with ``$ `` are commands (a backslash at the end continues one), and the lines after each
are what it prints, stdout and stderr together. There ``...`` stands for any text within a line, and
alone on a line for any lines. Of the other kinds only success is checked.

The blocks of a file run in order, in one temporary folder. One is left out by an HTML comment on
the line above it, with a reason, which pytest then lists: ``<!-- not run: needs a GPU -->``.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATTERNS = ("README.md", "CONTRIBUTING.md", "docs/*.md", "engines/*.md", "plugins/*.md")
DOCUMENTS = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))

RUN = {"console", "sh", "bash", "python"}
FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run:(?P<reason>.*)-->")
LINK = re.compile(r"\]\((?P<target>[^)\s]+)|(?:src|href)=\"(?P<quoted>[^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """One fenced block that is to be run."""

    document: Path
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(document: Path) -> list[Block]:
    """The examples of a Markdown file, in order."""
    markdown, found = document.read_text(encoding="utf-8"), []
    for fence in FENCE.finditer(markdown):
        before = markdown[: fence.start()].splitlines()
        if fence["language"] in RUN:
            comment = NOT_RUN.fullmatch(before[-1].strip()) if before else None
            reason = comment["reason"].strip() if comment else None
            found.append(Block(document, len(before) + 1, fence["language"], fence["text"], reason))
    return found


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]


def test_the_readme_has_an_example_that_runs() -> None:
    readme = [block for block in BLOCKS if block.document == ROOT / "README.md"]
    assert any(block.not_run is None for block in readme), "README.md: missing, or nothing runs"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    return {document: tmp_path_factory.mktemp(document.stem) for document in DOCUMENTS}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_example(block: Block, folders: dict[Path, Path]) -> None:
    if block.not_run is not None:
        assert block.not_run, f"{block}: say why it is not run"
        pytest.skip(f"{block}: {block.not_run}")
    folder = folders[block.document]
    if block.language == "console":
        for command, expected in commands(block.text):
            printed = run(["bash", "-euo", "pipefail", "-c", command], folder)
            if not matches(expected, printed):
                pytest.fail(f"{block}: $ {command}\nshown:\n{expected}\nprinted:\n{printed}")
    elif block.language == "python":
        # In a file, because torch and onnxscript read the source of what they are given.
        script = folder / f".block_{block.line}.py"
        script.write_text(block.text, encoding="utf-8")
        run([sys.executable, str(script)], folder)
    else:
        run(["bash", "-euo", "pipefail", "-c", block.text], folder)


def commands(console: str) -> list[tuple[str, str]]:
    """The commands of a ``console`` block, each with the output shown below it."""
    first, *rest = re.split(r"^\$ ", console, flags=re.MULTILINE)
    assert not first.strip() and rest, f"a console block starts with `$ `, not with: {first}"
    command = re.compile(r"(?:.*\\\n)*.*\n")
    return [(found[0], part[found.end() :]) for part in rest if (found := command.match(part))]


def run(command: list[str], folder: Path) -> str:
    """What a command prints; a failure of the test if it does not end with 0."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "80",  # help texts wrap as in a plain terminal
        "PYTHONUNBUFFERED": "1",  # stdout and stderr come in the order they were written
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{command[-1]}\nended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def matches(expected: str, printed: str) -> bool:
    pattern = ""
    for line in expected.splitlines():
        if line.strip() == "...":
            pattern += r"(?:.*\n)*"
        else:
            pattern += ".*".join(map(re.escape, line.rstrip().split("..."))) + "\n"
    lines = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
    return re.fullmatch(pattern, lines) is not None


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("", "", True),
        ("", "surprise\n", False),
        ("error 1e-7\n", "error 1e-7  \n", True),
        ("error ... of 2\n", "error 1e-7 of 2\n", True),
        ("error ... of 2\n", "error\n1 of 2\n", False),
        ("first\n...\nlast\n", "first\nlast\n", True),
        ("first\n...\nlast\n", "first\n1\n2\nlast\n", True),
        ("first\n...\nlast\n", "first\n1\n2\n", False),
        ("a.c\n", "abc\n", False),
    ],
)
def test_dots_stand_for_text(expected: str, printed: str, same: bool) -> None:
    assert matches(expected, printed) is same


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for link in LINK.finditer(text):
        target = (link["target"] or link["quoted"]).partition("#")[0]
        if not target or re.match(r"[a-z]+:", target):
            continue  # a heading of this page, or another site
        path = (document.parent / target).resolve()
        assert path.is_relative_to(ROOT) and path.exists(), f"{target} does not exist"


def test_the_op_page_names_every_input_attribute_and_feature() -> None:
    from fastmqa_export.config import (
        OP_INPUTS,
        OP_OUTPUTS,
        PLUGIN_ATTRIBUTES,
        AttentionAttributes,
        Feature,
    )

    page = (ROOT / "docs" / "op.md").read_text(encoding="utf-8")
    names = [*OP_INPUTS, *OP_OUTPUTS, *AttentionAttributes.__dataclass_fields__, *PLUGIN_ATTRIBUTES]
    assert [name for name in names if f"`{name}`" not in page] == []
    assert all(f"{int(bit)} " in page.split("bits: ")[1].split("An unknown")[0] for bit in Feature)
