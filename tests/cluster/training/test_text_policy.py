"""Checks of the initial policy before a run starts."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, BertConfig, BloomConfig, Lfm2Config, PretrainedConfig

from cluster.training.run import Run, prepare
from orchard import config
from orchard.errors import EngineError
from orchard.policy.item_tokenizer import compact_tokenizer
from orchard.testing import save_model_folder

LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def run_file(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "toy.toml"
    path.write_text(f'name = "toy"\noutput = "{tmp_path / "runs"}"\ndata.path = "{data}"\n')
    return path


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (BertConfig(**LAYERS, num_attention_heads=4), r"type bert gives .* differ by"),
        (
            Lfm2Config(**LAYERS, **HEADS, layer_types=["conv", "full_attention"]),
            r"type lfm2 gives .* differ by",
        ),
        (BloomConfig(hidden_size=32, n_layer=2, n_head=4), "bloom states no max_position"),
    ],
    ids=["encoder", "convolution", "no positions"],
)
def test_a_policy_that_trees_do_not_reproduce_is_refused_before_the_run(
    architecture: PretrainedConfig, message: str, run_file: Path, tmp_path: Path
) -> None:
    run: Run = prepare(config.load(run_file), "sft")
    architecture.vocab_size = run.tokenizer.size
    network = AutoModelForCausalLM.from_config(architecture)
    save_model_folder(network, compact_tokenizer(run.catalog), tmp_path / "policy")
    with pytest.raises(EngineError, match=message):
        prepare(config.load(run_file, [f"model.path={tmp_path / 'policy'}"]), "sft")
