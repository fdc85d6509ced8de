"""Evaluate saved policies on held-out rows, and keep the results in the run folder.

An evaluation of the plain beam comes with up to two more: `_unseen` is the same lists without the
items of each row's own history, and `_guided` are lists searched with the policy's guide.

Shapes:  R rows
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from cluster.console import Progress
from cluster.training.controller import Controller
from cluster.training.measure import measure, search_settings
from cluster.training.run import Run
from cluster.training.run_dir import saved_policy
from orchard import arrays, ragged
from orchard.data.prompts import Split
from orchard.errors import ConfigError, DataError
from orchard.evaluation import ranking
from orchard.evaluation.bootstrap import Estimate
from orchard.evaluation.ranking import Evaluation
from orchard.evaluation.segments import by_segment, segments_of
from orchard.folders import atomic_write
from orchard.guide.fit import REPEATS_EXCLUDED_BELOW
from orchard.guide.guide import Guide
from orchard.policy.store import PolicyFacts, open_guide
from orchard.settings.widths import Width, last, shown
from orchard.types import PolicyVersion
from rollout.candidates import Candidates

_log = logging.getLogger("orchard")

UNSEEN, GUIDED = "_unseen", "_guided"
"""Endings of the names of evaluations without the history, and of guided lists."""

SplitName = Literal["valid", "test"]


async def evaluate(
    controller: Controller, folder: Path, *, split: SplitName, beams: Width, name: str
) -> dict[str, Evaluation]:
    """Evaluate a policy folder, and keep each result as `evaluation/<name>.json`.

    Returns the evaluation of the plain beam as `name`, and those of further lists after it.
    """
    run, data = controller.run, getattr(controller.run, split)
    rows = chosen_rows(run, split)
    version, values = saved_policy(run, folder)
    guide = guide_to_evaluate(run, folder, version)
    excludes = excludes_seen(run, guide)
    searches: dict[str, Guide | None] = {name: None}
    if guide is not None:
        searches[f"{name}{GUIDED}"] = guide
    batches = -(-len(rows) // run.config.evaluate.batch_size)
    results: dict[str, Evaluation] = {}
    for title, guided_by in searches.items():
        with Progress(f"evaluating {title}", total=batches) as progress:
            candidates = await controller.rank(
                data,
                rows,
                policy=version,
                weights=values,
                beams=beams,
                advance=progress.advance,
                guide=guided_by,
                exclude_seen=excludes and guided_by is not None,
            )
        further = width_settings(beams)
        if guided_by is not None:
            further |= guide_settings(guided_by, excludes)
        results[title] = measure(run, data, rows, candidates, last(beams), version, further)
        if excludes and guided_by is None:
            unseen = without_seen(run, data, rows, candidates)
            width = max(1, int(unseen.count.min(initial=last(beams))))
            results[f"{title}{UNSEEN}"] = measure(run, data, rows, unseen, width, version, further)
    for title, result in results.items():
        ranking.write(result, evaluation_file(run, title))
    return results


def width_settings(beams: Width) -> dict[str, str]:
    """Return what lists depend on besides the number of candidates: the widths of all levels."""
    return {} if isinstance(beams, int) else {"evaluate.beams": str(shown(beams))}


def guide_settings(guide: Guide, excludes: bool) -> dict[str, str]:
    """Return what guided lists depend on besides `measure.search_settings`."""
    return {"guide": guide.digest, "evaluate.exclude_seen": str(excludes)}


def guide_to_evaluate(run: Run, folder: Path, version: PolicyVersion) -> Guide | None:
    """Return the guide of a policy folder if evaluations use it; log what it was fitted for.

    Raises:
        ConfigError: `evaluate.guide` asks for a guide, and the folder holds none.
        CatalogError, CheckpointError: as `Guide.open`.
    """
    wanted = run.config.evaluate.guide
    if wanted is False:
        return None
    guide = open_guide(folder, run.catalog)
    if guide is None and wanted is True:
        raise ConfigError(
            f"evaluate.guide = true, and {folder} holds no guide; run `orchard fit guide` with the "
            "run file, or set evaluate.guide = false"
        )
    if guide is not None:
        for note in guide.notes(rows=run.leaf_rows.digest, policy=version.digest):
            _log.warning("%s", note)
    return guide


def excludes_seen(run: Run, guide: Guide | None) -> bool:
    """Return whether lists leave out the history: as set, or by the repeats of training targets."""
    setting = run.config.evaluate.exclude_seen
    if setting != "auto":
        return setting
    if guide is not None:
        return guide.exclude_seen
    return run.leaf_rows.repeat_rate < REPEATS_EXCLUDED_BELOW


def without_seen(
    run: Run, split: Split, rows: Int64[np.ndarray, " R"], candidates: Candidates
) -> Candidates:
    """Drop the candidates that are in the history of their own row."""
    history, start = ragged.take(split.history, split.history_start, rows)
    prompt = ragged.row_of(candidates.start)
    seen = ragged.contains(run.catalog.leaf_of_item[history], start, prompt, candidates.leaf)
    kept = np.flatnonzero(~seen)
    return dataclasses.replace(
        arrays.take(candidates, kept, axis="C"),
        start=ragged.starts(np.bincount(prompt[kept], minlength=len(rows))),
    )


async def evaluate_split(controller: Controller, folder: Path, name: str) -> Evaluation:
    """Return the test evaluation of a policy folder; reuse a current one in the run folder.

    One whose further lists are missing, or are not those of now, is made anew with them.
    """
    run, beams = controller.run, controller.run.config.evaluate.beams
    path = evaluation_file(run, name)
    if path.is_file():
        with suppress(DataError):  # a damaged one is made anew
            saved = ranking.read(path)
            if is_current(saved, run, folder, path, beams) and has_companions(
                saved, run, folder, name
            ):
                return saved
    results = await evaluate(controller, folder, split="test", beams=beams, name=name)
    return results[name]


def has_companions(saved: Evaluation, run: Run, folder: Path, name: str) -> bool:
    """Check that the further lists of a current evaluation are there, and current as well.

    Raises:
        DataError: the file of one is damaged.
    """
    guide = guide_to_evaluate(run, folder, PolicyFacts.read(folder).version)
    excludes, beams = excludes_seen(run, guide), run.config.evaluate.beams
    if excludes:
        path = evaluation_file(run, f"{name}{UNSEEN}")
        if not path.is_file():
            return False
        unseen = ranking.read(path)
        # Both are of one search, whose duration is recorded; the width is that of the lists.
        if unseen.seconds != saved.seconds or not is_current(
            unseen, run, folder, path, unseen.width, width_settings(beams)
        ):
            return False
    if guide is None:
        return True
    path = evaluation_file(run, f"{name}{GUIDED}")
    return path.is_file() and is_current(
        ranking.read(path), run, folder, path, beams, guide_settings(guide, excludes)
    )


def is_current(
    saved: Evaluation,
    run: Run,
    folder: Path,
    path: Path,
    beams: Width,
    further: Mapping[str, str] | None = None,
) -> bool:
    """Check that an evaluation in the file `path` is what evaluating a policy folder would give.

    A policy folder that names no digest is compared by the time of its files. `further` are
    settings that the search depends on besides `measure.search_settings`.
    """
    version = PolicyFacts.read(folder).version
    same_policy = (
        saved.policy == str(version)
        if version.digest
        else path.stat().st_mtime >= (folder / "config.json").stat().st_mtime
    )
    return (
        same_policy
        and saved.catalog == run.catalog.digest
        and saved.split == run.test.digest
        and saved.width == last(beams)
        and saved.search == {**search_settings(run), **width_settings(beams), **(further or {})}
        and np.array_equal(saved.row, chosen_rows(run, "test"))
    )


def chosen_rows(run: Run, split: SplitName) -> Int64[np.ndarray, " R"]:
    """Return all rows of the split, or a seeded sample of `evaluate.test_rows` rows."""
    sample_size, num_rows = run.config.evaluate.test_rows, len(getattr(run, split))
    if sample_size == 0 or sample_size >= num_rows:
        return np.arange(num_rows)
    generator = np.random.Generator(np.random.Philox(key=[run.config.seed, 2**33]))
    return np.sort(generator.permutation(num_rows)[:sample_size])


def evaluation_file(run: Run, name: str) -> Path:
    """Return the path of a named evaluation in the run folder."""
    return run.dir / "evaluation" / f"{name}.json"


def write_metrics(evaluations: Mapping[str, Evaluation], name: str, path: Path) -> None:
    """Write {mean, low, high, n} of each metric as JSON, for `orchard evaluate --json`.

    Metrics of lists without the history start with `unseen_`, those of guided lists with
    `guided_`.
    """
    metrics: dict[str, Any] = {}
    for title, evaluation in evaluations.items():
        kind = title.removeprefix(name).removeprefix("_")
        prefix = f"{kind}_" if kind else ""
        metrics |= {f"{prefix}{n}": asdict(e) for n, e in evaluation.metrics.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(metrics, indent=2) + "\n")


def write_segments(
    run: Run, split: SplitName, name: str, evaluation: Evaluation
) -> dict[str, dict[str, Estimate]]:
    """Compute the metrics of each segment of an evaluation, and write `segments/<name>.json`."""
    data, known, row = getattr(run, split), run.known, evaluation.row
    rows = segments_of(
        target=data.target[row],
        history_length=np.diff(data.history_start)[row],
        user=data.user[row],
        train_item=np.concatenate([known.history, known.target]),
        train_user=known.user,
    )
    found = by_segment(
        evaluation.ranks,
        rows,
        width=evaluation.width,
        resamples=run.config.evaluate.resamples,
        seed=run.config.seed,
    )
    facts = {s: {n: asdict(e) for n, e in metrics.items()} for s, metrics in found.items()}
    path = run.dir / "segments" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(facts, indent=2) + "\n")
    return found
