# SPDX-License-Identifier: MIT
"""The result of the main job on paper: ``report.json`` and one self-contained ``report.html``.

The result is a dictionary of plain values, made by `fastmqa_export.pipeline`:

* ``tool``, ``source``, ``export``, ``versions``, ``machine``: what was done, with what;
* ``graph``: op counts ``unfused`` and ``fused``;
* ``accuracy``: a row per runtime and output (errors against the float64 oracle, limit, passed);
* ``error_distribution``: histograms (label, edges in log10 of the absolute error, counts);
* ``language``: per runtime, agreement of a language model and its greedy texts; may be empty;
* ``kv_cache``: bytes per token of MHA, GQA, MQA and MLA;
* ``timings``: medians with percentiles, in milliseconds;
* ``verdict``: passed, and the reasons if not.

No time or path is in it, so that two runs differ in their timings only.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2

from fastmqa_export.files import write_text

_PLOT_WIDTH: Final = 640
_PLOT_HEIGHT: Final = 200
#: Bins at the ends with a smaller share of the values are left out of the plot.
_SHOWN_SHARE: Final = 1e-5


def write_report(result: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html`` into an existing folder.

    Returns:
        Both paths.

    Raises:
        OutputError: if they cannot be written.
    """
    data, page = folder / "report.json", folder / "report.html"
    text = json.dumps(finite(result), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    # A lone surrogate, from bytes that are no text, becomes an escape that both formats know.
    write_text(data, text, errors="backslashreplace")
    write_text(page, render(result), errors="xmlcharrefreplace")
    return data, page


def render(result: Mapping[str, Any]) -> str:
    """The HTML page of a result."""
    template = importlib.resources.files("fastmqa_export").joinpath("report.html.j2").read_text()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(bytes=human_bytes, scientific=scientific, percent=percent)
    page: str = environment.from_string(template).render(
        **result, plot=_histogram(result["error_distribution"])
    )
    return page


def summary(result: Mapping[str, Any]) -> str:
    """The result in a few lines for a terminal: accuracy, texts, verdict."""
    lines: list[str] = []
    several = len({row["runtime"] for row in result["accuracy"]}) > 1
    for row in result["accuracy"]:
        heading = f"{row['runtime']}, {row['cases']} cases"
        if several and heading not in lines:
            lines.append(heading)
        mark = "ok  " if row["passed"] else "FAIL"
        lines.append(
            f"{mark} {row['output']:<18} max error {scientific(row['max_abs'])}, "
            f"{row['error_ratio']:.2f} × PyTorch {row['dtype']}, limit {scientific(row['limit'])}"
        )
    for language in result["language"]:
        lines.append(
            f"     top-1 agreement {percent(language['top1_agreement'])}, "
            f"mean KL {scientific(language['kl_mean'])} nats"
            + (f" in {language['runtime']}" if several else "")
        )
        for prompt in language["prompts"]:
            text, ours = (printable(prompt[key]) for key in ("prompt", "text"))
            lines += ["", f"> {text.rstrip()}", ours.strip()]
            if prompt["identical"]:
                lines.append(f"({prompt['tokens']} tokens, the same as PyTorch's)")
            else:
                lines.append(f"DIFFERS from PyTorch: {printable(prompt['pytorch']).strip()}")
    verdict = result["verdict"]
    lines += ["", "verdict: PASS" if verdict["passed"] else "verdict: FAIL"]
    lines += [f"  {reason}" for reason in verdict["reasons"]]
    return "\n".join(lines)


def finite(value: Any) -> Any:
    """The value with NaN and infinities as strings, which JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return value


def printable(text: str) -> str:
    """The text with control characters as escapes: a model may write what a terminal obeys."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def human_bytes(count: float) -> str:
    """Bytes with a binary unit: 1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.4g} {unit}"


def scientific(x: float) -> str:
    """Two significant digits: 3.4e-07; exact zero is 0."""
    return f"{x:.1e}" if x else "0"


def percent(x: float) -> str:
    """A share: 0.969 is "96.9 %"."""
    return f"{100 * x:.1f} %"


def _histogram(series: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Points of an overlaid step plot: share of values per bin of log10 |error|."""
    shares = [
        (s, [count / sum(s["counts"]) for count in s["counts"]]) for s in series if any(s["counts"])
    ]
    if not shares:
        return None
    bins = [
        (s["edges"][i], s["edges"][i + 1])
        for s, share in shares
        for i in range(len(share))
        if share[i] > _SHOWN_SHARE
    ]
    first, last = min(edge for edge, _ in bins), max(edge for _, edge in bins)
    low, high = math.floor(first), math.ceil(last)
    peak = max(max(share) for _, share in shares)

    def x(edge: float) -> str:
        return f"{_PLOT_WIDTH * (edge - low) / (high - low):.1f}"

    def y(share: float) -> str:
        return f"{_PLOT_HEIGHT * (1 - share / peak):.1f}"

    lines = []
    for s, share in shares:
        shown = [i for i in range(len(share)) if first <= s["edges"][i] < last]
        points = [(x(s["edges"][shown[0]]), y(0))]
        for i in shown:
            points += [(x(s["edges"][i]), y(share[i])), (x(s["edges"][i + 1]), y(share[i]))]
        points.append((points[-1][0], y(0)))
        lines.append({"label": s["label"], "points": " ".join(f"{a},{b}" for a, b in points)})
    return {
        "width": _PLOT_WIDTH,
        "height": _PLOT_HEIGHT,
        "lines": lines,
        "ticks": [{"x": x(edge), "label": f"1e{edge}"} for edge in range(low, high + 1)],
        "levels": [{"y": y(s), "label": percent(s)} for s in (0, peak / 2, peak)],
    }
