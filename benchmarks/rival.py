"""What is usually written instead: FastAPI around Hugging Face's beam search under a constraint.

`python -m benchmarks.rival POLICY PORT WIDTH`; answers POST /recommend, a list of item ids.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from torch import Tensor

from orchard import catalogue as catalogues
from orchard import model as models
from orchard import vocabulary
from orchard.prompts import PromptFormat


def recommender(folder: Path, width: int) -> Callable[[list[int]], list[int]]:
    """Histories to the items of the beams, one request at a time."""
    items = catalogues.load(folder / "catalogue")
    words = vocabulary.of_codes(vocabulary.read_tokenizer(folder), items)
    model: Any = models.load(folder, words)
    form, depth = PromptFormat(catalogue=items, vocabulary=words), items.trie.depth
    columns = [words.tokens_at(level).numpy()[items.codes[:, level]] for level in range(depth)]
    allowed: dict[tuple[int, ...], set[int]] = {}
    found: dict[tuple[int, ...], list[int]] = {}
    for row, path in enumerate(np.stack(columns, 1).tolist()):
        found.setdefault(tuple(path), []).append(int(items.item_id[row]))
        for level in range(depth):
            allowed.setdefault(tuple(path[:level]), set()).add(path[level])
    legal = {prefix: sorted(after) for prefix, after in allowed.items()}

    @torch.inference_mode()
    def recommend(history: list[int]) -> list[int]:
        rows = items.rows(np.array(history, dtype=np.int64))[-10:]
        token, _ = form.tokens(rows, np.array([0, len(rows)]))
        prompt = torch.from_numpy(token.astype(np.int64))[None]

        def after(_: int, tokens: Tensor) -> list[int]:
            return legal[tuple(tokens[prompt.shape[1] :].tolist())]

        beams = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), num_beams=width,
            num_return_sequences=width, max_new_tokens=depth, min_new_tokens=depth,
            do_sample=False, renormalize_logits=True, eos_token_id=None, pad_token_id=0,
            prefix_allowed_tokens_fn=after,
        )  # fmt: skip
        paths = cast(list[list[int]], beams[:, prompt.shape[1] :].tolist())
        return [item for path in paths for item in found[tuple(path)]]

    return recommend


def main() -> None:
    """Serve until terminated."""
    folder, port, width = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    recommend, app = recommender(folder, width), FastAPI()

    @app.post("/recommend")
    def answer(history: list[int]) -> list[int]:
        return recommend(history)

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    main()
