"""Baseline servers: FastAPI around beam searches on Hugging Face's model.

`python -m benchmarks.shared.rival POLICY PORT WIDTH WAY` answers POST /recommend, a history and a
number k, with a list of item ids. The way `generate` runs `generate` with its constraint, one
request at a time. The way `strong` answers up to 16 waiting requests together, by a loop that
computes each prompt once: what somebody who serves such a model would write by hand.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.shared.hugging_face import allowed_tokens, beams, paths, strong_beams
from orchard.policy.store import Policy

SEARCHES = {"generate": (beams, 1), "strong": (strong_beams, 16)}
"""Beam search of each way, and the number of requests that it answers together."""


class Request(BaseModel):
    """Body of a request."""

    history: list[int]
    k: int


def recommender(
    folder: Path, width: int, way: str
) -> Callable[[Sequence[list[int]]], list[list[int]]]:
    """Return a function from histories to the items of their best beams."""
    policy = Policy.open(folder)
    model, tokenizer, catalog = policy.model, policy.tokenizer, policy.tokenizer.catalog
    depth, allowed, search = catalog.trie.depth, allowed_tokens(tokenizer), SEARCHES[way][0]
    items_of_path: dict[tuple[int, ...], list[int]] = {}
    for row, path in enumerate(paths(tokenizer)):
        items_of_path.setdefault(path, []).append(int(catalog.item_id[row]))

    def recommend(histories: Sequence[list[int]]) -> list[list[int]]:
        prompts: list[tuple[int, ...]] = []
        for history in histories:
            rows = catalog.rows(np.array(history, dtype=np.int64))[-10:]
            token, _ = tokenizer.encode_history(rows, np.array([0, len(rows)]))
            prompts.append(tuple(token.tolist()))
        found = [list[int]()] * len(prompts)
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for _, group in groupby(by_length, key=lambda index: len(prompts[index])):
            index = list(group)
            prompt = torch.tensor([prompts[i] for i in index])
            best = search(model, prompt, allowed, width=width, levels=depth)
            for i, rows in zip(index, best.tolist(), strict=True):
                found[i] = [item for path in rows for item in items_of_path[tuple(path)]]
        return found

    return recommend


def create_app(recommend: Callable[[Sequence[list[int]]], list[list[int]]], most: int) -> FastAPI:
    """Create the server; it answers up to `most` waiting requests together."""
    waiting: asyncio.Queue[tuple[Request, asyncio.Future[list[int]]]] = asyncio.Queue()

    async def work() -> None:
        while True:
            batch = [await waiting.get()]
            while len(batch) < most and not waiting.empty():
                batch.append(waiting.get_nowait())
            found = await asyncio.to_thread(recommend, [request.history for request, _ in batch])
            for (request, future), items in zip(batch, found, strict=True):
                future.set_result(items[: request.k])

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        task = asyncio.create_task(work())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/recommend")
    async def answer(request: Request) -> list[int]:
        future = asyncio.get_running_loop().create_future()
        await waiting.put((request, future))
        return await future

    return app


def main() -> None:
    """Serve a policy folder until terminated."""
    folder, port, width, way = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    app = create_app(recommender(folder, width, way), SEARCHES[way][1])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    main()
