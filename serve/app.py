"""Ray Serve deployment of the application in `serve.http.routes`.

A Serve config refers to `build`: `import_path: serve.app:build`.
"""

import gc
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve as ray_serve
from ray.serve import metrics

from orchard.registry import import_plugins
from orchard.settings import ServeConfig
from orchard.settings.widths import widest
from serve.factory import open_service
from serve.http.routes import create_app
from serve.metrics import COUNTERS, GAUGES, HISTOGRAMS, SECONDS, SHARES
from serve.service import Service

DEPLOYMENT = "Endpoint"


class Arguments(BaseModel):
    """Arguments of the application in a Serve config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: Path
    """Folder of an exported policy."""
    max_history: int | None = None
    plugins: tuple[str, ...] = ()
    """Modules to import first, which may register engines of one's own."""
    serve: ServeConfig = ServeConfig()


class RayMetrics:
    """Metrics on Ray's metrics port; Serve adds the tags deployment and replica."""

    def __init__(self) -> None:
        """Register all metrics."""
        self._counters = {n: metrics.Counter(n, tag_keys=cast(Any, t)) for n, t in COUNTERS.items()}
        self._gauges = {n: metrics.Gauge(n, tag_keys=cast(Any, t)) for n, t in GAUGES.items()}
        self._histograms = {
            n: metrics.Histogram(n, boundaries=_boundaries(n), tag_keys=cast(Any, t))
            for n, t in HISTOGRAMS.items()
        }

    def count(self, name: str, by: float = 1.0, **tags: str) -> None:
        """Increase a counter."""
        self._counters[name].inc(by, tags)

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Add an observation to a histogram."""
        self._histograms[name].observe(value, tags)

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge."""
        self._gauges[name].set(value, tags)


def _boundaries(name: str) -> list[float]:
    """Return the bucket boundaries of a histogram."""
    return list(SECONDS if name.endswith("_seconds") else SHARES)


class Endpoint:
    """Replica: a service and its HTTP application in the same process, to avoid a network hop."""

    def __init__(self, arguments: Arguments) -> None:
        """Load the service; Serve sends no request before the application has started."""
        import_plugins(arguments.plugins)
        self._service: Service = open_service(
            arguments.policy, arguments.serve, RayMetrics(), max_history=arguments.max_history
        )
        # A full collection of the objects of torch and Ray blocks requests for hundreds of
        # milliseconds; none of these objects ever becomes garbage.
        gc.collect()
        gc.freeze()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application, whose lifespan starts the service."""
        return create_app(self._service)

    async def check_health(self) -> None:
        """Raise if the replica should be replaced."""
        if not self._service.ready:
            raise RuntimeError("the service is closed")


def build(arguments: Arguments) -> Any:
    """Build the Serve application."""
    deployment: Any = ray_serve.deployment(ray_serve.ingress()(Endpoint))
    max_waiting = arguments.serve.queue // widest(arguments.serve.width)
    return deployment.options(
        **options(arguments.serve),
        # Above the bound of the service's own queue, which answers 429 when it is full.
        max_ongoing_requests=2 * max_waiting + 16,
        health_check_period_s=2,
        health_check_timeout_s=10,
    ).bind(arguments)


def options(serving: ServeConfig) -> dict[str, Any]:
    """Return the options of the deployment, used here and in a Serve config."""
    return {
        "name": DEPLOYMENT,
        "num_replicas": serving.replicas,
        # A single replica is replaced only once its successor is up.
        "max_surge_percent": 100 if serving.replicas == 1 else 0,
        "graceful_shutdown_timeout_s": 20,
        "ray_actor_options": {"num_cpus": serving.threads},
    }
