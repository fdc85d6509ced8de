"""Settings of the recommendation endpoint. Importable without torch and without Ray."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from orchard.settings.section import Fraction, Section
from orchard.settings.widths import Widths, shown, widest


def _has_credentials(address: str) -> bool:
    """Return whether a Redis address has a user or password, before the host or as a parameter."""
    parts = urlsplit(address)
    return "@" in address or bool({"password", "username"} & parse_qs(parts.query).keys())


class FilterConfig(Section):
    """Named view of the catalog: the items whose attribute passes a comparison."""

    column: str
    """Column of the attributes file."""
    op: Literal["==", "!=", "<", "<=", ">", ">=", "in"] = "=="
    """Comparison operator, with the attribute on the left."""
    value: bool | int | float | str | tuple[int | float | str, ...] = True
    """Value that the attribute is compared with; an item without the attribute never passes."""


class VariantConfig(Section):
    """Additional policy behind the same endpoint."""

    policy: Path
    """Folder of a policy trained on the same catalog."""
    share: Fraction = 0.0
    """Share of the users that are served by this policy."""
    shadow: bool = False
    """Whether the policy also answers every other request, for the exposure log only."""
    guide: bool | None = None
    """Whether searches use the guide of the policy, if its folder has one; by default
    `serve.guide`."""


class ServeConfig(Section):
    """HTTP endpoint that serves recommendations."""

    section: ClassVar[str] = "serve"
    renamed: ClassVar[Mapping[str, str]] = {
        "linger_ms": "batch_wait_ms", "salt": "ab_salt", "follow_s": "poll_interval_s",
    }  # fmt: skip

    host: str = "127.0.0.1"
    """Address that the endpoint binds to."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port of the endpoint."""
    application: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "orchard"
    """Name of the application on Ray Serve; every endpoint on a cluster has its own."""
    route: Annotated[str, Field(pattern=r"^/([A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*)?$")] = "/"
    """Path that the endpoint's routes begin with; every endpoint on a cluster has its own."""
    replicas: PositiveInt = 1
    """Number of replicas."""
    engine: str = "torch"
    """Decoding engine; if vLLM is not available, `vllm` falls back to `torch` with a warning."""
    threads: PositiveInt = 1
    """CPU threads of the engine in each replica."""
    width: Widths = 50
    """Default beam width of a request: one number, or a list with a number for each level of the
    codes, such as [128, 256, 512]. Decoders other than `beam` and `guided` take the largest."""
    max_width: PositiveInt = 512
    """Maximum beam width of a request, at any level."""
    guide: bool = True
    """Whether searches use the guide in the policy folder (`orchard fit guide`), if there is one:
    requests are then decoded by `guided` unless they name another decoder."""
    wide: NonNegativeInt = 0
    """Beam width of a second search by the decoder `guided`, which runs if the first did not prove
    that its items are the best and the deadline leaves time; 0 disables it."""
    max_k: PositiveInt = 512
    """Maximum number of items per request."""
    budget: PositiveInt = 1024
    """Maximum number of beam rows in one batch."""
    queue: PositiveInt = 8192
    """Maximum number of queued beam rows; requests beyond it are rejected with status 429."""
    batch_wait_ms: NonNegativeFloat = 0.0
    """Milliseconds to wait for more requests before a batch runs."""
    deadline_ms: NonNegativeFloat = 0.0
    """Default deadline of a request in milliseconds; 0 sets none."""
    cache_s: NonNegativeFloat = 0.0
    """Seconds to keep a cached response; 0 disables the cache."""
    cache_size: PositiveInt = 10_000
    """Maximum number of cached responses."""
    prefix_cache_mib: NonNegativeFloat = 0.0
    """Size in MiB of the cache of keys and values of earlier histories, per policy of a replica. A
    history that extends a cached one only costs its new items. 0 disables the cache; only the
    engine `torch` has it."""
    popularity: Path | None = None
    """Parquet file with the columns item_id and count: the popular items that are returned when the
    policy cannot answer in time. Without the file the training targets of the run are counted."""
    attributes: Path | None = None
    """Parquet file with the column item_id and the attribute columns that `filters` use."""
    histories: Path | None = None
    """Parquet file with the columns user_id and history, for requests that contain only a user
    ID."""
    redis: str | None = None
    """Address of a Redis server that replaces `histories`, such as redis://host:6379/0. It stores a
    list of item IDs per user, oldest first."""
    redis_prefix: str = "history:"
    """Prefix of the Redis keys, followed by the user ID."""
    redis_timeout_ms: Annotated[float, Field(gt=0.0)] = 50.0
    """Milliseconds to wait for a Redis connection and for a Redis reply; after that the request
    fails with status 503."""
    redis_password_env: str = "ORCHARD_REDIS_PASSWORD"
    """Environment variable that contains the password of the Redis server, if it has one."""
    filters: dict[str, FilterConfig] = Field(default_factory=dict[str, FilterConfig])
    """Named catalog views; a request may combine several."""
    variants: dict[str, VariantConfig] = Field(default_factory=dict[str, VariantConfig])
    """Additional policies by name; the main policy is named `main`."""
    ab_salt: str = "orchard"
    """Salt of the hash that assigns users to variants; a new salt reassigns all users."""
    state: Path | None = None
    """Folder shared by the replicas, with catalog deltas and the pinned policy; by default the
    folder `serve` next to the policy folder."""
    logs: Path | None = None
    """Folder of the logs of `orchard serve`; by default the folder `logs` in the folder of
    `state`."""
    exposure: Path | None = None
    """Folder of the exposure log; by default no log is written."""
    poll_interval_s: PositiveFloat = 0.5
    """Seconds between two checks of the policy folder and of the shared state."""
    versions: PositiveInt = 3
    """Number of policies and of catalogs that are kept for rollback."""
    probe_tolerance: Annotated[float, Field(gt=0.0)] = 1e-3
    """Maximum difference in nats between the scores that the engine and the reference model of a
    new policy give to a probe."""
    token_env: str = "ORCHARD_SERVE_TOKEN"
    """Environment variable that contains the bearer token of the operator endpoints; while it is
    unset, these endpoints are disabled."""

    @model_validator(mode="after")
    def _consistent(self) -> "ServeConfig":
        if not widest(self.width) <= self.max_width <= self.budget <= self.queue:
            raise ValueError(
                f"serve.width = {shown(self.width)}, max_width = {self.max_width}, "
                f"budget = {self.budget} and queue = {self.queue} must not fall in this order; "
                "raise the later ones"
            )
        if self.wide > self.max_width:
            raise ValueError(
                f"serve.wide = {self.wide} is above serve.max_width = {self.max_width}; lower it, "
                "or raise serve.max_width"
            )
        if self.max_k > self.max_width:
            raise ValueError(
                f"serve.max_k = {self.max_k} needs a beam as wide; raise serve.max_width"
            )
        if self.redis is not None and self.histories is not None:
            raise ValueError(
                "serve.redis and serve.histories are both set; keep the one store that is to answer"
            )
        if self.redis is not None and _has_credentials(self.redis):
            raise ValueError(
                "serve.redis holds a password or user; leave it out and put the password into the "
                f"environment variable {self.redis_password_env}"
            )
        if "main" in self.variants:
            raise ValueError("serve.variants.main names the main policy; choose another name")
        total_share = sum(variant.share for variant in self.variants.values())
        if total_share > 1:
            raise ValueError(
                f"the shares of serve.variants add up to {total_share:g}, more than 1; lower them"
            )
        return self
