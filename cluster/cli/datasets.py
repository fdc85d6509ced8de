"""Import data sets and assign semantic IDs for the data commands, and print the results."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cluster.console import Progress
from orchard import folders
from orchard.data.importers.card import CARD
from orchard.data.importers.read import ImportOptions, read, size_of
from orchard.data.importers.write import write
from orchard.data.remote.fetch import fetch_files
from orchard.data.remote.sources import find
from orchard.errors import ConfigError
from orchard.settings.data import GAP

if TYPE_CHECKING:
    from orchard.semantic_ids.build import SemanticIdConfig
    from orchard.semantic_ids.encode import EncodeOptions

_MIB = 1 << 20
_TOLD_BYTES = 64 * _MIB
"""Bytes of a download between two lines that say how much was received."""


def import_dataset(
    source: Path, out: Path, items: Path | None, options: ImportOptions, *, overwrite: bool
) -> None:
    """Import a source with an optional item list, and print the facts of the data set's card.

    Raises:
        ConfigError, DataError: one sentence each; `out` is left unchanged.
    """
    folders.check_output_dir(out, mark=CARD, kind="data set", overwrite=overwrite)
    bytes_read = 0
    with Progress("reading, MiB", total=max(1, size_of(source, items) // _MIB)) as progress:

        def tick(count: int) -> None:
            nonlocal bytes_read
            before, bytes_read = bytes_read, bytes_read + count
            progress.advance(
                count=min(bytes_read // _MIB, progress.total) - min(before // _MIB, progress.total)
            )

        examples = read(source, items, options, tick)
    facts = write(out, examples, source=source.resolve().name, overwrite=overwrite)
    for note in examples.notes:
        typer.echo(note)
    print_facts(facts)
    typer.echo(f"data set: {out}")
    if examples.items.sid is None:
        typer.echo(f"it has no semantic IDs yet; to assign them: orchard data sids {out}")


def fetch_dataset(name: str, root: Path, *, overwrite: bool) -> None:
    """Download a public data set below `root` and import it, and print where it comes from.

    Raises:
        ConfigError, DataError: one sentence each; what was downloaded is kept.
    """
    remote = find(name)
    out, raw = root / name, root / "raw" / name
    folders.check_output_dir(out, mark=CARD, kind="data set", overwrite=overwrite)
    typer.echo(f"{name}: {remote.page}; terms: {remote.terms}")
    received = 0

    def tick(count: int) -> None:
        nonlocal received
        before, received = received, received + count
        if before // _TOLD_BYTES != received // _TOLD_BYTES:
            typer.echo(f"{received // _MIB} MiB received", err=True)

    for sentence in fetch_files(remote, raw, tick=tick):
        typer.echo(sentence)
    items = None if remote.items is None else raw / remote.items
    import_dataset(raw / remote.source, out, items, remote.options, overwrite=overwrite)


def assign_semantic_ids(folder: Path, recipe: "SemanticIdConfig", *, overwrite: bool) -> None:
    """Assign semantic IDs to the items of a data set, and print their quality.

    Raises:
        ConfigError, DataError: one sentence each; the folder is left unchanged.
    """
    from orchard.semantic_ids import build, bundle, sampled  # loads faiss and scikit-learn

    make = build.build if recipe.sample is None else sampled.build_sampled
    report = make(folder, recipe, overwrite=overwrite)
    before, after = report["before"], report["after"]
    sharing = report["items_sharing_an_embedding"]
    typer.echo(
        f"embeddings: {report['embedding']}, {report['recipe']['dimensions']} dimensions; "
        f"{report['items_without_signal']} items without signal"
        + ("" if sharing is None else f", {sharing} share an embedding")
    )
    for name, quality in (("as quantised", before), ("with collisions settled", after)):
        typer.echo(
            f"{name}: {quality['distinct']} distinct of {quality['items']} items, "
            f"{quality['colliding_items']} share an ID"
        )
    residual = report["residual"]
    for index, level in enumerate(after["levels"]):
        # A level that settles collisions has no residual.
        rest = f", residual {residual[index]:.3f}" if index < len(recipe.levels) else ""
        typer.echo(
            f"level {index + 1}: {level['codes_used']} codes, perplexity "
            f"{level['perplexity']:.1f}, {level['children_mean']:.1f} children per prefix, "
            f"{level['single_child_share']:.0%} of prefixes with one{rest}"
        )
    typer.echo(f"report: {folder / build.REPORT}, picture: {folder / build.PICTURE}")
    typer.echo(f"tokenizer bundle: {folder / bundle.BUNDLE}, for new items: orchard data encode")


def encode_items(bundle: Path, items: Path, out: Path, options: "EncodeOptions") -> None:
    """Encode the items of a file with a tokenizer bundle, and print what became of them.

    Raises:
        ConfigError, DataError: one sentence each; the bundle is left unchanged.
    """
    from orchard.semantic_ids.encode import encode  # loads faiss and scikit-learn

    report = encode(bundle, items, out, options)
    typer.echo(f"{report.num_known} items have a semantic ID of the bundle and keep it")
    typer.echo(
        f"{report.num_new} items are new: {report.num_moved} of them took a free code instead of "
        f"their nearest, {report.num_shared} share one"
    )
    if report.num_new:
        typer.echo(
            f"mean squared distance to the last code: {report.distance:.3g} times that of the "
            "items that the bundle was made from"
        )
    if report.num_silent:
        typer.echo(
            f"warning: the embeddings of {report.num_silent} new items carry no information, so "
            "their semantic IDs are arbitrary; give them titles with known words, or fit the "
            "bundle again",
            err=True,
        )
    if report.num_repeated is not None:
        typer.echo(
            f"{report.num_repeated} of {report.num_first} items that the bundle was made from get "
            "the same semantic ID again"
        )
    if report.num_new:
        typer.echo(
            f"bundle: version {report.version}, with the new items"
            if options.append
            else f"bundle: version {report.version}, unchanged; --append adds the new items"
        )
    typer.echo(f"items: {out}")


def level_sizes(text: str) -> tuple[int, ...]:
    """Parse codebook sizes such as `256,256,256`; raises ConfigError."""
    sizes = text.split(",")
    if not all(size.strip().isdigit() for size in sizes):
        raise ConfigError(f"--levels = {text!r} is not a list of sizes such as 256,256,256")
    return tuple(int(size) for size in sizes)


def column_roles(columns: Sequence[str]) -> dict[str, str]:
    """Parse `role=NAME` pairs such as `user=customer`; raises ConfigError."""
    pairs = [text.partition("=") for text in columns]
    for text, (role, equals, name) in zip(columns, pairs, strict=True):
        if not (role and equals and name):
            raise ConfigError(f"--column = {text!r} is not of the form role=NAME, as in user=uid")
        if sum(other == role for other, _, _ in pairs) > 1:
            raise ConfigError(f"--column names {role} twice; give each role one column")
    return {role: name for role, _, name in pairs}


def context_columns(columns: Sequence[str]) -> dict[str, str]:
    """Parse names of context such as `behavior` or `behavior=event_type`; raises ConfigError.

    `gap` without a column has an empty one: it stands for the times of the events.
    """
    found: dict[str, str] = {}
    for text in columns:
        name, equals, column = text.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9_]+", name) or (equals and not column) or name in found:
            raise ConfigError(
                f"--context = {text!r} is not of the form NAME or NAME=COLUMN, with a new name of "
                "lower-case letters, digits and _, at least two of them"
            )
        found[name] = column or ("" if name == GAP else name)
    return found


def print_facts(facts: Mapping[str, float]) -> None:
    """Print facts, one per line, with aligned values."""
    width = max(len(fact) for fact in facts)
    for fact, value in facts.items():
        typer.echo(f"{fact:>{width}}  {value:g}")
