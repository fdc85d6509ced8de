"""What every bench shares: where it ran, timing side by side, and the form of the result."""

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
    """One number that was asked for."""

    name: str
    value: float
    unit: str
    asked: str
    """A comparison such as ">= 8"."""
    holds: bool
    note: str


class Report(TypedDict):
    """What a bench returns and `orchard bench NAME --json FILE` writes."""

    bench: str
    commit: str
    machine: dict[str, str | int | float]
    figures: list[Figure]
    rows: list[Row]


def figure(name: str, value: float, unit: str, *, asked: str, note: str = "") -> Figure:
    """A measured value beside what was asked of it; `holds` follows from the two alone."""
    comparison, bound = asked.split()
    holds = bool(_COMPARE[comparison](value, float(bound)))
    return Figure(name=name, value=value, unit=unit, asked=asked, holds=holds, note=note)


def report(bench: str, figures: Sequence[Figure], rows: Sequence[Row]) -> Report:
    """The result of a bench, signed with the commit and the machine."""
    return Report(
        bench=bench, commit=commit(), machine=machine(), figures=list(figures), rows=list(rows)
    )


def interleaved(cases: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median seconds of each case after one unmeasured call of each.

    The cases take turns, so that whatever else the machine does meanwhile falls on all of them.
    """
    for call in cases.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, call in cases.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def commit() -> str:
    """The checked-out commit, marked where the tree was changed since; "unknown" outside git."""
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
    """Enough of the hardware and the software to judge a time by."""
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
    """The model name, which only Linux's own file spells out."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
