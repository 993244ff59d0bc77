"""What people see of a load test: progress while it runs, a table, lines of JSON and a plot."""

import contextlib
import importlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table

from server.bench.messages import Progress

LATENCIES = ("ttft", "tpot", "itl", "e2e")


class Watch:
    """A line of progress on standard error, if that is a terminal."""

    def __init__(self, bars: Bars, task: TaskID, whole_s: float | None) -> None:
        self._bars = bars
        self._task = task
        self._whole_s = whole_s
        self._start = time.monotonic()
        self._before = (self._start, 0)

    def begin(self, start: float) -> None:
        """The load begins at this moment."""
        self._start = start
        self._before = (start, 0)

    def update(self, sums: Progress) -> None:
        """What there is until now."""
        now = time.monotonic()
        then, tokens = self._before
        if now - then >= 1:
            self._before = (now, sums.tokens)
            self._bars.update(self._task, rate=f"{(sums.tokens - tokens) / (now - then):,.0f} tok/s")
        done = sums.answers + sums.failures if self._whole_s is None else now - self._start
        self._bars.update(self._task, completed=done, counts=f"{sums.answers} answers, {sums.failures} failures")


@contextlib.contextmanager
def watch(title: str, warm_up: float, seconds: float | None, requests: int | None) -> Iterator[Watch]:
    """Show the progress of one load, which ends after `seconds` or `requests`."""
    whole_s = None if seconds is None else warm_up + seconds
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[counts]}  {task.fields[rate]}"),
    )
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=whole_s or requests, counts="", rate="")
        yield Watch(bars, task, whole_s)


def show_table(rows: Sequence[dict[str, Any]]) -> None:
    """A line a load, on standard output."""
    first = rows[0]
    shown = "streamed" if first["streamed"] else "whole answers"
    title = f"{first['url']}, {first['model'] or 'no model'}, {shown}: "
    title += f"prompts of {first['prompt_lengths']}, answers of {first['output_lengths']} tokens"
    table = Table(title=title, caption="latencies in ms: p50/p90/p99")
    names = ["load", "answers", "failed", "requests/s", "tok/s", *(name.upper() for name in LATENCIES)]
    extra = [name for name in ("goodput_share", "ceiling_tok_s") if name in first]
    names += [{"goodput_share": "goodput", "ceiling_tok_s": "client's ceiling"}[name] for name in extra]
    for name in names:
        table.add_column(name, justify="left" if name == "load" else "right")
    for row in rows:
        cells = [row["load"], str(row["answers"]), str(row["failures"]), f"{row['requests_s']:,.2f}"]
        cells += [f"{row['tok_s']:,.0f}", *(_percentiles(row[f"{name}_ms"]) for name in LATENCIES)]
        if "goodput_share" in row:
            cells.append(f"{row['goodput_requests_s']:,.2f}/s, {row['goodput_share']:.1%}")
        if "ceiling_tok_s" in row:
            cells.append(f"{row['ceiling_tok_s']:,.0f}{' client-bound' if row['client_bound'] else ''}")
        table.add_row(*cells)
    console = Console()
    # A table that is piped to a file has no terminal's width to fit in.
    (console if console.is_terminal else Console(width=180)).print(table)
    for row in rows:
        notes = [f"{count} x {kind}" for kind, count in row["errors"].items()]
        if row["unfinished"] and "rate" in row:
            notes.append(f"{row['unfinished']} still open at the end")
        if notes:
            console.print(f"{row['load']}: {', '.join(notes)}", highlight=False)


def append_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A line a load. OSError if the file cannot be written."""
    with path.open("ab") as file:
        file.write(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Throughput and latencies over the load. ImportError without matplotlib, OSError if the file cannot be written."""
    # Not a dependency of the server: looked up when somebody wants a plot.
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(11, 4), layout="constrained")
    places = range(len(rows))
    labels = [row["load"] for row in rows]
    left, right = figure.subplots(1, 2)
    left.plot(places, [row["tok_s"] for row in rows], "o-")
    left.set_ylabel("generated tokens a second")
    for name in ("ttft", "tpot", "e2e"):
        if all(row[f"{name}_ms"] is not None for row in rows):
            (line,) = right.plot(places, [row[f"{name}_ms"]["p50"] for row in rows], "o-", label=f"{name.upper()} p50")
            points = [row[f"{name}_ms"]["p99"] for row in rows]
            right.plot(places, points, "o:", color=line.get_color(), label=f"{name.upper()} p99")
    right.set_yscale("log")
    right.set_ylabel("ms")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.set_xticks(places, labels)
        axes.set_xlabel("load")
        axes.grid(alpha=0.3)
    left.set_ylim(bottom=0)
    figure.savefig(path)


def _percentiles(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    values = [spread[name] for name in ("p50", "p90", "p99")]
    return "/".join(f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in values)
