"""How a run would scale over GPUs, by a model of its queues: which room does a step wait for?

Not measured. The layout of a step is that of `cluster.training.loop` and
`cluster.training.rollout_stream`: requests to rollout actors, each judged by a reward actor; then,
one after another in the driver, packing, the update, and the push, which every rollout actor takes
after the requests in its hands. Service times follow from the constants of `Model`, all of which
may be overridden; docs/operations.md says where they are weak.

The batch does not grow with the machine (strong scaling), because the algorithm sees its size.
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

STAGES = ("search", "rewards", "pack", "learn", "push")
SERIAL = ("pack", "learn", "push")
"""Those that the driver goes through one after another."""
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
_STEPS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The run, as far as the model knows it, and assumed speeds of one machine."""

    parameters: float = 6e8
    prompt_tokens: float = 128.0
    """Of a mean prompt."""
    prompts_per_step: float = 8192.0
    candidates: float = 16.0
    levels: float = 3.0
    """Codes of an item, hence passes of a search."""
    batch_size: float = 64.0
    """Prompts of a request, at most."""
    max_lag: float = 1.0
    """Versions that searches may be behind."""
    reward_actors: float = 8.0
    rollout_share: float = 0.5
    """Of the GPUs, those that search; one actor each. The others learn."""
    search_tflops: float = 100.0
    """Of a GPU in searches, all losses included; a token costs 2 FLOP a parameter."""
    learn_tflops: float = 300.0
    """Of a GPU in updates; a token costs 8 FLOP a parameter, a reference's forward included."""
    pass_s: float = 0.03
    """Least time of a forward pass of a search, whatever its size."""
    reward_rate: float = 20_000.0
    """Candidates a second that a reward actor judges."""
    pack_rate: float = 200_000.0
    """Candidates a second that the driver takes in, credits and packs; packing alone does 0.9
    million on one core of a small server."""
    reduce_gb_s: float = 25.0
    """Gigabytes a second of a ring that adds up gradients, at each GPU."""
    network_gb_s: float = 10.0
    """Gigabytes a second from one node to another."""
    gpus_per_node: float = 8.0
    digest_gb_s: float = 1.5
    """Gigabytes a second of SHA-256 in one process."""
    load_gb_s: float = 5.0
    """Gigabytes a second from shared memory into an engine."""
    spread: float = 0.1
    """Standard deviation of the logarithm of a request's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A run on so many GPUs."""

    gpus: int
    step_s: float
    """Mean over all steps but the first."""
    busy: Mapping[str, float]
    """Share of the time in which a server of the stage works, by stage."""
    bottleneck: str
    """The stage that the step waits for."""


def model_of(config: Config, sizes: Sizes, assumed: Sequence[str]) -> Model:
    """The model of a run, with `name=value` assumptions in the place of its own.

    Raises:
        ConfigError: an assumption names no constant of the model, or is no positive number.
    """
    own = Model(
        parameters=float(sizes.parameters),
        prompt_tokens=sizes.prompt_tokens,
        prompts_per_step=float(config.learner.prompts_per_step),
        candidates=float(config.rollout.group_size),
        levels=float(len(sizes.nodes_per_level)),
        batch_size=float(config.rollout.batch_size),
        max_lag=float(config.cluster.max_off_policy_steps),
        reward_actors=float(config.rewards.actors),
    )
    known, changes = {field.name for field in fields(Model)}, dict[str, float]()
    for one in assumed:
        name, _, text = one.partition("=")
        if name not in known:
            raise ConfigError(f"--assume {one} names no constant; choose from {', '.join(known)}")
        try:
            changes[name] = float(text)
        except ValueError as error:
            raise ConfigError(f"--assume {one} gives no number; write {name}=1.5") from error
        zero_is_fine = name in ("max_lag", "spread", "pass_s")
        if not (changes[name] > 0 or (zero_is_fine and changes[name] == 0)):
            raise ConfigError(f"--assume {one} is out of bounds; take a number above 0")
    return replace(own, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds that the model gives each part of a step on so many GPUs."""

    actors: int
    requests: int
    """Of a step, all of one size."""
    search: float
    """Of a request, at the median."""
    judge: float
    """Of a request."""
    pack: float
    learn: float
    send: float
    """Until the weights are on every node."""
    install: float
    """At each actor."""


def times(model: Model, gpus: int) -> Times:
    """The service times of a step."""
    actors = min(gpus - 1, max(1, round(model.rollout_share * gpus)))
    learners = gpus - actors
    size = min(model.batch_size, math.ceil(model.prompts_per_step / actors))
    width, giga = model.candidates, 4e-9 * model.parameters  # float32
    tokens = model.prompt_tokens + (model.levels - 1) * width
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
        + 2 * (learners - 1) / learners * giga / model.reduce_gb_s,
        # Into the object store and through the driver, then from node to node, each a new source.
        send=2 * giga / model.load_gb_s + rounds * giga / model.network_gb_s,
        install=giga / model.digest_gb_s + giga / model.load_gb_s,
    )


def simulate(model: Model, gpus: int, *, steps: int = _STEPS, seed: int = 0) -> Simulated:
    """Play some steps on so many GPUs, at least two of them."""
    given, draw = times(model, gpus), np.random.Generator(np.random.Philox(key=[seed, gpus]))
    actors = [0.0] * given.actors
    judges = [0.0] * int(model.reward_actors)
    busy: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    published, ready = [0.0], list[float]()
    while len(published) <= steps:
        version = len(published) - 1
        while len(ready) < steps and len(ready) <= version + model.max_lag:
            found = list[float]()
            slow = np.exp(model.spread * draw.standard_normal(given.requests))
            for factor in slow:
                service = given.search * float(factor)
                begin = max(heapq.heappop(actors), published[version])
                heapq.heappush(actors, begin + service)
                found.append(begin + service)
                busy["search"] += service / given.actors
            judged = 0.0
            for done in sorted(found):
                judged = max(heapq.heappop(judges), done) + given.judge
                heapq.heappush(judges, judged)
                busy["rewards"] += given.judge / len(judges)
            ready.append(judged)
        learned = max(ready[version], published[version]) + given.pack + given.learn
        actors = [max(free, learned + given.send) + given.install for free in actors]
        heapq.heapify(actors)
        published.append(max(actors))
        for stage, spent in (
            ("pack", given.pack), ("learn", given.learn), ("push", given.send + given.install)
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
    """The busiest stage. Where searches run ahead, what the driver does in turn counts as one."""
    candidates = dict(busy)
    if ahead and sum(busy[stage] for stage in SERIAL) > max(busy["search"], busy["rewards"]):
        candidates = {stage: busy[stage] for stage in SERIAL}
    return max(candidates, key=lambda stage: candidates[stage])


def draw(path: Path, panels: Mapping[str, Model]) -> None:
    """Plot what the stages of each model do over the machines of `GPUS`; SVG or PNG by suffix."""
    drawn: dict[str, tuple[Sequence[int], dict[str, list[float]]]] = {}
    for title, model in panels.items():
        found = [simulate(model, gpus) for gpus in GPUS]
        drawn[title] = GPUS, {stage: [one.busy[stage] for one in found] for stage in STAGES}
    plots.stages(path, drawn)


def lines(found: Sequence[Simulated], model: Model) -> list[str]:
    """A table: a row for each number of GPUs."""
    told = [
        "simulated, not measured: " + ", ".join(f"{f.name}={getattr(model, f.name):g}"
                                                for f in fields(Model)),
        f"{'GPUs':>5} {'step s':>8} {'prompts/s':>10} {'speedup':>8}  "
        + " ".join(f"{stage:>8}" for stage in STAGES) + "  waits for",
    ]  # fmt: skip
    for one in found:
        shares = " ".join(f"{one.busy[stage]:>8.0%}" for stage in STAGES)
        told.append(
            f"{one.gpus:>5} {one.step_s:>8.2f} {model.prompts_per_step / one.step_s:>10.0f} "
            f"{found[0].step_s / one.step_s:>8.1f}  {shares}  {one.bottleneck}"
        )
    return told


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
