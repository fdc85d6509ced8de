"""Which models run as trees, by their numbers: each kind of layer, tiny and untrained."""

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from orchard.errors import EngineError
from orchard.policy import tree_check
from orchard.policy.attention import make_masks
from orchard.policy.tree_check import check_trees

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
OLD = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
DELTA = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}


def build(name: str, sizes: dict[str, Any] = SIZES, **changes: Any) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**sizes | changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen3", {"head_dim": 8}),
        ("Llama", {}),
        ("Mistral", {"sliding_window": 8}),
        ("Phi3", {"sliding_window": 8}),
        ("Mixtral", {"sliding_window": 8, "num_local_experts": 4}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("Gemma3Text", {"head_dim": 8, **MIXED}),
        ("GptOss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **MIXED}),
        ("Olmo3", MIXED),
    ],
)
def test_causal_attention_is_exact_in_windows_too(name: str, changes: dict[str, Any]) -> None:
    check_trees(build(name, **changes))


def test_a_window_left_out_of_the_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build("Mistral", sliding_window=7)
    monkeypatch.setattr(
        "orchard.policy.model.make_masks", lambda _, *rest: make_masks(LlamaConfig(), *rest)
    )
    with pytest.raises(EngineError, match="type mistral gives .* in a packed tree that differ by"):
        check_trees(policy)


@pytest.mark.parametrize(
    ("name", "sizes", "changes", "message"),
    [
        ("Qwen3_5Text", SIZES, DELTA, "qwen3_5_text gives .* in a packed tree that differ"),
        ("Lfm2", SIZES, {"layer_types": ["conv", "full_attention"]}, "lfm2 gives"),
        (
            "Jamba",
            SIZES,
            {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
            "jamba gives",
        ),
        ("Bert", SIZES, {}, "bert gives .* take one such as Qwen3"),
        ("Roberta", SIZES, {}, "roberta gives"),
        ("Bloom", OLD, {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "bloom states no max_pos"),
        ("Mamba", OLD, {"hidden_size": 32, "num_hidden_layers": 2}, "mamba states no max_pos"),
        (
            "GPTNeo",
            OLD,
            {
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 4,
                "attention_types": [[["global", "local"], 1]],
                "window_size": 8,
                "max_position_embeddings": 64,
            },
            "gpt_neo gives",
        ),
        ("Falcon", OLD, {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "alibi": True}, "falcon cannot run a tree"),
        ("Granite", SIZES, {"logits_scaling": 8.0}, "granite gives"),
        ("Cohere2", SIZES, {"sliding_window": 8}, "cohere2 gives"),
        ("Gemma2", SIZES, {"head_dim": 8, "sliding_window": 8}, "gemma2 caps its logits"),
    ],
)  # fmt: skip
def test_other_arithmetic_is_refused_by_its_numbers(
    name: str, sizes: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        check_trees(build(name, sizes, **changes))


def test_a_check_changes_neither_draws_nor_mode_and_is_made_once_for_a_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = build("Qwen3", head_dim=8, intermediate_size=40)
    policy.train()
    state = torch.get_rng_state()
    check_trees(policy)
    assert policy.training
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(tree_check, "_differences", None)  # not called again
    check_trees(build("Qwen3", head_dim=8, intermediate_size=40))
    with pytest.raises(EngineError, match="cannot run a tree"):
        check_trees(build("Qwen3", head_dim=8, intermediate_size=44))


def test_a_model_in_16_bits_passes() -> None:
    check_trees(build("Qwen3", head_dim=8).to(torch.bfloat16))
