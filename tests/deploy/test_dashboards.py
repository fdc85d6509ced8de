"""Dashboards, rules and runbooks, without Grafana."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.monitoring.dashboards.boards import BOARDS
from cluster.monitoring.dashboards.graphs import WIDTH, Board
from cluster.monitoring.prometheus_metrics import BY_NAME, METRICS, OTHERS
from serve import metrics

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "cluster" / "monitoring"
FILES = sorted((ROOT / "cluster" / "monitoring" / "dashboards").glob("*.json"))

BUILT_IN = {"__rate_interval", "datasource"}
WORDS = re.compile(r"\b(?:orchard|ray)_[a-z0-9_]+")


def panels(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["panels"]


def expressions(file: Path) -> list[str]:
    return [target["expr"] for panel in panels(file) for target in panel["targets"]]


def known(name: str) -> bool:
    """Return whether a series is defined by Orchard or Ray, including histogram series."""
    defined = {m.name for m in METRICS if m.kind != "histogram"} | OTHERS.keys()
    defined |= {f"ray_{n}_total" for n in metrics.COUNTERS} | {f"ray_{n}" for n in metrics.GAUGES}
    parts = re.fullmatch(r"(.*)_(bucket|sum|count)", name)
    histograms = {m.name for m in METRICS if m.kind == "histogram"} | {
        "ray_serve_http_request_latency_ms",
        "ray_serve_deployment_processing_latency_ms",
        *(f"ray_{n}" for n in metrics.HISTOGRAMS),
    }
    return name in defined or (parts is not None and parts[1] in histograms)


def test_there_is_a_file_for_each_board() -> None:
    assert {f.stem for f in FILES} == {board.uid for board in BOARDS}
    for board in BOARDS:
        file = ROOT / "cluster" / "monitoring" / "dashboards" / f"{board.uid}.json"
        found = {target["expr"] for panel in panels(file) for target in panel["targets"]}
        drawn = [graph for row in board.rows for graph in row]
        assert found == {curve for graph in drawn for curve, _ in graph.curves}
        assert [p["title"] for p in panels(file)] == [graph.title for graph in drawn]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_panels_are_whole_and_do_not_overlap(file: Path) -> None:
    board = json.loads(file.read_text())
    assert board["uid"] == file.stem
    assert board["schemaVersion"] == 41
    variables = {v["name"] for v in board["templating"]["list"]} | BUILT_IN
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        cell = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(cell["x"], cell["x"] + cell["w"])
            for y in range(cell["y"], cell["y"] + cell["h"])
        }
        assert cell["x"] + cell["w"] <= WIDTH
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        places = [target["refId"] for target in panel["targets"]]
        assert len(set(places)) == len(places)
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert target["legendFormat"]
            assert set(re.findall(r"\$\{?(\w+)", target["expr"])) <= variables


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_panels_ask_for_metrics_that_exist_by_labels_that_they_have(file: Path) -> None:
    for expression in expressions(file):
        for name in WORDS.findall(expression):
            assert known(name), expression
            metric = BY_NAME.get(re.sub("_(bucket|sum|count)$", "", name)) or BY_NAME.get(name)
            if metric is not None:
                near = re.findall(rf"{name}\{{([^}}]*)\}}", expression)
                asked = {label for part in near for label in re.findall(r"(\w+)=", part)}
                assert asked <= {"run", *metric.labels}, expression


@pytest.mark.parametrize("board", [b for b in BOARDS if b.by_run], ids=lambda b: b.uid)
def test_a_legend_names_all_by_which_curves_differ(board: Board) -> None:
    """Two runs at once, two actors, two pools: no two curves of a query have one name."""
    drawn = [graph for row in board.rows for graph in row]
    for expression, legend in (curve for graph in drawn for curve in graph.curves):
        metric = next(iter(BY_NAME.keys() & set(WORDS.findall(expression))), None)
        by = re.search(r"by \(([^)]*)\)", expression)
        if by is not None:
            kept = set(by[1].split(", ")) - {"le"}
        else:
            assert metric is not None, expression
            fixed = set(re.findall(r'(\w+)="', expression))
            kept = {"run", *BY_NAME[metric].labels} - fixed
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) >= kept, (expression, legend)
        assert metric is None or "run" in kept, expression


def test_the_serving_board_shows_all_of_the_endpoint_by_labels_that_it_has() -> None:
    tags = {
        **{f"ray_{name}_total": labels for name, labels in metrics.COUNTERS.items()},
        **{f"ray_{name}": labels for name, labels in metrics.GAUGES.items()},
        **{f"ray_{name}_bucket": labels for name, labels in metrics.HISTOGRAMS.items()},
    }
    shown: set[str] = set()
    for expression in expressions(
        ROOT / "cluster" / "monitoring" / "dashboards" / "orchard-serving.json"
    ):
        names = [name for name in WORDS.findall(expression) if name in tags]
        shown.update(names)
        for name in names:
            by = re.search(r"by \(([^)]*)\)", expression)
            labels = set(by[1].split(", ")) if by is not None else set[str]()
            assert labels <= {*tags[name], "le", "replica"}, expression
    assert shown == tags.keys()


def test_every_metric_is_on_a_dashboard_or_in_a_rule() -> None:
    text = " ".join(e for f in FILES for e in expressions(f))
    text += (MONITORING / "rules.yml").read_text()
    used = {re.sub("_(bucket|sum|count)$", "", word) for word in WORDS.findall(text)}
    assert {m.name for m in METRICS} == used & {m.name for m in METRICS}


def test_ray_still_has_the_metrics_that_are_asked_of_it() -> None:
    import ray

    folder = Path(ray.__file__).parent
    rooms = [folder / "serve", folder / "dashboard" / "modules"]
    text = "".join(file.read_text() for room in rooms for file in room.rglob("*.py"))
    protocols = {"num_http_requests", "num_http_error_requests", "http_request_latency_ms"}
    for name in OTHERS:
        plain = name.removeprefix("ray_").removesuffix("_total")
        generic = plain.removeprefix("serve_")
        if generic in protocols:
            plain = generic.replace("http", "{protocol_name}")
        assert plain in text, name


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_alert_has_a_severity_a_runbook_a_test_and_known_metrics() -> None:
    tests = yaml.safe_load((ROOT / "tests/deploy/rules_test.yml").read_text())["tests"]
    tested = {
        one["alertname"] for test in tests for one in test["alert_rule_test"] if one["exp_alerts"]
    }
    alerts = [rule for rule in rules() if "alert" in rule]
    assert {alert["alert"] for alert in alerts} == tested
    books: set[str] = set()
    for alert in alerts:
        assert alert["labels"]["severity"] in ("warning", "critical")
        book = ROOT / alert["annotations"]["runbook"]
        assert book.read_text().startswith(f"# {alert['alert']}\n")
        books.add(book.name)
    assert books == {file.name for file in (ROOT / "docs" / "runbooks").glob("*.md")}
    recorded = {rule["record"].split(":")[1] for rule in rules() if "record" in rule}
    for rule in rules():
        words = re.sub(r"\brun:\w+:\w+", "", rule["expr"])
        assert all(known(name) or name in recorded for name in WORDS.findall(words)), rule


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    return subprocess.run(
        [tool, *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )


def test_promtool_accepts_the_rules() -> None:
    ended = promtool("check", "rules", "--lint=all", "--lint-fatal", str(MONITORING / "rules.yml"))
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_alerts_fire_when_they_should_and_not_otherwise() -> None:
    ended = promtool("test", "rules", "rules_test.yml")
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_expressions_of_panels_are_promql(tmp_path: Path) -> None:
    recorded = [
        {"record": f"panel:{number}", "expr": text.replace("$__rate_interval", "1m")}
        for number, text in enumerate(e for f in FILES for e in expressions(f))
    ]
    file = tmp_path / "panels.yml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": recorded}]}))
    ended = promtool("check", "rules", "--lint=none", str(file))
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_regenerating_gives_the_same_files_and_grafanas_model_loses_nothing() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="the extra `dashboards` is not installed")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    from cluster.monitoring.dashboards.generate import as_json

    register_default_plugins()
    for board in BOARDS:
        text = (ROOT / "cluster" / "monitoring" / "dashboards" / f"{board.uid}.json").read_text()
        assert text == as_json(board)
        again = json.loads(JSONEncoder().encode(Dashboard.from_json(json.loads(text))))
        for panel in again["panels"]:  # the model adds an empty section of its own
            assert panel["fieldConfig"]["defaults"].pop("custom") == {}
        assert again == json.loads(text)
