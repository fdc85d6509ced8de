"""A text model from its folder to an update, without actors."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from cluster.training.run import Run, prepare
from cluster.training.run_dir import open_run_dir, save_policy
from learner.batch.pack import make_batch
from learner.batch.sft import pack_answers, pack_examples
from learner.trainer import Trainer
from orchard import config
from orchard.data.prompts import make_prompts
from orchard.errors import CatalogError, ConfigError, DataError
from orchard.policy import item_tokenizer, model, prompt_template
from orchard.policy.item_tokenizer import sid_token
from orchard.policy.titles import make_title_tokenizer
from orchard.policy.weights import digest, snapshot
from orchard.settings import Config, ModelConfig
from orchard.testing import save_model_folder, tiny_catalog
from orchard.types import PolicyVersion, SearchTrees
from rewards.score import score_trees
from rollout.actor import RolloutWorker
from rollout.engine.torch import TorchEngine
from rollout.search.add_target import score_leaf

VERSION = PolicyVersion(step=0, digest="")
TEMPLATE = "Bought: {history}. Next is "


@pytest.fixture(scope="module")
def language(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny text model without tokens for semantic IDs."""
    folder = tmp_path_factory.mktemp("language")
    titles = pq.read_table(data / "items.parquet")["title"].to_pylist()
    tokenizer = make_title_tokenizer([*titles, TEMPLATE], 400)
    words = item_tokenizer.ItemTokenizer(
        catalog=tiny_catalog(),
        level_tokens=(torch.tensor([0]),),
        bos=1,
        pad=0,
        size=len(tokenizer) + 16,
    )
    sizes = ModelConfig(hidden_size=32, intermediate_size=48, layers=1, heads=2, kv_heads=1)
    save_model_folder(model.create(sizes, words, seed=3), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def settings(
    data: Path, language: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Config]:
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "run.toml"
    path.write_text(
        f"""
        name = "speaker"
        output = "{folder}"
        data = {{path = "{data}"}}
        model = {{path = "{language}"}}
        prompt = {{history = "{TEMPLATE}"}}
        sft.logprob = "full"
        sft.tasks = {{titles = 0.5, title_to_item = 0.25, item_to_title = 0.25}}
        rewards = {{weights = {{rule = 1.0}}}}
        rollout = {{engine = "torch", group_size = 4, threads = 1}}
        """
    )
    return lambda *changes: config.load(path, changes)


@pytest.fixture(scope="module")
def opened(settings: Callable[..., Config]) -> Run:
    run = prepare(settings(), "sft")
    open_run_dir(run)
    return run


def spelled(run: Run, item: int) -> str:
    """Return the code tokens of an item."""
    codes: list[int] = run.catalog.codes[item].tolist()
    return "".join(sid_token(level, code) for level, code in enumerate(codes))


def learner(run: Run, policy: model.PreTrainedModel, *, lr: float = 1e-2) -> Trainer:
    rates = run.config.learner.model_copy(update={"lr": lr})
    return Trainer(policy, run.tokenizer, rates, total_steps=100)


def test_a_text_model_gets_a_row_for_each_code_near_the_mean_of_its_own(
    opened: Run, language: Path
) -> None:
    before, after = model.load(language), model.load(opened.policy, opened.tokenizer)
    known = len(item_tokenizer.read_tokenizer(language))
    old, new = model.head_weight(before), model.head_weight(after)
    assert new.shape[0] == opened.tokenizer.size == known + 5 + 6 + 7
    assert after.get_input_embeddings().weight is new
    assert torch.equal(new[:known], old[:known])
    assert (new[known:] - old[:known].mean(0)).abs().max() < 0.1 * old.std()
    assert len(new[known:].unique(dim=0)) == 18


def test_a_prompt_in_pieces_is_the_template_tokenised_whole(opened: Run) -> None:
    run = opened
    rows = np.arange(6)
    prompts = make_prompts(run.tokenizer, run.train, rows)
    for row in rows:
        items = run.train.history[run.train.history_start[row] : run.train.history_start[row + 1]]
        text = TEMPLATE.replace("{history}", ", ".join(spelled(run, item) for item in items))
        found = prompts.token[prompts.token_start[row] : prompts.token_start[row + 1]]
        assert found.tolist() == run.text_tokenizer.encode(text)


def test_a_prompt_that_is_too_long_loses_its_oldest_items_and_keeps_the_instruction(
    opened: Run, settings: Callable[..., Config]
) -> None:
    whole = opened.tokenizer.template
    item, start = np.array([3, 1, 4, 5]), np.array([0, 4, 4])
    two = whole.size + 2 * 3 + len(whole.between)
    short = prepare(settings(f"prompt.max_tokens={two + 2}", "sft.tasks={}", "name=short"), "sft")
    token, bounds = short.tokenizer.encode_history(item, start)
    expected, _ = opened.tokenizer.encode_history(item[2:], np.array([0, 2]))
    assert token[: bounds[1]].tolist() == expected.tolist()
    assert token[bounds[1] :].tolist() == [*whole.before, *whole.after]
    assert np.diff(bounds).tolist() == [two, whole.size]


def test_the_instruction_travels_with_the_tokenizer(opened: Run) -> None:
    again = item_tokenizer.make_item_tokenizer(
        item_tokenizer.read_tokenizer(opened.policy), opened.catalog
    )
    assert again.instruction == opened.tokenizer.instruction
    assert again.instruction is not None


def test_an_epoch_has_every_row_once_and_other_tasks_by_their_share(opened: Run) -> None:
    tasks = opened.tasks
    assert tasks is not None
    first, second = (tasks.epoch(number, seed=0) for number in (0, 1))
    rows = len(opened.train)
    count = np.bincount(first[:, 0])
    assert count.tolist() == [rows, round(rows / 2), round(rows / 4), round(rows / 4)]
    assert len(first) == len(tasks)
    assert sorted(first[first[:, 0] == 0, 1].tolist()) == list(range(rows))
    assert (first != second).any()
    shown = [set(epoch[epoch[:, 0] == 1, 1].tolist()) for epoch in (first, second)]
    assert shown[0] | shown[1] == set(range(rows))


def test_only_answers_are_learned_and_scored_as_an_ordinary_forward_pass_does(opened: Run) -> None:
    run, tasks = opened, opened.tasks
    assert tasks is not None
    chosen = np.array([[0, 5], [1, 5], [2, 7], [3, 7]])
    examples = tasks.examples(chosen, run.tokenizer)
    batch = pack_examples(examples, run.tokenizer, VERSION, forced=True)
    policy = model.load(run.policy, run.tokenizer)
    title = run.catalog.title[7]
    shown = zip(batch.token, batch.subtree_end, strict=True)
    spoken = [run.text_tokenizer.decode(row[end > 0]) for row, end in shown]
    name = spelled(run, 7)
    assert run.catalog.title[run.train.history[run.train.history_start[5]]] in spoken[1]
    assert spoken[2] == run.config.prompt.title.replace("{title}", title) + name
    assert spoken[3] == run.config.prompt.item.replace("{item}", name) + title + "<eos>"
    expected = 0.0
    for row in range(4):
        length, asked = (
            int((batch.subtree_end[row] > 0).sum()),
            int(np.diff(examples.prompt[1])[row]),
        )
        slots = np.arange(asked - 1, length - 1)
        assert sorted(batch.query_slot[batch.row == row].tolist()) == slots.tolist()
        token = torch.from_numpy(batch.token[row, :length].astype(np.int64))
        with torch.no_grad():
            logprob = policy(token[None]).logits[0].log_softmax(-1)
        expected -= float(logprob[slots, token[slots + 1]].sum())
    assert (batch.chosen[batch.state == SearchTrees.FREE_TEXT][-1]) == tasks.end
    full = run.config.learner.model_copy(update={"logprob": "full"})
    teacher = Trainer(policy, run.tokenizer, full, total_steps=10)
    nll = teacher.sft_step(batch)["nll"]
    assert nll == pytest.approx(expected / len(batch.row), rel=1e-4)


@pytest.mark.slow
def test_a_taught_text_model_is_searched_and_improved(
    opened: Run, settings: Callable[..., Config]
) -> None:
    run, tasks = opened, opened.tasks
    assert tasks is not None
    policy = model.load(run.policy, run.tokenizer)
    teacher = learner(run, policy)
    order, losses = tasks.epoch(0, seed=0), list[float]()
    for number in range(40):
        examples = tasks.examples(order[np.arange(16) + 16 * (number % 10)], run.tokenizer)
        losses.append(teacher.sft_step(pack_examples(examples, run.tokenizer, VERSION))["nll"])
    assert losses[-1] < losses[0] / 1.5
    weights = snapshot(policy)
    save_policy(run, run.result, PolicyVersion(step=0, digest=digest(weights)), weights)
    after = prepare(settings(), "train")
    assert after.base is None
    assert after.policy == run.result
    rollout_worker = RolloutWorker(after.config.rollout, after.policy, after.tokenizer, seed=0)
    trees = rollout_worker.search(make_prompts(after.tokenizer, after.train, np.arange(8)), seed=0)
    batch = make_batch(
        score_trees(trees, after.catalog, {"rule": 1.0}), after.tokenizer, after.config.learner
    )
    metrics = learner(after, model.load(after.policy, after.tokenizer)).rl_step(batch)
    assert metrics["logprob_gap"] < 1e-5


def test_a_probe_of_a_text_model_is_scored_within_its_instruction(opened: Run) -> None:
    run, policy = opened, model.load(opened.policy, opened.tokenizer)
    prompts = make_prompts(run.tokenizer, run.train, np.arange(4))
    known = learner(run, policy).score(pack_answers(prompts, run.tokenizer, VERSION))
    engine = TorchEngine(policy, run.tokenizer, VERSION)
    found = score_leaf(engine, prompts, run.catalog.leaf_of_item[prompts.target])
    np.testing.assert_allclose(known, found.score, atol=1e-5)


def test_a_new_text_model_is_made_from_the_titles(settings: Callable[..., Config]) -> None:
    changed = settings("name=made")
    sizes = ModelConfig(hidden_size=32, intermediate_size=48, layers=1, heads=2, kv_heads=1)
    run = prepare(changed.model_copy(update={"model": sizes}), "sft")
    assert run.base is None
    open_run_dir(run)
    again = prepare(changed.model_copy(update={"model": sizes}), "sft")
    assert again.text_tokenizer.get_vocab() == run.text_tokenizer.get_vocab()
    assert len(run.text_tokenizer.encode(run.catalog.title[0])) < len(run.catalog.title[0])


def test_a_chat_template_wraps_the_instruction(opened: Run) -> None:
    tokenizer = item_tokenizer.read_tokenizer(opened.policy)
    asked = opened.config.prompt.model_copy(update={"chat": True})
    with pytest.raises(ConfigError, match="has no chat template"):
        prompt_template.encode_template(TEMPLATE, "{history}", tokenizer, asked, limit=100)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} [assistant] {% endif %}"
    )
    frame = prompt_template.encode_template(TEMPLATE, "{history}", tokenizer, asked, limit=100)
    assert tokenizer.decode(frame.before) == "[user] Bought: "
    assert tokenizer.decode(frame.after) == ". Next is  [assistant] "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["prompt.history=What next?"], r"prompt.history = 'What next\?': .* has \{history\} once"),
        (["data.titles=true"], "leave one of them out"),
        (["data.rationale_template=seen {seen}"], "not taught to think"),
    ],
)
def test_settings_that_make_no_prompt_are_refused(
    settings: Callable[..., Config], changes: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(*changes)


def test_an_instruction_that_leaves_no_room_is_refused(settings: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"instruction alone has \d+ tokens, .* room for 4 "):
        prepare(settings("prompt.max_tokens=4", "name=tight"), "sft")


def test_a_title_that_leaves_no_room_is_refused(
    opened: Run, settings: Callable[..., Config]
) -> None:
    size = opened.tokenizer.template.size
    with pytest.raises(ConfigError, match="title has|instruction alone has"):
        prepare(settings(f"prompt.max_tokens={size}", "name=tight"), "sft")


def test_a_task_on_titles_needs_titles(
    settings: Callable[..., Config], data: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in data.glob("*.parquet"):
        table = pq.read_table(file)
        kept = [name for name in table.column_names if name != "title"]
        pq.write_table(table.select(kept), bare / file.name)
    with pytest.raises(DataError, match=r"sft.tasks.titles = 0.5 needs titles, and 80 of 80 items"):
        prepare(settings(f"data.path={bare}", "name=bare"), "sft")


def test_a_folder_without_weights_is_refused(
    settings: Callable[..., Config], language: Path, tmp_path: Path
) -> None:
    for file in language.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="holds no weights"):
        prepare(settings(f"model.path={tmp_path}", "name=empty"), "sft")


def test_a_tokenizer_that_cuts_a_code_is_refused(
    settings: Callable[..., Config], language: Path, tmp_path: Path
) -> None:
    for file in language.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    inner = json.loads((language / "tokenizer.json").read_text())
    known = inner["model"]["vocab"]
    known["<a_0>"] = len(known)  # a word of the vocabulary that no merge ever makes
    (tmp_path / "tokenizer.json").write_text(json.dumps(inner))
    tokenizer: PreTrainedTokenizerBase = item_tokenizer.read_tokenizer(tmp_path)
    assert "<a_0>" in tokenizer.get_vocab()
    with pytest.raises(CatalogError, match=r"cuts <a_0> into \d tokens \(1 of 18 codes\)"):
        prepare(settings(f"model.path={tmp_path}", "name=cut"), "sft")
