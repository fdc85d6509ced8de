"""Estimate the reward of a policy from logged single draws of other policies.

Shapes:  B draws   D codes   A codes that an item may begin with
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int64

from orchard.data.histories import history_prompts
from orchard.evaluation import off_policy
from orchard.evaluation.off_policy import OffPolicyEstimate
from orchard.policy.item_tokenizer import ItemTokenizer
from rollout.engine.protocol import DecodingBackend
from rollout.search.score_items import score_items

_BATCH, _FOLDS = 128, 5


def judge(
    engine: DecodingBackend,
    tokenizer: ItemTokenizer,
    *,
    row: Int64[np.ndarray, " B"],
    history: Sequence[Sequence[int]],
    logprob: Sequence[Sequence[float]],
    reward: Float64[np.ndarray, " B"],
    max_history: int | None = None,
) -> tuple[OffPolicyEstimate, Float32[np.ndarray, "B A"]]:
    """Estimate the reward per draw of the policy of an engine.

    Args:
        engine: engine with the policy that is judged.
        tokenizer: its item tokenizer.
        row: catalog row of the drawn item, -1 where the policy cannot make the draw.
        history: item ids before each draw, oldest first.
        logprob: log-probabilities of the codes of the drawn item, under the policy that drew it.
        reward: reward of each draw.
        max_history: number of items of a history that the policy reads; by default all.

    Returns:
        The estimates, and the log-probability of every first code under the judged policy.

    Raises:
        DataError: there are no draws, or a reward or log-probability is invalid.
    """
    catalog = tokenizer.catalog
    deepest = max((len(each) for each in logprob), default=1)
    target = np.zeros((len(row), max(deepest, catalog.trie.depth)))
    behaviour, rewards = np.zeros_like(target), np.zeros_like(target)
    # target, behaviour: log-probability of each code of the drawn item under the judged and the
    # logging policy, (B, depth); root: log-probability of each first code under the judged policy.
    root: list[Float32[np.ndarray, "B A"]] = []
    for batch_start in range(0, len(row), _BATCH):
        rows = slice(batch_start, min(batch_start + _BATCH, len(row)))
        prompts, _ = history_prompts(tokenizer, history[rows], max_history=max_history)
        leaf = catalog.leaf_of_item[row[rows].clip(min=0)]
        target[rows, : catalog.trie.depth], first = score_items(engine, prompts, leaf)
        root.append(first)
    # A draw that the judged policy cannot make has probability 0 under it.
    target[row < 0] = -np.inf
    for number, each in enumerate(logprob):
        behaviour[number, : len(each)] = each
    rewards[:, -1] = reward  # earned with the whole item; columns past its end have weight 1
    codes = catalog.trie.code[catalog.trie.children(catalog.trie.level_start[:1]).node].numpy()
    # Index of the first code of each drawn item among the children of the root.
    first_code = np.searchsorted(codes, catalog.codes[row, 0])
    first_code[row < 0] = off_policy.UNKNOWN
    fold = np.arange(len(first_code)) % _FOLDS
    first_logprob = np.concatenate(root)
    probability = np.exp(first_logprob.astype(np.float64))
    q, v = off_policy.first_code_model(first_code, rewards, fold, probability)
    decisions = off_policy.LoggedDecisions(
        behaviour=behaviour, target=target, reward=rewards, q=q, v=v
    )
    return off_policy.estimate(decisions), first_logprob
