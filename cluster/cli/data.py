"""Commands for data sets: `orchard data ...`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(help="Make or bring data.", no_args_is_help=True)


@data.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    items: Annotated[int | None, typer.Option(min=1, help="Number of items.")] = None,
    users: Annotated[int | None, typer.Option(min=1, help="Number of users.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
) -> None:
    """A synthetic world with structure worth learning."""
    from orchard.data.synthetic import WorldParams, write_world

    params = WorldParams(seed=seed)
    if items is not None:
        params = replace(params, num_items=items)
    if users is not None:
        params = replace(params, num_users=users)
    card = write_world(out, params, overwrite=overwrite)
    for fact, value in card.facts.items():
        typer.echo(f"{fact:>28}  {value:g}")


@data.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="Log (CSV, TSV, Parquet), Amazon reviews (JSON lines), RecBole files, or a "
            "MiniOneRec folder."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    items: Annotated[
        Path | None, typer.Option(help="List of items with titles, or Amazon's metadata.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="role=NAME for roles user, item, timestamp, title; may be repeated."),
    ] = None,
    split: Annotated[str, typer.Option(help="chronological or leave_one_out.")] = "chronological",
    core: Annotated[
        int | None,
        typer.Option(min=1, help="Fewest events of each user and item; 5 for Amazon reviews."),
    ] = None,
    title_words: Annotated[
        int | None, typer.Option(min=1, help="Most words of a title; 20 for Amazon reviews.")
    ] = None,
    max_history: Annotated[int, typer.Option(min=1, help="Longest history written.")] = 50,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set.")] = False,
) -> None:
    """Interactions of your own as a data set, with a card of what it holds."""
    from cluster.cli import datasets

    datasets.import_dataset(
        source,
        out,
        items=items,
        column=column or [],
        split=split,
        core=core,
        title_words=title_words,
        max_history=max_history,
        overwrite=overwrite,
    )


@data.command()
def sids(
    folder: Annotated[Path, typer.Argument(help="Folder of a data set.")],
    levels: Annotated[str, typer.Option(help="Codes of each level.")] = "256,256,256",
    quantiser: Annotated[
        str, typer.Option(help="kmeans, balanced (as many items to each code) or rqvae.")
    ] = "kmeans",
    collisions: Annotated[str, typer.Option(help="reassign, extra_level or keep.")] = "reassign",
    source: Annotated[str, typer.Option(help="auto, titles or interactions.")] = "auto",
    model: Annotated[
        Path | None, typer.Option(help="Folder of a sentence-transformers model for titles.")
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Embeddings: .npy, or Parquet of item_id and embedding.")
    ] = None,
    dimensions: Annotated[int, typer.Option(min=2, help="Of embeddings made here.")] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace semantic IDs.")] = False,
) -> None:
    """Semantic IDs by residual quantisation, with a report of their quality."""
    from cluster.cli import datasets

    datasets.assign_semantic_ids(
        folder,
        levels=levels,
        quantiser=quantiser,
        collisions=collisions,
        source=source,
        model=model,
        embeddings=embeddings,
        dimensions=dimensions,
        seed=seed,
        overwrite=overwrite,
    )
