"""Commands that make and import data sets: `orchard data ...`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(help="Generate or import data, and assign semantic IDs.", no_args_is_help=True)


@data.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    items: Annotated[int | None, typer.Option(min=1, help="Number of items.")] = None,
    users: Annotated[int | None, typer.Option(min=1, help="Number of users.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
) -> None:
    """Generate a synthetic data set with learnable structure."""
    from orchard.data.synthetic import WorldParams, write_world

    params = WorldParams(seed=seed)
    if items is not None:
        params = replace(params, num_items=items)
    if users is not None:
        params = replace(params, num_users=users)
    card = write_world(out, params, overwrite=overwrite)
    for fact, value in card.facts.items():
        typer.echo(f"{fact:>28}  {value:g}")


@data.command()
def fetch(
    name: Annotated[
        str,
        typer.Argument(
            help="amazon_industrial, amazon_instruments, or FAMILY/CATEGORY: amazon2014/Beauty, "
            "amazon2018/Industrial_and_Scientific, amazon2023/All_Beauty, movielens/1m, "
            "minionerec/Office_Products, letter/Beauty."
        ),
    ],
    root: Annotated[
        Path | None,
        typer.Option(
            help="Root of the data sets. [default: the environment variable ORCHARD_DATA, "
            "otherwise data]",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Import again over the data set in ROOT/NAME.")
    ] = False,
) -> None:
    """Download a public data set into ROOT/raw/NAME and import it into ROOT/NAME.

    Files that already lie in ROOT/raw/NAME are taken as they are.
    """
    from cluster.cli import datasets
    from orchard.settings.data import data_root

    datasets.fetch_dataset(name, root or data_root(), overwrite=overwrite)


@data.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="Interaction log: text table (CSV, TSV, .txt, .dat), JSON lines, Parquet, or a "
            "folder of parts, text also packed (.gz, .bz2, .zst, .xz); RecBole files; a folder of "
            "MiniOneRec, LC-Rec or LETTER."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    items: Annotated[
        Path | None,
        typer.Option(
            help="Item list with titles, in any of these formats; its identifiers are matched with "
            "those of the log."
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="role=NAME with role user, item, timestamp, title or label (of the log), "
            "items.item or items.title (of the item list); may be repeated. Columns of a file "
            "without a header are numbered from 1."
        ),
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of each event that is kept beside the histories, NAME or NAME=COLUMN; gap "
            "keeps the times. For data.context; may be repeated."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Events with label 0, which were shown but not chosen: positive drops them, all "
            "keeps them."
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(help="Encoding of text files, such as cp1251 or gbk; detected by default."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split rule: chronological or leave_one_out. "
            "[default: leave_one_out for LC-Rec and LETTER, else chronological]",
            show_default=False,
        ),
    ] = None,
    core: Annotated[
        int | None,
        typer.Option(min=1, help="Minimum events per user and item (k-core); 5 for Amazon."),
    ] = None,
    title_words: Annotated[
        int | None,
        typer.Option(min=0, help="Maximum words per title; 20 for Amazon. 0 keeps all items."),
    ] = None,
    max_history: Annotated[int, typer.Option(min=1, help="Maximum history length.")] = 50,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the data set in OUT.")
    ] = False,
) -> None:
    """Import an interaction log as a data set, with a card of its statistics."""
    from cluster.cli import datasets
    from orchard.data.importers.read import ImportOptions
    from orchard.errors import ConfigError

    if split not in (None, "chronological", "leave_one_out"):
        raise ConfigError(f"--split = {split!r}; choose chronological or leave_one_out")
    if labels not in (None, "positive", "all"):
        raise ConfigError(f"--labels = {labels!r}; choose positive or all")

    datasets.import_dataset(
        source,
        out,
        items,
        ImportOptions(
            columns=datasets.column_roles(column or []),
            context=datasets.context_columns(context or []),
            core=core,
            title_words=title_words,
            split=split,
            max_history=max_history,
            labels=labels,
            encoding=encoding,
        ),
        overwrite=overwrite,
    )


@data.command()
def sids(
    folder: Annotated[Path, typer.Argument(help="Data set folder.")],
    levels: Annotated[str, typer.Option(help="Codebook size of each level.")] = "256,256,256",
    quantiser: Annotated[
        str, typer.Option(help="kmeans, balanced (equally many items per code) or rqvae.")
    ] = "kmeans",
    collisions: Annotated[
        str, typer.Option(help="Collision policy: reassign, extra_level or keep.")
    ] = "reassign",
    source: Annotated[
        str, typer.Option(help="Embedding source: auto, titles or interactions.")
    ] = "auto",
    model: Annotated[
        Path | None, typer.Option(help="Folder of a sentence-transformers model for the titles.")
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            help="Embeddings: Parquet, .npz or .pt of item_id and embedding, or rows in the order "
            "of the items in .npy, .npz or .pt."
        ),
    ] = None,
    dimensions: Annotated[
        int, typer.Option(min=2, help="Dimensions of computed embeddings.")
    ] = 128,
    sample: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Fit the codebooks to so many items, and read the others in parts from "
            "--embeddings, an .npy file: for millions of items.",
        ),
    ] = None,
    max_without_signal: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Largest share of items whose embedding carries no information."
        ),
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing semantic IDs.")
    ] = False,
) -> None:
    """Assign semantic IDs by residual quantization, and report their quality."""
    from cluster.cli import datasets
    from orchard.errors import ConfigError

    # Loads faiss and scikit-learn, which the other commands do not need.
    from orchard.semantic_ids.build import SemanticIdConfig

    if source not in ("auto", "titles", "interactions"):
        raise ConfigError(f"--source = {source!r}; choose auto, titles or interactions")

    datasets.assign_semantic_ids(
        folder,
        SemanticIdConfig(
            levels=datasets.level_sizes(levels),
            quantiser=quantiser,
            collisions=collisions,
            source=source,
            model=model,
            embeddings=embeddings,
            dimensions=dimensions,
            sample=sample,
            max_without_signal=max_without_signal,
            seed=seed,
        ),
        overwrite=overwrite,
    )


@data.command()
def encode(
    bundle: Annotated[
        Path, typer.Argument(help="Tokenizer bundle: the folder `sids` next to the items.")
    ],
    items: Annotated[
        Path, typer.Argument(help="Items file (Parquet): new items, or all of a catalog.")
    ],
    out: Annotated[Path, typer.Argument(help="Items file to write, with `sid` and `sid_text`.")],
    append: Annotated[
        bool, typer.Option("--append", help="Add the new items to the bundle as its next version.")
    ] = False,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            help="Embeddings of the new items, for a bundle made from embeddings or interactions: "
            "files as for `orchard data sids`."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of the sentence-transformers model that the bundle names."),
    ] = None,
    share_when_full: Annotated[
        bool,
        typer.Option(
            "--share-when-full", help="Let a new item share a semantic ID where no code is free."
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Make the semantic IDs of the bundle's first items again and compare."
        ),
    ] = False,
) -> None:
    """Give the items of a file the semantic IDs of a bundle; those that have one keep it."""
    from cluster.cli import datasets

    # Loads faiss and scikit-learn, which the other commands do not need.
    from orchard.semantic_ids.encode import EncodeOptions

    datasets.encode_items(
        bundle,
        items,
        out,
        EncodeOptions(
            embeddings=embeddings,
            model=model,
            append=append,
            share_when_full=share_when_full,
            verify=verify,
        ),
    )


@data.command()
def feedback(
    log: Annotated[Path, typer.Argument(help="Exposure log of an endpoint: folder or file.")],
    events: Annotated[
        Path,
        typer.Argument(
            help="Events (Parquet, CSV, JSON lines, or a folder of them): time, item_id, behavior, "
            "request_id or user, and optionally value and event_id."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    value: Annotated[
        list[str] | None,
        typer.Option(help="BEHAVIOR=VALUE; may be repeated. Without any, every behavior is 1."),
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option(
            help="Items file of the catalog to learn with; rows of other items are left out."
        ),
    ] = None,
    window: Annotated[float, typer.Option(help="Attribution window in seconds.")] = 3600.0,
    lateness: Annotated[
        float, typer.Option(help="Seconds beyond the window that events may still arrive in.")
    ] = 0.0,
    unsettled: Annotated[
        str, typer.Option(help="Exposures whose events may still come: keep or drop.")
    ] = "keep",
    clock_offset: Annotated[
        float, typer.Option(help="Seconds to add to the times of events.")
    ] = 0.0,
    clock_tolerance: Annotated[
        float, typer.Option(help="Seconds by which an event may precede its exposure.")
    ] = 60.0,
    repeats: Annotated[
        str, typer.Option(help="Events of one behavior count once for an exposure, or all.")
    ] = "once",
    combine: Annotated[
        str, typer.Option(help="Values of several behaviors: sum, max or last.")
    ] = "sum",
    contradictions: Annotated[
        str,
        typer.Option(help="Events of positive and of negative value: last, combine or drop."),
    ] = "last",
    bound: Annotated[float, typer.Option(help="Largest absolute reward; others are cut.")] = 1e3,
    bad_values: Annotated[
        str, typer.Option(help="Values that are not finite numbers: refuse or drop.")
    ] = "refuse",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
) -> None:
    """Join what was shown with what users did: one row with its reward for every exposure."""
    from cluster.cli.feedback import behavior_values, join_options, make_feedback

    options = join_options(
        values=behavior_values(value or []), window=window, lateness=lateness, unsettled=unsettled,
        clock_offset=clock_offset, clock_tolerance=clock_tolerance, repeats=repeats,
        combine=combine, contradictions=contradictions, bound=bound, bad_values=bad_values,
    )  # fmt: skip
    make_feedback(log, events, out, options, items=items, overwrite=overwrite)
