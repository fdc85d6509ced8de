"""Bringing data: the import of a million interactions, and semantic IDs for 100,000 items.

And how good semantic IDs made of Amazon Industrial's titles are, beside the published ones.
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

from benchmarks.shared.measure import Report, Row, figure, report
from orchard import config
from orchard.catalog import catalog
from orchard.data.semantic_ids.build import QUANTIZERS, SemanticIdConfig, build
from orchard.data.semantic_ids.measure import CodeQuality, measure_codes
from orchard.data.semantic_ids.quantize import quantize

GIB = 1 << 30
INDUSTRIAL = Path("cluster/runs/amazon_industrial.toml")


def run(quick: bool) -> Report:
    """The whole command, files and start of Python included, in a process of its own."""
    events = 50_000 if quick else 1_000_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_log(folder / "log.csv", events)
        size = (folder / "log.csv").stat().st_size
        seconds, peak = timed(
            ["data", "import", str(folder / "log.csv"), str(folder / "out"), "--core", "2"]
        )
    items = 5_000 if quick else 100_000
    plain = quantised(items)
    compared = beside_published(config.load(INDUSTRIAL, []).data.path)
    note = f"{events} interactions, CSV of {size / 1e6:.0f} MB"
    return report(
        "data",
        [
            figure("import_s", seconds, "s", asked="<= 60", note=note),
            figure(
                "import_peak_gib", peak / GIB, "GiB", asked="<= 2", note="resident, at its peak"
            ),
            figure(
                "rq_kmeans_s", plain, "s", asked="<= 180", note=f"{items} x 256, 3 levels of 256"
            ),
        ],
        [
            {"events": events, "seconds": seconds, "peak_gib": peak / GIB, "rq_kmeans_s": plain},
            *compared,
        ],
    )


def write_log(path: Path, events: int) -> None:
    """A log whose users and items are text and whose popularity falls off as 1 / rank."""
    draw = np.random.default_rng(0)
    users, items = max(1, events // 12), max(1, events // 40)
    chance = 1 / np.arange(1, items + 1)
    table = {
        "user_id": np.char.add("user-", draw.integers(users, size=events).astype(str)),
        "item_id": np.char.add(
            "item-", draw.choice(items, size=events, p=chance / chance.sum()).astype(str)
        ),
        "rating": draw.integers(1, 6, size=events),
        "timestamp": draw.integers(1_600_000_000, 1_700_000_000, size=events),
    }
    csv.write_csv(pa.table(table), path)


def quantised(items: int) -> float:
    """Seconds of three levels of residual k-means over random points around 2,000 centres."""
    draw = np.random.default_rng(0)
    centre = draw.standard_normal((2000, 256), dtype=np.float32)
    noise = draw.standard_normal((items, 256), dtype=np.float32)
    points = centre[draw.integers(len(centre), size=items)] + 0.5 * noise
    begin = time.perf_counter()
    quantize(points, (256, 256, 256))
    return time.perf_counter() - begin


def beside_published(source: Path) -> list[Row]:
    """The semantic IDs of a data set, and those that each quantiser makes of its titles."""
    if not source.is_dir():
        return [{"sids": "published", "note": f"not run: there is no data set in {source}"}]
    published = measure_codes(catalog.read(source / "items.parquet").codes)
    rows: list[Row] = [{"sids": "published", **_facts(published)}]
    for name in QUANTIZERS:
        with tempfile.TemporaryDirectory() as made:
            for file in ("items.parquet", "train.parquet"):
                shutil.copyfile(source / file, Path(made) / file)
            begin = time.perf_counter()
            found = build(Path(made), SemanticIdConfig(quantiser=name), overwrite=True)
        rows.append(
            {
                "sids": name,
                **_facts(found["after"]),
                "colliding_as_quantised": found["before"]["colliding_items"],
                "residual": found["residual"][-1],
                "seconds": time.perf_counter() - begin,
            }
        )
    return rows


def _facts(found: CodeQuality) -> Row:
    """What is compared of one set of semantic IDs."""
    facts: dict[str, str | int | float | bool] = {"colliding": found["colliding_items"]}
    for number, level in enumerate(found["levels"], start=1):
        facts[f"codes_{number}"] = level["codes_used"]
        facts[f"perplexity_{number}"] = level["perplexity"]
    return facts | {"single_child_share": found["levels"][-1]["single_child_share"]}


def timed(arguments: Sequence[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *arguments], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(arguments))
    return time.perf_counter() - begin, usage.ru_maxrss * 1024
