"""Spellings of codes in tokenizers, and a policy of another spelling from folder to answer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import orchard
from learner.batch.sft import pack_answers
from learner.trainer import Trainer
from orchard import ragged
from orchard.errors import CatalogError
from orchard.policy import prompt_template, token_embeddings
from orchard.policy.code_tokens import PUBLISHED, Spelling, find_spelling
from orchard.policy.item_tokenizer import make_item_tokenizer
from orchard.policy.store import Policy
from orchard.policy.weights import digest, snapshot
from orchard.settings import LearnerConfig, PromptConfig
from orchard.testing import brute_force, tiny_catalog
from orchard.types import PolicyVersion, Prompts
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam

SIZES = (5, 4, 6)


@pytest.mark.parametrize(
    ("spelling", "example"),
    [
        (PUBLISHED, "<b_3>"),
        (Spelling(before="<s_"), "<s_b_3>"),
        (Spelling(before="<|sid_", after="|>", first="0"), "<|sid_1_3|>"),
        (Spelling(before="[L", between="-", after="]", first="1"), "[L2-3]"),
        (Spelling(before="", between="", after=""), "b3"),
    ],
)
def test_a_vocabulary_has_one_spelling(spelling: Spelling, example: str) -> None:
    assert spelling.token(1, 3) == example
    others = ["a", "item_0", "<|sid_begin|>", "<a_0>", "0", "1_0", "Ġa0", "café"]
    assert find_spelling([*others, *spelling.tokens(SIZES)], SIZES) == spelling


def test_without_all_codes_the_published_spelling_is_missing_some() -> None:
    tokens = Spelling(before="<s_").tokens(SIZES)
    assert find_spelling(tokens[:-1], SIZES) == PUBLISHED
    assert find_spelling([], SIZES) == PUBLISHED
    both = [*tokens, *Spelling(before="<t_").tokens(SIZES)]
    with pytest.raises(CatalogError, match=r"in 2 ways, <s_a_0> and <t_a_0> among them"):
        find_spelling(both, SIZES)
    assert find_spelling([*both, *PUBLISHED.tokens(SIZES)], SIZES) == PUBLISHED


def spelt_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer in the spelling of OneRec: `<|sid_begin|><s_a_3><s_b_0><s_c_5><|sid_end|>`."""
    words = ["<pad>", "<bos>", "<eos>", "seen", "next", "<|sid_begin|>", "<|sid_end|>"]
    words += Spelling(before="<s_").tokens(SIZES)
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


@pytest.mark.slow
def test_a_folder_in_another_spelling_loads_searches_trains_and_answers(tmp_path: Path) -> None:
    catalog, text = tiny_catalog(level_size=SIZES), spelt_tokenizer()
    known = len(text)
    assert token_embeddings.add_tokens(text, catalog) == 0
    template = prompt_template.encode_template(
        "seen <|sid_begin|> {history} <|sid_end|> next <|sid_begin|>", "{history}", text,
        PromptConfig(history="{history}", separator=" <|sid_end|> <|sid_begin|> "), limit=100,
    )  # fmt: skip
    prompt_template.save_to_tokenizer(text, template)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=known, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    tokenizer = make_item_tokenizer(text, catalog)
    history, start = np.array([3, 7, 11]), np.array([0, 2, 3])
    token, token_start = tokenizer.encode_history(history, start)
    first = text.convert_ids_to_tokens(token[: token_start[1]].tolist())
    assert first[:2] == ["seen", "<|sid_begin|>"]
    assert first[-3:] == ["<|sid_end|>", "next", "<|sid_begin|>"]
    assert first.count("<|sid_begin|>") == 3
    prompts = Prompts(
        id=np.arange(2), target=np.array([4, 9]), history=history, history_start=start,
        token=token, token_start=token_start,
    )  # fmt: skip
    version = PolicyVersion(step=0, digest="")
    trainer = Trainer(model, tokenizer, LearnerConfig(lr=1e-2), total_steps=30)
    batch = pack_answers(prompts, tokenizer, version)
    losses = [trainer.sft_step(batch)["nll"] for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]
    found = beam(TorchEngine(model, tokenizer, version), prompts, width=99)
    for row, (low, high) in enumerate(zip(found.start, found.start[1:], strict=False)):
        expected = brute_force(
            model, tokenizer, ragged.take(token, token_start, np.array([row]))[0]
        )
        assert np.allclose(found.score[low:high], expected[found.leaf[low:high]], atol=1e-4)
        assert found.leaf[low] == catalog.leaf_of_item[prompts.target[row]]
    policy = Policy(
        version=PolicyVersion(step=0, digest=digest(snapshot(model))), model=model,
        tokenizer=tokenizer, text_tokenizer=text,
    )  # fmt: skip
    policy.save(tmp_path / "policy")
    ids = catalog.item_id
    answer = orchard.load(tmp_path / "policy").recommend(history=[int(ids[i]) for i in (3, 7)], k=1)
    best = catalog.leaf_of_item[catalog.rows(np.array([answer[0].item_id]))]
    assert best == found.leaf[0]
