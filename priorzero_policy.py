"""PriorZeroPolicy: UniZero's world model, trained from the buffer, and a search whose root also
listens to an LLM.

Registered in DI-engine's policy registry as `priorzero`; UniZero's network and optimiser are
LightZero's. It joins four parts, each of which can be used alone: the network
(`priorzero/world_model/model.py`), the planner (`priorzero/search/planner.py`), the trainer
(`priorzero/world_model/trainer.py`) and the vocabulary of actions. The collector asks
`collect_mode.forward`, the evaluator `eval_mode.forward`, the training stage `learn_mode.forward`.
It keeps nothing of the episodes that are played: their roots bring their own context.

Letters: `B` roots, `A` valid actions of a root, `V` vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from priorzero.data.batch import LearnOutput, WorldModelBatch
from priorzero.quiet import quiet_base
from priorzero.run.randomness import generator_state, set_generator_state
from priorzero.search.planner import Plan, Planner
from priorzero.search.reanalyse import reanalyse
from priorzero.search.roots import Root, SearchOutput
from priorzero.settings.policy import PolicySettings
from priorzero.text.vocabulary import ActionVocabulary, make_vocabulary
from priorzero.world_model.model import PriorZeroModel
from priorzero.world_model.trainer import WorldModelTrainer

with quiet_base():
    from ding.utils import POLICY_REGISTRY
    from lzero.policy import InverseScalarTransform
    from lzero.policy.unizero import UniZeroPolicy


@POLICY_REGISTRY.register("priorzero")
class PriorZeroPolicy(UniZeroPolicy):
    """See the module.

    Args:
        cfg: LightZero's compiled settings; `cfg.settings` is our `PolicySettings`, the only one of
            our own parts' settings that is read.
    """

    config = dict(type="priorzero")

    def default_model(self) -> tuple[str, list[str]]:
        return "PriorZeroModel", ["priorzero.world_model.model"]

    # ---- set-up: DI-engine calls these three, in this order --------------------------------------

    def _init_learn(self) -> None:
        cfg = self._cfg
        self._settings: PolicySettings = cfg.settings
        scalar_of = InverseScalarTransform(self._settings.support_scale, cfg.device, True)

        self.vocabulary = make_vocabulary(self._settings.action_vocabulary)
        self._embed_text: Callable[[list[str]], np.ndarray] | None = None
        self._rng = np.random.default_rng(cfg.seed)
        self._trainer = WorldModelTrainer(self._model, self._settings, scalar_of, cfg.device)
        self._planner = Planner(self._model, self._settings, scalar_of, cfg.device)
        self._named = [self.network, self.target_network]  # what new actions are named in

    def _init_collect(self) -> None:
        """Collection plans with the parts `_init_learn` made."""

    def _init_eval(self) -> None:
        """So does evaluation."""

    @property
    def settings(self) -> PolicySettings:
        """Of network, search and learning."""
        return self._settings

    @property
    def network(self) -> PriorZeroModel:
        """The online network."""
        return self._model

    @property
    def target_network(self) -> PriorZeroModel:
        """The slowly following copy that targets come from."""
        return self._trainer.target

    @property
    def positions_clamped(self) -> int:
        """How often a search went deeper than the window the positions were trained for."""
        return self._planner.positions_clamped

    # ---- actions ---------------------------------------------------------------------------------

    def attach_encoder(self, encode: Callable[[list[str]], np.ndarray]) -> None:
        """Give the policy the sentence encoder: texts -> `[N, E]` float32, for new actions."""
        self._embed_text = encode

    def register_actions(self, actions: Sequence[str]) -> list[int | None]:
        """Ids of a state's valid actions; new ones are named in the vocabulary and in both copies
        of the network.

        None marks an action the full vocabulary had to drop (see `ActionVocabulary`).
        """
        before = self.vocabulary.size
        ids = self.vocabulary.ids(actions)
        if self.vocabulary.size > before and isinstance(self.vocabulary, ActionVocabulary):
            self._name_actions(range(before, self.vocabulary.size))
        return ids

    def _name_actions(self, ids: Sequence[int]) -> None:
        assert self._embed_text is not None, "attach_encoder comes before playing"
        texts = [self.vocabulary.action_of(i) for i in ids]
        embeddings = torch.from_numpy(self._embed_text(texts))
        for network in self._named:
            network.set_action_text(list(ids), embeddings)

    @contextmanager
    def guests(self) -> Iterator[None]:
        """For evaluation, which must not teach anything: actions registered inside get ids and
        texts that planning can use, and are unknown again afterwards.

        Vocabulary and both networks are left as they were found.
        """
        own, named = self.vocabulary, self._named
        self.vocabulary, self._named = own.copy(), [self.network]
        try:
            with self.network.borrowed_action_text():
                yield
        finally:
            self.vocabulary, self._named = own, named

    def _inner_actions(self) -> int:
        """How many of the first ids inner nodes branch over. With overflow ids in use, all: they
        lie at the end.
        """
        used = np.flatnonzero(self.vocabulary.used_mask)
        return int(used[-1]) + 1 if len(used) else 1

    # ---- planning --------------------------------------------------------------------------------

    def _forward_collect(
        self, roots: Sequence[Root], temperature: float, env_steps: int
    ) -> list[SearchOutput]:
        """Plan with root noise and draw actions from visit counts ** (1 / temperature). A root
        policy that chooses itself is followed, whatever the temperature.

        Args:
            env_steps: of the training so far, for the mixture's schedule.

        Returns:
            one output per root, in their order.
        """
        plans = self._planner.plan(
            roots, self._inner_actions(), self._settings.root_prior, env_steps, self._rng
        )
        outputs = []
        for plan in plans:
            result = plan.result
            if result.choice is not None:
                # It drew from the prior and improved on the draw: nearly its own target.
                index, behaviour = result.choice, result.target_policy
            else:
                behaviour = tempered(result.visit_counts, temperature)
                index = int(self._rng.choice(len(behaviour), p=behaviour))
            outputs.append(_output(plan, index, behaviour))
        return outputs

    def _forward_eval(
        self,
        roots: Sequence[Root],
        env_steps: int,
        prior_mode: str | None = None,
        temperature: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> list[SearchOutput]:
        """Plan without noise.

        Args:
            env_steps: as in `_forward_collect`.
            prior_mode: overrides the mixture's mode.
            temperature: 0 takes the most visited action, or the root policy's own choice; a higher
                one draws with `rng` from visit counts ** (1 / temperature), or so from the target
                of a root policy that chooses itself.

        Returns:
            one output per root, in their order.
        """
        root_prior = self._settings.root_prior
        if prior_mode is not None:
            root_prior = replace(root_prior, mode=prior_mode)
        plans = self._planner.plan(roots, self._inner_actions(), root_prior, env_steps, None)

        outputs = []
        for plan in plans:
            counts, choice = plan.result.visit_counts, plan.result.choice
            if temperature > 0:
                assert rng is not None, "drawing needs a generator"
                shares = counts if choice is None else plan.result.target_policy
                behaviour = tempered(shares, temperature)
                index = int(rng.choice(len(behaviour), p=behaviour))
            else:
                # Ties go to the action the mixture prefers, not to the first in the alphabet.
                most = int(np.lexsort((plan.prior.log_mixed, counts))[-1])
                index = most if choice is None else choice
                behaviour = np.eye(len(counts))[index]
            outputs.append(_output(plan, index, behaviour))
        return outputs

    def _reset_collect(self, env_ids: Sequence[int] | None = None) -> None:
        """Nothing to forget: the episodes' slots own their contexts."""

    def _reset_eval(self, env_ids: Sequence[int] | None = None) -> None:
        """Nothing to forget."""

    # ---- learning --------------------------------------------------------------------------------

    def reanalyse(
        self, batch: WorldModelBatch, env_steps: int
    ) -> tuple[WorldModelBatch, dict[str, float]]:
        """The batch with fresh targets for its `revisits`, found by the online network as it is,
        and metrics; see `priorzero/search/reanalyse.py`.

        Args:
            env_steps: as in `_forward_collect`.
        """

        def plan(roots: Sequence[Root]) -> list[Plan]:
            root_prior = self._settings.root_prior
            return self._planner.plan(roots, self._inner_actions(), root_prior, env_steps, None)

        return reanalyse(batch, plan, self._settings.root_prior.reduction)

    def _forward_learn(self, batch: WorldModelBatch) -> LearnOutput:
        """One update of the world model.

        Raises:
            PriorZeroError: the loss is not finite.
        """
        return self._trainer.update(batch, self.vocabulary.used_mask)

    def _state_dict_learn(self) -> dict[str, Any]:
        return self._trainer.state_dict() | {
            "vocabulary": self.vocabulary.state_dict(),
            "rng": generator_state(self._rng),
        }

    def _load_state_dict_learn(self, state: dict[str, Any]) -> None:
        self._trainer.load_state_dict(state)
        self.vocabulary.load_state_dict(state["vocabulary"])
        if "rng" in state:  # older checkpoints have none
            set_generator_state(self._rng, state["rng"])


def tempered(counts: np.ndarray, temperature: float) -> np.ndarray:
    """Visit counts `[A]` -> probabilities proportional to counts ** (1 / temperature)."""
    # The largest count first becomes 1, so that a small temperature cannot overflow.
    powered = (counts / counts.max()) ** (1.0 / temperature)
    return powered / powered.sum()


def _output(plan: Plan, index: int, behaviour: np.ndarray) -> SearchOutput:
    return SearchOutput(
        action_index=index,
        visit_counts=plan.result.visit_counts,
        target_policy=plan.result.target_policy,
        behaviour=behaviour,
        root_value=plan.result.value,
        predicted_value=plan.predicted_value,
        prior=plan.prior,
        tree=plan.tree,
    )
