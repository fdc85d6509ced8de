"""Time the way of a new title to its first recommendation, with an endpoint in this process.

An untrained policy of the default size serves items with random titles, whose tokenizer bundle it
carries. A delta adds an item by its title and marks it as new; then a request for new items alone
is sent, which is answered by the decoder over the trie with the item in it. Each pair is one trial.
"""

import asyncio
import os
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.shared.measure import Figure, Row, figure
from orchard.catalog.catalog import from_codes
from orchard.policy import model, weights
from orchard.policy.item_tokenizer import compact_tokenizer, make_item_tokenizer
from orchard.policy.store import Policy, PolicyFacts
from orchard.semantic_ids.build import SemanticIdConfig, build
from orchard.semantic_ids.bundle import BUNDLE, Bundle
from orchard.settings import FilterConfig, ModelConfig, ServeConfig
from orchard.types import PolicyVersion
from serve.factory import open_service
from serve.http.routes import create_app
from serve.metrics import InMemoryMetrics

WORDS, TITLE, TRIALS = 3000, 6, 20
LEVELS = (256, 256, 256)


def run(quick: bool) -> tuple[list[Figure], list[Row]]:
    """Measure catalogs of 3,700 and 100,000 items; `quick` has the small one alone."""
    rows = [measure(items) for items in ((3_700,) if quick else (3_700, 100_000))]
    first = rows[0]
    slowest = f"the slowest took {float(first['slowest_s']):.2f} s"
    note = f"{first['items']} items, {TRIALS} titles, median; {slowest}"
    figures = [
        figure(
            "title_to_recommendation_s", float(first["title_to_recommendation_s"]), "s",
            asked="<= 2", note=note,
        )
    ]  # fmt: skip
    return figures, rows


def measure(num_items: int) -> Row:
    """Add titles to a catalog one by one; return one row with medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_policy(folder, num_items)
        trials = asyncio.run(_trials(folder, num_items))
    delta_s, total_s, moved = (np.array(column) for column in zip(*trials, strict=True))
    return {
        "items": num_items,
        "titles": len(trials),
        "delta_s": float(np.median(delta_s)),
        "title_to_recommendation_s": float(np.median(total_s)),
        "slowest_s": float(total_s.max()),
        "took_a_free_code": int(moved.sum()),
    }


def write_policy(folder: Path, num_items: int) -> None:
    """Write items with titles, their bundle, and an untrained policy that carries it."""
    ids, draw = np.arange(num_items), np.random.default_rng(0)
    items = pa.table({"item_id": ids, "title": titles(draw, num_items)})
    pq.write_table(items, folder / "items.parquet")
    build(folder, SemanticIdConfig(levels=LEVELS, dimensions=64))
    attributes = pa.table({"item_id": ids, "new": np.zeros(num_items, dtype=bool)})
    pq.write_table(attributes, folder / "attributes.parquet")
    bundle = Bundle.open(folder / BUNDLE)
    catalog = from_codes(bundle.table.sid, item_id=bundle.table.item_id, level_size=LEVELS)
    text_tokenizer = compact_tokenizer(catalog)
    tokenizer = make_item_tokenizer(text_tokenizer, catalog)
    network = model.create(ModelConfig(), tokenizer, seed=0)
    Policy(
        version=PolicyVersion(step=0, digest=weights.digest(weights.snapshot(network))),
        model=network, tokenizer=tokenizer, text_tokenizer=text_tokenizer,
        facts=PolicyFacts(max_history=10), new_bundle=bundle,
    ).save(folder / "policy")  # fmt: skip


def titles(draw: np.random.Generator, number: int) -> list[str]:
    """Return random titles, whose words are as frequent as in a language."""
    words = draw.zipf(1.3, size=(number, TITLE)) % WORDS
    return [" ".join(f"word{word}" for word in row) for row in words]


async def _trials(folder: Path, num_items: int) -> list[tuple[float, float, bool]]:
    """Return the seconds of each delta, those until the item is recommended, and if it moved."""
    config = ServeConfig(
        attributes=folder / "attributes.parquet", filters={"new": FilterConfig(column="new")}
    )
    os.environ[config.token_env] = "bench"
    app = create_app(open_service(folder / "policy", config, InMemoryMetrics()))
    transport = httpx.ASGITransport(app)
    headers = {"authorization": "Bearer bench"}
    found: list[tuple[float, float, bool]] = []
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=transport, base_url="http://bench", headers=headers, timeout=600
        ) as client,
    ):
        for trial, title in enumerate(titles(np.random.default_rng(1), TRIALS)):
            item = {"item_id": num_items + trial, "title": title, "attributes": {"new": True}}
            start_s = time.perf_counter()
            taken = await client.post("/v1/catalog/delta", json={"add": [item]})
            delta_s = time.perf_counter() - start_s
            request = {"history": [trial, trial + 1], "k": trial + 1, "filters": ["new"]}
            answer = await client.post("/v1/recommend", json=request)
            total_s = time.perf_counter() - start_s
            shown = [item["item_id"] for item in answer.raise_for_status().json()["items"]]
            if item["item_id"] not in shown:
                raise RuntimeError(f"item {item['item_id']} was added and is not among {shown}")
            (assigned,) = taken.raise_for_status().json()["assigned"]
            found.append((delta_s, total_s, assigned["moved"]))
    return found
