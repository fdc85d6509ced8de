"""What the endpoint is asked and what it answers. Unknown fields are refused."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    computed_field,
    model_validator,
)

Decoder = Literal["beam", "ved", "beam_sample"]
ItemId = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Ids = Annotated[list[ItemId], Field(max_length=10_000, fail_fast=True)]
Name = Annotated[str, Field(min_length=1, max_length=100)]
Count = Annotated[StrictInt, Field(ge=1, le=100_000)]


class ResponseModel(BaseModel):
    """A request or a response."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


_MOST_FIELDS = 64


class _NamesCatalog(ResponseModel):
    """Responses that name the catalog, under the old spelling `catalogue` for one more release."""

    catalog: str
    """Version number and digest of the catalog."""

    @computed_field(json_schema_extra={"deprecated": True})
    @property
    def catalogue(self) -> str:
        """The value of `catalog`."""
        return self.catalog

    @model_validator(mode="before")
    @classmethod
    def _without_old_name(cls, data: Any) -> Any:
        """Let a response's own JSON be read back."""
        return {k: v for k, v in data.items() if k != "catalogue"} if "catalogue" in data else data


class RequestModel(ResponseModel):
    """A request, or a part of one.

    Lists are judged up to their first fault, objects up to a size: a body full of faults must not
    cost more than a good one.
    """

    @model_validator(mode="before")
    @classmethod
    def _small(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > _MOST_FIELDS:
            raise ValueError(f"at most {_MOST_FIELDS} fields, not {len(data)}")
        return data


class RecommendRequest(RequestModel):
    """Whose next items, how many, and which not."""

    history: Ids | None = None
    """Item ids, oldest first. The policy reads the last ones that it was trained to read."""
    user: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Chooses the variant; without `history`, also the row of the history store."""
    k: Count = 10
    """Items wanted."""
    exclude: Ids = Field(default_factory=list[int])
    """Item ids that must not be shown. Unknown ones exclude nothing."""
    exclude_seen: StrictBool = False
    """Exclude the whole history."""
    filters: Annotated[list[Name], Field(max_length=16)] = Field(default_factory=list[str])
    """Named views; an item must be in all of them."""
    width: Count | None = None
    """Width of the beam; for `ved`, that of the beam it begins with."""
    decoder: Decoder = "beam"
    per_prefix: Count | None = None
    """At most so many items that begin with the same code."""
    temperature: Annotated[float, Field(gt=0.0, le=100.0, allow_inf_nan=False)] = 1.0
    """Of `beam_sample`."""
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    """Of the random decoders; drawn, and named in the answer, where it is missing."""
    deadline_ms: Annotated[float, Field(gt=0.0, le=60_000.0, allow_inf_nan=False)] | None = None
    """The beam is narrowed, and at last popular items are shown, rather than to answer later."""
    explain: Literal["none", "levels", "tree"] = "none"
    """`levels`: log-probability and value of every code; `tree`: also what the search saw."""

    @model_validator(mode="after")
    def _someone(self) -> "RecommendRequest":
        if self.history is None and self.user is None:
            raise ValueError("give a history (it may be empty) or a user")
        return self


class BatchRequest(RequestModel):
    """Several requests, answered in their order."""

    requests: Annotated[list[RecommendRequest], Field(min_length=1, max_length=256, fail_fast=True)]


class Level(ResponseModel):
    """One code of an item."""

    code: int
    logprob: float
    """Given the codes before it; 0 where it was the only choice."""
    value: float | None = None
    """What the value head makes of the prefix that ends here, where the decoder asked."""


class Item(ResponseModel):
    """A recommended item."""

    rank: int
    item_id: int
    score: float | None
    """Log-probability of the semantic ID given the history; none where the policy did not answer.
    Items that share a semantic ID share it."""
    sid: list[int]
    title: str
    levels: list[Level] | None = None


class Node(ResponseModel):
    """A prefix that the search saw."""

    id: int
    parent: int
    """-1 at the root."""
    code: int
    logprob: float
    score: float
    """Sum of the log-probabilities down to here."""
    value: float | None = None
    kept: bool
    """It leads to an answer. The others were pruned, or may not be shown."""
    item_id: int | None = None
    """The best of its items, where the prefix is a whole semantic ID."""


class Cost(ResponseModel):
    """What the search of the batch that the request was in spent."""

    prefill_tokens: int
    forward_tokens: int
    passes: int
    batch: int
    """Requests in the batch."""
    seconds: float


class RecommendResponse(_NamesCatalog):
    """Items, best first, and what made them."""

    items: list[Item]
    returned: int
    asked: int
    fewer: Literal["", "exhausted", "width", "budget", "per_prefix"] = ""
    """Why there are fewer than asked for: no other item may be shown; the beam was too narrow; the
    guided search ended; the cap on items that begin with one code."""
    source: Literal["policy", "cache", "popularity"]
    """`popularity` is the fallback: nothing in it is personal but what is excluded."""
    fallback: Literal["", "deadline", "engine"] = ""
    variant: str
    policy: str
    decoder: Decoder
    width: int
    """The width that was searched with, which a deadline may have narrowed."""
    seed: int | None = None
    unknown: int = 0
    """Items of the history that the catalog does not know; they were passed over."""
    cost: Cost
    tree: list[Node] | None = None


class BatchResponse(ResponseModel):
    """One answer or problem per request, in their order."""

    responses: list["RecommendResponse | Problem"]


class NewItem(RequestModel):
    """An item to put into the catalog."""

    item_id: ItemId
    sid: Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(max_length=64)]
    title: Annotated[str, Field(max_length=2000)] = ""
    attributes: dict[Name, bool | int | float | str | None] = Field(
        default_factory=dict[str, bool | int | float | str | None]
    )


class ChangedItem(RequestModel):
    """What changes of an item; what is left out stays."""

    item_id: ItemId
    sid: Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(max_length=64)] | (
        None
    ) = None
    title: Annotated[str, Field(max_length=2000)] | None = None
    attributes: dict[Name, bool | int | float | str | None] = Field(
        default_factory=dict[str, bool | int | float | str | None]
    )


class DeltaRequest(RequestModel):
    """A change of the catalog: all of it happens, or nothing."""

    add: Annotated[list[NewItem], Field(max_length=100_000, fail_fast=True)] = Field(
        default_factory=list[NewItem]
    )
    remove: Annotated[list[ItemId], Field(max_length=100_000, fail_fast=True)] = Field(
        default_factory=list[int]
    )
    update: Annotated[list[ChangedItem], Field(max_length=100_000, fail_fast=True)] = Field(
        default_factory=list[ChangedItem]
    )
    dry_run: StrictBool = False
    """Check everything, change nothing."""
    base_version: Annotated[StrictInt, Field(ge=0)] | None = None
    """Refuse unless this is the version now."""
    rollback_to: Annotated[StrictInt, Field(ge=0)] | None = None
    """Instead of changes: the items of an earlier version, as a new one."""

    @model_validator(mode="after")
    def _one_thing(self) -> "DeltaRequest":
        changes = bool(self.add or self.remove or self.update)
        if changes == (self.rollback_to is not None):
            raise ValueError("give items to add, remove or update, or rollback_to, and not both")
        return self


class CatalogInfo(ResponseModel):
    """The catalog that answers now."""

    version: int
    digest: str
    items: int
    leaves: int
    """Distinct semantic IDs."""
    levels: int
    level_size: list[int]
    filters: list[str]
    kept: list[int]
    """Versions that can be rolled back to."""
    dry_run: bool = False


class ItemInfo(_NamesCatalog):
    """One item of the catalog."""

    item_id: int
    sid: list[int]
    title: str
    shares_sid_with: list[int]
    filters: list[str]
    """Views that the item is in."""


class VariantInfo(ResponseModel):
    """One policy behind the endpoint."""

    name: str
    policy: str
    step: int
    digest: str
    share: float
    shadow: bool
    pinned: bool
    kept: list[str]
    """Versions that can be activated."""
    engine: str
    decoders: list[Decoder]
    refused: str = ""
    """Why the newest policy that was found is not the one that answers."""


class PolicyInfo(ResponseModel):
    """The policies that answer now."""

    variants: list[VariantInfo]


class ActivateRequest(RequestModel):
    """Which version is to answer."""

    version: Annotated[str, Field(min_length=1, max_length=100)]
    """One of those kept, which is pinned; or `latest`, which follows training again."""
    variant: Name = "main"


class Problem(BaseModel):
    """An error, as RFC 9457 writes it."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str
    """Of the request: its `x-request-id`."""
    errors: list[dict[str, Any]] | None = None
    """Fields at fault."""
