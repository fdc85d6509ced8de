"""Measure semantic IDs of a hundred thousand to ten million items, and of items that come later.

Embeddings are random around 2,000 centers, in a file that the build maps. The codebooks, three
levels of 256, are fitted to a sample of 50,000. Each size is built in a separate process, whose
peak resident size counts, including interpreter and libraries. The last rows check what a bundle
promises: that its items get the same codes again, and that an append moves none.
"""

import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.shared.measure import Figure, Row, figure
from orchard.semantic_ids import assign, bundle, large, sampled
from orchard.semantic_ids.build import SemanticIdConfig
from orchard.semantic_ids.bundle import Bundle
from orchard.semantic_ids.quantize import residual_codes

LEVELS, SAMPLE, NEW = (256, 256, 256), 50_000, 1000
GIB = 1 << 30


def run(quick: bool) -> tuple[list[Figure], list[Row]]:
    """Measure 1e5, 1e6 and 1e7 items of 64 and 256 dimensions; `quick` stops at 1e6 of 64."""
    sizes = [(10**5, 64), (10**5, 256), (10**6, 64)]
    sizes += [] if quick else [(10**6, 256), (10**7, 256)]
    rows: list[Row] = []
    for num_items, dimensions in sizes:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows.append(pool.submit(measure, num_items, dimensions).result())
    largest = rows[-1]
    note = f"{largest['items']} x {largest['dimensions']}, fitted to {SAMPLE}"
    figures = [
        figure("sids_build_s", float(largest["build_s"]), "s", asked="<= 900", note=note),
        figure("sids_peak_gib", float(largest["peak_gib"]), "GiB", asked="<= 4", note=note),
        figure(
            "sids_repeated_share", min(float(row["repeated_share"]) for row in rows), "",
            asked="== 1", note="items that get the same codes again, alone or among others",
        ),
        figure(
            "sids_moved_by_append", max(float(row["moved_by_append"]) for row in rows), "items",
            asked="== 0",
        ),
    ]  # fmt: skip
    return figures, rows


def measure(num_items: int, dimensions: int) -> Row:
    """Build semantic IDs of random embeddings and append to the bundle; return one row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_items(folder, num_items, dimensions)
        recipe = SemanticIdConfig(levels=LEVELS, embeddings=folder / "e.npy", sample=SAMPLE)
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        quality = sampled.build_sampled(folder, recipe)
        build_s, build_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        known = Bundle.open(folder / "sids")
        vectors = np.load(folder / "e.npy", mmap_mode="r")
        shard = np.asarray(vectors[: large.SHARD])
        start_s = time.perf_counter()
        codes, _ = residual_codes(known.projection(shard), known.books)
        encode_s = time.perf_counter() - start_s
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        start_s = time.perf_counter()
        added = assign.assign(known, num_items + np.arange(NEW), shard[:NEW], share_when_full=True)
        assign_s = time.perf_counter() - start_s
        after = bundle.append(known, added.items, {})
        return {
            "items": num_items,
            "dimensions": dimensions,
            "build_s": build_s,
            "build_cpu_s": build_cpu_s,
            "peak_gib": peak / GIB,
            "encoded_per_s": len(shard) / encode_s,
            "colliding_as_quantised": quality["before"]["colliding_items"],
            "colliding": quality["after"]["colliding_items"],
            "repeated_share": float((codes == known.table.quantized[: len(shard)]).all(1).mean()),
            "new_items": NEW,
            "assign_new_s": assign_s,
            "moved_by_append": int((after.table.sid[:num_items] != known.table.sid).any(1).sum()),
        }


def write_items(folder: Path, num_items: int, dimensions: int) -> None:
    """Write items and their embeddings, a million rows at a time."""
    pq.write_table(pa.table({"item_id": np.arange(num_items)}), folder / "items.parquet")
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((2000, dimensions), dtype=np.float32)
    rows = np.lib.format.open_memmap(
        folder / "e.npy", mode="w+", dtype=np.float32, shape=(num_items, dimensions)
    )
    for start in range(0, num_items, 100_000):
        part = rows[start : start + 100_000]
        part[:] = centers[rng.integers(len(centers), size=len(part))]
        part += 0.5 * rng.standard_normal(part.shape, dtype=np.float32)
    rows.flush()
