"""An exported policy is complete, documented, and computes the same log-probabilities."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.cli import app as cli
from cluster.cli.export import MODEL_CARD
from cluster.training.run import Run, prepare
from cluster.training.run_dir import open_run_dir, save_policy
from orchard import config
from orchard.catalog import catalog
from orchard.data.prompts import make_prompts
from orchard.evaluation import ranking
from orchard.evaluation.ranking import Evaluation, TargetRanks
from orchard.policy import lora, model, value_head
from orchard.policy.store import Policy
from orchard.policy.weights import digest
from orchard.types import PolicyVersion
from tests.fixtures.runs import TinyRun


@pytest.fixture
def run_file(tiny_run: TinyRun) -> Path:
    return tiny_run(model={"hidden_size": 32, "intermediate_size": 32})


def started(path: Path) -> Run:
    """Create a run whose SFT result is its untrained initial policy."""
    run = prepare(config.load(path), "sft")
    open_run_dir(run)
    run.policy.rename(run.result)
    return prepare(config.load(path), "train")


def evaluated(run: Run) -> None:
    ranks = TargetRanks(
        sid=np.array([0, 3, TargetRanks.MISS]), item=np.array([0, 4, TargetRanks.MISS])
    )
    found = Evaluation(
        metrics=ranking.metrics(ranks, width=10), ranks=ranks, row=np.arange(3),
        split=run.test.digest, width=10, seconds=1.0, policy="0", catalog=run.catalog.digest,
        extra={},
    )  # fmt: skip
    ranking.write(found, run.dir / "evaluation" / "warm_start.json")


def logprobs(folder: Path, prompts: list[list[int]]) -> list[list[float]]:
    """Return the log-probability of every token given its prefix, by transformers alone."""
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[list[float]] = []
    for prompt in prompts:
        with torch.inference_mode():
            row = policy(torch.tensor([prompt])).logits[0].log_softmax(-1)
        found.append([float(row[i, t]) for i, t in enumerate(prompt[1:])])
    return found


@pytest.mark.slow
def test_the_folder_has_everything_and_computes_the_same(run_file: Path, tmp_path: Path) -> None:
    run = started(run_file)
    policy = model.load(run.policy, run.tokenizer)
    value_head.attach(policy, seed=3)
    value_head.save(policy, run.policy)
    evaluated(run)
    cli.main(["export", str(run_file), str(tmp_path / "out")])
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "value_head.safetensors", "catalogue", "policy.json", "run.toml", "evaluation",
            MODEL_CARD} <= names  # fmt: skip
    prompts = make_prompts(run.tokenizer, run.test, np.arange(4))
    rows = [row.tolist() for row in np.split(prompts.token, prompts.token_start[1:-1])]
    assert logprobs(out, rows) == logprobs(run.policy, rows)
    assert len(AutoTokenizer.from_pretrained(out)) == run.tokenizer.size
    assert catalog.load(out / "catalogue").digest == run.catalog.digest
    head = value_head.value_head_of(model.load(out, run.tokenizer))
    assert head is not None
    card = (out / MODEL_CARD).read_text()
    known = ranking.read(out / "evaluation" / "warm_start.json").metrics["ndcg@10/sid"]
    for part in ("## Data", "## Limits", "60", f"{known.mean:.4f} [{known.low:.4f}", "3 rows"):
        assert part in card
    cli.main(["export", str(run_file), str(out), "--overwrite"])


def test_what_cannot_be_handed_over_is_refused_and_nothing_is_written(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", str(run_file), str(out), *more])
        assert ended.value.code == 2
        assert not any(path.name.startswith((".out", "out")) for path in tmp_path.iterdir())
        return capsys.readouterr().err

    assert "holds no policy; run `orchard sft`" in refused()
    run = started(run_file)
    (run.policy / "policy.json").rename(tmp_path / "policy.json")
    assert "is not the policy of a run" in refused()
    (tmp_path / "policy.json").rename(run.policy / "policy.json")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit):
        cli.main(["export", str(run_file), str(tmp_path / "mine"), "--overwrite"])
    assert "is no policy; choose another folder" in capsys.readouterr().err
    (run.policy / "model.safetensors").unlink()
    assert "holds no weights" in refused()


@pytest.mark.slow
def test_adapters_are_exported_for_their_base(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, one = tmp_path / "adapter", ["export", str(run_file), str(tmp_path / "adapter")]
    begun = prepare(config.load(run_file), "sft")
    open_run_dir(begun)
    with pytest.raises(SystemExit):
        cli.main([*one, "--adapter", "--policy", str(begun.policy)])
    assert "model.lora.rank = 0: the run trains every weight" in capsys.readouterr().err
    assert not out.exists()
    with_lora = config.load(run_file, ["model.lora.rank=2"])

    def trained(run: Run, seed: int) -> torch.Tensor:
        """Move adapters and embeddings of the policy that a phase starts from, and save it."""
        policy, draw = model.load(run.policy), torch.Generator().manual_seed(seed)
        lora.attach(policy, with_lora.model.lora, seed=seed)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        weights = lora.snapshot(policy)
        version = PolicyVersion(step=seed, digest=digest(weights))
        save_policy(run, run.result, version, weights, lora.factors(policy))
        return policy.eval()(torch.tensor([[1, 5, 9]])).logits

    trained(replace(begun, config=with_lora), 1)
    logits = trained(replace(prepare(config.load(run_file), "train"), config=with_lora), 2)
    cli.main([*one, "--adapter", "model.lora.rank=2"])
    names = {path.name for path in out.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    assert f"`resize_token_embeddings({begun.tokenizer.size})`" in (out / MODEL_CARD).read_text()
    base = model.load(begun.policy)
    before = base(torch.tensor([[1, 5, 9]])).logits
    again = PeftModel.from_pretrained(base, str(out))(torch.tensor([[1, 5, 9]])).logits
    torch.testing.assert_close(again, logits)
    assert not torch.equal(before, again)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4  # of both phases
    facts = json.loads((begun.dir / "policy" / "policy.json").read_text())
    assert Policy.open(begun.dir / "policy").version.digest == facts["version"]["digest"]
    (begun.dir / "policy" / "policy.json").write_text(
        json.dumps({name: value for name, value in facts.items() if name != "adapter"})
    )
    with pytest.raises(SystemExit):  # as an older version wrote it
        cli.main([*one, "--adapter", "--overwrite", "model.lora.rank=2"])
    assert "holds no adapters for" in capsys.readouterr().err
    assert Policy.open(begun.dir / "policy").version.step == 2


VLLM = """
import json, os, sys
from rollout.engine.vllm import _ENVIRONMENT
os.environ.update(_ENVIRONMENT)
from vllm import LLM, SamplingParams
folder, rows = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(folder, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**28, block_size=32,
          enable_prefix_caching=False, use_tqdm_on_load=False)
params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
answers = llm.generate([{"prompt_token_ids": r} for r in rows], params, use_tqdm=False)
found = [[p[t].logprob for p, t in zip(a.prompt_logprobs[1:], r[1:])]
         for a, r in zip(answers, rows)]
print("FOUND" + json.dumps(found))
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_reads_the_folder_and_agrees_with_transformers(run_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    run = started(run_file)
    out = tmp_path / "out"
    cli.main(["export", str(run_file), str(out)])
    prompts = make_prompts(run.tokenizer, run.test, np.arange(4))
    rows = [row.tolist() for row in np.split(prompts.token, prompts.token_start[1:-1])]
    ended = subprocess.run(
        [sys.executable, "-c", VLLM, str(out), json.dumps(rows)],
        capture_output=True, text=True, check=False, timeout=280, env={**os.environ},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("FOUND")]
    found = json.loads(line.removeprefix("FOUND"))
    for row, known in zip(found, logprobs(out, rows), strict=True):
        assert row == pytest.approx(known, abs=1e-5)
