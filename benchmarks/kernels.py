"""Times each kernel on a CUDA device at the shapes of the served models and compares it with what the device can do.

    python -m benchmarks.kernels [--only decode] [--no-results] [--sweep]

A kernel is bound by memory or by arithmetic: its fraction of peak is bytes per second over the copy bandwidth, or
operations per second over the matrix rate. Times are medians over launches with a cold L2 cache; data is random.
"""

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from triton.runtime.errors import OutOfResources

from benchmarks.kernel_cases import CUDA, Case, cases
from benchmarks.kernel_sweep import SWEEPS, applied
from benchmarks.results import append, provenance
from kernels.dispatch import select_kernels

COPY_BYTES_PER_SECOND = 4.28e12
MATRIX_FLOPS = 790e12
"""Measured on an H200: a large device-to-device copy, bytes read and written; a large bf16 product of random data."""


def main() -> None:
    """Measure, print a table, append the rows to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose operation's name contains this")
    parser.add_argument("--no-results", action="store_true", help="append nothing to benchmarks/results")
    parser.add_argument("--sweep", action="store_true", help="compare launch settings instead; appends nothing")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels are timed on a CUDA device, and there is none")
    torch.manual_seed(0)
    if arguments.sweep:
        _sweep(arguments.only)
        return
    table = Table("operation", "shape", "us", "TB/s", "TFLOP/s", "of peak")
    rows = []
    source = provenance()
    for case in cases(select_kernels(CUDA), arguments.only):
        seconds = _median_seconds(case.run)
        fraction = _fraction_of_peak(case, seconds)
        table.add_row(
            case.op,
            case.shape,
            f"{seconds * 1e6:.1f}",
            f"{case.bytes / seconds / 1e12:.2f}",
            f"{case.flops / seconds / 1e12:.1f}",
            f"{fraction:.0%}",
        )
        rows.append(
            {
                "bench": "kernel",
                "op": case.op,
                "shape": case.shape,
                "dtype": "bfloat16",
                "device": torch.cuda.get_device_name(),
                "devices": 1,
                "seconds": seconds,
                "bytes": case.bytes,
                "flops": case.flops,
                "fraction_of_peak": round(fraction, 4),
                **source,
            }
        )
    Console(width=120).print(table)
    if not arguments.no_results:
        append("kernels", rows)


def _sweep(only: str) -> None:
    """Time the cases under every setting of their operation and print which is the fastest for each shape."""
    table = Table("operation", "shape", "setting", "us", "of peak", title=torch.cuda.get_device_name())
    for sweep in SWEEPS:
        if only not in sweep.op:
            continue
        timed: dict[str, list[tuple[float, str, str]]] = {}
        for setting in sweep.settings:
            with applied(sweep, setting) as kernels:
                for case in cases(kernels, sweep.op):
                    if case.op != sweep.op:
                        continue
                    try:
                        seconds = _median_seconds(case.run, repeats=11)
                    except OutOfResources as error:
                        table.add_row(case.op, case.shape, setting.name, "-", f"does not fit: {error.name}")
                        continue
                    fraction = f"{_fraction_of_peak(case, seconds):.0%}"
                    timed.setdefault(case.shape, []).append((seconds, setting.name, fraction))
        for shape, results in timed.items():
            for place, (seconds, name, fraction) in enumerate(sorted(results)):
                table.add_row(sweep.op, shape if not place else "", name, f"{seconds * 1e6:.1f}", fraction)
            table.add_section()
    Console(width=150).print(table)


def _fraction_of_peak(case: Case, seconds: float) -> float:
    return max(case.bytes / COPY_BYTES_PER_SECOND, case.flops / MATRIX_FLOPS) / seconds


def _median_seconds(run: Callable[[], object], repeats: int = 21) -> float:
    """Median over single launches, each behind a write larger than the L2 cache that hides the launch as well."""
    flush = torch.empty(1 << 30, dtype=torch.uint8, device=CUDA)
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]


if __name__ == "__main__":
    main()
