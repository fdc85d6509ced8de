"""Where the interactions are, and how items become sequences."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from orchard.settings.section import Section


class DataConfig(Section):
    """Where the interactions are, in the Parquet schema of `docs/data.md`."""

    path: Path
    """Folder of the files below."""
    items: str = "items.parquet"
    """Columns item_id, sid, and title if known."""
    train: tuple[str, ...] = ("train.parquet",)
    """Columns user_id, history, target; several files are one split."""
    valid: str = "valid.parquet"
    test: str = "test.parquet"
    embeddings: str | None = None
    """Columns item_id and embedding (a list of numbers): what the value head's step rewards compare
    items by; by default they compare codes."""
    max_history: PositiveInt = 10
    """Most recent items that the policy sees."""
    level_size: tuple[PositiveInt, ...] | None = None
    """Nominal codebook sizes; by default the largest code in use plus one."""
    varying_depth: bool = False
    """Allow semantic IDs of different lengths."""
    rationales: str | None = None
    """Column of the train files with a rationale for each row, one block for each code: the warm
    start then teaches to think (see `orchard.data.rationales`)."""
    rationale_template: str | None = None
    """Instead of a column, a template of a block such as "seen {seen}, next {next}", filled in with
    words that the codes stand for in the items' titles."""
    titles: bool = False
    """Items are their titles, in the text tokens of the policy in `model.path`, instead of semantic
    IDs."""
    title_tokens: Annotated[int, Field(ge=259)] | None = None
    """Size of the byte-level BPE vocabulary made from the titles where a policy is made from
    scratch: at least the 256 bytes and three special tokens."""
