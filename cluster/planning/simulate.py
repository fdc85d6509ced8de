"""Simulate how a run scales over GPUs, by a queueing model, and name the bottleneck of a step.

Nothing is measured. A step has the layout of `cluster.training.loop` and
`cluster.training.rollout_stream`: requests to rollout actors, each scored by a reward actor; then,
sequentially in the driver, packing, the update, and the weight push, which every rollout actor
takes after its requests in progress. Service times follow from the constants of `Model`, all of
which can be overridden; docs/operations.md discusses their weaknesses.

The batch does not grow with the number of GPUs (strong scaling), since the algorithm depends on it.
"""

import heapq
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from cluster.planning.plan import Sizes
from cluster.report import plots
from orchard.errors import ConfigError
from orchard.settings import Config
from orchard.settings.widths import of_levels

STAGES = ("search", "rewards", "pack", "learn", "push")
"""Stages of a step."""
SERIAL = ("pack", "learn", "push")
"""Stages that the driver runs sequentially."""
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Numbers of GPUs to simulate."""
_STEPS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes of the run and assumed speeds of the hardware."""

    parameters: float = 6e8
    """Number of parameters of the policy."""
    prompt_tokens: float = 128.0
    """Mean tokens per prompt."""
    prompts_per_step: float = 8192.0
    candidates: float = 16.0
    """Candidates per prompt."""
    width: float = 16.0
    """Mean width of the beam over the levels that are forwarded."""
    levels: float = 3.0
    """Codes per item, which is the number of passes of a search."""
    batch_size: float = 64.0
    """Maximum prompts per request."""
    max_lag: float = 1.0
    """Maximum number of versions that a search may be behind."""
    reward_actors: float = 8.0
    rollout_share: float = 0.5
    """Share of GPUs that search, with one actor each; the others learn."""
    search_tflops: float = 100.0
    """Effective TFLOP/s of a GPU in searches; a token costs 2 FLOP per parameter."""
    learn_tflops: float = 300.0
    """Effective TFLOP/s of a GPU in updates; a token costs 8 FLOP per parameter, including the
    forward pass of the reference."""
    pass_s: float = 0.03
    """Minimum seconds of a forward pass of a search, at any size."""
    reward_rate: float = 20_000.0
    """Candidates per second that a reward actor scores."""
    pack_rate: float = 200_000.0
    """Candidates per second that the driver receives, assigns advantages to and packs; packing
    alone reaches 0.9 million on one core of a small server."""
    reduce_gb_s: float = 25.0
    """Gigabytes per second and GPU of a ring all-reduce of gradients."""
    network_gb_s: float = 10.0
    """Gigabytes per second between two nodes."""
    gpus_per_node: float = 8.0
    digest_gb_s: float = 1.5
    """Gigabytes per second of SHA-256 in one process."""
    load_gb_s: float = 5.0
    """Gigabytes per second from shared memory into an engine."""
    spread: float = 0.1
    """Standard deviation of the logarithm of a request's duration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """Simulated run on a number of GPUs."""

    gpus: int
    step_s: float
    """Mean seconds per step, without the first step."""
    busy: Mapping[str, float]
    """Share of time in which a server of the stage is busy, by stage."""
    bottleneck: str
    """Stage that limits the step."""


def model_of(config: Config, sizes: Sizes, assumed: Sequence[str]) -> Model:
    """Build the model of a run and override its constants by `name=value` assumptions.

    Raises:
        ConfigError: an assumption does not name a constant, or its value is not positive.
    """
    widths = of_levels(config.rollout.beam_width, len(sizes.nodes_per_level), "rollout.width")
    forwarded = widths[:-1] or widths
    model = Model(
        parameters=float(sizes.parameters),
        prompt_tokens=sizes.prompt_tokens,
        prompts_per_step=float(config.learner.prompts_per_step),
        candidates=float(config.rollout.group_size),
        width=sum(forwarded) / len(forwarded),
        levels=float(len(sizes.nodes_per_level)),
        batch_size=float(config.rollout.batch_size),
        max_lag=float(config.cluster.max_off_policy_steps),
        reward_actors=float(config.rewards.actors),
    )
    constants, changes = {field.name for field in fields(Model)}, dict[str, float]()
    for assumption in assumed:
        name, _, text = assumption.partition("=")
        if name not in constants:
            raise ConfigError(
                f"--assume {assumption} names no constant; choose from {', '.join(constants)}"
            )
        try:
            changes[name] = float(text)
        except ValueError as error:
            raise ConfigError(f"--assume {assumption} gives no number; write {name}=1.5") from error
        may_be_zero = name in ("max_lag", "spread", "pass_s")
        if not (changes[name] > 0 or (may_be_zero and changes[name] == 0)):
            raise ConfigError(f"--assume {assumption} is out of bounds; take a number above 0")
    return replace(model, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Modeled seconds of each part of a step on a number of GPUs."""

    actors: int
    """Number of rollout actors."""
    requests: int
    """Number of equally large requests per step."""
    search: float
    """Median seconds of search per request."""
    judge: float
    """Seconds of reward scoring per request."""
    pack: float
    learn: float
    send: float
    """Seconds until the weights are on every node."""
    install: float
    """Seconds to load the weights at each actor."""


def times(model: Model, gpus: int) -> Times:
    """Compute the service times of a step."""
    actors = min(gpus - 1, max(1, round(model.rollout_share * gpus)))
    learners = gpus - actors
    size = min(model.batch_size, math.ceil(model.prompts_per_step / actors))
    width, gigabytes = model.candidates, 4e-9 * model.parameters  # weights in float32
    tokens = model.prompt_tokens + (model.levels - 1) * model.width
    update = model.prompts_per_step * (tokens + width) * 8e-12 * model.parameters
    rounds = math.ceil(math.log2(1 + actors / model.gpus_per_node))
    return Times(
        actors=actors,
        requests=math.ceil(model.prompts_per_step / size),
        search=model.levels * model.pass_s
        + size * tokens * 2e-12 * model.parameters / model.search_tflops,
        judge=size * width / model.reward_rate,
        pack=model.prompts_per_step * width / model.pack_rate,
        learn=update / model.learn_tflops / learners
        + 2 * (learners - 1) / learners * gigabytes / model.reduce_gb_s,
        # Into the object store and through the driver, then from node to node, where every
        # receiver becomes a new source.
        send=2 * gigabytes / model.load_gb_s + rounds * gigabytes / model.network_gb_s,
        install=gigabytes / model.digest_gb_s + gigabytes / model.load_gb_s,
    )


def simulate(model: Model, gpus: int, *, steps: int = _STEPS, seed: int = 0) -> Simulated:
    """Simulate some steps on a number of GPUs, at least two."""
    durations = times(model, gpus)
    generator = np.random.Generator(np.random.Philox(key=[seed, gpus]))
    # Times at which each rollout and each reward actor is free, as heaps.
    actors = [0.0] * durations.actors
    reward_actors = [0.0] * int(model.reward_actors)
    busy: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    # Times at which each version is on all actors, and each batch is scored.
    published, ready = [0.0], list[float]()
    while len(published) <= steps:
        version = len(published) - 1
        while len(ready) < steps and len(ready) <= version + model.max_lag:
            finished = list[float]()
            slowness = np.exp(model.spread * generator.standard_normal(durations.requests))
            for factor in slowness:
                service = durations.search * float(factor)
                start = max(heapq.heappop(actors), published[version])
                heapq.heappush(actors, start + service)
                finished.append(start + service)
                busy["search"] += service / durations.actors
            scored = 0.0
            for search_end in sorted(finished):
                scored = max(heapq.heappop(reward_actors), search_end) + durations.judge
                heapq.heappush(reward_actors, scored)
                busy["rewards"] += durations.judge / len(reward_actors)
            ready.append(scored)
        learned = max(ready[version], published[version]) + durations.pack + durations.learn
        actors = [max(free, learned + durations.send) + durations.install for free in actors]
        heapq.heapify(actors)
        published.append(max(actors))
        for stage, spent in (
            ("pack", durations.pack), ("learn", durations.learn),
            ("push", durations.send + durations.install),
        ):  # fmt: skip
            busy[stage] += spent
    busy = {stage: spent / published[-1] for stage, spent in busy.items()}
    return Simulated(
        gpus=gpus,
        step_s=(published[-1] - published[1]) / (steps - 1),
        busy=busy,
        bottleneck=_bottleneck(busy, ahead=model.max_lag > 0),
    )


def _bottleneck(busy: Mapping[str, float], *, ahead: bool) -> str:
    """Return the busiest stage; the sequential stages count as one if searches run ahead."""
    candidates = dict(busy)
    if ahead and sum(busy[stage] for stage in SERIAL) > max(busy["search"], busy["rewards"]):
        candidates = {stage: busy[stage] for stage in SERIAL}
    return max(candidates, key=lambda stage: candidates[stage])


def draw(path: Path, panels: Mapping[str, Model]) -> None:
    """Plot the busy share of the stages of each model over `GPUS`, as SVG or PNG by suffix."""
    shares: dict[str, tuple[Sequence[int], dict[str, list[float]]]] = {}
    for title, model in panels.items():
        results = [simulate(model, gpus) for gpus in GPUS]
        shares[title] = (
            GPUS,
            {stage: [result.busy[stage] for result in results] for stage in STAGES},
        )
    plots.stages(path, shares)


def lines(results: Sequence[Simulated], model: Model) -> list[str]:
    """Format the results as a table with one row per number of GPUs."""
    table = [
        "simulated, not measured: " + ", ".join(f"{f.name}={getattr(model, f.name):g}"
                                                for f in fields(Model)),
        f"{'GPUs':>5} {'step s':>8} {'prompts/s':>10} {'speedup':>8}  "
        + " ".join(f"{stage:>8}" for stage in STAGES) + "  waits for",
    ]  # fmt: skip
    for result in results:
        shares = " ".join(f"{result.busy[stage]:>8.0%}" for stage in STAGES)
        rate = model.prompts_per_step / result.step_s
        table.append(
            f"{result.gpus:>5} {result.step_s:>8.2f} {rate:>10.0f} "
            f"{results[0].step_s / result.step_s:>8.1f}  {shares}  {result.bottleneck}"
        )
    return table


def main() -> None:
    """Draw the figure of docs/operations.md: `python -m cluster.planning.simulate OUT.svg`."""
    built = Model()
    fast = replace(built, network_gb_s=100.0, load_gb_s=50.0, digest_gb_s=1000.0)
    titles = "As built: push through the object store", "With a push by collectives (not built)"
    draw(Path(sys.argv[1]), dict(zip(titles, (built, fast), strict=True)))
    for model in (built, fast):
        print("\n".join(lines([simulate(model, gpus) for gpus in GPUS], model)))


if __name__ == "__main__":
    main()
