"""Compare adapters trained by two workers, each with half of every weight, with those by one."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file, save_file
from torch.multiprocessing.spawn import spawn

from learner import checkpoint
from learner.batch.sft import pack_examples
from learner.trainer import Trainer
from orchard.data.sft_tasks import SftExamples
from orchard.policy import lora
from orchard.policy.weights import Weights
from orchard.settings import LearnerConfig, LoraConfig
from orchard.testing import tiny_setup
from orchard.types import PolicyVersion
from tests.fixtures.trainers import save_checkpoint

ON = LoraConfig(rank=3, targets=("q_proj", "down_proj"))


def taught(folder: Path, *, rank: int = 0, world: int = 1) -> Weights:
    """Return the merged weights after three updates, the last one after a resumption."""
    tiny = tiny_setup()
    tokenizer = tiny.tokenizer
    prompts = tokenizer.encode_history(np.arange(4, 10), np.array([0, 1, 3, 4, 6]))
    no_text = np.zeros(0, np.int32), np.zeros(5, np.int64)
    examples = SftExamples(prompt=prompts, answer=no_text, target=np.arange(4))
    batch = pack_examples(examples, tokenizer, PolicyVersion(step=0, digest=""), forced=True)

    def make_trainer() -> Trainer:
        policy = tiny_setup().model
        lora.attach(policy, ON, seed=0)
        config = LearnerConfig(lr=1e-2, parallel="fsdp")
        return Trainer(
            policy, tokenizer, config,
            total_steps=9, ema_decay=0.5, rank=rank, world=world,
        )  # fmt: skip

    first, digest = make_trainer(), tiny.catalog.digest
    for _ in range(2):
        first.sft_step(batch)
    save_checkpoint(first, folder, number=2, catalog=digest, write=rank == 0)
    if world > 1:
        dist.barrier()
    resumed = make_trainer()
    assert checkpoint.load(resumed, folder, catalog=digest) == 2
    resumed.sft_step(batch)
    return lora.snapshot(resumed.eval_policy)


def work(rank: int, folder: Path) -> None:
    """Run one of two workers."""
    torch.set_num_threads(1)
    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    values = taught(folder, rank=rank, world=2)
    save_file(dict(values), folder / f"{rank}.safetensors")
    dist.barrier()  # or gloo may abort the process that is still in a collective
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_merge_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    alone = taught(tmp_path / "one")
    before = tiny_setup().model.state_dict()
    spawn(work, (tmp_path,), nprocs=2)
    for rank in range(2):
        values = load_file(tmp_path / f"{rank}.safetensors")
        assert values.keys() == alone.keys()
        for name, value in alone.items():
            np.testing.assert_allclose(values[name], value, atol=1e-5, rtol=1e-4)
    moved = [name for name, value in alone.items() if not np.array_equal(value, before[name])]
    assert any("q_proj" in name for name in moved)
    assert any("embed_tokens" in name for name in moved)
