"""Settings of the closed loop between endpoint and learner (`orchard loop`)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from orchard.settings.section import Fraction, Section


class LoopConfig(Section):
    """Rounds of serving, collecting, training and publishing."""

    section: ClassVar[str] = "loop"

    rounds: PositiveInt = 10
    """Number of rounds; each collects one window of exposures and events."""
    users: Literal["real", "synthetic"] = "real"
    """Users of the endpoint: `real` ones, whose events come from `loop.events`, or simulated users
    of the synthetic world in `data.path`, who ask the endpoint over HTTP."""
    events: str | None = None
    """Source of events: a folder to which files are added, or the address of a Redis server, such
    as redis://host:6379/0; by default the folder `loop/arrivals` of the run, or the folder of the
    simulated users. If a Redis server is set, simulated users write to it."""
    events_stream: str = "events"
    """Key of the stream of events on the Redis server."""
    window_s: PositiveFloat = 3600.0
    """Length of a window of real users in seconds."""
    lateness_s: NonNegativeFloat = 60.0
    """Seconds to wait for late events after the end of a window of real users."""
    attribution_s: PositiveFloat = 3600.0
    """Seconds after an exposure within which events are attributed to it."""
    requests: PositiveInt = 500
    """Number of requests of simulated users in a window, each of another user."""
    click_model: Literal["position", "cascade", "satiation"] = "position"
    """Click model of simulated users."""
    k: PositiveInt = 10
    """Number of items in a list that a simulated user is shown."""
    explore: Fraction = 0.5
    """Share of the requests of simulated users that are answered by a single draw of the policy; a
    new policy can be judged on these draws before it is served."""
    learn: Literal["feedback", "clicks", "sft"] = "feedback"
    """Training method of a round: RL on the rewards of all shown items, with the reward `utility`
    unless `rewards.weights` is set; RL with clicked items as next items; or SFT on clicked
    items."""
    steps: PositiveInt = 20
    """Number of RL updates in a round."""
    replay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """Share of the training requests of a round that are taken from earlier windows."""
    canary: Fraction = 0.1
    """Share of the users who are served by a new policy in the window after it was published. 0
    serves it to all users at once, and rolls it back if it earns less than predicted."""
    min_draws: PositiveInt = 20
    """Minimum number of single draws, and of effective draws of an off-policy estimate, by which a
    policy is judged."""
    min_entropy: NonNegativeFloat = 0.5
    """Minimum entropy of the first code of a policy, as a share of that of the policy that is
    served."""
    min_coverage: NonNegativeFloat = 0.5
    """Minimum number of distinct items in the lists of a policy, as a share of that of the policy
    that is served."""

    @model_validator(mode="after")
    def _can_be_judged(self) -> "LoopConfig":
        if self.users == "synthetic" and not self.explore:
            raise ValueError(
                "loop.explore = 0 shows no single draws, by which a policy is judged; raise it"
            )
        return self
