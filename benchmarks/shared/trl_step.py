"""Steps of TRL's GRPOTrainer, one at a time, constrained to legal items.

TRL is no dependency of Orchard: `requirements/bench.txt` installs it.

Its trainer draws candidates independently (it has no beam search) and takes log-probabilities over
the whole vocabulary; a constraint can only be put on `generate`. So it is given as many candidates
of as many prompts, the same rewards, clips and divergence, and no tokens for an end of sequence.
"""

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from benchmarks.shared.flat_loop import rewards
from benchmarks.shared.hugging_face import Allowed, AllowedTokens
from orchard.settings import LearnerConfig

WAYS = ("hook", "processor", "search")
"""How candidates are found: `generate` with `prefix_allowed_tokens_fn`, `generate` with a masking
processor, or (so that only the learners differ) by a search that is handed in."""

Way = Literal["hook", "processor", "search"]
Search = Callable[[PreTrainedModel, Int[Tensor, "B P"]], Int[Tensor, "B G L"]]
"""Policy and prompts to the codes of their candidates."""


def installed() -> str | None:
    """The version of TRL, if it and what it needs are here."""
    try:
        for name in ("datasets", "multiprocess", "xxhash"):
            version(name)
        return version("trl")
    except PackageNotFoundError:
        return None


class TrlSteps:
    """A training by TRL that stands still between two steps."""

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Int[Tensor, "B P"],
        target: Int[Tensor, "B L"],
        allowed: Allowed,
        config: LearnerConfig,
        folder: Path,
        *,
        group: int,
        rows: int,
        way: Way,
        search: Search | None = None,
    ) -> None:
        """Train `policy` in place, `rows` sequences to a forward pass; every step has all prompts.

        The training itself runs in a thread of its own, which waits unless `step` is called.
        """
        self._gate = _Gate()
        levels = target.shape[1]
        words = [" ".join(cast(Any, tokenizer).convert_ids_to_tokens(p)) for p in prompt.tolist()]
        rewarder = partial(_rewards, group=group)
        rewarder.__name__ = "rule_and_ranking"  # pyright: ignore[reportAttributeAccessIssue]
        if way != "search":
            _constrain(policy, allowed, prompt.shape[1], way)
        with _quiet():
            from datasets import Dataset  # pyright: ignore[reportMissingImports]
            from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

            settings = GRPOConfig(
                output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False,
                report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                max_steps=1_000_000, lr_scheduler_type="constant", learning_rate=config.lr,
                adam_beta2=0.95, weight_decay=config.weight_decay, max_grad_norm=config.grad_clip,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=len(prompt) * group // rows,
                num_generations=group, max_completion_length=levels, temperature=1.0,
                loss_type="grpo", beta=config.kl.weight, epsilon=config.clip_low,
                epsilon_high=config.clip_high, delta=config.dual_clip,
            )  # fmt: skip
            self._trainer = GRPOTrainer(
                model=policy,
                reward_funcs=rewarder,
                args=settings,
                # Many times the same prompts: an epoch's beginning and end are no part of a step.
                train_dataset=Dataset.from_dict(
                    {"prompt": words * 64, "target": target.tolist() * 64}
                ),
                processing_class=tokenizer,
                callbacks=[self._gate],
                rollout_func=None
                if search is None
                else partial(_roll_out, tokenizer=tokenizer, search=search, group=group),
            )
            # It would print to where the bench prints its figures.
            self._trainer.remove_callback(PrinterCallback)
        self._thread = threading.Thread(target=self._train, name="trl", daemon=True)
        self._thread.start()
        self._gate.wait()

    def step(self) -> None:
        """One whole step of the trainer: generate, score, update."""
        self._gate.go()
        self._gate.wait()

    def close(self) -> None:
        """End the training."""
        self._gate.go(last=True)
        self._thread.join()

    def _train(self) -> None:
        try:
            with _quiet():
                self._trainer.train()
        except BaseException as error:  # handed to whoever waits for the step
            self._gate.failure = error
        self._gate.stands.release()


class _Gate(TrainerCallback):
    """Holds a training before its first step and after each."""

    def __init__(self) -> None:
        self.goes, self.stands = threading.Semaphore(0), threading.Semaphore(0)
        self.failure: BaseException | None = None
        self._last = False

    def go(self, *, last: bool = False) -> None:
        """Let one step pass, or the training end."""
        self._last = last
        self.goes.release()

    def wait(self) -> None:
        """Until the training stands; raises what ended it."""
        self.stands.acquire()
        if self.failure is not None:
            raise RuntimeError("TRL's training ended early") from self.failure

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stand before the first step."""
        self._hold(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stand after an update."""
        self._hold(control)

    def _hold(self, control: Any) -> None:
        self.stands.release()
        self.goes.acquire()
        control.should_training_stop = self._last


def _constrain(policy: PreTrainedModel, allowed: Allowed, length: int, way: Way) -> None:
    """Have the policy's `generate` emit legal codes after prompts of `length` tokens."""

    def after(_: int, tokens: Tensor) -> list[int]:
        return list(allowed[tuple(tokens[length:].tolist())])

    constraint: dict[str, Any] = {"prefix_allowed_tokens_fn": after}
    if way == "processor":
        constraint = {"logits_processor": [AllowedTokens(allowed, length)]}
    model = cast(Any, policy)
    model.generate = partial(model.generate, **constraint)


def _rewards(
    *, completion_ids: list[list[int]], target: list[list[int]], group: int, **_: Any
) -> list[float]:
    """The rewards of whole groups; independent draws are ranked as they come."""
    codes = torch.tensor(completion_ids).unflatten(0, (-1, group))
    return rewards(codes, torch.tensor(target)[::group]).flatten().tolist()


def _roll_out(
    prompts: list[str],
    trainer: Any,
    *,
    tokenizer: PreTrainedTokenizerBase,
    search: Search,
    group: int,
) -> dict[str, Any]:
    """TRL hands in every prompt once per candidate; each is searched once."""
    ids = cast(Any, tokenizer)(text=prompts)["input_ids"]
    codes = search(trainer.model, torch.tensor(ids[::group]))
    found = codes.flatten(0, 1).tolist()
    return {"prompt_ids": ids, "completion_ids": found, "logprobs": [[0.0] * len(c) for c in found]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without TRL's advice on versions of vLLM, which is not used, and on special tokens."""
    for name in ("trl", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
