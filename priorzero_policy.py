"""PriorZeroPolicy: UniZero's world model, trained from the buffer, and a search whose root also
listens to an LLM.

Registered in DI-engine's policy registry as ``priorzero``. It keeps LightZero's UniZero settings,
network, optimiser and C++ tree. The collector asks `collect_mode.forward`, the evaluator
`eval_mode.forward`, the learner `learn_mode.forward`; the first two differ only in Dirichlet noise,
in how the action is drawn from the visit counts, and in their contexts.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from priorzero.compute import torch_threads
from priorzero.data.batch import WorldModelBatch
from priorzero.quiet import quiet_base
from priorzero.search.context import ContextStore
from priorzero.search.root_prior import RootPrior, RootPriorSettings, mix_root_prior
from priorzero.search.tree import SearchSettings, search
from priorzero.text.vocabulary import ActionVocabulary, make_vocabulary
from priorzero.types import PriorZeroError
from priorzero.world_model.inference import SearchMemory
from priorzero.world_model.loss import LossWeights, WorldModelTargets, world_model_loss

with quiet_base():
    from ding.utils import POLICY_REGISTRY
    from lzero.policy import (
        DiscreteSupport,
        InverseScalarTransform,
        phi_transform,
        scalar_transform,
    )
    from lzero.policy.scaling_transform import visit_count_temperature
    from lzero.policy.unizero import UniZeroPolicy
    from lzero.policy.utils import configure_optimizers_nanogpt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SearchOutput:
    """What planning at one root gave. Arrays `[A]` follow `valid_ids`, the ids the search could
    choose from.

    action_index: the chosen position. visit_counts, behaviour: counts and the probabilities the
    action was drawn from. root_value: of the search. predicted_value: of the network alone. prior:
    the mixture that entered.
    """

    valid_ids: np.ndarray
    action_index: int
    visit_counts: np.ndarray
    behaviour: np.ndarray
    root_value: float
    predicted_value: float
    prior: RootPrior


@POLICY_REGISTRY.register("priorzero")
class PriorZeroPolicy(UniZeroPolicy):
    """See the module. Settings beyond UniZero's stand in `config`; `priorzero_config.py` documents
    all that matter.
    """

    config = dict(
        type="priorzero",
        # (dict) Fields of `priorzero.search.root_prior.RootPriorSettings`.
        root_prior=dict(),
        # (dict) kind "stable" or "positional", capacity (V), overflow: see
        # `priorzero.text.vocabulary`.
        action_vocabulary=dict(kind="stable", capacity=512, overflow=16),
        # (str) Where n-step targets bootstrap: "target_network" (its value now) or "search" (root
        # value when played).
        value_bootstrap="target_network",
        # (int) `C`: real observations a root looks back on, itself included.
        context_steps=4,
        # (int) CPU threads of a search; 0 leaves torch's own number.
        search_threads=1,
        # (str) puct or lightzero: see `priorzero.search.tree.SearchSettings`.
        search_tree="puct",
        # (dict) Fields of `priorzero.world_model.loss.LossWeights`.
        loss_weights=dict(),
    )

    def default_model(self) -> tuple[str, list[str]]:
        return "PriorZeroModel", ["priorzero.world_model.model"]

    # ---- set-up ----------------------------------------------------------------------------------

    def _init_learn(self) -> None:
        cfg = self._cfg
        with quiet_base():
            self._optimizer_world_model = configure_optimizers_nanogpt(
                model=self._model.world_model,
                learning_rate=cfg.learning_rate,
                weight_decay=cfg.weight_decay,
                device_type=cfg.device,
                betas=(0.9, 0.95),
            )
        self._fuse_optimizer()
        self._target_model = copy.deepcopy(self._model).requires_grad_(False)
        self._learn_model = self._model
        scale = cfg.model.support_scale
        self._support = DiscreteSupport(-scale, scale, delta=1)
        self._loss_weights = LossWeights(**cfg.loss_weights)
        self._train_iter = 0

    def _init_collect(self) -> None:
        self._collect_model = self._model
        self._collect_context = self._new_context()
        self._init_planning()

    def _init_eval(self) -> None:
        self._eval_model = self._model
        self._eval_context = self._new_context()
        self._init_planning()

    def _new_context(self) -> ContextStore:
        return ContextStore(self._cfg.context_steps, self._cfg.model.observation_shape)

    def _init_planning(self) -> None:
        cfg = self._cfg
        self._scalar_of = InverseScalarTransform(
            cfg.model.support_scale, cfg.device, cfg.model.categorical_distribution
        )
        self._search_settings = SearchSettings(
            cfg.num_simulations,
            cfg.discount_factor,
            root_dirichlet_alpha=cfg.root_dirichlet_alpha,
            root_noise_weight=cfg.root_noise_weight,
            tree=cfg.search_tree,
        )
        self._prior_settings = RootPriorSettings(**cfg.root_prior)
        self._rng = np.random.default_rng(cfg.get("seed", 0))
        self.positions_clamped = 0
        if not hasattr(self, "vocabulary"):
            self.vocabulary = make_vocabulary(**cfg.action_vocabulary)
            self._embed_text = None

    def attach_encoder(self, encode) -> None:
        """Give the policy the sentence encoder: ``encode(list[str]) -> [N, E] float32``, for the
        texts of new actions.
        """
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
        if self._embed_text is None:
            raise PriorZeroError(
                "the policy has no sentence encoder; call attach_encoder before playing"
            )
        texts = [self.vocabulary.action_of(i) for i in ids]
        embeddings = torch.from_numpy(self._embed_text(texts))
        models = [self._model] + ([self._target_model] if hasattr(self, "_target_model") else [])
        for model in models:
            model.set_action_text(list(ids), embeddings)

    # ---- planning --------------------------------------------------------------------------------

    def _plan(
        self,
        context: ContextStore,
        observations: np.ndarray,
        valid_ids: Sequence[Sequence[int]],
        llm_logprobs: Sequence[np.ndarray | None],
        env_ids: Sequence[int],
        prior_settings: RootPriorSettings,
        env_steps: int,
        noise: np.random.Generator | None,
    ):
        """The part collect and eval share: context -> network -> mixture -> search. Returns
        results, values, priors.
        """
        self._model.eval()
        for env_id, observation in zip(env_ids, observations, strict=True):
            context.observe(env_id, observation)
        with torch_threads(self._cfg.search_threads):
            return self._search(
                context, valid_ids, llm_logprobs, env_ids, prior_settings, env_steps, noise
            )

    def _search(
        self,
        context: ContextStore,
        valid_ids: Sequence[Sequence[int]],
        llm_logprobs: Sequence[np.ndarray | None],
        env_ids: Sequence[int],
        prior_settings: RootPriorSettings,
        env_steps: int,
        noise: np.random.Generator | None,
    ):
        memory = SearchMemory(self._model, self._search_settings.num_simulations)
        root = memory.root(*context.batch(env_ids, self._cfg.device))
        values = self._scalar_of(root.value_logits).view(-1).tolist()
        logits = root.policy_logits.cpu().numpy()
        priors = [
            mix_root_prior(logits[row, list(ids)], llm, prior_settings, env_steps)
            for row, (ids, llm) in enumerate(zip(valid_ids, llm_logprobs, strict=True))
        ]
        results = search(
            self._model,
            memory,
            priors,
            [list(ids) for ids in valid_ids],
            self._inner_actions(),
            self._scalar_of,
            self._search_settings,
            noise,
            np.asarray(values),
        )
        self.positions_clamped += memory.positions_clamped
        return results, values, priors

    def _inner_actions(self) -> int:
        """How many of the first ids inner nodes branch over. With overflow ids in use, all: they
        lie at the end.
        """
        used = np.flatnonzero(self.vocabulary.used_mask)
        return int(used[-1]) + 1 if len(used) else 1

    def _forward_collect(
        self,
        observations: np.ndarray,
        valid_ids: Sequence[Sequence[int]],
        llm_logprobs: Sequence[np.ndarray | None],
        env_ids: Sequence[int],
        temperature: float = 1.0,
        env_steps: int = 0,
    ) -> dict[int, SearchOutput]:
        """Plan with root noise and draw actions from visit counts ** (1 / temperature).

        Args:
            observations: `[B, E]`. valid_ids: per row its action ids. llm_logprobs: per row `[A]`
                or None.
            env_ids: per row the environment; its context is continued, `reset([id])` starts a new
                episode.
        """
        results, values, priors = self._plan(
            self._collect_context,
            observations,
            valid_ids,
            llm_logprobs,
            env_ids,
            self._prior_settings,
            env_steps,
            self._rng,
        )
        output = {}
        for row, env_id in enumerate(env_ids):
            behaviour = tempered(results[row].visit_counts, temperature)
            index = int(self._rng.choice(len(behaviour), p=behaviour))
            output[env_id] = SearchOutput(
                np.asarray(valid_ids[row]),
                index,
                results[row].visit_counts,
                behaviour,
                results[row].value,
                values[row],
                priors[row],
            )
            self._collect_context.act(env_id, int(valid_ids[row][index]))
        return output

    def _forward_eval(
        self,
        observations: np.ndarray,
        valid_ids: Sequence[Sequence[int]],
        llm_logprobs: Sequence[np.ndarray | None],
        env_ids: Sequence[int],
        env_steps: int = 0,
        prior_mode: str | None = None,
        temperature: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> dict[int, SearchOutput]:
        """Plan without noise. Temperature 0 takes the most visited action, a higher one draws with
        `rng` from visit counts
        ** (1 / temperature). `prior_mode` overrides the mixture's mode."""
        settings = (
            self._prior_settings
            if prior_mode is None
            else replace_mode(self._prior_settings, prior_mode)
        )
        results, values, priors = self._plan(
            self._eval_context,
            observations,
            valid_ids,
            llm_logprobs,
            env_ids,
            settings,
            env_steps,
            None,
        )
        output = {}
        for row, env_id in enumerate(env_ids):
            counts = results[row].visit_counts
            if temperature > 0:
                behaviour = tempered(counts, temperature)
                index = int(rng.choice(len(behaviour), p=behaviour))
            else:  # ties go to the action the mixture prefers, not to the first in the alphabet
                index = int(np.lexsort((priors[row].log_mixed, counts))[-1])
                behaviour = np.eye(len(counts))[index]
            output[env_id] = SearchOutput(
                np.asarray(valid_ids[row]),
                index,
                counts,
                behaviour,
                results[row].value,
                values[row],
                priors[row],
            )
            self._eval_context.act(env_id, int(valid_ids[row][index]))
        return output

    def _reset_collect(self, env_ids: Sequence[int] | None = None) -> None:
        for env_id in [None] if env_ids is None else env_ids:
            self._collect_context.reset(env_id)

    def _reset_eval(self, env_ids: Sequence[int] | None = None) -> None:
        for env_id in [None] if env_ids is None else env_ids:
            self._eval_context.reset(env_id)

    def collect_temperature(self) -> float:
        """Temperature of the visit counts at the present number of updates (LightZero's schedule)."""
        cfg = self._cfg
        return visit_count_temperature(
            cfg.manual_temperature_decay,
            cfg.fixed_temperature_value,
            cfg.threshold_training_steps_for_final_temperature,
            self._train_iter,
        )

    # ---- learning --------------------------------------------------------------------------------

    def _forward_learn(self, batch: WorldModelBatch) -> dict[str, float]:
        """One update of the world model; leaves |value error| of each row's first step in
        `batch.new_priorities`.
        """
        cfg, device = self._cfg, self._cfg.device
        self._learn_model.train()
        self._target_model.eval()
        on = lambda x: torch.from_numpy(x).to(device)  # noqa: E731
        observations, actions = on(batch.observations), on(batch.actions)
        target_value = self._value_targets(batch)
        latents = self._learn_model.encode(observations[:, :-1])
        outputs = self._learn_model.unroll(latents, actions)
        with torch.no_grad():
            next_latents = self._target_model.encode(observations[:, 1:])
        targets = WorldModelTargets(
            latent=next_latents,
            reward=self._categorical(on(batch.rewards)),
            value=self._categorical(target_value),
            policy=on(batch.policies),
            mask_latent=on(batch.mask_step),
            mask_reward=on(batch.mask_reward),
            mask_value=on(batch.mask_value),
            mask_policy=on(batch.mask_step),
            used_actions=on(self.vocabulary.used_mask),
        )
        total, terms = world_model_loss(
            outputs,
            targets,
            on(batch.weights),
            cfg.model.world_model_cfg.group_size,
            self._loss_weights,
        )
        if not torch.isfinite(total):
            raise PriorZeroError(
                f"the world model's loss is {total.item()}; terms: "
                f"{ {k: v.item() for k, v in terms.items()} }. Lower learning_rate or grad_clip_value, "
                "or check the game's score range against support_scale"
            )
        self._optimizer_world_model.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self._learn_model.world_model.parameters(), cfg.grad_clip_value
        )
        self._optimizer_world_model.step()
        self._update_target()
        self._train_iter += 1
        predicted = self._scalar_of(outputs[3].detach()[:, 0])[:, 0]
        batch.new_priorities = (predicted - target_value[:, 0]).abs().cpu().numpy()
        metrics = {name: value.item() for name, value in terms.items()}
        mask = targets.mask_value.bool()
        return metrics | {
            "wm_loss": total.item(),
            "grad_norm": float(norm),
            "value_error": float(batch.new_priorities.mean()),
            "target_value": target_value[mask].mean().item(),
            "target_reward": float(batch.rewards.mean()),
            "target_policy_entropy": _mean_entropy(targets.policy, targets.mask_policy),
            "learning_rate": self._optimizer_world_model.param_groups[0]["lr"],
        }

    def _value_targets(self, batch: WorldModelBatch) -> Tensor:
        """n-step targets `[B, T]`: returns + discounts * bootstrap value."""
        device = self._cfg.device
        returns, discounts = (
            torch.from_numpy(x).to(device) for x in (batch.returns, batch.discounts)
        )
        with torch.no_grad():
            latents = self._target_model.encode(
                torch.from_numpy(batch.bootstrap_observations).to(device)
            )
            logits = self._target_model.unroll(
                latents, torch.from_numpy(batch.bootstrap_actions).to(device)
            )[3]
            values = self._scalar_of(logits.flatten(0, 1)).view(returns.shape)
        bootstrap = values.gather(1, torch.from_numpy(batch.bootstrap_index).to(device))
        if self._cfg.value_bootstrap == "search":
            known = torch.from_numpy(batch.search_values).to(device)
            bootstrap = torch.where(known.isnan(), bootstrap, known)
        return returns + discounts * bootstrap

    def _categorical(self, scalars: Tensor) -> Tensor:
        """`[B, T]` scalars -> `[B, T, S]` two-hot distributions over the transformed support
        (MuZero, appendix F).
        """
        return phi_transform(self._support, scalar_transform(scalars))

    @torch.no_grad()
    def _update_target(self) -> None:
        """Soft update: target <- (1 - theta) target + theta online."""
        torch._foreach_lerp_(
            list(self._target_model.parameters()),
            list(self._learn_model.parameters()),
            self._cfg.target_update_theta,
        )

    def _fuse_optimizer(self) -> None:
        """LightZero asks for PyTorch's fused step on CUDA only; on two cores it took 2.0 instead of
        6.6 ms for as many small tensors as the debug network has.
        """
        for group in self._optimizer_world_model.param_groups:
            group["fused"] = True

    def _monitor_vars_learn(self) -> list[str]:
        return [
            "wm_loss",
            "latent_loss",
            "reward_loss",
            "policy_loss",
            "value_loss",
            "policy_entropy",
            "grad_norm",
            "value_error",
            "target_value",
            "target_reward",
            "target_policy_entropy",
            "learning_rate",
        ]

    def _state_dict_learn(self) -> dict[str, Any]:
        return {
            "model": self._learn_model.state_dict(),
            "target_model": self._target_model.state_dict(),
            "optimizer_world_model": self._optimizer_world_model.state_dict(),
            "vocabulary": self.vocabulary.state_dict(),
            "train_iter": self._train_iter,
        }

    def _load_state_dict_learn(self, state: dict[str, Any]) -> None:
        self._learn_model.load_state_dict(state["model"])
        self._target_model.load_state_dict(state["target_model"])
        self._optimizer_world_model.load_state_dict(state["optimizer_world_model"])
        self._fuse_optimizer()  # an older checkpoint's groups say otherwise
        self.vocabulary.load_state_dict(state["vocabulary"])
        self._train_iter = state["train_iter"]


def replace_mode(settings: RootPriorSettings, mode: str) -> RootPriorSettings:
    """The same mixture in another mode."""
    return RootPriorSettings(**{**settings.__dict__, "mode": mode})


def tempered(counts: np.ndarray, temperature: float) -> np.ndarray:
    """Visit counts `[A]` -> probabilities proportional to counts ** (1 / temperature)."""
    # The largest count first becomes 1, so that a small temperature cannot overflow.
    powered = (counts / counts.max()) ** (1.0 / temperature)
    return powered / powered.sum()


def _mean_entropy(policy: Tensor, mask: Tensor) -> float:
    entropy = -(policy * torch.log(policy.clamp(min=1e-12))).sum(-1)
    return ((entropy * mask).sum() / mask.sum().clamp(min=1.0)).item()
