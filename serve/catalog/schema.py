"""Request and response models of the catalog's routes. Models refuse unknown fields."""

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr, model_validator

from orchard.catalog.embeddings import MOST
from serve.schema import ItemId, Name, NamesCatalog, RequestModel, ResponseModel

AttributeValue = (
    StrictBool
    | Annotated[StrictInt, Field(ge=-(2**63), lt=2**64)]
    | Annotated[float, Field(strict=True, allow_inf_nan=False)]
    | Annotated[StrictStr, Field(max_length=10_000)]
    | None
)
"""Attribute of an item; of the type of its column (see `serve.catalog.attributes`)."""

Coordinate = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-MOST, le=MOST)]


class NewItem(RequestModel):
    """Item to add to the catalog."""

    item_id: ItemId
    sid: Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(max_length=64)] | (
        None
    ) = None
    """Semantic ID; without it, the tokenizer bundle of the policy assigns one."""
    title: Annotated[str, Field(max_length=2000)] = ""
    embedding: Annotated[list[Coordinate], Field(max_length=65_536, fail_fast=True)] | None = None
    """Embedding for a bundle that was made from embeddings; only without `sid`."""
    attributes: dict[Name, AttributeValue] = Field(default_factory=dict[str, AttributeValue])

    @model_validator(mode="after")
    def _one_source_of_codes(self) -> "NewItem":
        """Refuse an embedding that nothing is made of."""
        if self.sid is not None and self.embedding is not None:
            raise ValueError("give sid, or an embedding to assign one by, but not both")
        return self


class ChangedItem(RequestModel):
    """Changes to an item; omitted fields keep their values."""

    item_id: ItemId
    sid: Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(max_length=64)] | (
        None
    ) = None
    title: Annotated[str, Field(max_length=2000)] | None = None
    attributes: dict[Name, AttributeValue] = Field(default_factory=dict[str, AttributeValue])


class DeltaRequest(RequestModel):
    """Atomic change of the catalog."""

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
    """Whether to validate the delta without applying it."""
    base_version: Annotated[StrictInt, Field(ge=0)] | None = None
    """Catalog version that the delta was made for; refused if another one is current."""
    share_when_full: StrictBool = False
    """Whether a new item without `sid` may share that of another where no free one is left."""
    rollback_to: Annotated[StrictInt, Field(ge=0)] | None = None
    """Earlier version whose items become a new version, instead of changes."""

    @model_validator(mode="after")
    def _require_changes_or_rollback(self) -> "DeltaRequest":
        """Require either changes or `rollback_to`."""
        changes = bool(self.add or self.remove or self.update)
        if changes == (self.rollback_to is not None):
            raise ValueError("give items to add, remove or update, or rollback_to, and not both")
        return self


class Event(RequestModel):
    """An item that was bought after others."""

    history: Annotated[list[ItemId], Field(max_length=10_000, fail_fast=True)]
    """Items bought before, oldest first; the last 50 count."""
    item: ItemId
    """Item bought after them."""


class EventsRequest(RequestModel):
    """Events to add to the counts of the guide."""

    events: Annotated[list[Event], Field(max_length=10_000, fail_fast=True)] = Field(
        default_factory=list[Event]
    )
    forget: StrictBool = False
    """Whether to forget all earlier events first: where the guide was fitted anew on a log that
    holds them."""

    @model_validator(mode="after")
    def _require_events(self) -> "EventsRequest":
        """Refuse a request that changes nothing."""
        if not self.events and not self.forget:
            raise ValueError("give events, or forget the earlier ones")
        return self


class EventsInfo(ResponseModel):
    """Events that are added to the counts of the guide."""

    version: int
    """Number of changes of the events."""
    events: int
    """Number of events by now."""
    unknown_items: int
    """Number of items of this request that the catalog does not contain: they count once it
    does."""


class Neighbor(ResponseModel):
    """Item of the catalog near a new one."""

    item_id: int
    distance: float
    """Euclidean distance between the new item's embedding and the point that the codes of this item
    stand for, in the space of the codebooks."""


class AssignedItem(ResponseModel):
    """Semantic ID that a new item got."""

    item_id: int
    sid: list[int]
    source: Literal["bundle", "kept"]
    """`bundle` if the ID was assigned by the item's embedding, `kept` if the item had it before."""
    moved: bool
    """Whether the nearest codes were taken, and the item has others."""
    shared: bool
    """Whether no code was free, and the item shares the ID of another."""
    distance: float | None
    """Euclidean distance between the embedding and the point that the ID stands for; null if the ID
    was kept."""
    typical_distance: float | None
    """Root mean square of this distance over the items that the bundle was made from; null without
    a bundle."""
    neighbors: list[Neighbor]
    """Nearest items of the catalog before the delta; empty if the ID was kept, and in deltas of
    many new items."""


class CatalogInfo(ResponseModel):
    """Current version of the catalog."""

    version: int
    digest: str
    items: int
    leaves: int
    """Number of distinct semantic IDs."""
    levels: int
    level_size: list[int]
    filters: list[str]
    kept: list[int]
    """Versions available for rollback."""
    bundle: str = ""
    """Digest of the tokenizer bundle that assigns semantic IDs to new items; empty without one."""
    dry_run: bool = False
    assigned: list[AssignedItem] = Field(default_factory=list[AssignedItem])
    """Semantic IDs of the items that a delta added without any."""
    deltas_refused: str = ""
    """Reason for not applying newer deltas of the shared state, empty if they are applied."""


class ItemInfo(NamesCatalog):
    """Item of the catalog."""

    item_id: int
    sid: list[int]
    title: str
    shares_sid_with: list[int]
    filters: list[str]
    """Names of the filters that the item passes."""
