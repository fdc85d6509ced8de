"""Train the prefix critic by RLlib's MARWIL learner: same network, trajectories and loss as torch.

A row of the learner's batch is a history with the states of all its trajectories, which RLlib sees
as a sequence with a loss mask. The legal codes follow from the state and are not sent. The learner
runs in this process, without actors. `Learner` and its relatives are alpha APIs of Ray 2.60.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from orchard.errors import ConfigError
from orchard.optim import make_optimizer
from orchard.scorers.fit_critic import NORM_RATE, NORM_START, Trajectories
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import CriticConfig

_NEEDS = ("gymnasium", "tree", "lz4", "ormsgpack")
_MODULE = "critic"


class RllibBackend:
    """Critic backend that updates by `MARWILTorchLearner`; see `CriticBackend`."""

    def __init__(self, critic: PrefixCritic, settings: CriticConfig) -> None:
        """Prepare to update `critic` in place.

        Raises:
            ConfigError: a package that RLlib needs is not installed.
        """
        missing = [name for name in _NEEDS if find_spec(name) is None]
        if missing:
            raise ConfigError(
                f'critic.backend = "rllib" needs {", ".join(missing)}, which RLlib imports; '
                "install requirements/rllib.txt with pip's --no-deps, or set "
                'critic.backend = "torch"'
            )
        self.critic = critic
        self._learner = _learner(critic, settings)

    def learn(self, walks: Trajectories) -> float:
        """Make one update and return its loss."""
        from ray.rllib.core.columns import Columns
        from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch

        batch = SampleBatch(
            {
                Columns.OBS: np.concatenate([walks.history, walks.node], 1),
                Columns.ACTIONS: walks.action,
                Columns.VALUE_TARGETS: walks.outcome,
                Columns.LOSS_MASK: walks.node >= 0,
            }
        )
        # RLlib uses the number of steps for its metrics only.
        steps = int((walks.node >= 0).sum())
        result = self._learner.update(batch=MultiAgentBatch({_MODULE: batch}, env_steps=steps))
        return float(result[_MODULE][self._learner.TOTAL_LOSS_KEY].peek())


def _learner(critic: PrefixCritic, settings: CriticConfig) -> Any:
    """Build a learner whose only module is the critic itself, not a copy of it."""
    from ray.rllib.algorithms.marwil import MARWILConfig
    from ray.rllib.algorithms.marwil.torch.marwil_torch_learner import MARWILTorchLearner
    from ray.rllib.core.columns import Columns
    from ray.rllib.core.rl_module.apis import ValueFunctionAPI
    from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec
    from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule

    class CriticModule(TorchRLModule, ValueFunctionAPI):
        """The critic as an RLModule with its policy logits and its value function."""

        def setup(self) -> None:
            self.critic = critic

        def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            table, node = batch[Columns.OBS].split(
                [critic.max_history, batch[Columns.OBS].shape[1] - critic.max_history], 1
            )
            value, logit = critic(table, node)
            return {Columns.ACTION_DIST_INPUTS: logit, Columns.EMBEDDINGS: value}

        def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Any:
            return self._forward(batch)[Columns.EMBEDDINGS] if embeddings is None else embeddings

    class CriticLearner(MARWILTorchLearner):
        """MARWIL with Orchard's optimizer, so that both backends make the same updates."""

        def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
            self.register_optimizer(
                module_id=module_id,
                optimizer=make_optimizer(
                    critic, lr=settings.lr, weight_decay=settings.weight_decay
                ),
                params=list(critic.parameters()),
                lr_or_lr_schedule=settings.lr,
            )

    trie, spaces = critic.catalog.trie, import_module("gymnasium.spaces")
    spec = RLModuleSpec(
        module_class=CriticModule,
        observation_space=spaces.Box(-1, trie.num_nodes, (critic.max_history + 1,), int),
        action_space=spaces.Discrete(critic.num_actions),
    )
    config = MARWILConfig().training(
        beta=settings.beta,
        lr=settings.lr,
        vf_coeff=settings.value_weight,
        moving_average_sqd_adv_norm_start=NORM_START,
        moving_average_sqd_adv_norm_update_rate=NORM_RATE,
    )
    learner = CriticLearner(
        config=config, module_spec=MultiRLModuleSpec(rl_module_specs={_MODULE: spec})
    )
    learner.build()
    return learner
