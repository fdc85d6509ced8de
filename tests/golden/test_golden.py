"""Recorded behavior of the product, held bit for bit. `record.py` records it anew.

A later name of something recorded goes into one of the tables below, and nothing else changes.
"""

import asyncio
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import typer

# The product, as far as it is reached from here: after a move, adapt this part alone.
from cluster.cli import main
from cluster.cli.app import app
from orchard import config
from orchard.settings import Config, ServeConfig
from orchard.settings.section import current_key
from serve.factory import open_service
from serve.http.routes import create_app
from serve.metrics import InMemoryMetrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUN_FILES = ROOT / "cluster" / "runs"
COMMAND = (sys.executable, "-m", "cluster.cli")


def application(policy: Path) -> Any:
    """The endpoint's FastAPI application over a policy folder."""
    return create_app(open_service(policy, ServeConfig(), InMemoryMetrics()))


def resolved(path: Path) -> str:
    """A run file with every setting, as TOML."""
    return config.dump(config.load(path))


# Names that have changed since the recording, old to new.

RENAMED_METRICS: dict[str, str] = {}
"""Keys of metrics.jsonl and of evaluations."""
RENAMED_SETTINGS: dict[str, str] = {
    "rollout.candidates": "rollout.group_size",
    "learner.step": "learner.sapo",
    "learner.truncate": "learner.tis_clip",
    "learner.average": "learner.ema_decay",
    "sft.average": "sft.ema_decay",
    "cluster.max_lag": "cluster.max_off_policy_steps",
    "rewards.ranking": "rewards.ranking_variant",
    "serve.linger_ms": "serve.batch_wait_ms",
    "serve.salt": "serve.ab_salt",
    "serve.follow_s": "serve.poll_interval_s",
}
"""Dotted settings."""
RENAMED_CHOICES: dict[str, dict[str, str]] = {
    "learner.estimator": {"step": "sapo"},
    "rewards.ranking_variant": {"coded": "reference_code", "published": "paper"},
}
"""Values of settings."""
RENAMED_SCHEMAS: dict[str, str] = {"CatalogueInfo": "CatalogInfo"}
"""Schemas of the API."""
ADDED_SETTINGS = {
    "plugins", "serve.application", "serve.route", "rollout.guide", "rollout.ved.likelihood",
    "evaluate.exclude_seen", "evaluate.guide", "evaluate.wide", "data.fresh", "data.hold_back",
    "data.hold_back_by", "sft.rows", "learner.rows", "critic.rows", "serve.guide", "serve.wide",
    "learner.loss", "learner.ecpo_delta", "learner.window", "learner.anchor",
    "learner.hint_weight", "learner.max_draws", "rollout.hints", "learner.attention",
    "learner.gradient_checkpointing", "data.bundle", "cluster.publish_format", "data.feedback",
    "rewards.steps", "rewards.utility.clusters", "rewards.utility.groups",
    "rewards.utility.prior", "rewards.utility.backoff", "rewards.utility.floor",
    "rewards.utility.source", "learner.weight_clip", "learner.lists",
    "rollout.width", "serve.prefix_cache_mib", "cluster.in_process", "data.context",
    "data.hide_context",
}  # fmt: skip
"""Settings that came after the recording."""
ADDED_SECTIONS = {"guide", "loop"}
"""Sections of settings that came after the recording."""
ADDED_OPTIONS = {
    "orchard data import": {"--labels", "--encoding", "--context"},
    "orchard data sids": {"--max-without-signal", "--sample"},
    "orchard evaluate": {"--segments"},
    "orchard fit": {"--policy"},
}
"""Options of commands that came after the recording."""
ADDED_COMMANDS = {"orchard": {"loop"}, "orchard data": {"encode", "feedback", "fetch"}}
"""Commands that came after the recording, by the group that lists them."""
ADDED_METRICS = {"split", "search"}
"""Facts of an evaluation that came after the recording."""
ADDED_STEP_METRICS = {"rollout/hit_share_valid"}
"""Metrics of a training step that came after the recording."""
ADDED_RESPONSES = {"415"}
"""Statuses of the API that came after the recording."""
ADDED_BOUNDS = {"minimum", "exclusiveMaximum", "maxLength"}
"""Bounds that the attributes of items have got since the recording."""
ADDED_FIELDS: dict[str, set[str]] = {
    "RecommendRequest": {"context"},
    "RecommendResponse": {"catalog", "requested", "shortfall_reason", "unknown_items", "proved"},
    "Item": {"guide"},
    "ItemInfo": {"catalog"},
    "CatalogInfo": {"deltas_refused", "assigned", "bundle"},
    "DeltaRequest": {"share_when_full"},
    "NewItem": {"embedding"},
    "VariantInfo": {"guide", "guide_notes", "guide_events", "context"},
}
"""Fields of the API that came beside the recorded ones, by the name of their schema."""
ADDED_SCHEMAS = {
    "ScoreRequest",
    "ScoreResponse",
    "ScoredItem",
    "GuideShare",
    "AssignedItem",
    "Neighbor",
    "Event",
    "EventsInfo",
    "EventsRequest",
}
"""Schemas of the API that came after the recording."""
ADDED_PATHS = {"/v1/events", "/v1/score"}
"""Routes that came after the recording."""
ADDED_DECODERS = {"guided"}
"""Decoders that came after the recording."""
NOW_LEFT_OUT = {("NewItem", "sid")}
"""Fields that were required, by the name of their schema."""
NOW_OPTIONAL: dict[str, Any] = {"decoder": "beam", "exclude_seen": False}
"""Fields of a request whose default is up to the policy's guide, and what it was before."""

# What is observed. All of it is a function of the code, seconds and memory aside.

COMMANDS = {"beam": ("sft", "train"), "ved": ("train",), "think": ("sft", "train")}
"""Tiny runs, and what is done to each."""
RAY = (pytest.mark.ray, pytest.mark.nightly)
PHASES = {
    "sft": {"sft", "evaluation warm_start"},
    "train": {"train", "evaluation warm_start", "evaluation trained"},
}
"""File in which a command leaves its metrics."""
COUNTED = {
    "num_rows", "learner/restarts", "rewards/restarts", "rollout/restarts",
    "rollout/candidates", "rollout/lag_versions", "rollout/prompts",
}  # fmt: skip
"""Metrics that are equal on every machine."""
TIMED = ("_s", "seconds", "_bytes", "_gib")
"""How the names of metrics end that say more about the machine than about the code."""
HISTORIES = ([3, 17, 5], [], [71, 2, 2, 40, 9, 33, 60, 12, 79, 1, 25, 44], [55])
QUESTIONS: tuple[dict[str, Any], ...] = (
    *({"history": history, "k": 79, "width": 79, "explain": "levels"} for history in HISTORIES),
    {"history": [3, 17, 5], "exclude_seen": True, "exclude": [0, 1], "per_prefix": 2},
    {"history": [8, 30], "decoder": "beam_sample", "seed": 7, "temperature": 1.5},
    {"history": [8, 30], "width": 6, "explain": "tree"},
    {"history": [8, 30], "k": 1000},
)


GUIDED: dict[str, Any] = {"history": [3, 17], "decoder": "ved", "seed": 1, "width": 6}
POLICIES: dict[str, tuple[dict[str, Any], ...]] = {"beam": (), "ved": (GUIDED,)}
"""Saved ones, and what each is asked beside `QUESTIONS`."""
WORLD = ("--items", 80, "--users", 120)


def fingerprint() -> dict[str, str]:
    """Return the facts of this machine that floating-point results depend on."""
    known = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", known.read_text() if known.exists() else "", re.M)
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "cpu": named[1] if named else platform.processor(),
    }


def do(*arguments: object) -> None:
    """Run a command here, as the command line does."""
    main([str(argument) for argument in arguments])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def metrics(run: Path) -> list[dict[str, Any]]:
    """The logbook of a run folder, then its evaluations."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    entries = [
        {
            "phase": one["phase"],
            "step": one["step"],
            "values": untimed(without(one["values"], ADDED_STEP_METRICS)),
        }
        for one in found
    ]
    for path in sorted((run / "evaluation").glob("*.json")):
        one = json.loads(path.read_text())
        ranks = pq.read_table(path.with_suffix(".parquet")).to_pydict()
        entries.append({"phase": f"evaluation {path.stem}", "step": 0, "values": untimed(one)})
        for fact in ADDED_METRICS:
            entries[-1]["values"].pop(fact, None)
        entries[-1]["values"]["ranks"] = {name: list(map(float, v)) for name, v in ranks.items()}
    return entries


def untimed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what differs from one time to the next."""
    return {
        name: untimed(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if not name.endswith(TIMED)
    }


def configurations() -> dict[str, dict[str, Any]]:
    """Return the dotted keys and values of every run file."""
    files = sorted(RUN_FILES.glob("*.toml"))
    return {path.stem: flatten(tomllib.loads(resolved(path))) for path in files}


def help_texts() -> dict[str, list[str]]:
    """Return the plain lines that `--help` of every command prints at one width."""
    texts: dict[str, list[str]] = {}

    def walk(command: Any, name: str, parent: Any) -> None:
        command.rich_markup_mode = None
        context = command.context_class(
            command, info_name=name, parent=parent, terminal_width=100, max_content_width=100
        )
        texts[context.command_path] = command.get_help(context).splitlines()
        for word, below in sorted(getattr(command, "commands", {}).items()):
            walk(below, word, context)

    walk(typer.main.get_command(app), "orchard", None)
    return texts


def openapi(policy: Path) -> dict[str, Any]:
    """The document of the endpoint."""
    return json.loads(json.dumps(application(policy).openapi()))


def answers(policy: Path, *more: dict[str, Any]) -> list[Any]:
    """Return the facts of a policy at the endpoint, and recommendations by it."""
    endpoint = application(policy)

    async def work() -> list[Any]:
        transport = httpx.ASGITransport(endpoint, raise_app_exceptions=False)
        async with (
            endpoint.router.lifespan_context(endpoint),
            httpx.AsyncClient(transport=transport, base_url="http://shop") as client,
        ):
            found = [await client.get(f"/v1/{what}") for what in ("catalog", "policy", "items/3")]
            for number, question in enumerate((*QUESTIONS, *more)):
                headers = {"x-request-id": f"golden-{number}"}
                found.append(await client.post("/v1/recommend", json=question, headers=headers))
        return [{"status": one.status_code, "body": untimed_tree(one.json())} for one in found]

    return asyncio.run(work())


def untimed_tree(tree: Any) -> Any:
    """An answer without the seconds in its cost."""
    if isinstance(tree, list):
        return [untimed_tree(one) for one in tree]
    if not isinstance(tree, dict):
        return tree
    return {name: untimed_tree(one) for name, one in tree.items() if name != "seconds"}


# How it is held.


def renamed(tree: Any, table: Mapping[str, str]) -> Any:
    """Something recorded, under today's names."""
    if isinstance(tree, list):
        return [renamed(one, table) for one in tree]
    if not isinstance(tree, dict):
        return tree
    return {table.get(name, name): renamed(one, table) for name, one in tree.items()}


def without(tree: Any, fields: set[str]) -> Any:
    """An answer without the fields that came later."""
    if isinstance(tree, list):
        return [without(one, fields) for one in tree]
    if not isinstance(tree, dict):
        return tree
    return {name: without(one, fields) for name, one in tree.items() if name not in fields}


def exact(tree: Any, name: str = "") -> Any:
    """Keep what is equal on every machine: no real numbers, no digests of what is learned."""
    if isinstance(tree, list):
        return [exact(one, name) for one in tree]
    if isinstance(tree, dict):
        return {key: exact(one, key) for key, one in tree.items()}
    learned = isinstance(tree, float) and name not in COUNTED
    return None if learned or (name == "policy" and isinstance(tree, str)) else tree


def hold(now: Any, then: Any) -> None:
    """Assert that nothing has changed; of real numbers where they were recorded alone."""
    assert exact(now) == exact(then)
    there = read("fingerprint.json")
    other = [
        f"{key} is {value}, not {there[key]}"
        for key, value in fingerprint().items()
        if value != there[key]
    ]
    if other:
        pytest.skip(f"real numbers are left out, recorded on another machine: {'; '.join(other)}")
    assert now == then


def read(name: str) -> Any:
    """Read the record of that name."""
    text = (HERE / name).read_text()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the run files name."""
    for name in ("data", "policies"):
        shutil.copytree(HERE / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def interface(lines: Sequence[str]) -> list[str]:
    """Usage, commands, arguments and options of a help text; what it says of them is prose."""
    lists = next(i for i, line in enumerate(lines) if line in ("Arguments:", "Options:"))
    words = [named(line) for line in lines[lists:]]  # the paragraphs above are prose, too
    return [lines[0], *(word for word in words if word)]


def named(line: str) -> str:
    """The command or option that a line of help begins with, "" where it goes on."""
    found = re.match(r"  (--?[\w-]+(?:, --?[\w-]+)*(?: [A-Z]+\b)?|[\w-]+)", line)
    return found[1] if found else ""


def test_help_names_the_commands_and_options_that_it_named() -> None:
    now, then = help_texts(), read("help.json")
    added_commands = {f"{group} {name}" for group, new in ADDED_COMMANDS.items() for name in new}
    assert now.keys() - added_commands == then.keys()
    for name, lines in then.items():
        added = ADDED_OPTIONS.get(name, set()) | ADDED_COMMANDS.get(name, set())
        kept = [line for line in interface(now[name]) if line not in added]
        assert kept == interface(lines), name


def test_run_files_resolve_to_what_they_resolved_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHARD_DATA", str(tmp_path))  # data sets that are here change no path
    now = configurations()
    for name, settings in read("configurations.json").items():
        kept = {
            key: value
            for key, value in now[name].items()
            if key not in ADDED_SETTINGS and key.split(".")[0] not in ADDED_SECTIONS
        }
        assert kept == as_named_now(settings), name


def as_named_now(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded dotted settings under today's names."""
    return {
        (name := current_key(Config, key)): RENAMED_CHOICES.get(name, {}).get(value, value)
        if isinstance(value, str)
        else value
        for key, value in settings.items()
    }


def test_the_table_of_settings_is_that_of_the_product() -> None:
    assert {old: current_key(Config, old) for old in RENAMED_SETTINGS} == RENAMED_SETTINGS


def test_a_synthetic_world_is_what_it_was(here: Path) -> None:
    do("data", "synth", "again", *WORLD)
    for path in sorted((here / "data").glob("*.parquet")):
        assert pq.read_table(here / "again" / path.name).equals(pq.read_table(path)), path.name
    hold(*(json.loads((here / each / "card.json").read_text()) for each in ("again", "data")))


@pytest.mark.slow
def test_the_endpoint_describes_itself_as_it_did(here: Path) -> None:
    now = openapi(here / "policies" / "beam")
    for name, fields in ADDED_FIELDS.items():
        schema = now["components"]["schemas"][name]
        for field in fields:
            del schema["properties"][field]
        if "required" in schema:
            schema["required"] = [one for one in schema["required"] if one not in fields]
    for name in ADDED_SCHEMAS:
        del now["components"]["schemas"][name]
    for path in ADDED_PATHS:
        del now["paths"][path]
    request = now["components"]["schemas"]["RecommendRequest"]["properties"]
    for field, default in NOW_OPTIONAL.items():
        (kind,) = (kind for kind in request[field].pop("anyOf") if kind != {"type": "null"})
        request[field] |= kind | {"default": default}
    for name, field in NOW_LEFT_OUT:
        schema = now["components"]["schemas"][name]
        (kind,) = (k for k in schema["properties"][field].pop("anyOf") if k != {"type": "null"})
        schema["properties"][field] |= kind
        schema["required"] = [*schema["required"], field]
    for choices in (
        request["decoder"],
        now["components"]["schemas"]["RecommendResponse"]["properties"]["decoder"],
        now["components"]["schemas"]["VariantInfo"]["properties"]["decoders"]["items"],
    ):
        choices["enum"] = [one for one in choices["enum"] if one not in ADDED_DECODERS]
    for operations in now["paths"].values():
        for operation in operations.values():
            for status in ADDED_RESPONSES:
                operation["responses"].pop(status, None)
    for name in ("NewItem", "ChangedItem"):
        attributes = now["components"]["schemas"][name]["properties"]["attributes"]
        kinds = attributes["additionalProperties"]["anyOf"]
        attributes["additionalProperties"]["anyOf"] = [
            without(kind, ADDED_BOUNDS) for kind in kinds
        ]
    then = json.loads(
        re.sub(
            r"\b(" + "|".join(RENAMED_SCHEMAS) + r")\b",
            lambda found: RENAMED_SCHEMAS[found[1]],
            json.dumps(read("openapi.json")),
        )
    )
    assert without_prose(now) == without_prose(then)


def without_prose(tree: Any) -> Any:
    """An OpenAPI document less descriptions, names of operations and marks of old fields."""
    prose = ("description", "summary", "operationId", "deprecated", "readOnly")
    if isinstance(tree, list):
        return [without_prose(one) for one in tree]
    if isinstance(tree, dict):
        return {
            key: sorted(value)
            if key == "required" and isinstance(value, list)
            else without_prose(value)
            for key, value in tree.items()
            if key not in prose or isinstance(value, dict | list)
        }
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_a_saved_policy_recommends_what_it_did(name: str, here: Path) -> None:
    now = answers(here / "policies" / name, *POLICIES[name])
    hold(without(now, set[str]().union(*ADDED_FIELDS.values())), read(f"policies/{name}.json"))


def measures_what_it_did(name: str, *, in_process: bool) -> None:
    """Run commands here; all that they measure is what it was."""
    for command in COMMANDS[name]:
        do(command, HERE / name / "run.toml", f"cluster.in_process={str(in_process).lower()}")
    phases = set[str]().union(*(PHASES[command] for command in COMMANDS[name]))
    then = [line for line in read(f"{name}/metrics.jsonl") if line["phase"] in phases]
    hold(metrics(Path("runs", name)), renamed(then, RENAMED_METRICS))


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_tiny_run_in_one_process_measures_what_it_did(name: str) -> None:
    measures_what_it_did(name, in_process=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster", "here")
@pytest.mark.parametrize(
    "name",
    [pytest.param("beam", marks=pytest.mark.nightly), "ved",
     pytest.param("think", marks=pytest.mark.nightly)],
)  # fmt: skip
def test_a_tiny_run_through_ray_measures_what_it_did(name: str) -> None:
    measures_what_it_did(name, in_process=False)


@pytest.mark.slow
@pytest.mark.parametrize("ray", [False, pytest.param(True, marks=RAY)])
def test_an_interrupted_run_ends_as_the_undisturbed_one_did(
    ray: bool, here: Path, request: pytest.FixtureRequest
) -> None:
    if ray:
        request.getfixturevalue("ray_cluster")
    run = here / "runs" / "beam"
    shutil.copytree(HERE / "interrupted", run)
    do("train", run / "config.toml", f"cluster.in_process={str(not ray).lower()}")
    hold(metrics(run), renamed(read("beam/metrics.jsonl"), RENAMED_METRICS))


@pytest.mark.nightly
@pytest.mark.vllm
@pytest.mark.timeout(3600)
def test_the_quickstart_measures_what_it_did(tmp_path: Path) -> None:
    command = [*COMMAND, "quickstart", "--output", "."]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    then = renamed(read("quickstart/metrics.jsonl"), RENAMED_METRICS)
    hold(metrics(tmp_path / "quickstart"), then)
