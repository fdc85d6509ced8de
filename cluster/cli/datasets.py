"""What the data commands do: bring interactions, with a bar while files are read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from cluster.console import Progress
from orchard import folders
from orchard.data.importers.card import CARD
from orchard.data.importers.read import ImportOptions, read, size_of
from orchard.data.importers.write import write
from orchard.errors import ConfigError

_MIB = 1 << 20


def import_dataset(
    source: Path,
    out: Path,
    *,
    items: Path | None,
    column: Sequence[str],
    split: str,
    core: int | None,
    title_words: int | None,
    max_history: int,
    overwrite: bool,
) -> None:
    """Import a source and print the facts of its card.

    Raises:
        ConfigError, DataError: one sentence each; `out` is then as it was.
    """
    if split not in ("chronological", "leave_one_out"):
        raise ConfigError(f"--split = {split!r}; choose chronological or leave_one_out")
    choices = ImportOptions(
        columns=_mapping(column),
        core=core,
        title_words=title_words,
        split="leave_one_out" if split == "leave_one_out" else "chronological",
        max_history=max_history,
    )
    folders.check_output_dir(out, mark=CARD, kind="data set", overwrite=overwrite)
    seen = 0
    with Progress("reading, MiB", total=max(1, size_of(source, items) // _MIB)) as progress:

        def tick(count: int) -> None:
            nonlocal seen
            before, seen = seen, seen + count
            progress.advance(
                count=min(seen // _MIB, progress.total) - min(before // _MIB, progress.total)
            )

        examples = read(source, items, choices, tick)
    print_facts(write(out, examples, source=source.name, overwrite=overwrite))
    typer.echo(f"data set: {out}")
    if examples.items.sid is None:
        typer.echo(f"it has no semantic IDs yet: orchard data sids {out}")


def assign_semantic_ids(
    folder: Path,
    *,
    levels: str,
    quantiser: str,
    collisions: str,
    source: str,
    model: Path | None,
    embeddings: Path | None,
    dimensions: int,
    seed: int,
    overwrite: bool,
) -> None:
    """Make semantic IDs and print how good they are.

    Raises:
        ConfigError, DataError: one sentence each; the folder is then as it was.
    """
    from orchard.data.semantic_ids import (
        build,  # loads faiss and scikit-learn, which an import does not need
    )

    if source not in ("auto", "titles", "interactions"):
        raise ConfigError(f"--source = {source!r}; choose auto, titles or interactions")
    sizes = levels.split(",")
    if not all(size.strip().isdigit() for size in sizes):
        raise ConfigError(f"--levels = {levels!r} is no list of sizes such as 256,256,256")
    recipe = build.SemanticIdConfig(
        levels=tuple(int(size) for size in sizes),
        quantiser=quantiser,
        collisions=collisions,
        source=source,
        model=model,
        embeddings=embeddings,
        dimensions=dimensions,
        seed=seed,
    )
    report = build.build(folder, recipe, overwrite=overwrite)
    before, after = report["before"], report["after"]
    typer.echo(f"embeddings: {report['embedding']}, {report['recipe']['dimensions']} dimensions")
    for name, found in (("as quantised", before), ("with collisions settled", after)):
        typer.echo(
            f"{name}: {found['distinct']} distinct of {found['items']} items, "
            f"{found['colliding_items']} share theirs"
        )
    for index, level in enumerate(after["levels"]):
        rest = f", residual {report['residual'][index]:.3f}" if index < len(sizes) else ""
        typer.echo(
            f"level {index + 1}: {level['codes_used']} codes, perplexity "
            f"{level['perplexity']:.1f}, {level['children_mean']:.1f} children per prefix, "
            f"{level['single_child_share']:.0%} with one{rest}"
        )
    typer.echo(f"report: {folder / build.REPORT}, picture: {folder / build.PICTURE}")


def print_facts(facts: Mapping[str, float]) -> None:
    """Facts, one to a line."""
    width = max(len(fact) for fact in facts)
    for fact, value in facts.items():
        typer.echo(f"{fact:>{width}}  {value:g}")


def _mapping(column: Sequence[str]) -> dict[str, str]:
    """Pairs such as `user=customer`."""
    pairs = [text.partition("=") for text in column]
    for text, (role, equals, name) in zip(column, pairs, strict=True):
        if not (role and equals and name):
            raise ConfigError(f"--column = {text!r} is not of the form role=NAME, as in user=uid")
        if sum(other == role for other, _, _ in pairs) > 1:
            raise ConfigError(f"--column names {role} twice; give each role one column")
    return {role: name for role, _, name in pairs}
