"""PriorZeroPolicy: UniZero's world model, trained from the buffer, and a search whose root also
listens to an LLM.

Registered in DI-engine's policy registry as `priorzero`; UniZero's network and optimiser are
LightZero's. It joins four parts, each of which can be used alone: the network
(`priorzero/world_model/model.py`), the planner (`priorzero/search/planner.py`), the trainer
(`priorzero/world_model/trainer.py`) and the vocabulary of actions. The collector asks
`collect_mode.forward`, the evaluator `eval_mode.forward`, the training stage `learn_mode.forward`.
It keeps nothing of the episodes that are played: their roots bring their own context.

Threads: in a run in turn one of them is at work at a time. Beside training, collection plans with
an acting copy of the network (`act_apart`) and evaluation with a policy of its own (`snapshot`);
the vocabulary is the one thing that collection and training then share.

Letters: `B` roots, `A` valid actions of a root, `V` vocabulary size.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from priorzero.data.batch import WorldModelBatch
from priorzero.data.segment import StepRecord
from priorzero.quiet import quiet_base
from priorzero.ranks import Ranks
from priorzero.run.randomness import generator_state, set_generator_state
from priorzero.search.calibration import calibrate
from priorzero.search.planner import Plan, Planner
from priorzero.search.reanalyse import reanalyse
from priorzero.search.roots import Root, SearchOutput
from priorzero.settings.policy import PolicySettings, RootPriorSettings
from priorzero.text.shared import SharedVocabulary
from priorzero.text.vocabulary import ActionVocabulary, make_vocabulary
from priorzero.world_model.categorical import Support
from priorzero.world_model.model import PriorZeroModel
from priorzero.world_model.trainer import PendingOutput, WorldModelTrainer

with quiet_base():
    from ding.utils import POLICY_REGISTRY
    from lzero.policy.unizero import UniZeroPolicy

# Among the weights that other processes are handed, which have the names of parameters.
_TEMPERATURE = "prior temperature"


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
        self._scalar_of = Support(self._settings.support_scale, cfg.device).scalars

        self.vocabulary = make_vocabulary(self._settings.action_vocabulary)
        self._embed_text: Callable[[list[str]], np.ndarray] | None = None
        self._rng = np.random.default_rng(cfg.seed)
        self._trainer = WorldModelTrainer(self._model, self._settings, cfg.device)
        self._planner = self._planner_of(self._model)
        self._named = [self.network, self.target_network]  # what new actions are named in
        self._met = 0  # actions that all processes of a data-parallel run know
        self._naming = threading.Lock()  # an id is used by nobody before it has its text
        self._calibrated: float | None = None  # the LLM's temperature, once it was calibrated

        # What collection plans with: the network itself, or a copy beside training.
        self._acting: PriorZeroModel = self._model
        self._acting_planner = self._planner
        self._offered: deque[tuple[list[torch.Tensor], int]] = deque(maxlen=1)  # the newest alone
        self.acting_version = 0

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
        planners = {id(p): p for p in (self._planner, self._acting_planner)}
        return sum(planner.positions_clamped for planner in planners.values())

    def _planner_of(self, model: PriorZeroModel) -> Planner:
        return Planner(model, self._settings, self._scalar_of, self._cfg.device)

    # ---- playing beside training -----------------------------------------------------------------

    def snapshot(self) -> PriorZeroPolicy:
        """A policy that plays as this one does now, whatever this one does afterwards: network,
        vocabulary and planner are its own. It plays evaluations and learns nothing.

        Call it while nothing trains.
        """
        taken = copy.copy(self)
        taken._model = taken._acting = copy.deepcopy(self._model).requires_grad_(False).eval()
        taken.vocabulary = self.vocabulary.copy()
        taken._named, taken._naming = [taken._model], threading.Lock()
        taken._planner = taken._acting_planner = taken._planner_of(taken._model)
        taken._offered = deque(maxlen=1)
        taken._trainer = None
        return taken

    def act_apart(self, version: int) -> None:
        """From here on collection plans with a copy of the network, which training does not touch;
        it takes over what `offer_weights` gives.

        Args:
            version: of the weights as they are, a number of the caller's.
        """
        assert self._acting is self._model, "collection has its own copy already"
        self._acting = copy.deepcopy(self._model).requires_grad_(False).eval()
        self._acting_planner = self._planner_of(self._acting)
        self._named.append(self._acting)
        self.acting_version = version

    def offer_weights(self, version: int) -> None:
        """Let collection plan with the weights as they are now, from its next search on. Call it
        where training does, between updates.

        Args:
            version: what `acting_version` is from that search on.
        """
        assert self._acting is not self._model, "act_apart comes first"
        # Parameters only: action texts are given to every copy at once, and may be newer there.
        self._offered.append(([p.detach().clone() for p in self._model.parameters()], version))

    @torch.no_grad()
    def _take_over(self) -> None:
        """Between two searches: the newest weights that were offered, if there are any."""
        while self._offered:
            weights, self.acting_version = self._offered.popleft()
            torch._foreach_copy_(list(self._acting.parameters()), weights)

    # ---- training with other processes -----------------------------------------------------------

    def train_with(self, ranks: Ranks) -> None:
        """Train one network together with the other processes of a data-parallel run. It begins as
        the first one's, and actions get the same ids in all. Call it before anything is loaded or
        played.
        """
        assert self.vocabulary.size == 0 and isinstance(self.vocabulary, ActionVocabulary)
        self.vocabulary = SharedVocabulary(self._settings.action_vocabulary, ranks.store())
        ranks.take_from_first([*self.network.state_dict().values()])
        ranks.take_from_first([*self.target_network.state_dict().values()])
        self._trainer.train_with_others(ranks.mean)

    def meet(self, ranks: Ranks) -> None:
        """Know all actions that the processes have met, those among the overflow ids included. All
        call it at once, while none of them plays.
        """
        used = np.logical_or.reduce(ranks.gather(self._used_actions()))
        with self._naming:
            self.vocabulary.catch_up(used)
            new = list(range(self._met, self.vocabulary.size))
            self._met = self.vocabulary.size
            if new:
                # Batches of other texts may round otherwise.
                self._name_actions(new, ranks.from_first)

    # ---- playing in other processes --------------------------------------------------------------

    def acting_weights(self) -> dict[str, np.ndarray]:
        """Copies of the parameters that collection plans with now, by name, and the LLM's
        temperature, where it is calibrated. Action texts are not among them: every process gives
        them to its network as it learns of them.
        """
        self._take_over()
        weights = {n: p.detach().cpu().numpy().copy() for n, p in self._acting.named_parameters()}
        if self._settings.root_prior.calibrated:
            weights[_TEMPERATURE] = np.array(self.prior_temperature)
        return weights

    @torch.no_grad()
    def take_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Plan with these from here on, as `acting_weights` gave them elsewhere."""
        weights = dict(weights)
        if self._settings.root_prior.calibrated:
            self._calibrated = float(weights.pop(_TEMPERATURE))

        own = dict(self._acting.named_parameters())
        assert own.keys() == weights.keys(), "the networks differ"
        for name, parameter in own.items():
            parameter.copy_(torch.tensor(weights[name]))

    # ---- actions ---------------------------------------------------------------------------------

    def attach_encoder(self, encode: Callable[[list[str]], np.ndarray]) -> None:
        """Give the policy the sentence encoder: texts -> `[N, E]` float32, for new actions."""
        self._embed_text = encode

    def register_actions(self, actions: Sequence[str]) -> list[int | None]:
        """Ids of a state's valid actions; new ones are named in the vocabulary and in every copy
        of the network.

        None marks an action the full vocabulary had to drop (see `ActionVocabulary`).
        """
        with self._naming:
            before = self.vocabulary.size
            ids = self.vocabulary.ids(actions)
            if self.vocabulary.size > before and isinstance(self.vocabulary, ActionVocabulary):
                self._name_actions(range(before, self.vocabulary.size))
        return ids

    def _name_actions(
        self,
        ids: Sequence[int],
        agreed: Callable[[np.ndarray], np.ndarray] = lambda vectors: vectors,
    ) -> None:
        """Give these ids their texts, by vectors that are `agreed` on."""
        assert self._embed_text is not None, "attach_encoder comes before playing"
        texts = [self.vocabulary.action_of(i) for i in ids]
        embeddings = torch.from_numpy(agreed(self._embed_text(texts)))
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

    def _used_actions(self) -> np.ndarray:
        """`[V]` bool, ids that name an action and have its text."""
        with self._naming:
            return self.vocabulary.used_mask

    def _inner_actions(self) -> int:
        """How many of the first ids inner nodes branch over. With overflow ids in use, all: they
        lie at the end.
        """
        used = np.flatnonzero(self._used_actions())
        return int(used[-1]) + 1 if len(used) else 1

    # ---- the LLM's temperature -------------------------------------------------------------------

    @property
    def prior_temperature(self) -> float:
        """The LLM's temperature at the root, as of now."""
        settings = self._settings.root_prior
        if not settings.calibrated:
            return float(settings.temperature)
        return settings.calibration.start if self._calibrated is None else self._calibrated

    def calibrate(self, steps: Sequence[StepRecord]) -> dict[str, float]:
        """Fit the LLM's temperature to these decisions; every search from here on has it, those of
        snapshots that were taken before aside.

        Args:
            steps: with the LLM's scores, newest first.

        Returns:
            metrics: `temperature`, which the searches had so far, and what came of the calibration
            (`priorzero/search/calibration.py`), if the decisions were enough for one.
        """
        root_prior, used = self._settings.root_prior, self.prior_temperature
        assert root_prior.calibrated
        found = calibrate(steps, root_prior.reduction, root_prior.calibration, used)
        if found is None:
            return {"temperature": used}

        self._calibrated = found.temperature
        return {
            "temperature": used,
            "calibration_best": found.best,
            "calibration_loss_before": found.loss_before,
            "calibration_loss_after": found.loss_after,
            "calibration_loss_uniform": found.loss_uniform,
            "calibration_decisions": float(found.decisions),
        }

    def _root_prior(self, mode: str | None = None) -> RootPriorSettings:
        """How the LLM enters now, with a number as temperature.

        Args:
            mode: in place of the settings'.
        """
        root_prior = self._settings.root_prior
        if root_prior.calibrated:
            root_prior = replace(root_prior, temperature=self.prior_temperature)
        return root_prior if mode is None else replace(root_prior, mode=mode)

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
        self._take_over()
        plans = self._acting_planner.plan(
            roots, self._inner_actions(), self._root_prior(), env_steps, self._rng
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
        root_prior = self._root_prior(prior_mode)
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
                index = plan.favourite
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
            root_prior = self._root_prior()
            return self._planner.plan(roots, self._inner_actions(), root_prior, env_steps, None)

        return reanalyse(batch, plan, self._settings.root_prior.reduction)

    def _forward_learn(self, batch: WorldModelBatch) -> PendingOutput:
        """One update of the world model; see `WorldModelTrainer.update`."""
        return self._trainer.update(batch, self._used_actions())

    def _state_dict_learn(self) -> dict[str, Any]:
        calibrated = {}
        if self._settings.root_prior.calibrated:
            calibrated["prior_temperature"] = self.prior_temperature
        return (
            self._trainer.state_dict()
            | {"vocabulary": self.vocabulary.state_dict(), "rng": generator_state(self._rng)}
            | calibrated
        )

    def _load_state_dict_learn(self, state: dict[str, Any]) -> None:
        self._trainer.load_state_dict(state)
        self.vocabulary.load_state_dict(state["vocabulary"])
        self._met = self.vocabulary.size
        if "rng" in state:  # older checkpoints have none
            set_generator_state(self._rng, state["rng"])
        # None where the run had a number so far; then calibration begins now.
        self._calibrated = state.get("prior_temperature")


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
        world_model_target=plan.world_model_target,
        llm_target=plan.llm_target,
    )
