"""Shared tools of the benchmarks: result types, interleaved timing, machine description."""

import operator
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch

Row = Mapping[str, str | int | float | bool]
_COMPARE = {">": operator.gt, ">=": operator.ge, "<=": operator.le, "==": operator.eq}


class Figure(TypedDict):
    """Measured value with its target."""

    name: str
    value: float
    unit: str
    asked: str
    """Target as a comparison such as ">= 8"."""
    holds: bool
    note: str


class Report(TypedDict):
    """Result of a benchmark, as written by `orchard bench NAME --json FILE`."""

    bench: str
    commit: str
    machine: dict[str, str | int | float]
    figures: list[Figure]
    rows: list[Row]


def figure(name: str, value: float, unit: str, *, asked: str, note: str = "") -> Figure:
    """Return a measured value with its target; `holds` tells whether it meets the target."""
    comparison, bound = asked.split()
    holds = bool(_COMPARE[comparison](value, float(bound)))
    return Figure(name=name, value=value, unit=unit, asked=asked, holds=holds, note=note)


def report(bench: str, figures: Sequence[Figure], rows: Sequence[Row]) -> Report:
    """Return the result of a benchmark, with the commit and the machine."""
    return Report(
        bench=bench, commit=commit(), machine=machine(), figures=list(figures), rows=list(rows)
    )


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Measure the median seconds of each case by `clock`, after one warm-up call of each.

    The repeats of the cases are interleaved, so that other load of the machine affects all of them.
    """
    for call in cases.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, call in cases.items():
            start_s = clock()
            call()
            seconds[name].append(clock() - start_s)
    return {name: statistics.median(times) for name, times in seconds.items()}


def commit() -> str:
    """Return the checked-out commit, marked if the tree is dirty; "unknown" outside git."""
    call = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    return call.stdout.strip() if call.returncode == 0 else "unknown"


def machine() -> dict[str, str | int | float]:
    """Describe the hardware and software that affect timings."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts: dict[str, str | int | float] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    """Return the processor's model name, from `/proc/cpuinfo` if it exists."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
