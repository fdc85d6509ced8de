"""What a text model is taught: the items of a history, and what their titles and codes have to do.

The mixture of MiniOneRec (arXiv 2510.24431): history -> item, titles of the history -> item, title
-> item and item -> title. An epoch shows every row of the split once and of the other tasks as many
examples as their share says, in an order drawn from (seed, epoch). Only answers are learned.

Shapes:  B examples   R1 = rows + 1   T tokens   I1 = items + 1
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Int32, Int64
from transformers import PreTrainedTokenizerBase

from orchard import ragged
from orchard.data.prompts import Split, rows_of_step
from orchard.errors import DataError
from orchard.policy import prompt_template
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.prompt_template import PromptTemplate
from orchard.settings import PromptConfig

TASKS = ("history", "titles", "title_to_item", "item_to_title")
Ragged = tuple[Int32[np.ndarray, " _"], Int64[np.ndarray, " _"]]


@dataclass(frozen=True, kw_only=True)
class SftExamples:
    """What is asked, the text to be written, and the item named after it; either may be missing."""

    asked: Ragged
    written: Ragged
    target: Int64[np.ndarray, " B"]
    """Catalog rows, -1 for none."""


@dataclass(frozen=True, kw_only=True)
class SftTasks:
    """The examples of a warm start, made when they are asked for."""

    split: Split
    share: Mapping[str, float]
    """Examples of each task per row of the split."""
    frame: Mapping[str, PromptTemplate]
    """Of each task but history, whose frame is the policy's own."""
    title: Ragged
    """Of every item, as tokens."""
    end: int
    """Token that ends a written title."""

    def counts(self) -> tuple[int, ...]:
        """Examples of each task in an epoch."""
        return tuple(round(len(self.split) * self.share[name]) for name in TASKS)

    def __len__(self) -> int:
        """Examples of an epoch."""
        return sum(self.counts())

    def epoch(self, number: int, *, seed: int) -> Int64[np.ndarray, "B 2"]:
        """Task and row (of the split or the catalog) of each example, in the order to learn."""
        drawn: list[np.ndarray] = []
        items = len(self.title[1]) - 1
        for kind, count in enumerate(self.counts()):
            about = len(self.split) if kind < 2 else items
            rows = rows_of_step(number, num_rows=about, per_step=count, seed=seed + kind)
            drawn.append(np.stack([np.full(count, kind), rows], axis=1))
        order = np.random.Generator(np.random.Philox(key=[seed, number])).permutation(len(self))
        return np.concatenate(drawn)[order]

    def examples(
        self, chosen: Int64[np.ndarray, "B 2"], item_tokenizer: ItemTokenizer
    ) -> SftExamples:
        """The chosen examples, by task."""
        kinds: list[int] = np.unique(chosen[:, 0]).tolist()
        parts = [self._of(kind, chosen[chosen[:, 0] == kind, 1], item_tokenizer) for kind in kinds]
        return SftExamples(
            asked=ragged.concatenate([part.asked for part in parts]),
            written=ragged.concatenate([part.written for part in parts]),
            target=np.concatenate([part.target for part in parts]),
        )

    def _of(
        self, kind: int, rows: Int64[np.ndarray, " B"], item_tokenizer: ItemTokenizer
    ) -> SftExamples:
        nothing = np.zeros(0, np.int32), np.zeros(len(rows) + 1, np.int64)
        if kind < 2:
            history, start = ragged.take(self.split.history, self.split.history_start, rows)
            named = self.split.target[rows]
            if kind == 0:
                return SftExamples(
                    asked=item_tokenizer.encode_history(history, start),
                    written=nothing,
                    target=named,
                )
        else:
            history, start, named = rows, np.arange(len(rows) + 1), rows
        words = item_tokenizer.item_tokens if kind == 3 else self.title
        asked = prompt_template.fill_template(self.frame[TASKS[kind]], words, history, start)
        if kind < 3:
            return SftExamples(asked=asked, written=nothing, target=named)
        text, text_start = ragged.take(*self.title, rows)
        ended = np.insert(text, text_start[1:], self.end)
        return SftExamples(
            asked=asked,
            written=(ended.astype(np.int32), text_start + np.arange(len(text_start))),
            target=np.full(len(rows), -1),
        )


def build_sft_tasks(
    split: Split,
    item_tokenizer: ItemTokenizer,
    tokenizer: PreTrainedTokenizerBase,
    settings: PromptConfig,
    share: Mapping[str, float],
    *,
    positions: int,
) -> SftTasks:
    """The tasks of a warm start, checked.

    Args:
        split: rows of the history tasks.
        item_tokenizer: the catalog and the tokens of its codes.
        tokenizer: of the policy.
        settings: templates.
        share: examples of each task per row of the split.
        positions: tokens of a prompt and its answer together.

    Raises:
        DataError: a task needs titles and an item has none.
        ConfigError: a template or a title has more tokens than there is room for.
    """
    titles = item_tokenizer.catalog.title
    needing = [name for name in TASKS[1:] if share[name] > 0]
    lacking = sum(not title for title in titles)
    if needing and lacking:
        raise DataError(
            f"sft.tasks.{needing[0]} = {share[needing[0]]} needs titles, and {lacking} of "
            f"{len(titles)} items have none; add a title column to the items, or set it to 0"
        )
    rows = [tokenizer.encode(title, add_special_tokens=False) for title in titles]
    text = np.array([token for row in rows for token in row], np.int32)
    title = text, ragged.starts(np.array([len(row) for row in rows]))
    longest = 1 + int(np.diff(title[1]).max())
    room = item_tokenizer.template.limit
    answer = {"item_to_title": min(room, positions - longest)}
    places = {"titles": "{history}", "title_to_item": "{title}", "item_to_title": "{item}"}
    templates = {
        "titles": settings.titles,
        "title_to_item": settings.title,
        "item_to_title": settings.item,
    }
    frame: dict[str, PromptTemplate] = {}
    for name in needing:
        limit = answer.get(name, room)
        frame[name] = prompt_template.encode_template(
            templates[name], places[name], tokenizer, settings, limit=limit
        )
        shown = item_tokenizer.item_tokens[1] if name == "item_to_title" else title[1]
        if name != "titles":
            prompt_template.check_fits(
                shown, frame[name], "item" if name == "item_to_title" else "title"
            )
    end = cast(int, tokenizer.eos_token_id)
    return SftTasks(split=split, share=share, frame=frame, title=title, end=end)
