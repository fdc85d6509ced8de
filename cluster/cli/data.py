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


@data.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="Interaction log (CSV, TSV, Parquet), Amazon reviews (JSON lines), RecBole files, "
            "or a MiniOneRec folder."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    items: Annotated[
        Path | None, typer.Option(help="Item list with titles, or Amazon metadata.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="role=NAME with role user, item, timestamp or title; may be repeated."),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split rule: chronological or leave_one_out.")
    ] = "chronological",
    core: Annotated[
        int | None,
        typer.Option(min=1, help="Minimum events per user and item (k-core); 5 for Amazon."),
    ] = None,
    title_words: Annotated[
        int | None, typer.Option(min=1, help="Maximum words per title; 20 for Amazon.")
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

    if split not in ("chronological", "leave_one_out"):
        raise ConfigError(f"--split = {split!r}; choose chronological or leave_one_out")

    datasets.import_dataset(
        source,
        out,
        items,
        ImportOptions(
            columns=datasets.column_roles(column or []),
            core=core,
            title_words=title_words,
            split="leave_one_out" if split == "leave_one_out" else "chronological",
            max_history=max_history,
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
        Path | None, typer.Option(help="Embeddings: .npy, or Parquet of item_id and embedding.")
    ] = None,
    dimensions: Annotated[
        int, typer.Option(min=2, help="Dimensions of computed embeddings.")
    ] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing semantic IDs.")
    ] = False,
) -> None:
    """Assign semantic IDs by residual quantization, and report their quality."""
    from cluster.cli import datasets

    # Loads faiss and scikit-learn, which the other commands do not need.
    from orchard.data.semantic_ids.build import SemanticIdConfig
    from orchard.errors import ConfigError

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
            seed=seed,
        ),
        overwrite=overwrite,
    )
