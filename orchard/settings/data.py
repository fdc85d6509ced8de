"""Settings of the data files and of the item sequences made from them."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from orchard.settings.section import Section, refusal

FileName = Annotated[
    str, AfterValidator(lambda name: str(Path(name).expanduser()) if name[:1] == "~" else name)
]
"""Name of a file in `data.path`, or a path of its own, whose leading `~` is the home folder."""


DATA_ROOT = "ORCHARD_DATA"
"""Environment variable with the folder under which data sets lie."""


def data_root() -> Path:
    """Return the folder under which data sets lie: that of `ORCHARD_DATA`, otherwise `data`."""
    return Path(os.environ.get(DATA_ROOT) or "data").expanduser()


def _under_root(path: Path) -> Path:
    """Return the path under the data root if it is relative and a folder only there."""
    if path.is_absolute() or path.exists() or not (data_root() / path).is_dir():
        return path
    return data_root() / path


def _as_list(value: Any) -> Any:
    """Return one path as a list of one."""
    return [value] if isinstance(value, str | Path) else value


Folders = Annotated[
    tuple[Annotated[Path, AfterValidator(Path.expanduser)], ...], BeforeValidator(_as_list)
]
"""Folders; a single folder may be given without a list."""


GAP = "gap"
"""Name of the column of context with the times between events."""
ContextName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]+$", max_length=40)]
"""Name of a column of context: lower-case letters, digits and `_`, at least two of them."""


class DataConfig(Section):
    """Locations of the interaction files, in the Parquet schema of `docs/data.md`."""

    path: Annotated[Path, AfterValidator(_under_root)]
    """Folder that contains the data files. A relative path that is not a folder in the working
    directory is looked up under the folder in the environment variable `ORCHARD_DATA`, by default
    `data`, where `orchard data fetch` puts data sets."""
    items: FileName = "items.parquet"
    """Items file with the columns item_id, sid, and optionally title."""
    train: tuple[FileName, ...] = ("train.parquet",)
    """Training files with the columns user_id, history and target; several files form one split."""
    fresh: tuple[FileName, ...] = ()
    """Files of fresh rows, with the columns of the training files: rows that SFT leaves out and RL
    draws its prompts from (see `learner.rows`), such as those that came after the warm start."""
    hold_back: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the rows of the training files that are held back as fresh rows; 0 holds back
    none."""
    hold_back_by: Literal["row", "user"] = "user"
    """Rows that are held back: the last rows of the files, or the last rows of each user. Users
    keep at least one row."""
    feedback: Folders = ()
    """Folders of feedback, which `orchard data feedback` makes from the log of an endpoint and the
    events of its users. RL draws its prompts from their requests (see `learner.rows`)."""
    valid: FileName = "valid.parquet"
    """Validation file, with the columns of the training files."""
    test: FileName = "test.parquet"
    """Test file, with the columns of the training files."""
    embeddings: FileName | None = None
    """Embeddings file with the columns item_id and embedding (a list of numbers). The step rewards
    of the value head compare items by these embeddings; by default they compare codes."""
    bundle: FileName = "sids"
    """Folder of the tokenizer bundle that `orchard data sids` wrote with the items. The policy
    carries it, so that new items get semantic IDs at the endpoint. The default folder `sids` need
    not exist; with an empty name, the policy carries no bundle."""
    max_history: PositiveInt = 10
    """Maximum number of history items in a prompt; the most recent items are kept."""
    context: tuple[ContextName, ...] = ()
    """Columns of context whose values become tokens of the prompts: `NAME` is read from the lists
    `history_NAME`, one value for each item of the history, or else from the column `NAME`, one
    value for the row. `gap` without such a column is the time until the next event, in buckets,
    from `history_timestamp` and `timestamp`."""
    hide_context: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of the training rows whose context is hidden, so that the policy can also do without.
    Nothing is drawn where `data.context` names no column."""
    level_size: tuple[PositiveInt, ...] | None = None
    """Codebook size of each level; by default that of the tokenizer bundle, or, without a bundle,
    the largest code in use plus one."""
    varying_depth: bool = False
    """Whether semantic IDs may differ in length."""
    rationales: str | None = None
    """Column of the training files with a rationale for each row, one block for each code. SFT then
    trains the policy to think (see `orchard.data.rationales`)."""
    rationale_template: str | None = None
    """Template of a thinking block, used instead of a rationales column, such as
    "seen {seen}, next {next}". It is filled with the title words that each code stands for."""
    titles: bool = False
    """Whether items are identified by the text tokens of their titles, in the tokenizer of the
    policy in `model.path`, instead of by semantic IDs."""
    title_tokens: Annotated[int, Field(ge=259)] | None = None
    """Size of the byte-level BPE vocabulary trained on the titles when a policy is created from
    scratch: at least the 256 bytes and three special tokens."""

    @property
    def has_rationales(self) -> bool:
        """True if SFT trains on rationales."""
        return self.rationales is not None or self.rationale_template is not None

    @property
    def has_fresh(self) -> bool:
        """True if there are fresh rows."""
        return bool(self.fresh or self.hold_back)

    @model_validator(mode="after")
    def _one_source_of_fresh_rows(self) -> "DataConfig":
        if self.fresh and self.hold_back:
            raise refusal(
                "two_sources_of_fresh_rows",
                f"data.fresh and data.hold_back = {self.hold_back} both say which rows are fresh; "
                "set one of them",
            )
        return self

    @model_validator(mode="after")
    def _each_context_once(self) -> "DataConfig":
        twice = [name for name in self.context if self.context.count(name) > 1]
        if twice:
            raise refusal(
                "context_twice", f"data.context names {twice[0]!r} more than once; name it once"
            )
        return self

    @model_validator(mode="after")
    def _one_source_of_rationales(self) -> "DataConfig":
        if self.rationales is not None and self.rationale_template is not None:
            raise refusal(
                "two_rationales",
                "data.rationales and data.rationale_template both say where rationales come from; "
                "set one of them",
            )
        return self
