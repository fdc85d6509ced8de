"""The settings of the recommendation endpoint. Importable without torch and without Ray."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from orchard.settings.section import Fraction, Section


def _tells_secrets(address: str) -> bool:
    """If a password or a user is part of a Redis address, before the host or as a parameter."""
    parts = urlsplit(address)
    return "@" in address or bool({"password", "username"} & parse_qs(parts.query).keys())


class FilterConfig(Section):
    """A named view of the catalog: the items whose attribute passes a comparison."""

    column: str
    """Of the attributes file."""
    op: Literal["==", "!=", "<", "<=", ">", ">=", "in"] = "=="
    value: bool | int | float | str | tuple[int | float | str, ...] = True
    """An item whose attribute is unknown passes no comparison."""


class VariantConfig(Section):
    """Another policy behind the same endpoint."""

    policy: Path
    """Folder of a policy that was trained on the same catalog."""
    share: Fraction = 0.0
    """Of the users who are answered by it."""
    shadow: bool = False
    """Let it answer every request too, for the exposure log alone."""


class ServeConfig(Section):
    """The recommendation endpoint."""

    section: ClassVar[str] = "serve"
    renamed: ClassVar[Mapping[str, str]] = {
        "linger_ms": "batch_wait_ms", "salt": "ab_salt", "follow_s": "poll_interval_s",
    }  # fmt: skip

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    replicas: PositiveInt = 1
    engine: Literal["vllm", "torch"] = "torch"
    """`vllm` falls back to `torch`, with a warning, where it cannot be had."""
    threads: PositiveInt = 1
    """Of the engine in each replica."""
    width: PositiveInt = 50
    """Beam width where a request does not say."""
    max_width: PositiveInt = 512
    max_k: PositiveInt = 512
    budget: PositiveInt = 1024
    """Beam rows that one batch may hold."""
    queue: PositiveInt = 8192
    """Beam rows that may wait; beyond it requests are refused with 429."""
    batch_wait_ms: NonNegativeFloat = 0.0
    """Time that a batch waits for company."""
    deadline_ms: NonNegativeFloat = 0.0
    """Where a request does not say; 0 sets none."""
    cache_s: NonNegativeFloat = 0.0
    """Life of a cached answer; 0 caches nothing."""
    cache_size: PositiveInt = 10_000
    popularity: Path | None = None
    """Parquet columns item_id and count: what is shown where the policy cannot answer in time. A
    run without the file counts its training targets."""
    attributes: Path | None = None
    """Parquet column item_id, and any others for `filters`."""
    histories: Path | None = None
    """Parquet columns user_id and history: what requests that name only a user are answered by."""
    redis: str | None = None
    """Address of a Redis server, such as redis://host:6379/0, instead of `histories`: a list of
    item ids per user, oldest first."""
    redis_prefix: str = "history:"
    """Of the keys; the user follows."""
    redis_timeout_ms: Annotated[float, Field(gt=0.0)] = 50.0
    """Of connecting, and of an answer; beyond it a request is answered with 503."""
    redis_password_env: str = "ORCHARD_REDIS_PASSWORD"
    """Environment variable with the password of the Redis server, where it has one."""
    filters: dict[str, FilterConfig] = Field(default_factory=dict[str, FilterConfig])
    """Views by name; requests may ask for several at once."""
    variants: dict[str, VariantConfig] = Field(default_factory=dict[str, VariantConfig])
    """Other policies by name, beside the main one, which is named `main`."""
    ab_salt: str = "orchard"
    """Of the hash that spreads users over variants; another one spreads them anew."""
    state: Path | None = None
    """Folder that the replicas share: catalog deltas and the pinned policy. By default `serve`
    beside the policy."""
    exposure: Path | None = None
    """Folder of the exposure log; by default none is kept."""
    poll_interval_s: PositiveFloat = 0.5
    """Time between two looks at the policy folder and at the shared state."""
    versions: PositiveInt = 3
    """Policies and catalogs kept for rollback."""
    probe_tolerance: Annotated[float, Field(gt=0.0)] = 1e-3
    """Largest difference between what a new policy's engine and its reference make of a probe."""
    token_env: str = "ORCHARD_SERVE_TOKEN"
    """Environment variable with the bearer token of the operator's endpoints; unset, they are
    closed."""

    @model_validator(mode="after")
    def _consistent(self) -> "ServeConfig":
        if not self.width <= self.max_width <= self.budget <= self.queue:
            raise ValueError(
                f"serve.width = {self.width}, max_width = {self.max_width}, budget = {self.budget} "
                f"and queue = {self.queue} must not fall in this order; raise the later ones"
            )
        if self.max_k > self.max_width:
            raise ValueError(
                f"serve.max_k = {self.max_k} needs a beam as wide; raise serve.max_width"
            )
        if self.redis is not None and self.histories is not None:
            raise ValueError(
                "serve.redis and serve.histories are both set; keep the one store that is to answer"
            )
        if self.redis is not None and _tells_secrets(self.redis):
            raise ValueError(
                "serve.redis holds a password or user; leave it out and put the password into the "
                f"environment variable {self.redis_password_env}"
            )
        if "main" in self.variants:
            raise ValueError("serve.variants.main names the main policy; choose another name")
        shared = sum(variant.share for variant in self.variants.values())
        if shared > 1:
            raise ValueError(
                f"the shares of serve.variants add up to {shared:g}, more than 1; lower them"
            )
        return self
