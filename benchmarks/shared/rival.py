"""Baseline server: FastAPI around Hugging Face's constrained beam search.

`python -m benchmarks.rival POLICY PORT WIDTH`; answers POST /recommend, a list of item ids.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI

from benchmarks.shared.hugging_face import allowed_tokens, beams, paths
from orchard.policy.store import Policy


def recommender(folder: Path, width: int) -> Callable[[list[int]], list[int]]:
    """Return a function from a history to the items of the best beams, one request at a time."""
    policy = Policy.open(folder)
    model, tokenizer, catalog = policy.model, policy.tokenizer, policy.tokenizer.catalog
    depth = catalog.trie.depth
    allowed = allowed_tokens(tokenizer)
    items_of_path: dict[tuple[int, ...], list[int]] = {}
    for row, path in enumerate(paths(tokenizer)):
        items_of_path.setdefault(path, []).append(int(catalog.item_id[row]))

    def recommend(history: list[int]) -> list[int]:
        rows = catalog.rows(np.array(history, dtype=np.int64))[-10:]
        token, _ = tokenizer.encode_history(rows, np.array([0, len(rows)]))
        prompt = torch.from_numpy(token.astype(np.int64))[None]
        best = beams(model, prompt, allowed, width=width, levels=depth)
        return [item for path in best[0].tolist() for item in items_of_path[tuple(path)]]

    return recommend


def main() -> None:
    """Serve a policy folder until terminated."""
    folder, port, width = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    recommend, app = recommender(folder, width), FastAPI()

    @app.post("/recommend")
    def answer(history: list[int]) -> list[int]:
        return recommend(history)

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    main()
