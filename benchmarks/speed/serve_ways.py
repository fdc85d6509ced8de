"""Latency of given items, of histories that grow, and of beams by level, at one endpoint.

All is measured one request at a time through the whole application, without a socket and without
Ray. Items are scored against one forward pass of the model for each item; answers are compared.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from benchmarks.shared.measure import Figure, Row, figure
from orchard.policy.model import child_logprobs, head_weight, hidden_states
from orchard.policy.store import Policy
from orchard.settings import ServeConfig
from serve.factory import open_service
from serve.http.routes import create_app
from serve.metrics import InMemoryMetrics

ITEMS = (10, 100, 1000)
"""Numbers of items that are scored at once."""
HISTORY, GROWS = 10, 30
"""Items of a history, and of one that grows, at its end."""
WIDTHS: tuple[int | list[int], ...] = (50, [16, 32, 50], [50, 32, 16])
"""Widths that are compared."""
TOLERANCE = 1e-3
"""Nats by which scores may differ."""


class ForwardPerItem:
    """Scores by one forward pass of the model for each item, with nothing shared."""

    def __init__(self, folder: Path) -> None:
        """Read a policy, of which the endpoint shares nothing."""
        policy = Policy.open(folder)
        self._model, self._tokenizer = policy.model.eval(), policy.tokenizer

    @torch.inference_mode()
    def score(self, history: Sequence[int], item: int) -> float:
        """Return the log-probability of an item after a history."""
        tokenizer, catalog = self._tokenizer, self._tokenizer.catalog
        rows = catalog.rows(np.array(history, np.int64))
        prompt, _ = tokenizer.encode_history(rows, np.array([0, len(rows)]))
        leaf = catalog.leaf_of_item[catalog.rows(np.array([item], np.int64))]
        path = tokenizer.trie.path(tokenizer.trie.node_of(torch.from_numpy(leaf)))[0]
        path = path[path >= 0]
        token = torch.cat([torch.from_numpy(prompt).long(), tokenizer.token_of(path[:-1])])[None]
        slot = torch.arange(token.shape[1])
        visible = (slot <= slot[:, None])[None]
        hidden = hidden_states(self._model, token, slot[None], visible)[0, -len(path) :]
        above = torch.cat([torch.zeros(1, dtype=torch.long), path[:-1]])
        logprob, children = child_logprobs(hidden, above, head_weight(self._model), tokenizer)
        chosen = children.start[:-1] + path - tokenizer.trie.first_child(above)
        return float(logprob[chosen].sum())


def run(folder: Path, items: int, number: int) -> tuple[list[Figure], list[Row]]:
    """Measure the policy in `folder` of a catalog of `items` items, `number` times each."""
    rows = [
        *_scores(folder, items, number),
        *_growing(folder, items),
        *_widths(folder, items, number),
    ]
    at = {str(row["case"]): row for row in rows}
    most, plain, kept = at[f"score {ITEMS[-1]}"], at["growing"], at["growing, kept"]
    return [
        figure("score_over_forward_per_item", float(most["times"]), "x", asked=">= 5",
               note=f"{ITEMS[-1]} items in one tree in {most['ms']:.0f} ms, against "
               f"{most['per_item_ms']:.1f} ms for each item in a forward pass of its own"),
        figure("score_is_equal", float(most["equal"]), "share", asked="== 1",
               note=f"within {TOLERANCE:g} of a forward pass per item"),
        figure("prefix_cache_equal", float(kept["equal"]), "share", asked="== 1",
               note="lists with and without kept keys and values"),
        figure("prefix_cache_over_none", float(plain["ms"]) / float(kept["ms"]), "x", asked=">= 1",
               note=f"histories that grow to {GROWS} items, request by request"),
    ], rows  # fmt: skip


def _ask(
    folder: Path, bodies: Sequence[tuple[str, dict[str, Any]]], **settings: Any
) -> list[tuple[float, Any]]:
    """Send requests one after another; return seconds and answer of each."""
    config = ServeConfig(poll_interval_s=3600.0, **settings)
    app = create_app(
        open_service(folder, config, InMemoryMetrics(), max_history=max(HISTORY, GROWS))
    )

    async def send() -> list[tuple[float, Any]]:
        answers: list[tuple[float, Any]] = []
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client,
        ):
            for path, body in bodies:
                start_s = time.perf_counter()
                answer = await client.post(path, json=body)
                answers.append((time.perf_counter() - start_s, answer.json()))
        return answers

    return asyncio.run(send())


def _timed(call: Callable[[], float]) -> tuple[float, float]:
    start_s = time.perf_counter()
    value = call()
    return time.perf_counter() - start_s, value


def _scores(folder: Path, items: int, number: int) -> list[Row]:
    """Time scores of different numbers of items, and a forward pass per item."""
    draw, alone = np.random.default_rng(0), ForwardPerItem(folder)
    history = draw.integers(items, size=HISTORY).tolist()
    alone.score(history, 0)
    rows: list[Row] = []
    for size in ITEMS:
        chosen = draw.choice(items, size, replace=False).tolist()
        body = ("/v1/score", {"history": history, "items": chosen})
        answers = _ask(folder, [body] * (1 + number))[1:]
        single = [_timed(lambda item=item: alone.score(history, item)) for item in chosen[:20]]
        scores = [entry["score"] for entry in answers[0][1]["items"]]
        equal = np.mean([
            abs(score - value) < TOLERANCE
            for score, (_, value) in zip(scores[:20], single, strict=False)
        ])  # fmt: skip
        ms = 1000 * statistics.median(seconds for seconds, _ in answers)
        per_item_ms = 1000 * statistics.median(seconds for seconds, _ in single)
        rows.append({
            "case": f"score {size}", "ms": ms, "per_item_ms": per_item_ms,
            "times": size * per_item_ms / ms, "equal": float(equal),
            "forward_tokens": answers[0][1]["cost"]["forward_tokens"],
        })  # fmt: skip
    return rows


def _growing(folder: Path, items: int) -> list[Row]:
    """Time histories that grow item by item, with and without kept keys and values."""
    draw = np.random.default_rng(1)
    history = draw.integers(items, size=GROWS).tolist()
    bodies = [("/v1/recommend", {"history": history[:size]}) for size in range(1, GROWS + 1)]
    facts = {"width": 16, "cache_s": 0.0}
    plain, kept = (_ask(folder, bodies, prefix_cache_mib=mib, **facts) for mib in (0.0, 256.0))
    same = [
        [i["item_id"] for i in a["items"]] == [i["item_id"] for i in b["items"]]
        for (_, a), (_, b) in zip(plain, kept, strict=True)
    ]
    return [
        {"case": case, "ms": 1000 * statistics.median(s for s, _ in answers[GROWS // 3 :]),
         "equal": float(np.mean(same))}
        for case, answers in (("growing", plain), ("growing, kept", kept))
    ]  # fmt: skip


def _widths(folder: Path, items: int, number: int) -> list[Row]:
    """Time beams of one width and of widths by level."""
    draw = np.random.default_rng(2)
    bodies = [
        ("/v1/recommend", {"history": draw.integers(items, size=HISTORY).tolist()})
        for _ in range(1 + number)
    ]
    rows: list[Row] = []
    for width in WIDTHS:
        answers = _ask(folder, bodies, width=width)[1:]
        rows.append({
            "case": f"width {width}", "ms": 1000 * statistics.median(s for s, _ in answers),
            "forward_tokens": statistics.mean(a["cost"]["forward_tokens"] for _, a in answers),
        })  # fmt: skip
    return rows
