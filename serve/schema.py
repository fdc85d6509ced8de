"""Request and response models of the HTTP API. Models refuse unknown fields."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    computed_field,
    model_validator,
)

_MAX_FIELDS = 64
Decoder = Literal["beam", "ved", "beam_sample", "guided"]
Shortfall = Literal["", "exhausted", "width", "budget", "per_prefix"]
ItemId = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Ids = Annotated[list[ItemId], Field(max_length=10_000, fail_fast=True)]
Name = Annotated[str, Field(min_length=1, max_length=100)]
Count = Annotated[StrictInt, Field(ge=1, le=100_000)]
ContextValue = Name | StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)] | None
ContextValues = Annotated[list[ContextValue], Field(max_length=10_000, fail_fast=True)]


class ResponseModel(BaseModel):
    """Base of all requests and responses."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _RenamedFields(ResponseModel):
    """Response that repeats renamed fields under their old names for one more release."""

    @model_validator(mode="before")
    @classmethod
    def _drop_old_names(cls, data: Any) -> Any:
        """Drop the computed old names, so that a response's own JSON can be read back."""
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if k not in cls.model_computed_fields}


class NamesCatalog(_RenamedFields):
    """Response that names the catalog, also under the old spelling `catalogue`."""

    catalog: str
    """Version number and digest of the catalog."""

    @computed_field(json_schema_extra={"deprecated": True})
    @property
    def catalogue(self) -> str:
        """Old name of `catalog`."""
        return self.catalog


class RequestModel(ResponseModel):
    """Base of requests and of their parts.

    Validation of a list stops at its first error, and an object has a bounded number of fields, so
    that an invalid body does not cost more than a valid one.
    """

    @model_validator(mode="before")
    @classmethod
    def _limit_fields(cls, data: Any) -> Any:
        """Refuse an object with too many fields before any of them is validated."""
        if isinstance(data, dict) and len(data) > _MAX_FIELDS:
            raise ValueError(f"at most {_MAX_FIELDS} fields, not {len(data)}")
        return data


class _HistoryRequest(RequestModel):
    """Request about one history or user."""

    history: Ids | None = None
    """Item ids, oldest first. The policy reads the last `max_history` of them."""
    user: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """User id that selects the variant and, without `history`, the row of the history store."""
    context: Annotated[
        dict[Name, ContextValues | ContextValue] | None, Field(max_length=_MAX_FIELDS)
    ] = None
    """Context that the policy was trained with, by column: a list with a value for each item of the
    history, or one value. Columns that are left out, and values without a token, are unknown."""

    @model_validator(mode="after")
    def _require_history_or_user(self) -> "_HistoryRequest":
        """Require a history, which may be empty, or a user."""
        if self.history is None and self.user is None:
            raise ValueError("give a history (it may be empty) or a user")
        return self


class RecommendRequest(_HistoryRequest):
    """Request for the next items of one history or user."""

    k: Count = 10
    """Number of items to return."""
    exclude: Ids = Field(default_factory=list[int])
    """Item ids that must not be shown; unknown ids are ignored."""
    exclude_seen: StrictBool | None = None
    """Whether to exclude every item of the history; by default the rule of the policy's guide,
    false without one and for `beam_sample`."""
    filters: Annotated[list[Name], Field(max_length=16)] = Field(default_factory=list[str])
    """Names of configured filters; an item must pass all of them."""
    width: Count | None = None
    """Beam width at all levels; `ved` gets the forward budget of a beam of this width."""
    decoder: Decoder | None = None
    """Search; by default `guided` where the policy has a guide, else `beam`."""
    per_prefix: Count | None = None
    """Maximum number of items that share their first code."""
    temperature: Annotated[float, Field(gt=0.0, le=100.0, allow_inf_nan=False)] = 1.0
    """Sampling temperature of `beam_sample`."""
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    """Seed of the random decoders; if missing, one is drawn and returned in the response."""
    deadline_ms: Annotated[float, Field(gt=0.0, le=60_000.0, allow_inf_nan=False)] | None = None
    """Deadline in milliseconds; to meet it the beam is narrowed or popular items are shown."""
    explain: Literal["none", "levels", "tree"] = "none"
    """Detail to add: `levels` the log-probability and value of every code and the guide's share in
    the ranking, `tree` the tree too."""


class BatchRequest(RequestModel):
    """Several requests, answered in order."""

    requests: Annotated[list[RecommendRequest], Field(min_length=1, max_length=256, fail_fast=True)]


class ScoreRequest(_HistoryRequest):
    """Items to score after one history."""

    items: Annotated[list[ItemId], Field(min_length=1, max_length=1000, fail_fast=True)]
    """Item ids to score."""
    order: StrictBool = False
    """Whether to return the items best first, with ranks, instead of in the given order."""
    explain: Literal["none", "levels"] = "none"
    """Detail to add: `levels` the log-probability of every code."""


class Level(ResponseModel):
    """One code of an item."""

    code: int
    logprob: float
    """Log-probability of the code given the codes before it; 0 if no other code was legal."""
    value: float | None = None
    """Value of the prefix that ends with this code: the estimate of the value head for `ved`, the
    largest reward of the guide below it for `guided`."""


class GuideShare(ResponseModel):
    """Share of the guide in the rank of an item: items come in the order of score + reward."""

    reward: float
    """Reward that the guide gives the item's semantic ID after the history."""
    summands: dict[str, float]
    """Summands of the reward: each expert, `popularity`, and being in the `history`."""


class Item(ResponseModel):
    """A recommended item."""

    rank: int
    item_id: int
    score: float | None
    """Log-probability of the semantic ID given the history, null if the policy did not answer.
    Items that share a semantic ID share the score."""
    sid: list[int]
    title: str
    levels: list[Level] | None = None
    guide: GuideShare | None = None


class ScoredItem(ResponseModel):
    """An item with its score."""

    item_id: int
    score: float | None
    """Log-probability of the semantic ID given the history, which items of one semantic ID share;
    null for an item that the catalog does not contain."""
    sid: list[int]
    title: str
    rank: int | None = None
    """Place in the order of the scores, 1 for the best; null unless `order` was set."""
    levels: list[Level] | None = None


class Node(ResponseModel):
    """Node of the search tree: one prefix of codes."""

    id: int
    parent: int
    """Id of the parent node; -1 at the root."""
    code: int
    logprob: float
    score: float
    """Sum of the log-probabilities from the root to this node."""
    value: float | None = None
    kept: bool
    """Whether the node leads to a returned item; the others were pruned or may not be shown."""
    item_id: int | None = None
    """First item of the leaf, if the prefix is a complete semantic ID."""


class Cost(ResponseModel):
    """Cost of the search of the batch that contained the request."""

    prefill_tokens: int
    forward_tokens: int
    passes: int
    batch: int
    """Number of requests in the batch."""
    seconds: float


def _old_names_are_optional(schema: dict[str, Any]) -> None:
    """Leave old names that always had a default out of the required properties."""
    if "required" in schema:
        schema["required"] = [n for n in schema["required"] if n not in ("fewer", "unknown")]


class RecommendResponse(NamesCatalog):
    """Recommended items, best first, with their provenance and cost."""

    model_config = ConfigDict(json_schema_extra=_old_names_are_optional)

    items: list[Item]
    returned: int
    """Number of items returned."""
    requested: int
    """Number of items requested."""
    shortfall_reason: Shortfall = ""
    """Reason for returning fewer items than requested: `exhausted`, no other item may be shown;
    `width`, the beam was too narrow; `budget`, the value-guided search used up its budget;
    `per_prefix`, the cap on items that share their first code."""
    source: Literal["policy", "cache", "popularity"]
    """Origin of the items; `popularity` is the fallback, personal only in what it excludes."""
    fallback: Literal["", "deadline", "engine"] = ""
    variant: str
    policy: str
    decoder: Decoder
    width: int
    """Beam width of the search at its widest level, which a deadline may have reduced."""
    seed: int | None = None
    unknown_items: int = 0
    """Number of history items that the catalog does not contain; the policy does not read them."""
    proved: bool | None = None
    """Whether the items are proved to be the best of all that may be shown, by score + reward; null
    unless the decoder is `guided`."""
    cost: Cost
    tree: list[Node] | None = None

    @computed_field(json_schema_extra={"deprecated": True})
    @property
    def asked(self) -> int:
        """Old name of `requested`."""
        return self.requested

    @computed_field(json_schema_extra={"deprecated": True, "default": ""})
    @property
    def fewer(self) -> Shortfall:
        """Old name of `shortfall_reason`."""
        return self.shortfall_reason

    @computed_field(json_schema_extra={"deprecated": True, "default": 0})
    @property
    def unknown(self) -> int:
        """Old name of `unknown_items`."""
        return self.unknown_items


class ScoreResponse(ResponseModel):
    """Scores of the given items."""

    items: list[ScoredItem]
    variant: str
    policy: str
    catalog: str
    """Version number and digest of the catalog."""
    unknown_items: int = 0
    """Number of history items that the catalog does not contain; the policy does not read them."""
    cost: Cost


class VariantInfo(ResponseModel):
    """Policy variant behind the endpoint."""

    name: str
    policy: str
    step: int
    digest: str
    share: float
    shadow: bool
    pinned: bool
    kept: list[str]
    """Policy versions that can be activated."""
    engine: str
    decoders: list[Decoder]
    guide: str = ""
    """Digest of the guide of the policy's searches, empty without one."""
    guide_notes: list[str] = Field(default_factory=list[str])
    """Reasons why the guide is not used, or was fitted for something else."""
    guide_events: int = 0
    """Number of events that are added to the counts of the guide."""
    context: dict[str, list[str]] = Field(default_factory=dict[str, list[str]])
    """Context that requests may give: the values of each column that have tokens."""
    refused: str = ""
    """Reason for not serving the newest policy in the folder, empty if it is served."""


class PolicyInfo(ResponseModel):
    """Policies that serve requests now."""

    variants: list[VariantInfo]


class ActivateRequest(RequestModel):
    """Policy version to serve from now on."""

    version: Annotated[str, Field(min_length=1, max_length=100)]
    """Archived version to pin, or `latest` to follow training again."""
    variant: Name = "main"


class Problem(BaseModel):
    """Error body (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str
    """Request ID, the `x-request-id` of the request."""
    errors: list[dict[str, Any]] | None = None
    """Invalid fields with the reason for each."""
