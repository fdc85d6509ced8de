"""Open the folder of a loop, and run its rounds against an endpoint.

loop/policies/00000     the policy that the loop starts with; 00001 on are those of its rounds
loop/serving/           links that the endpoint follows
loop/exposures/         log of the endpoint
loop/visits/            events of simulated users, one file per window
loop/arrivals/          events of real users, where no other source is named
loop/events/            events of the source, each once
loop/feedback/          what was shown with its rewards, one folder per round
loop/training/          one run per round
loop/rounds/            state of each round
"""

import json
import logging
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import polars as pl
from transformers.utils import logging as transformers_logging

from cluster import run_lock
from cluster.loop import rounds, state
from cluster.loop.actions import EndpointActions
from cluster.loop.collect import Collector, SimulatedUsers
from cluster.loop.metrics import drift, round_metrics
from cluster.loop.publish import CANARY, MAIN, Policies
from cluster.loop.state import RoundState
from cluster.monitoring.exporter import Exporter
from cluster.report.loop_rounds import LOG
from cluster.training.run import prepare
from orchard import config
from orchard.errors import ConfigError, RunInterrupted
from orchard.feedback.event_store import EventStore
from orchard.feedback.redis_stream import RedisSource, open_source
from orchard.feedback.stream import FolderSource
from orchard.folders import atomic_write
from orchard.settings import Config, ServeConfig, VariantConfig
from orchard.simulation.click_models import click_model
from orchard.simulation.clients import Asking
from orchard.simulation.synthetic_users import UserParams, users_of_folder
from orchard.tracking.metrics_log import MetricsLogger

# Bars of single weight files would break up the lines of the rounds.
transformers_logging.disable_progress_bar()

_log = logging.getLogger("orchard")
AGAIN = "the same command resumes"
Serve = Callable[[Path, ServeConfig], AbstractContextManager[str]]
"""Starts an endpoint for a policy folder; gives its address, and ends it with the context."""


def loop_folder(settings: Config) -> Path:
    """Return the folder of the loop in the run folder."""
    return (settings.run_dir / "loop").absolute()


def first_policy(settings: Config) -> Path:
    """Return the folder of the policy that the loop starts with.

    Raises:
        ConfigError: the run has none.
    """
    candidates = [settings.run_dir / "policy", settings.run_dir / "warm_start"]
    if settings.model.path is not None:
        candidates.append(settings.model.path)
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise ConfigError(
        f"there is no policy to serve: neither {candidates[0]} nor {candidates[1]} exists, and "
        "model.path is not set; run `orchard sft` first, or set model.path",
        code="config.no_policy",
    )


def serve_settings(settings: Config) -> ServeConfig:
    """Return the settings of the loop's endpoint: its log, its state and the canary's variant.

    Raises:
        ConfigError: the run has variants of its own, which would take users from the canary.
    """
    folder, serving = loop_folder(settings), settings.serve
    if serving.variants:
        raise ConfigError(
            "serve.variants is set, and the endpoint of a loop has the variants main and canary; "
            "leave it out"
        )
    variants: dict[str, VariantConfig] = {}
    if settings.loop.canary:
        variants[CANARY] = VariantConfig(
            policy=Policies(folder=folder).link(CANARY), share=settings.loop.canary
        )
    return serving.model_copy(
        update={
            "exposure": (serving.exposure or folder / "exposures").absolute(),
            "state": (serving.state or folder / "serve").absolute(),
            "variants": variants,
        }
    )


def run_loop(settings: Config, serve: Serve, *, train: Callable[..., Path] | None = None) -> Path:
    """Run the rounds of a loop that are left; return the log of rounds.

    Args:
        settings: settings of the run.
        serve: starts the endpoint.
        train: trains a policy; by default `cluster.loop.train.train_round`.

    Raises:
        OrchardError: the loop cannot start or go on; the message says what to do.
        RunInterrupted: SIGTERM came; the same command resumes.
    """
    folder, policies = loop_folder(settings), Policies(folder=loop_folder(settings))
    prepare(settings, "evaluate", policy=first_policy(settings))  # its errors, before a process
    serving = serve_settings(settings)
    with ExitStack() as stack:
        lock = stack.enter_context(run_lock.hold(settings.run_dir))
        policies.keep("00000", first_policy(settings))
        states = state.read_states(folder)
        first = states[-1] if states else RoundState(number=0)
        policies.switch(*rounds.served(first))
        if not (settings.run_dir / "config.toml").is_file():
            atomic_write(settings.run_dir / "config.toml", config.dump(settings))
        exporter = stack.enter_context(closing(Exporter(settings.name)))
        exporter.listen(settings.cluster, settings.run_dir)
        metrics = stack.enter_context(MetricsLogger(settings.run_dir, [exporter.log]))
        done = sum(each.phase == "done" for each in states)
        metrics.rewind("loop", done)
        url = stack.enter_context(serve(policies.link(MAIN), serving))
        collector = _collector(settings, serving, folder, url, len(states))
        actions = EndpointActions(
            settings=settings, policies=policies, collector=collector, url=url,
            has_canary=CANARY in serving.variants,
            **({} if train is None else {"train_policy": train}),
        )  # fmt: skip
        known = {each.number: each for each in states}

        def save(now: RoundState) -> None:
            lock.check()
            state.write_state(folder, now)
            known[now.number] = now
            if now.phase == "done":
                every = [known[number] for number in sorted(known)]
                state.write_log(settings.run_dir / LOG, every)
                change = drift(every)
                values = round_metrics(now) | ({} if change is None else {"loop/drift": change})
                metrics.log("loop", now.number + 1, values)
                _log.info("round %d: %s", now.number, now.outcome)
            _raise_on_sigterm()  # an event loop that ended has restored the default

        _raise_on_sigterm()
        rounds.run_rounds(states, actions, settings.loop, save)
    return settings.run_dir / LOG


def _collector(
    settings: Config, serving: ServeConfig, folder: Path, url: str, begun: int
) -> Collector:
    """Return the collector of a loop, with its users as they are after the rounds so far."""
    loop, visits = settings.loop, folder / "visits"
    address = loop.events or str(folder / "arrivals")
    users, source = None, None
    if loop.events is not None or loop.users == "real":
        source = open_source(
            address, stream=loop.events_stream, password_env=serving.redis_password_env
        )
    if loop.users == "synthetic":
        params = UserParams(seed=settings.seed, requests=loop.requests)
        users = SimulatedUsers(
            simulator=users_of_folder(settings.data.path, params, click_model(loop.click_model)),
            asking=Asking(url=url, k=loop.k, explore=loop.explore, seed=settings.seed),
            visits=visits,
            deliver=partial(_append, source) if isinstance(source, RedisSource) else None,
        )
        if not isinstance(source, RedisSource):
            source = FolderSource(visits)
        users.restore(max(begun - 1, 0))
    assert source is not None
    assert serving.exposure is not None
    return Collector(
        settings=loop, exposures=serving.exposure, feedback=folder / "feedback", source=source,
        store=EventStore(folder / "events"), start=_start_of(folder), users=users,
    )  # fmt: skip


def _append(source: RedisSource, events: pl.DataFrame) -> None:
    source.append(events)


def _start_of(folder: Path) -> float:
    """Return the time at which the loop began, which the first process writes."""
    path = folder / "start.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps({"time": time.time()}) + "\n")
    return float(json.loads(path.read_text())["time"])


def _raise_on_sigterm() -> None:
    """Let SIGTERM end the command in order."""

    def stop(number: int, frame: object) -> None:
        raise RunInterrupted(f"stopped in a round, whose phases so far are kept; {AGAIN}")

    with suppress(ValueError):  # only the main thread receives signals
        signal.signal(signal.SIGTERM, stop)
