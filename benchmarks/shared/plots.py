"""Plot V-STAR's ablation from the results of `orchard bench vstar`."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.shared.measure import Report
from cluster.report.plots import COLOURS, FAINT, INK, apply_style

ABLATION = Path(__file__).parents[2] / "docs" / "vstar.svg"
METRIC = "ndcg@10/sid"


def ablation(report: Report, path: Path = ABLATION) -> None:
    """Plot the metric of every method in a report over the forward tokens of its searches.

    Dashed lines are the SFT policies. Equal reports give equal files.
    """
    rows = [row for row in report["rows"] if "way" in row]
    with mpl.rc_context(apply_style(path.name)):
        figure = Figure(figsize=(7.2, 3.6))
        axes = figure.subplots()
        for row in rows:
            name, is_guided = str(row["way"]), str(row["way"]).startswith("ved")
            tokens, score = float(row["forward_tokens"]) / 1e6, float(row[METRIC])
            axes.plot(tokens, score, "o", color=COLOURS[1 if is_guided else 0], markersize=5)
            if row["seed"] == 0:
                axes.annotate(
                    name, (tokens, score), xytext=(6, -3), textcoords="offset points",
                    color=INK, fontsize=8, bbox={
                        "facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 0.4,
                    },
                )  # fmt: skip
        for row in report["rows"]:
            if row.get("policy") == "warm_start":
                axes.axhline(
                    float(row[METRIC]), color=FAINT, linewidth=0.8, linestyle="--", zorder=0
                )
        axes.set_xlabel("million tokens forwarded by 120 updates' searches, leaves included")
        axes.set_ylabel("NDCG@10, test rows")
        axes.margins(x=0.2)
        figure.savefig(path, metadata={"Date": None})
