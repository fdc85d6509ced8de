"""Read the folders of LC-Rec and LETTER: `*.inter.json`, `*.index.json` and `*.item.json`.

The interaction file maps each user to the numbers of all items, oldest first. Both repositories
test on a user's last item, validate on the one before, and train on the rest
(https://github.com/RUCAIBox/LC-Rec, https://github.com/HonghuiBao2000/LETTER).
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from orchard import ragged
from orchard.data.importers.columns import integers
from orchard.data.importers.examples import SplitExamples, of_log
from orchard.data.importers.log import InteractionLog, ItemTable
from orchard.data.importers.semantic_index import only, read_index, read_json, read_titles, rows_of
from orchard.data.importers.tables.table import Tick
from orchard.errors import DataError


def read_folder(folder: Path, tick: Tick, *, max_history: int) -> SplitExamples:
    """Read the sequences of the folder as a leave-one-out split.

    Raises:
        DataError: a file is missing or ambiguous, or a sequence or an item cannot be read.
    """
    path = only(folder, "**/*.inter.json", "interaction")
    sequence = read_json(path)
    tick(path.stat().st_size)
    for user, ids in sequence.items():
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise DataError(
                f"user {user} of {path} has {str(ids)[:60]}; give a list of the items' numbers"
            )
    flat = np.array([i for ids in sequence.values() for i in ids], dtype=np.int64)
    if len(flat) == 0:
        raise DataError(f"{path} holds no interactions; at least one user needs two")
    items = read_index(folder)
    note = "semantic IDs of the index file"
    if items is None:  # LC-Rec's preprocessing comes before its index
        titles = read_titles(folder)
        ids = np.unique(np.concatenate([flat, np.array(list(titles), dtype=np.int64)]))
        items = ItemTable(item_id=ids, title=tuple(titles.get(i, "") for i in ids.tolist()))
        note = "no index file, so no semantic IDs"
    start = ragged.starts(np.array([len(ids) for ids in sequence.values()]))
    present = np.flatnonzero(np.diff(start))  # users with an item
    users = [list(sequence)[row] for row in present.tolist()]
    numbers = integers(pa.array(users, pa.string()))
    owner = np.repeat(np.arange(len(users)), np.diff(start)[present])
    log = InteractionLog(
        user=owner,
        item=rows_of(flat, items),
        timestamp=ragged.index_in_row(start),
        user_id=np.arange(len(users)) if numbers is None else numbers,
        user_key=tuple(users) if numbers is None else None,
        items=items,
        notes=(f"{path.name}: a sequence per user, in its order, without times; {note}",),
    )
    examples = of_log(log, split="leave_one_out", max_history=max_history)
    ties = "events_at_the_time_of_the_users_event_before"
    facts = {name: value for name, value in examples.facts.items() if name != ties}
    return replace(examples, timestamp=None, facts=facts)
