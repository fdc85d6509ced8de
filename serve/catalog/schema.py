"""Request and response models of the catalog's routes. Models refuse unknown fields."""

from typing import Annotated

from pydantic import Field, StrictBool, StrictInt, StrictStr, model_validator

from serve.schema import ItemId, Name, NamesCatalog, RequestModel, ResponseModel

AttributeValue = (
    StrictBool
    | Annotated[StrictInt, Field(ge=-(2**63), lt=2**64)]
    | Annotated[float, Field(strict=True, allow_inf_nan=False)]
    | Annotated[StrictStr, Field(max_length=10_000)]
    | None
)
"""Attribute of an item; of the type of its column (see `serve.catalog.attributes`)."""


class NewItem(RequestModel):
    """Item to add to the catalog."""

    item_id: ItemId
    sid: Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(max_length=64)]
    title: Annotated[str, Field(max_length=2000)] = ""
    attributes: dict[Name, AttributeValue] = Field(default_factory=dict[str, AttributeValue])


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
    rollback_to: Annotated[StrictInt, Field(ge=0)] | None = None
    """Earlier version whose items become a new version, instead of changes."""

    @model_validator(mode="after")
    def _require_changes_or_rollback(self) -> "DeltaRequest":
        """Require either changes or `rollback_to`."""
        changes = bool(self.add or self.remove or self.update)
        if changes == (self.rollback_to is not None):
            raise ValueError("give items to add, remove or update, or rollback_to, and not both")
        return self


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
    dry_run: bool = False
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
