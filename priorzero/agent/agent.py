"""Plans single decisions with a network that is not trained any more.

Letters: `A` valid actions, `E` dimension of a text embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from priorzero.decisions.record import tree_commands
from priorzero.search.planner import Plan, Planner, ScalarOf
from priorzero.search.roots import Root, SearchOutput
from priorzero.settings.policy import PolicySettings
from priorzero.text.vocabulary import ActionVocabulary, Vocabulary
from priorzero.world_model.model import PriorZeroModel


class Agent:
    """See the module.

    Args:
        settings: of search and mixture.
        model: the network.
        vocabulary: of actions; what is new is taken in.
        encode: texts -> `[N, E]` float32.
        scalar_of: the network's transform of values and rewards.
        device: where the network lives.
    """

    def __init__(
        self,
        settings: PolicySettings,
        model: PriorZeroModel,
        vocabulary: Vocabulary,
        encode: Callable[[Sequence[str]], np.ndarray],
        scalar_of: ScalarOf,
        device: str,
    ) -> None:
        self.settings, self.encode = settings, encode
        self._model, self._vocabulary = model, vocabulary
        self._planner = Planner(model, settings, scalar_of, device)

    def ids(self, actions: Sequence[str]) -> list[int | None]:
        """Ids of a state's valid actions; None for what a full vocabulary drops. The texts of new
        ones are given to the network.
        """
        before = self._vocabulary.size
        ids = self._vocabulary.ids(actions)
        new = range(before, self._vocabulary.size)
        if new and isinstance(self._vocabulary, ActionVocabulary):
            texts = [self._vocabulary.action_of(i) for i in new]
            self._model.set_action_text(list(new), torch.from_numpy(self.encode(texts)))
        return ids

    def plan(self, root: Root, env_steps: int, use_llm: bool = True) -> SearchOutput:
        """Plan from one root without noise, as an evaluation does; the tree comes with it.

        Args:
            root: see there.
            env_steps: of the training, for the mixture's schedule.
            use_llm: False searches with the network's own policy at the root, whatever the root
                says of the LLM.
        """
        root_prior = self.settings.root_prior
        if not use_llm:
            root_prior = replace(root_prior, mode="wm_logits")
        inner = int(np.flatnonzero(self._vocabulary.used_mask)[-1]) + 1
        root = replace(root, keep_tree=True)
        (plan,) = self._planner.plan([root], inner, root_prior, env_steps, None)
        return _output(plan)

    def tree_commands(
        self, plan: SearchOutput, valid_ids: np.ndarray, commands: Sequence[str]
    ) -> list[str | None]:
        """The command of each node of the plan's tree; empty where the root policy shows none."""
        if plan.tree is None:
            return []
        return tree_commands(plan.tree, valid_ids, commands, self._vocabulary.action_of)


def _output(plan: Plan) -> SearchOutput:
    best = plan.favourite
    return SearchOutput(
        action_index=best,
        visit_counts=plan.result.visit_counts,
        target_policy=plan.result.target_policy,
        behaviour=np.eye(len(plan.result.visit_counts))[best],
        root_value=plan.result.value,
        predicted_value=plan.predicted_value,
        prior=plan.prior,
        tree=plan.tree,
    )
