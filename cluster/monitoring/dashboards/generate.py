"""Writes the JSON beside it from `boards.py`: `python -m cluster.monitoring.dashboards.generate`.

Needs the Grafana foundation SDK (the extra `dashboards`), which nothing else does.
"""
# pyright: basic, reportMissingImports=false

import json
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, GridPos, VariableRefresh

from cluster.monitoring.dashboards.boards import BOARDS, HEIGHT, WIDTH, Board, Graph

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
FOLDER = Path(__file__).parent


def dashboard(board: Board) -> Dashboard:
    """A board as the SDK builds it."""
    made = (
        Dashboard(board.title)
        .uid(board.uid)
        .tags(["orchard"])
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("browser")
        .editable()
        .with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    if board.by_run:
        made = made.with_variable(
            QueryVariable("run")
            .label("Run")
            .datasource(SOURCE)
            .query("label_values(orchard_start_timestamp_seconds, run)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    number = 0
    for line, row in enumerate(board.rows):
        width = WIDTH // len(row)
        for column, graph in enumerate(row):
            number += 1
            at = GridPos(h=HEIGHT, w=width, x=column * width, y=line * HEIGHT)
            made = made.with_panel(panel(graph).id(number).grid_pos(at))
    return made


def panel(graph: Graph) -> Panel:
    """A graph as the SDK builds it."""
    made = Panel().title(graph.title).unit(graph.unit).datasource(SOURCE)
    if graph.about:
        made = made.description(graph.about)
    for place, (expression, legend) in enumerate(graph.curves):
        made = made.with_target(
            Dataquery()
            .ref_id(chr(ord("A") + place))
            .datasource(SOURCE)
            .expr(expression)
            .legend_format(legend)
        )
    return made


def as_json(board: Board) -> str:
    """The file that Grafana provisions."""
    return JSONEncoder(sort_keys=True, indent=1).encode(dashboard(board).build()) + "\n"


def main() -> None:
    """Write one file per board."""
    for board in BOARDS:
        text = as_json(board)
        json.loads(text)
        (FOLDER / f"{board.uid}.json").write_text(text)


if __name__ == "__main__":
    main()
