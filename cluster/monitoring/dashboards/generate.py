"""Write the JSON files of `boards.py`: `python -m cluster.monitoring.dashboards.generate`.

Only this module needs the Grafana foundation SDK (the extra `dashboards`).
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

from cluster.monitoring.dashboards.boards import BOARDS
from cluster.monitoring.dashboards.graphs import HEIGHT, WIDTH, Board, Graph

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
FOLDER = Path(__file__).parent


def dashboard(board: Board) -> Dashboard:
    """Build a dashboard with the SDK."""
    built = (
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
        built = built.with_variable(
            QueryVariable("run")
            .label("Run")
            .datasource(SOURCE)
            .query("label_values(orchard_start_timestamp_seconds, run)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    panel_id = 0
    for row_index, row in enumerate(board.rows):
        width = WIDTH // len(row)
        for column, graph in enumerate(row):
            panel_id += 1
            position = GridPos(h=HEIGHT, w=width, x=column * width, y=row_index * HEIGHT)
            built = built.with_panel(panel(graph).id(panel_id).grid_pos(position))
    return built


def panel(graph: Graph) -> Panel:
    """Build a panel with the SDK."""
    built = Panel().title(graph.title).unit(graph.unit).datasource(SOURCE)
    if graph.about:
        built = built.description(graph.about)
    for index, (expression, legend) in enumerate(graph.curves):
        built = built.with_target(
            Dataquery()
            .ref_id(chr(ord("A") + index))
            .datasource(SOURCE)
            .expr(expression)
            .legend_format(legend)
        )
    return built


def as_json(board: Board) -> str:
    """Return the JSON file that Grafana provisions."""
    return JSONEncoder(sort_keys=True, indent=1).encode(dashboard(board).build()) + "\n"


def main() -> None:
    """Write one file per dashboard."""
    for board in BOARDS:
        text = as_json(board)
        json.loads(text)
        (FOLDER / f"{board.uid}.json").write_text(text)


if __name__ == "__main__":
    main()
