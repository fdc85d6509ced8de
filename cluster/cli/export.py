"""Export a policy as a self-contained Hugging Face folder with a model card.

A policy with LoRA can be exported as adapters alone, to be used with its base model.

Besides weights, configuration and tokenizer, the folder holds the value head, the catalog, the
run's configuration and evaluations, and `README.md` (description, metrics and limits).
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cluster.training.run import Run
from cluster.training.run_dir import base_of
from orchard import config, folders
from orchard.data.importers.card import CARD
from orchard.errors import CheckpointError, ConfigError, DataError
from orchard.evaluation import ranking
from orchard.evaluation.ranking import Evaluation
from orchard.policy import lora, model, value_head
from orchard.policy.store import FILE, Policy, read_adapter
from orchard.semantic_ids.bundle import BUNDLE
from orchard.settings import Config

_SHOWN = ("hr@1", "hr@3", "hr@10", "hr@50", "ndcg@3", "ndcg@10")
_MARK = FILE
MODEL_CARD = "README.md"


def export_policy(run: Run, out: Path, *, overwrite: bool = False, adapter: bool = False) -> None:
    """Write the run's policy, or its LoRA adapters alone, to `out` atomically.

    Raises:
        DataError: `out` holds something else, or the policy or its base has no weights.
        CheckpointError: the weights do not fit the tokenizer, do not belong to a trained policy,
            or hold no adapters where those are to be exported.
        ConfigError: `adapter` is set and the run has no adapters.
    """
    if adapter and run.config.model.lora.rank == 0:
        raise ConfigError(
            "model.lora.rank = 0: the run trains every weight and has no adapters; leave out "
            "--adapter"
        )
    folders.check_output_dir(out, mark=_MARK, kind="policy", overwrite=overwrite)
    if not (run.policy / _MARK).is_file():
        raise CheckpointError(
            f"{run.policy} is not the policy of a run; warm-start or train one first, or name its "
            "folder with --policy"
        )
    policy = replace(Policy.open(run.policy, run.tokenizer), new_bundle=run.bundle)
    parameters = policy.model.num_parameters()

    def describe(partial: Path) -> None:
        if not adapter:
            # Without its generation config, libraries that generate text would make one up.
            assert policy.model.generation_config is not None
            policy.model.generation_config.save_pretrained(partial)
        (partial / "run.toml").write_text(config.dump(run.config))
        evaluations = evaluations_of(run)
        for name, evaluation in evaluations.items():
            ranking.write(evaluation, partial / "evaluation" / f"{name}.json")
        card = model_card(run, policy, evaluations, parameters=parameters, adapter=adapter)
        (partial / MODEL_CARD).write_text(card)

    if not adapter:
        policy.save(out, describe)
        return
    with folders.atomic_dir(out) as partial:
        _save_adapters(run, policy.model, partial)
        policy.save_description(partial)
        describe(partial)


def _save_adapters(run: Run, policy: model.PreTrainedModel, folder: Path) -> None:
    adapter = read_adapter(run.policy)
    if not adapter:
        raise CheckpointError(
            f"{run.policy} holds no adapters for {base_of(run.config)}: an older version of "
            "Orchard wrote it, or a phase of the run trained without; leave out --adapter and "
            "export the whole policy"
        )
    value_head.detach(policy)
    lora.export(policy, adapter, folder, base=str(base_of(run.config)))
    if (run.policy / value_head.FILE).is_file():
        shutil.copy(run.policy / value_head.FILE, folder / value_head.FILE)


def evaluations_of(run: Run) -> dict[str, Evaluation]:
    """Load every evaluation in the run folder on this catalog and these splits, by name."""
    paths = sorted((run.dir / "evaluation").glob("*.json"))
    saved = {path.stem: ranking.read(path) for path in paths}
    splits = {"", run.valid.digest, run.test.digest}
    return {
        name: each
        for name, each in saved.items()
        if each.catalog == run.catalog.digest and each.split in splits
    }


def model_card(
    run: Run,
    policy: Policy,
    evaluations: Mapping[str, Evaluation],
    *,
    parameters: int,
    adapter: bool = False,
) -> str:
    """Return the model card in Markdown, from recorded facts only."""
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags: [generative-recommendation, semantic-ids, orchard]\n---",
        f"# {run.config.name}",
        f"A generative recommender of {parameters:,} parameters, made by the run "
        f"`{run.config.name}` of Orchard: version {policy.version.step}, digest "
        f"`{policy.version.digest[:12]}`. It reads a user's last "
        f"{policy.facts.max_history} items and writes the next one as its "
        f"{'title' if run.config.data.titles else 'semantic ID'}. "
        "`run.toml` is its whole configuration.",
        "## Data",
        _data(run),
        "## Metrics",
        _metrics(evaluations),
        "## Limits",
        _limits(run),
        "## Use",
        (_adapter_usage(run) if adapter else "Load it by `AutoModelForCausalLM.from_pretrained`")
        + "; it is a policy over the items of "
        "`catalogue/` only where decoding is constrained to their codes."
        + (
            f" `{value_head.FILE}` is Orchard's own."
            if (run.policy / value_head.FILE).is_file()
            else ""
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _adapter_usage(run: Run) -> str:
    """Explain how to load the adapters on their base model."""
    return (
        f"These are adapters and embeddings alone. Load the base model, `{base_of(run.config)}` in "
        "the run, by `AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)`, call its "
        f"`resize_token_embeddings({run.tokenizer.size})`, and give both to "
        "`peft.PeftModel.from_pretrained`"
    )


def _data(run: Run) -> str:
    trie = run.catalog.trie
    facts: dict[str, str] = {
        "items": str(len(run.catalog)),
        "distinct sequences": str(trie.num_leaves),
        "levels": str(trie.depth),
        "train, valid, test rows": f"{len(run.train)}, {len(run.valid)}, {len(run.test)}",
        "catalogue": f"`{run.catalog.digest[:12]}`",
    }
    card = run.config.data.path / CARD
    if card.is_file():
        recorded = json.loads(card.read_text()).get("facts", {})
        facts |= {name.replace("_", " "): f"{number:g}" for name, number in recorded.items()}
    return _table(("fact", "value"), [[name, value] for name, value in facts.items()])


def _metrics(evaluations: Mapping[str, Evaluation]) -> str:
    if not evaluations:
        return "The run contains no evaluation of this catalog."
    names = [f"{metric}/{level}" for level in ("sid", "item") for metric in _SHOWN]
    names = [name for name in names if any(name in each.metrics for each in evaluations.values())]
    rows: list[list[str]] = []
    for name in names:
        cells = [evaluation.metrics.get(name) for evaluation in evaluations.values()]
        texts = [f"{c.mean:.4f} [{c.low:.4f}, {c.high:.4f}]" if c else "" for c in cells]
        rows.append([name, *texts])
    facts = "; ".join(
        f"`{name}`: {evaluation.policy}, {evaluation.num_rows} rows, {evaluation.width} beams"
        for name, evaluation in evaluations.items()
    )
    table = _table(("metric", *evaluations), rows)
    return f"Means and 95 % bootstrap intervals. {facts}.\n\n{table}"


def _limits(run: Run) -> str:
    trie, num_items = run.catalog.trie, len(run.catalog)
    sharing = num_items - int((run.catalog.place_in_leaf == 0).sum())
    new_items = "new items need new semantic IDs and more training"
    if run.bundle is not None:
        new_items = (
            f"its tokenizer bundle (`{BUNDLE}/`) gives new ones semantic IDs, whose codes it has "
            "learned from other items alone"
        )
    lines = [
        f"It knows the {num_items} items of its catalog and no others; {new_items}.",
        f"{sharing} items share the sequence of an earlier one; within {trie.num_leaves} sequences "
        "it cannot tell such items apart, and lists them in catalog order.",
        "Metrics are of offline prediction of logged interactions, which favors what was shown "
        "and popular; effects on users were not measured.",
        "Biases of the interaction log, such as towards popular items, were neither measured nor "
        "corrected.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def policy_of(settings: Config) -> Path:
    """Return the folder of the run's trained or SFT policy; raises DataError without either."""
    for name in ("policy", "warm_start"):
        if (settings.run_dir / name).is_dir():
            return settings.run_dir / name
    raise DataError(
        f"{settings.run_dir} holds no policy; run `orchard sft` or `orchard train` first, or name "
        "a folder with --policy"
    )
