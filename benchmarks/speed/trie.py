"""Benchmark building, storing and searching tries of a hundred thousand to ten million items.

Items have three codes drawn uniformly from 8192, which minimizes shared prefixes. Each size is
built in a separate process, whose peak resident size counts, including interpreter, torch and
Parquet reader.

The cost of masking and selection is that of a beam search whose policy is free: its logits are a
fixed vector. A step lasts from one call of the engine to the next, or to the end. It looks up the
children, gathers their logits and ranks them; the softmax over them, which belongs to the policy
and not to the mask, is included, so the figures are upper bounds.
"""

import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from benchmarks.shared.measure import Report, Row, figure, report
from benchmarks.speed.learner import VERSION
from orchard.catalog import catalog as catalogs
from orchard.catalog import trie as tries
from orchard.catalog.trie import Trie
from orchard.catalog.view import full_view
from orchard.policy import model as models
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.model import segment_log_softmax
from orchard.settings import ModelConfig
from orchard.types import Prompts
from rollout.engine.protocol import DecodingBackend, NextCodeLogprobs
from rollout.engine.torch import TorchEngine
from rollout.item_filter import ItemFilter
from rollout.search.beam import beam

CODES, LEVELS, WIDTH, LENGTH = 8192, 3, 64, 128
"""Codes per level, levels, beam width and prompt tokens of the reported figures."""
BATCHES = (1, 8, 32)
"""Numbers of prompts for which steps are compared with those of a policy."""
REPEATS = 10
MEGABYTE = 1e6


def run(quick: bool) -> Report:
    """Measure 1e5 to 1e7 items, and the steps at 1e6 against a policy's; `quick` stops at 1e6."""
    torch.set_num_threads(1)
    sizes = [10**5, 10**6] if quick else [10**5, 10**6, 10**7]
    with tempfile.TemporaryDirectory() as folder:
        files = {size: Path(folder) / f"{size}.trie" for size in sizes}
        built_rows = [_build(size, path) for size, path in files.items()]
        loaded = {size: pickle.loads(path.read_bytes()) for size, path in files.items()}
        step_rows = _steps(loaded)
        policy_rows = _beside_a_policy(loaded[10**6])
        view_rows = _viewed(loaded[10**6])
    largest = built_rows[-1]
    worst = {
        count: max(
            (r for r in policy_rows if r["prompts"] == count), key=lambda r: float(r["search_s"])
        )
        for count in BATCHES
    }
    single_prompt, share = worst[1], max(float(row["share"]) for row in policy_rows)
    many = ", ".join(
        f"{count} at once {float(row['search_s']) * 1e3:.1f} ms"
        for count, row in worst.items()
        if count > 1
    )
    conditions = f"V={CODES}, L={LEVELS}"
    growth = float(step_rows[-1]["search_s"]) / float(step_rows[0]["search_s"])
    fastest = float(step_rows[-1]["fastest_s"]) / float(step_rows[0]["fastest_s"])
    figures = [
        figure("build_s", float(largest["parquet_to_file_s"]), "s", asked="<= 60",
               note=f"{largest['items']} items, {conditions}: Parquet to pickled trie; the sort "
               f"alone {largest['build_s']:.2f} s, median of {REPEATS}"),
        figure("file_mb", float(largest["file_mb"]), "MB", asked="<= 150",
               note="the pickled trie, as it travels to another machine"),
        figure("resident_mb", float(largest["resident_mb"]), "MB", asked="<= 150",
               note="growth of the process when the trie is read and live leaves are counted"),
        figure("peak_build_gb", float(largest["peak_mb"]) / 1e3, "GB", asked="<= 2",
               note="largest resident size of the whole process"),
        figure("mask_and_selection_ms", float(single_prompt["search_s"]) * 1e3, "ms", asked="<= 1",
               note=f"dearest level step of one prompt, 1e6 items, W={WIDTH}; the fastest turn "
               f"{float(single_prompt['fastest_s']) * 1e3:.2f} ms; {many}"),
        figure("mask_and_selection_share", share, "of a step", asked="<= 0.2",
               note="the largest of all of these steps; the policy is a fresh Qwen3 of the default "
               "sizes, FP32"),
        figure("step_growth", growth, "x", asked="<= 2",
               note=f"all level steps of one prompt, {sizes[-1]:.0e} items over {sizes[0]:.0e}; "
               f"the fastest of {2 * REPEATS} turns {fastest:.2f}x"),
    ]  # fmt: skip
    return report("trie", figures, [*built_rows, *step_rows, *policy_rows, *view_rows])


def _build(num_items: int, path: Path) -> Row:
    """Build and load one size, each in a fresh process."""
    items, row = path.with_suffix(".parquet"), {"items": num_items}
    steps: tuple[Callable[[int, Path, Path], dict[str, float]], ...]
    steps = (_write_items, _measure_build, _measure_load)
    for step in steps:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            row |= executor.submit(step, num_items, items, path).result()
    items.unlink()
    return row


def _write_items(num_items: int, items: Path, _: Path) -> dict[str, float]:
    codes = np.random.default_rng(0).integers(CODES, size=num_items * LEVELS, dtype=np.int32)
    start = np.arange(num_items + 1, dtype=np.int32) * LEVELS
    sids = pa.ListArray.from_arrays(pa.array(start), pa.array(codes))
    pq.write_table(pa.table({"item_id": np.arange(num_items), "sid": sids}), items)
    return {}


def _measure_build(_: int, items: Path, path: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    catalog = catalogs.read(items, level_size=(CODES,) * LEVELS)
    read_s = time.perf_counter() - start_s
    path.write_bytes(pickle.dumps(catalog.trie, protocol=5))
    total_s, peak = time.perf_counter() - start_s, _memory("VmHWM")
    seconds = _median(lambda: tries.build(catalog.codes, catalog=catalog.digest))
    return {
        "build_s": seconds,
        "parquet_to_catalog_s": read_s,
        "parquet_to_file_s": total_s,
        "peak_mb": peak,
        "file_mb": path.stat().st_size / MEGABYTE,
    }


def _measure_load(_: int, items: Path, path: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    full_view(catalogs.from_codes([[0], [1]]).trie)  # load torch's lazily loaded parts
    rss_before, start_s = _memory("VmRSS"), time.perf_counter()
    loaded: Trie = pickle.loads(path.read_bytes())
    seconds, read_mb = time.perf_counter() - start_s, _memory("VmRSS") - rss_before
    start_s = time.perf_counter()
    view = full_view(loaded)
    return {
        "load_s": seconds,
        "view_s": time.perf_counter() - start_s,
        "read_mb": read_mb,
        "view_mb": view.num_bytes / MEGABYTE,
        "resident_mb": _memory("VmRSS") - rss_before,
    }


def _memory(entry: str) -> float:
    """Return an entry of this process's `/proc` status in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) * 1024 / MEGABYTE


def _median(call: Callable[[], object]) -> float:
    seconds: list[float] = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds)


class FreeEngine:
    """Engine of a free policy, in which code c has the logit `logit[c]` after every prefix."""

    def __init__(self, trie: Trie) -> None:
        """Draw the logits."""
        self.trie, self.tokenizer, self.version = trie, _tokenizer(trie), VERSION
        self._logit = torch.randn(CODES, generator=torch.Generator().manual_seed(0))

    def prefill(self, prompts: Prompts) -> NextCodeLogprobs:
        """Score the children of the root."""
        return self._expand(torch.zeros(len(prompts), dtype=torch.long))

    def extend(
        self,
        state: Int64[Tensor, " F"],
        token: Int64[Tensor, " S"],
        start: Int64[Tensor, " F1"],
        node: Int64[Tensor, " F"],
    ) -> NextCodeLogprobs:
        """Score the children of the nodes."""
        return self._expand(node)

    def _expand(self, node: Int64[Tensor, " F"]) -> NextCodeLogprobs:
        children = self.trie.children(node)
        code = self.trie.code.index_select(0, children.node).long()
        logit: Float32[Tensor, " M"] = self._logit.index_select(0, code)
        logprob = segment_log_softmax(logit, children.owner, children.start)
        return NextCodeLogprobs(state=node, logprob=logprob, children=children)


class Stopwatch:
    """Engine wrapper that records the time of each call."""

    def __init__(self, engine: DecodingBackend) -> None:
        """Wrap `engine`."""
        self.trie, self.tokenizer, self.version = engine.trie, engine.tokenizer, engine.version
        self._engine = engine
        self.asked: list[float] = []

    def prefill(self, prompts: Prompts) -> NextCodeLogprobs:
        """Record the time and call the engine."""
        self.asked.append(time.perf_counter())
        return self._engine.prefill(prompts)

    def extend(
        self,
        state: Int64[Tensor, " F"],
        token: Int64[Tensor, " S"],
        start: Int64[Tensor, " F1"],
        node: Int64[Tensor, " F"],
    ) -> NextCodeLogprobs:
        """Record the time and call the engine."""
        self.asked.append(time.perf_counter())
        return self._engine.extend(state, token, start, node)


def _tokenizer(trie: Trie) -> ItemTokenizer:
    """Create a tokenizer with three special tokens and one token per code."""
    catalog: Any = SimpleNamespace(trie=trie)  # decoding needs only the trie of a catalog
    levels = tuple(torch.arange(CODES) + 3 + level * CODES for level in range(LEVELS))
    return ItemTokenizer(
        catalog=catalog, level_tokens=levels, bos=1, pad=0, size=3 + LEVELS * CODES
    )


def _prompts(count: int) -> Prompts:
    draw = np.random.default_rng(count)
    return Prompts(
        id=np.arange(count),
        target=np.zeros(count, np.int64),
        history=np.zeros(0, np.int64),
        history_start=np.zeros(count + 1, np.int64),
        token=draw.integers(3, 3 + LEVELS * CODES, count * LENGTH).astype(np.int32),
        token_start=np.arange(count + 1) * LENGTH,
    )


def _timed(
    cases: Mapping[str, DecodingBackend], prompts: Prompts, repeats: int = 2 * REPEATS
) -> dict[str, Float64[np.ndarray, "repeats steps"]]:
    """Measure the seconds of each level step of each case, interleaved; one row per search."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, engine in cases.items():
            watch = Stopwatch(engine)
            beam(watch, prompts, width=WIDTH)
            if turn:
                seconds[name].append(np.diff([*watch.asked, time.perf_counter()]).tolist())
    return {name: np.array(times) for name, times in seconds.items()}


def _steps(loaded: Mapping[int, Trie]) -> list[Row]:
    """Measure all level steps of a search, with the sizes interleaved."""
    seconds = _timed({str(size): FreeEngine(trie) for size, trie in loaded.items()}, _prompts(1))
    return [
        {
            "step_items": int(size),
            "prompts": 1,
            "search_s": float(np.median(steps, 0).sum()),
            "fastest_s": float(steps.min(0).sum()),
        }
        | {f"level_{level}_s": float(s) for level, s in enumerate(np.median(steps, 0), 1)}
        for size, steps in seconds.items()
    ]


def _beside_a_policy(trie: Trie) -> list[Row]:
    """Measure each level step with and without a policy, for each number of prompts."""
    tokenizer = _tokenizer(trie)
    model = models.create(ModelConfig(), tokenizer, seed=0)
    cases = {"free": FreeEngine(trie), "policy": TorchEngine(model, tokenizer, VERSION)}
    rows: list[Row] = []
    for count in BATCHES:
        seconds = _timed(cases, _prompts(count), REPEATS)
        rows += [
            {
                "level": level,
                "prompts": count,
                "search_s": float(np.median(free_s)),
                "fastest_s": float(free_s.min()),
                "with_policy_s": float(np.median(policy_s)),
                "share": float(np.median(free_s) / np.median(policy_s)),
            }
            for level, (free_s, policy_s) in enumerate(
                zip(seconds["free"].T, seconds["policy"].T, strict=False), 1
            )
        ]
    return rows


def _viewed(trie: Trie) -> list[Row]:
    """Measure the cost of a view and a hundred excluded leaves in a search of one prompt."""
    engine, prompts = FreeEngine(trie), _prompts(1)
    allowed = ItemFilter(
        view=full_view(trie),
        excluded=np.random.default_rng(0).integers(trie.num_leaves, size=100),
        excluded_start=np.array([0, 100]),
    )
    search_s = _median(lambda: beam(engine, prompts, width=WIDTH))
    view_search_s = _median(lambda: beam(engine, prompts, width=WIDTH, allowed=allowed))
    return [{"excluded": 100, "search_s": search_s, "search_with_view_s": view_search_s}]
