"""Join exposures with events: the reward of everything that was shown, and counts of the rest.

An event belongs to the latest exposure of its item, in its request or, without one, to its user,
that is not younger than the event. The *attribution window* slides with the exposures: it opens
with each and ends `window` seconds later. Clocks differ, so an event may be up to `clock_tolerance`
seconds older than the exposure that caused it. What is not attributed is counted by its reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from orchard.catalog.catalog import Catalog
from orchard.errors import ConfigError, DataError
from orchard.feedback.schema import FEEDBACK

Counts = dict[str, int | float]
"""Counts by name, and what is measured of clocks and rewards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOptions:
    """Rules by which events become rewards."""

    window: float = 3600.0
    """Seconds after an exposure within which events are attributed to it."""
    lateness: float = 0.0
    """Seconds beyond the window until the events of an exposure are taken to be complete."""
    unsettled: Literal["keep", "drop"] = "keep"
    """Treatment of exposures whose events may be incomplete; dropped ones are for a later join."""
    clock_offset: float = 0.0
    """Seconds that are added to the times of events."""
    clock_tolerance: float = 60.0
    """Seconds by which an event may precede its exposure."""
    values: Mapping[str, float] = field(default_factory=dict[str, float])
    """Value of each behavior; others are worth nothing. Empty: every behavior is worth 1."""
    repeats: Literal["once", "all"] = "once"
    """Whether a behavior counts once for each exposure, by its last event, or every time."""
    combine: Literal["sum", "max", "last"] = "sum"
    """Rule by which the values of several behaviors become one reward."""
    contradictions: Literal["last", "combine", "drop"] = "last"
    """Treatment of exposures with events of positive and of negative value: the last event decides,
    they are combined as others are, or the row has weight 0."""
    bound: float = 1e3
    """Largest absolute reward; larger ones are cut to it and counted."""
    bad_values: Literal["refuse", "drop"] = "refuse"
    """Treatment of events whose value is no finite number."""

    def __post_init__(self) -> None:
        """Raise ConfigError where an option is out of its bounds."""
        for name, low in (("window", 0.0), ("lateness", 0.0), ("clock_tolerance", 0.0)):
            value = getattr(self, name)
            if not low <= value < float("inf"):
                raise ConfigError(f"{name} = {value} of the join must be finite and at least 0")
        if not 0 < self.bound < float("inf"):
            raise ConfigError(f"bound = {self.bound} of rewards must be finite and above 0")
        wrong = [f"{name}={value}" for name, value in self.values.items() if not abs(value) < 1e300]
        if wrong or not abs(self.clock_offset) < float("inf"):
            raise ConfigError(
                f"{', '.join(wrong) or f'clock_offset = {self.clock_offset}'} is not finite; give "
                "numbers"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """Feedback with the counts of its exposures and events."""

    rows: pl.DataFrame
    """Columns of `FEEDBACK`, in the order of the log."""
    summary: Counts
    warnings: tuple[str, ...] = ()
    """Sentences about what was probably not meant."""


def join(
    exposures: pl.DataFrame,
    events: pl.DataFrame,
    options: JoinOptions | None = None,
    catalog: Catalog | None = None,
) -> Joined:
    """Join exposures with events; every exposure becomes one row.

    With a catalog, items that it lacks are counted and left out; the `sid` of an item that has
    another one in it is replaced, and its log-probabilities, which are of other codes, are nulled.

    Args:
        exposures: table of `orchard.feedback.read.read_exposures`.
        events: table of `orchard.feedback.read.read_events`.
        options: options of the join.
        catalog: catalog that the rows are to be used with.

    Raises:
        DataError: there are no exposures, or an event has a value that is no finite number.
    """
    options = options or JoinOptions()
    if exposures.is_empty():
        raise DataError("nothing was shown; there is no exposure to join", code="data.no_exposures")
    summary: Counts = {"exposures": len(exposures), "events": len(events)}
    usable = _usable_events(events, options, summary)
    shown = exposures.with_row_index("exposure").sort("time", maintain_order=True)
    pairs = pl.concat(
        [
            _attribute(usable.filter(pl.col("request_id").is_not_null()), shown, "request_id"),
            _attribute(usable.filter(pl.col("request_id").is_null()), shown, "user"),
        ]
    )
    warnings = _count_pairs(pairs, shown, options, summary)
    attributed = pairs.filter(_is_attributed(options))
    rows = _rows(exposures, _rewards(attributed, options, summary), options, summary)
    newest = max(_latest(exposures), _latest(usable))
    open_from = newest - options.window - options.lateness
    summary["unsettled"] = rows.filter(pl.col("time") > open_from).height
    if options.unsettled == "drop":
        rows = rows.filter(pl.col("time") <= open_from)
    if catalog is not None:
        rows = _on_catalog(rows, catalog, summary)
    summary |= {
        "rows": len(rows),
        "requests": rows["request_id"].n_unique(),
        "catalogs": rows["catalogue"].n_unique(),
        "policies": rows["policy"].n_unique(),
        "without_logprob": rows["logprob"].null_count(),
        "with_reward": rows.filter(pl.col("reward") != 0).height,
        "negative": rows.filter(pl.col("reward") < 0).height,
        "reward_mean": float(rows.select(pl.col("reward").mean().fill_null(0.0)).item()),
    }
    return Joined(rows=rows, summary=summary, warnings=warnings)


def _latest(table: pl.DataFrame) -> float:
    """Return the latest time of a table, minus infinity without rows."""
    return float(table.select(pl.col("time").max().fill_null(float("-inf"))).item())


def _usable_events(events: pl.DataFrame, options: JoinOptions, summary: Counts) -> pl.DataFrame:
    """Return the events that can be attributed, in order of time, and count the others."""
    subject = pl.col("request_id").is_not_null() | pl.col("user").is_not_null()
    complete = (
        subject & pl.col("item_id").is_not_null() & pl.col("behavior").is_not_null()
        & pl.col("time").is_finite().fill_null(False)
    )  # fmt: skip
    kept = events.filter(complete)
    summary["incomplete"] = len(events) - len(kept)
    bad = kept.filter(~pl.col("value").is_finite())
    if len(bad) and options.bad_values == "refuse":
        first = bad.row(0, named=True)
        raise DataError(
            f"{len(bad)} of {len(events)} events have a value that is not a finite number, such as "
            f"{first['value']} of behavior {first['behavior']} for item {first['item_id']}; repair "
            "them, or leave them out with --bad-values drop",
            code="data.bad_reward",
        )
    summary["bad_values"] = len(bad)
    kept = kept.filter(pl.col("value").is_finite())
    named = kept.filter(pl.col("event_id").is_not_null())
    distinct = pl.concat(
        [
            named.unique("event_id", keep="first", maintain_order=True),
            kept.filter(pl.col("event_id").is_null()).unique(keep="first", maintain_order=True),
        ]
    )
    summary["duplicates"] = len(kept) - len(distinct)
    if options.values:
        worth = pl.col("behavior").replace_strict(
            list(options.values), list(options.values.values()), default=0.0,
            return_dtype=pl.Float64,
        )  # fmt: skip
        known = pl.col("behavior").is_in(list(options.values))
        summary["without_value"] = len(distinct.filter(~known))
    else:
        worth = pl.lit(1.0)
        summary["without_value"] = 0
    return distinct.with_columns(
        pl.col("time") + options.clock_offset, (pl.col("value") * worth).alias("gain")
    ).sort("time", maintain_order=True)


def _attribute(events: pl.DataFrame, shown: pl.DataFrame, subject: str) -> pl.DataFrame:
    """Pair each event with the exposure of its item and subject before it, or else after it.

    The result has `exposure` (null where the item was not shown), the `delay` from the exposure to
    the event, and whether the subject is `known`.
    """
    keys = [subject, "item_id"]
    targets = shown.filter(pl.col(subject).is_not_null()).select(
        *keys, "exposure", pl.col("time").alias("shown")
    )
    known = shown.select(pl.col(subject).drop_nulls().unique())[subject]
    paired = events.with_columns(pl.col(subject).is_in(known.implode()).alias("known"))
    for strategy in ("backward", "forward"):
        paired = paired.join_asof(
            targets, left_on="time", right_on="shown", by=keys, strategy=strategy,
            check_sortedness=False, suffix=f"_{strategy}", coalesce=False,
        )  # fmt: skip
    return paired.select(
        "time", "behavior", "gain", "known", pl.lit(subject).alias("subject"),
        pl.coalesce("exposure", "exposure_forward").alias("exposure"),
        (pl.col("time") - pl.coalesce("shown", "shown_forward")).alias("delay"),
    )  # fmt: skip


def _is_attributed(options: JoinOptions) -> pl.Expr:
    """Return the condition that an event lies in the window of its exposure."""
    inside = pl.col("delay").is_between(-options.clock_tolerance, options.window)
    return inside.fill_null(False)


def _count_pairs(
    pairs: pl.DataFrame, shown: pl.DataFrame, options: JoinOptions, summary: Counts
) -> tuple[str, ...]:
    """Count events by what became of them, and return warnings about clocks."""
    by_request = pl.col("subject") == "request_id"
    missing = pl.col("exposure").is_null()
    conditions = {
        "attributed": _is_attributed(options),
        "late": pl.col("delay") > options.window,
        "early": pl.col("delay") < -options.clock_tolerance,
        "unknown_item": missing & pl.col("known"),
        "unknown_request": missing & ~pl.col("known") & by_request,
        "unknown_user": missing & ~pl.col("known") & ~by_request,
    }
    counts = pairs.select(
        condition.fill_null(False).sum().alias(name) for name, condition in conditions.items()
    ).row(0, named=True)
    summary |= {name: int(number) for name, number in counts.items()}
    # Requests identify exposures whatever the clocks say, so that they measure the difference.
    delay = pairs.filter(by_request & ~missing)["delay"]
    if delay.is_empty():
        return ()
    summary["delay_median_s"] = float(delay.quantile(0.5) or 0.0)
    summary["delay_shortest_s"] = float(delay.quantile(0.01) or 0.0)
    before = int((delay < 0).sum())
    summary["before_exposure"] = before
    shift = -summary["delay_shortest_s"]
    if shift > options.clock_tolerance or 2 * before > len(delay):
        return (
            f"{before} of {len(delay)} events of known requests are older than their exposures, "
            f"by up to {shift:.0f} s: the clocks differ; give --clock-offset {shift:.0f} to add "
            f"that to the times of events, or raise --clock-tolerance {options.clock_tolerance:g}",
        )
    if summary["delay_shortest_s"] > options.window:
        return (
            f"all events of known requests come {summary['delay_shortest_s']:.0f} s or more after "
            f"the exposure, later than the window of {options.window:g} s; check the clocks and "
            "--clock-offset, or raise --window",
        )
    return ()


def _rewards(attributed: pl.DataFrame, options: JoinOptions, summary: Counts) -> pl.DataFrame:
    """Return reward, weight and behaviors of each exposure with events."""
    ordered = attributed.sort("time", maintain_order=True)
    counted = ordered
    if options.repeats == "once":
        counted = ordered.unique(["exposure", "behavior"], keep="last", maintain_order=True)
    summary["repeats"] = len(ordered) - len(counted)
    worth = pl.col("gain").filter(pl.col("gain") != 0)
    combined = {"sum": worth.sum(), "max": worth.max(), "last": worth.last()}[options.combine]
    grouped = counted.group_by("exposure", maintain_order=True).agg(
        combined.fill_null(0.0).alias("reward"),
        worth.last().fill_null(0.0).alias("last"),
        ((pl.col("gain") > 0).any() & (pl.col("gain") < 0).any()).alias("contradictory"),
        pl.col("behavior").unique(maintain_order=True).alias("behaviors"),
    )
    summary["contradictory"] = int(grouped["contradictory"].sum())
    weight = pl.lit(1.0)
    if options.contradictions == "last":
        grouped = grouped.with_columns(
            pl.when("contradictory").then("last").otherwise("reward").alias("reward")
        )
    elif options.contradictions == "drop":
        weight = pl.when("contradictory").then(0.0).otherwise(1.0)
    return grouped.select("exposure", "reward", weight.alias("weight"), "behaviors")


def _rows(
    exposures: pl.DataFrame, rewards: pl.DataFrame, options: JoinOptions, summary: Counts
) -> pl.DataFrame:
    """Return one row for each exposure, with reward 0 where nothing is attributed to it."""
    rows = exposures.with_row_index("exposure").join(
        rewards, on="exposure", how="left", maintain_order="left"
    )
    rows = rows.with_columns(
        pl.col("reward").fill_null(0.0),
        pl.col("weight").fill_null(1.0),
        pl.col("behaviors").fill_null(pl.lit([], dtype=pl.List(pl.String))),
        # A decoder that drew nothing has no log-probabilities, whatever it logs.
        pl.when(pl.col("logprob").list.len() > 0).then("logprob").alias("logprob"),
    )
    summary["bounded"] = rows.filter(pl.col("reward").abs() > options.bound).height
    rows = rows.with_columns(pl.col("reward").clip(-options.bound, options.bound))
    return rows.select(FEEDBACK.names())


def _on_catalog(rows: pl.DataFrame, catalog: Catalog, summary: Counts) -> pl.DataFrame:
    """Keep the rows of a catalog's items, with their semantic IDs in it."""
    row, listed = catalog.lookup(rows["item_id"].to_numpy())
    short = catalog.digest[:8]
    version = pl.col("catalogue").str.split("-").list.last()
    summary["other_catalog"] = rows.filter(version.fill_null("") != short).height
    summary["unmapped"] = int((~listed).sum())
    mine = pl.Series(
        "mine", catalog.plain_codes[row[listed]].tolist(), pl.List(pl.Int32)
    ).list.eval(pl.element().filter(pl.element() >= 0))
    kept = rows.filter(pl.Series(listed)).with_columns(mine)
    moved = (pl.col("sid") != pl.col("mine")).fill_null(True)
    summary["moved"] = kept.filter(moved).height
    return kept.with_columns(
        pl.col("mine").alias("sid"),
        pl.when(~moved).then("logprob").alias("logprob"),
    ).select(FEEDBACK.names())
