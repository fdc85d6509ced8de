"""Generate tables of the README and of `docs/results.md` from results, between two marks."""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.shared.measure import Report, Row

DECODERS = {
    "floor_s": "the floor: prefill and two forward passes of all beams, no search",
    "worker_s": "**in vLLM's worker**",
    "torch_s": "torch engine, tree attention",
    "requests_s": "vLLM, one request per node",
    "vllm_beam_search_s": "vLLM's own `LLM.beam_search`, unconstrained, faster of two block sizes",
    "hf_strong_s": "Hugging Face, prompts computed once, dense masks",
    "hf_generate_s": "Hugging Face `generate`, `prefix_allowed_tokens_fn`",
    "hf_processor_s": "Hugging Face `generate`, masking logits processor",
}
STEPS = {
    "orchard": "**Orchard**",
    "trl_hook": "TRL 1.9.2's GRPOTrainer, constrained by `prefix_allowed_tokens_fn`",
    "trl_processor": "the same, constrained by a logits processor",
    "trl_search": "the same, handed Orchard's candidates, so that only its update counts",
    "flat_loop": "a plain loop of sequences, as MiniOneRec describes it",
    "orchard_whole_vocabulary": 'Orchard with `learner.logprob = "full"`',
}


def marks(name: str) -> tuple[str, str]:
    """Return the marks before and after a table."""
    return f"<!-- {name}: made by `make figures` -->", f"<!-- end of {name} -->"


def within(text: str, name: str, made: str) -> str:
    """Replace the text between the marks; raise ValueError if they are missing."""
    begin, end = marks(name)
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    if not rest or end not in rest:
        raise ValueError(f"the page lacks {begin} or {end}; put the two marks where tables go")
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


def decode(report: Report) -> str:
    """Tabulate the seconds of each search, absolute and relative to the search in the worker."""
    rows = [_with_fastest(row) for row in report["rows"] if "worker_s" in row]
    lines = [
        [label, *(f"{row[key]:.3f} ({_times(row[key], row['worker_s'])})" for row in rows)]
        for key, label in DECODERS.items()
    ]
    return _table(
        [
            "seconds (times the search in the worker)",
            *(f"width {row['width']:.0f}" for row in rows),
        ],
        lines,
    )


def learner(report: Report) -> str:
    """Tabulate packed trees against one sequence per candidate."""
    lines = [
        [
            f"{row['prompt_tokens']}", f"{row['candidates']}", f"{float(row['token_ratio']):.1f}x",
            f"{float(row['time_ratio']):.1f}x",
            f"{float(row['loss_difference']):.2g}, {float(row['gradient_difference']):.2g}",
        ]
        for row in report["rows"]
        if "time_ratio" in row
    ]  # fmt: skip
    head = ["prompt tokens", "candidates", "forward tokens flat / packed", "seconds flat / packed"]
    return _table([*head, "loss, gradients: relative difference"], lines)


def step(report: Report) -> str:
    """Tabulate the whole step of each method."""
    rows = {str(row["way"]): row for row in report["rows"] if "way" in row}
    lines = [
        [label, f"{rows[way]['step_s']:.2f}", f"{rows[way]['over_orchard']:.1f}x"]
        for way, label in STEPS.items()
    ]
    return _table(["a whole step", "seconds", "times Orchard's"], lines)


def highlights(reports: Sequence[Report]) -> str:
    """Tabulate one comparison of each of `step`, `decode` and `learner`."""
    rows = {report["bench"]: report["rows"] for report in reports}
    steps = {str(row["way"]): float(row["step_s"]) for row in rows["step"] if "way" in row}
    widest = max(
        (row for row in rows["decode"] if "worker_s" in row), key=lambda row: float(row["width"])
    )
    packed = next(
        row for row in rows["learner"] if (row["prompt_tokens"], row["candidates"]) == (128, 16)
    )
    decoders = float(widest["worker_s"]), float(widest["hf_generate_s"])
    updates = float(packed["packed_s"]), float(packed["flat_s"])
    compared = [
        ("A whole RL step, 32 prompts with 16 candidates each", "TRL 1.9.2, constrained",
         steps["orchard"], steps["trl_hook"]),
        (f"Constrained beam search of width {widest['width']}, 32 prompts",
         "Hugging Face `generate`", *decoders),
        ("An update, 8 prompts with 16 candidates each", "one sequence per candidate", *updates),
    ]  # fmt: skip
    lines = [
        [what, f"{ours:.2f} s", f"{rival}: {theirs:.2f} s", f"**{_times(theirs, ours)}**"]
        for what, rival, ours, theirs in compared
    ]
    return _table(["measured on two CPU cores", "Orchard", "compared with", "factor"], lines)


def gpu(report: Report) -> str:
    """Tabulate updates of packed trees and of separate sequences, and searches, on a GPU."""
    ways = ("flat", "packed, dense", "packed, flex", "packed, flex, checkpointed")
    updates: dict[str, dict[str, Row]] = {}
    for row in report["rows"]:
        if row["part"] == "updates":
            name = f"{row['policy']}, {row['prompts']} prompts of {row['prompt_tokens']} tokens"
            updates.setdefault(name, {})[str(row["way"])] = row
    lines = [
        [name, *(f"{float(rows[way]['seconds']):.3f} s, {float(rows[way]['peak_gib']):.1f} GiB"
                 for way in ways),
         _times(float(rows["flat"]["seconds"]), float(rows["packed, flex"]["seconds"]))]
        for name, rows in updates.items()
    ]  # fmt: skip
    head = ["an update", *ways, "flat / packed, flex"]
    searches: dict[str, dict[int, Row]] = {}
    for row in report["rows"]:
        if row["part"] == "searches" and "way" not in row:
            name = f"{row['policy']}, {row['prompts']} of {row['prompt_tokens']} tokens"
            searches.setdefault(name, {})[int(row["width"])] = row
    widths = sorted({width for rows in searches.values() for width in rows})
    found = [
        [name, *(f"{1000 * float(rows[w]['seconds']):.0f} ms, "
                 f"{float(rows[w]['requests_per_s']):.0f}/s" for w in widths)]
        for name, rows in searches.items()
    ]  # fmt: skip
    search_head = ["a search, requests a second", *(f"width {width}" for width in widths)]
    return _table(head, lines) + "\n\n" + _table(search_head, found)


TABLES: Mapping[str, Callable[[Report], str]] = {
    "decode": decode, "gpu": gpu, "learner": learner, "step": step,
}  # fmt: skip
"""Table functions by name of the benchmark, which is also that of the marks."""


def _with_fastest(row: Row) -> dict[str, float]:
    """Return the numbers of a row, with vLLM's own search at its faster block size."""
    numbers = {name: float(value) for name, value in row.items()}
    stock_seconds = [
        value for name, value in numbers.items() if name.startswith("vllm_beam_search_")
    ]
    return numbers | {"vllm_beam_search_s": min(stock_seconds)}


def _times(seconds: float, unit: float) -> str:
    ratio = seconds / unit
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table_lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table_lines)
