"""Build the SFT task mixture of a text policy: next items, and the relation of titles and codes.

The mixture is that of MiniOneRec (arXiv 2510.24431): history -> item, titles of the history ->
item, title -> item and item -> title. An epoch has `share` examples of each task for every row of
the split, in an order drawn from (seed, epoch). Only answers contribute to the loss.

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
from orchard.policy.plain_text import encode_texts
from orchard.policy.prompt_template import PromptTemplate
from orchard.settings import PromptConfig

TASKS = ("history", "titles", "title_to_item", "item_to_title")
Ragged = tuple[Int32[np.ndarray, " _"], Int64[np.ndarray, " _"]]


@dataclass(frozen=True, kw_only=True)
class SftExamples:
    """Prompts with their answers: a text, an item after it, or one of the two."""

    prompt: Ragged
    """Prompt tokens."""
    answer: Ragged
    """Answer text as tokens, empty where the answer is an item alone."""
    target: Int64[np.ndarray, " B"]
    """Answer items as catalog rows, -1 for none."""


@dataclass(frozen=True, kw_only=True)
class SftTasks:
    """SFT examples of all tasks, encoded on demand."""

    split: Split
    share: Mapping[str, float]
    """Number of examples of each task per row of the split."""
    frame: Mapping[str, PromptTemplate]
    """Prompt template of each task except `history`, which uses that of the item tokenizer."""
    title: Ragged
    """Title of every item, as tokens."""
    end: int
    """Token that ends a title in an answer."""

    def counts(self) -> tuple[int, ...]:
        """Return the number of examples of each task in an epoch."""
        return tuple(round(len(self.split) * self.share[name]) for name in TASKS)

    def __len__(self) -> int:
        """Return the number of examples in an epoch."""
        return sum(self.counts())

    def epoch(self, number: int, *, seed: int) -> Int64[np.ndarray, "B 2"]:
        """Return the task and the row (of split or catalog) of each example, in training order."""
        task_rows: list[np.ndarray] = []
        num_items = len(self.title[1]) - 1
        for task, count in enumerate(self.counts()):
            num_rows = len(self.split) if task < 2 else num_items
            rows = rows_of_step(number, num_rows=num_rows, per_step=count, seed=seed + task)
            task_rows.append(np.stack([np.full(count, task), rows], axis=1))
        order = np.random.Generator(np.random.Philox(key=[seed, number])).permutation(len(self))
        return np.concatenate(task_rows)[order]

    def examples(
        self, chosen: Int64[np.ndarray, "B 2"], item_tokenizer: ItemTokenizer
    ) -> SftExamples:
        """Encode the chosen examples, grouped by task."""
        tasks: list[int] = np.unique(chosen[:, 0]).tolist()
        parts = [self._of(task, chosen[chosen[:, 0] == task, 1], item_tokenizer) for task in tasks]
        return SftExamples(
            prompt=ragged.concatenate([part.prompt for part in parts]),
            answer=ragged.concatenate([part.answer for part in parts]),
            target=np.concatenate([part.target for part in parts]),
        )

    def _of(
        self, task: int, rows: Int64[np.ndarray, " B"], item_tokenizer: ItemTokenizer
    ) -> SftExamples:
        empty = np.zeros(0, np.int32), np.zeros(len(rows) + 1, np.int64)
        beside = None
        if task < 2:
            history, start = ragged.take(self.split.history, self.split.history_start, rows)
            target, context = self.split.target[rows], self.split.context
            context = context and context.take(self.split.history_start, rows)
            beside = item_tokenizer.tokens_beside(context, start)
            if task == 0:
                return SftExamples(
                    prompt=item_tokenizer.encode_history(history, start, context),
                    answer=empty,
                    target=target,
                )
        else:
            history, start, target = rows, np.arange(len(rows) + 1), rows
        shown_tokens = item_tokenizer.item_tokens if task == 3 else self.title
        template = self.frame[TASKS[task]]
        prompt = prompt_template.fill_template(template, shown_tokens, history, start, beside)
        if task < 3:
            return SftExamples(prompt=prompt, answer=empty, target=target)
        text, text_start = ragged.take(*self.title, rows)
        ended = np.insert(text, text_start[1:], self.end)
        return SftExamples(
            prompt=prompt,
            answer=(ended.astype(np.int32), text_start + np.arange(len(text_start))),
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
    """Build the SFT tasks, and check that titles exist and prompts fit.

    Args:
        split: rows of the history tasks.
        item_tokenizer: the catalog and the tokens of its codes.
        tokenizer: text tokenizer of the policy.
        settings: prompt templates.
        share: number of examples of each task per row of the split.
        positions: maximum number of tokens of a prompt and its answer together.

    Raises:
        DataError: a task needs titles and an item has none.
        ConfigError: a template or a title has too many tokens.
    """
    titles = item_tokenizer.catalog.title
    title_tasks = [name for name in TASKS[1:] if share[name] > 0]
    num_untitled = sum(not title for title in titles)
    if title_tasks and num_untitled:
        raise DataError(
            f"sft.tasks.{title_tasks[0]} = {share[title_tasks[0]]} needs titles, and "
            f"{num_untitled} of {len(titles)} items have none; add a title column to the items, "
            "or set it to 0"
        )
    rows = encode_texts(tokenizer, titles)
    text = np.array([token for row in rows for token in row], np.int32)
    title = text, ragged.starts(np.array([len(row) for row in rows]))
    longest = 1 + int(np.diff(title[1]).max())
    prompt_limit = item_tokenizer.template.limit
    answer = {"item_to_title": min(prompt_limit, positions - longest)}
    placeholders = {"titles": "{history}", "title_to_item": "{title}", "item_to_title": "{item}"}
    templates = {
        "titles": settings.titles,
        "title_to_item": settings.title,
        "item_to_title": settings.item,
    }
    frame: dict[str, PromptTemplate] = {}
    for name in title_tasks:
        limit = answer.get(name, prompt_limit)
        frame[name] = prompt_template.encode_template(
            templates[name], placeholders[name], tokenizer, settings, limit=limit
        )
        shown_start = item_tokenizer.item_tokens[1] if name == "item_to_title" else title[1]
        if name != "titles":
            prompt_template.check_fits(
                shown_start, frame[name], "item" if name == "item_to_title" else "title"
            )
    end = cast(int, tokenizer.eos_token_id)
    return SftTasks(split=split, share=share, frame=frame, title=title, end=end)
