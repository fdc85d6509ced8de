"""Run TRL's GRPOTrainer step by step, constrained to legal items.

TRL is not a dependency of Orchard: `requirements/bench.txt` installs it.

Its trainer samples candidates independently (it has no beam search) and computes log-probabilities
over the whole vocabulary; only `generate` can be constrained. It gets the same number of candidates
and prompts, the same rewards, clips and divergence, and generates no end-of-sequence tokens.
"""

import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
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
"""Sources of candidates: `generate` with `prefix_allowed_tokens_fn`, `generate` with a masking
logits processor, or an external search, so that only the updates differ."""

Way = Literal["hook", "processor", "search"]
Search = Callable[[PreTrainedModel, Int[Tensor, "B P"]], Int[Tensor, "B G L"]]
"""Function from a policy and prompts to the codes of their candidates."""


def installed() -> str | None:
    """Return the version of TRL, or None if it or a dependency is not installed."""
    try:
        for name in ("datasets", "multiprocess", "xxhash"):
            version(name)
        return version("trl")
    except PackageNotFoundError:
        return None


class TrlSteps:
    """TRL training that pauses between steps."""

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
        """Set up in-place training of `policy`, with `rows` sequences per forward pass.

        Every step has all prompts. The training runs in a separate thread, which waits until `step`
        is called.
        """
        self._gate = _Gate()
        levels = target.shape[1]
        prompt_texts = [
            " ".join(cast(Any, tokenizer).convert_ids_to_tokens(p)) for p in prompt.tolist()
        ]
        reward_fn = partial(_rewards, group=group)
        reward_fn.__name__ = "rule_and_ranking"  # pyright: ignore[reportAttributeAccessIssue]
        if way != "search":
            _constrain(policy, allowed, prompt.shape[1], way)
        # The prompts are repeated to exclude the start and end of epochs from most steps.
        self._trainer = grpo_trainer(
            policy, tokenizer, config, folder, group=group, rows=rows, levels=levels,
            prompts=prompt_texts, targets=target.tolist(), epochs=64, reward_fn=reward_fn,
            callbacks=[self._gate],
            rollout_func=None
            if search is None
            else partial(_roll_out, tokenizer=tokenizer, search=search, group=group),
        )  # fmt: skip
        self._thread = threading.Thread(target=self._train, name="trl", daemon=True)
        self._thread.start()
        self._gate.wait()

    def step(self) -> None:
        """Run one whole step of the trainer: generate, score, update."""
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
        except BaseException as error:  # raised by `_Gate.wait`
            self._gate.failure = error
        self._gate.stands.release()


def grpo_trainer(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: LearnerConfig,
    folder: Path,
    *,
    group: int,
    rows: int,
    levels: int,
    prompts: Sequence[str],
    targets: Sequence[Sequence[int]] | None = None,
    epochs: int = 1,
    reward_fn: Callable[..., list[float]] | None = None,
    **options: Any,
) -> Any:
    """Create TRL's trainer with the settings of Orchard's learner.

    Every step has all prompts and `rows` sequences per forward pass; `options` are those of
    `GRPOTrainer`.
    """
    with _quiet():
        from datasets import Dataset  # pyright: ignore[reportMissingImports]
        from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

        settings = GRPOConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            max_steps=1_000_000, lr_scheduler_type="constant", learning_rate=config.lr,
            adam_beta2=0.95, weight_decay=config.weight_decay, max_grad_norm=config.grad_clip,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=len(prompts) * group // rows,
            num_generations=group, max_completion_length=levels, temperature=1.0,
            loss_type="grpo", beta=config.kl.weight, epsilon=config.clip_low,
            epsilon_high=config.clip_high, delta=config.dual_clip,
        )  # fmt: skip
        columns: dict[str, list[Any]] = {"prompt": list(prompts) * epochs}
        if targets is not None:
            columns["target"] = list(targets) * epochs
        trainer = GRPOTrainer(
            model=policy,
            reward_funcs=reward_fn or _no_reward,
            args=settings,
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer,
            **options,
        )
        # It would print to the stream on which the benchmark prints its figures.
        trainer.remove_callback(PrinterCallback)
    return trainer


def _no_reward(*, completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return no reward, for a trainer of which only the loss is computed."""
    return [0.0] * len(completion_ids)


class _Gate(TrainerCallback):
    """Callback that pauses a training before its first step and after each step."""

    def __init__(self) -> None:
        self.goes, self.stands = threading.Semaphore(0), threading.Semaphore(0)
        self.failure: BaseException | None = None
        self._last = False

    def go(self, *, last: bool = False) -> None:
        """Let the training run one step, or end it."""
        self._last = last
        self.goes.release()

    def wait(self) -> None:
        """Wait until the training pauses; raise RuntimeError if it failed."""
        self.stands.acquire()
        if self.failure is not None:
            raise RuntimeError("TRL's training ended early") from self.failure

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Pause before the first step."""
        self._hold(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Pause after an update."""
        self._hold(control)

    def _hold(self, control: Any) -> None:
        self.stands.release()
        self.goes.acquire()
        control.should_training_stop = self._last


def _constrain(policy: PreTrainedModel, allowed: Allowed, length: int, way: Way) -> None:
    """Constrain the policy's `generate` to legal codes after prompts of `length` tokens."""

    def allowed_after(_: int, tokens: Tensor) -> list[int]:
        return list(allowed[tuple(tokens[length:].tolist())])

    constraint: dict[str, Any] = {"prefix_allowed_tokens_fn": allowed_after}
    if way == "processor":
        constraint = {"logits_processor": [AllowedTokens(allowed, length)]}
    model = cast(Any, policy)
    model.generate = partial(model.generate, **constraint)


def _rewards(
    *, completion_ids: list[list[int]], target: list[list[int]], group: int, **_: Any
) -> list[float]:
    """Compute the rewards of whole groups; independent samples are ranked in their order."""
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
    """Search each prompt once; TRL passes every prompt once per candidate."""
    ids = cast(Any, tokenizer)(text=prompts)["input_ids"]
    codes = search(trainer.model, torch.tensor(ids[::group]))
    completions = codes.flatten(0, 1).tolist()
    return {
        "prompt_ids": ids,
        "completion_ids": completions,
        "logprobs": [[0.0] * len(c) for c in completions],
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress TRL's warnings about vLLM versions, which are not used, and special tokens."""
    for name in ("trl", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
