"""The Ray shell of the room: a Serve deployment around the application of `serve.http.routes`.

`build` is what a Serve config names: `import_path: serve.app:build`.
"""

import gc
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve as ray_serve
from ray.serve import metrics

from orchard.settings import ServeConfig
from serve.factory import open_service
from serve.http.routes import create_app
from serve.metrics import COUNTERS, GAUGES, HISTOGRAMS, SECONDS, SHARES
from serve.service import Service

DEPLOYMENT = "Endpoint"


class Arguments(BaseModel):
    """What a Serve config gives the application."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: Path
    """Folder of an exported policy."""
    max_history: int | None = None
    serve: ServeConfig = ServeConfig()


class RayMetrics:
    """Figures on Ray's own metrics port; Serve adds deployment and replica."""

    def __init__(self) -> None:
        """Register all of them."""
        self._counters = {n: metrics.Counter(n, tag_keys=cast(Any, t)) for n, t in COUNTERS.items()}
        self._gauges = {n: metrics.Gauge(n, tag_keys=cast(Any, t)) for n, t in GAUGES.items()}
        self._histograms = {
            n: metrics.Histogram(n, boundaries=_bounds(n), tag_keys=cast(Any, t))
            for n, t in HISTOGRAMS.items()
        }

    def count(self, name: str, by: float = 1.0, **tags: str) -> None:
        """Add to a counter."""
        self._counters[name].inc(by, tags)

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Add to a histogram."""
        self._histograms[name].observe(value, tags)

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge."""
        self._gauges[name].set(value, tags)


def _bounds(name: str) -> list[float]:
    return list(SECONDS if name.endswith("_seconds") else SHARES)


class Endpoint:
    """A replica: one service and its HTTP face in one process, so that no request takes a hop."""

    def __init__(self, arguments: Arguments) -> None:
        """Load everything; Serve sends no request before the application has started."""
        self._service: Service = open_service(
            arguments.policy, arguments.serve, RayMetrics(), max_history=arguments.max_history
        )
        # A full collection of what torch and Ray have imported takes hundreds of milliseconds,
        # in which nobody is answered; nothing of it will ever be garbage.
        gc.collect()
        gc.freeze()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, which starts the service with itself."""
        return create_app(self._service)

    async def check_health(self) -> None:
        """Raise where the replica should be replaced."""
        if not self._service.ready:
            raise RuntimeError("the service is closed")


def build(arguments: Arguments) -> Any:
    """The Serve application."""
    shell: Any = ray_serve.deployment(ray_serve.ingress()(Endpoint))
    rows = arguments.serve.queue // max(1, arguments.serve.width)
    return shell.options(
        **options(arguments.serve),
        # The service has a queue of its own, with a bound and answers for those beyond it.
        max_ongoing_requests=2 * rows + 16,
        health_check_period_s=2,
        health_check_timeout_s=10,
    ).bind(arguments)


def options(serving: ServeConfig) -> dict[str, Any]:
    """Of the deployment, here and in a Serve config."""
    return {
        "name": DEPLOYMENT,
        "num_replicas": serving.replicas,
        # A single replica is replaced by one that is up already.
        "max_surge_percent": 100 if serving.replicas == 1 else 0,
        "graceful_shutdown_timeout_s": 20,
        "ray_actor_options": {"num_cpus": serving.threads},
    }
