"""Benchmark data preparation: import of a million interactions, semantic IDs of many items.

Also compare semantic IDs built from Amazon Industrial's titles with the published ones.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv

from benchmarks.shared import new_items, sids
from benchmarks.shared.measure import Report, Row, figure, report
from orchard import config
from orchard.catalog import catalog
from orchard.semantic_ids.build import QUANTIZERS, SemanticIdConfig, build
from orchard.semantic_ids.measure import CodeQuality, measure_codes
from orchard.semantic_ids.quantize import quantize

GIB = 1 << 30
INDUSTRIAL = Path("cluster/runs/amazon_industrial.toml")


def run(quick: bool) -> Report:
    """Time the import command in a separate process, including files and the start of Python."""
    events = 50_000 if quick else 1_000_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_log(folder / "log.csv", events)
        size = (folder / "log.csv").stat().st_size
        seconds, peak = timed(
            ["data", "import", str(folder / "log.csv"), str(folder / "out"), "--core", "2"]
        )
    items = 5_000 if quick else 100_000
    quantize_s = quantised(items)
    published_rows = beside_published(config.load(INDUSTRIAL, []).data.path)
    sid_figures, sid_rows = sids.run(quick)
    new_figures, new_rows = new_items.run(quick)
    import_note = f"{events} interactions, CSV of {size / 1e6:.0f} MB"
    return report(
        "data",
        [
            figure("import_s", seconds, "s", asked="<= 60", note=import_note),
            figure(
                "import_peak_gib", peak / GIB, "GiB", asked="<= 2", note="resident, at its peak"
            ),
            figure(
                "rq_kmeans_s",
                quantize_s,
                "s",
                asked="<= 180",
                note=f"{items} x 256, 3 levels of 256",
            ),
            *sid_figures,
            *new_figures,
        ],
        [
            {
                "events": events,
                "seconds": seconds,
                "peak_gib": peak / GIB,
                "rq_kmeans_s": quantize_s,
            },
            *published_rows,
            *sid_rows,
            *new_rows,
        ],
    )


def write_log(path: Path, events: int) -> None:
    """Write a log with text identifiers and item popularity proportional to 1 / rank."""
    rng = np.random.default_rng(0)
    users, items = max(1, events // 12), max(1, events // 40)
    weight = 1 / np.arange(1, items + 1)
    table = {
        "user_id": np.char.add("user-", rng.integers(users, size=events).astype(str)),
        "item_id": np.char.add(
            "item-", rng.choice(items, size=events, p=weight / weight.sum()).astype(str)
        ),
        "rating": rng.integers(1, 6, size=events),
        "timestamp": rng.integers(1_600_000_000, 1_700_000_000, size=events),
    }
    csv.write_csv(pa.table(table), path)


def quantised(items: int) -> float:
    """Time three levels of residual k-means over random points around 2,000 centers, in seconds."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((2000, 256), dtype=np.float32)
    noise = rng.standard_normal((items, 256), dtype=np.float32)
    points = centers[rng.integers(len(centers), size=items)] + 0.5 * noise
    start_s = time.perf_counter()
    quantize(points, (256, 256, 256))
    return time.perf_counter() - start_s


def beside_published(source: Path) -> list[Row]:
    """Measure the semantic IDs of a data set, and those that each quantizer builds from titles."""
    if not source.is_dir():
        return [{"sids": "published", "note": f"not run: there is no data set in {source}"}]
    published_quality = measure_codes(catalog.read(source / "items.parquet").codes)
    rows: list[Row] = [{"sids": "published", **_facts(published_quality)}]
    for name in QUANTIZERS:
        with tempfile.TemporaryDirectory() as folder:
            for file in ("items.parquet", "train.parquet"):
                shutil.copyfile(source / file, Path(folder) / file)
            start_s = time.perf_counter()
            sid_report = build(Path(folder), SemanticIdConfig(quantiser=name), overwrite=True)
        rows.append(
            {
                "sids": name,
                **_facts(sid_report["after"]),
                "colliding_as_quantised": sid_report["before"]["colliding_items"],
                "residual": sid_report["residual"][-1],
                "seconds": time.perf_counter() - start_s,
            }
        )
    return rows


def _facts(quality: CodeQuality) -> Row:
    """Return the compared properties of one set of semantic IDs."""
    facts: dict[str, str | int | float | bool] = {"colliding": quality["colliding_items"]}
    for number, level in enumerate(quality["levels"], start=1):
        facts[f"codes_{number}"] = level["codes_used"]
        facts[f"perplexity_{number}"] = level["perplexity"]
    return facts | {"single_child_share": quality["levels"][-1]["single_child_share"]}


def timed(arguments: Sequence[str]) -> tuple[float, int]:
    """Run a command and return its seconds and peak resident bytes."""
    start_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *arguments], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(arguments))
    return time.perf_counter() - start_s, usage.ru_maxrss * 1024
