"""ORZ's trainer with its workers, from start to end. Imports ORZ.

`RayPPOTrainer.train` draws prompts, generates answers and rates them. Our decisions are played and
rated already, so that it is left out: of a phase ORZ computes the old log-probabilities, trains the
policy, and hands over its weights.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import ray
import ray.exceptions
import torch
from loguru import logger as orz_logger

from priorzero.llm.update.losses import kl_estimate
from priorzero.llm.update.orz.actors import MENDS, PolicyActor
from priorzero.llm.update.orz.cluster import Cluster
from priorzero.llm.update.orz.contract import Learnt, OrzFailure
from priorzero.llm.update.orz.mends import orz_imported
from priorzero.llm.update.orz.packs import PackTensors, Plan
from priorzero.ray_link import worker_logs

with orz_imported():
    from orz.ppo.actors import PPORayActorGroup
    from orz.ppo.replay_buffer import Experience, NaiveReplayBuffer
    from orz.ppo.trainer import RayPPOTrainer
    from orz.ppo.utils import get_strategy

logger = logging.getLogger(__name__)

_LONGEST = 300  # characters of a message; Ray's advice on memory goes on for a page


class DecisionTrainer(RayPPOTrainer):
    """ORZ's trainer, fed with packs and driven by ours.

    Args:
        arguments: see `orz_arguments`; with `pretrain`, the folder the workers load.
        cluster: where they live.
    """

    def __init__(self, arguments: SimpleNamespace, cluster: Cluster) -> None:
        with orz_imported():  # it asks for a CUDA device
            super().__init__(arguments, get_strategy(arguments), None, None, vllm_engines=[])
        self._placement = cluster.placement
        self._moments = False
        self._state: dict[str, Any] | None = None
        self.global_step = 0

    def build_dataloader(self, dataset) -> None:
        """ORZ's prompts; ours are played already."""

    async def build_models(self, policy, critic=None, reference=None, reward=None) -> None:
        """The policy's workers, in the room we reserved. The world model is critic and reward, and
        the reference's numbers come with the decisions.
        """
        self.critic_model = self.ref_model = self.reward_model = None
        self.policy_model = PPORayActorGroup(
            self.cfg.actor_num_nodes,
            self.cfg.actor_num_gpus_per_node,
            policy,
            pg=self._placement,
            num_gpus_per_actor=1,
        )
        loading = self.policy_model.async_init_model_from_pretrained(
            self.strategy, self.cfg.pretrain
        )
        await asyncio.gather(*loading)

    async def log_probs(self, packs: Sequence[Sequence[PackTensors]]) -> list[list[torch.Tensor]]:
        """`[1, N]` log-probabilities of the rated tokens of every worker's packs."""
        actors = self.policy_model._actor_handlers

        async def of_worker(actor, own: Sequence[PackTensors]) -> list[torch.Tensor]:
            asked = [
                actor.forward.remote(
                    p.sequences,
                    p.num_actions,
                    p.attention_mask,
                    packed_seq_lens=p.packed_seq_lens,
                )
                for p in own
            ]
            return list(await asyncio.gather(*asked))

        pairs = zip(actors, packs, strict=True)
        return list(await asyncio.gather(*(of_worker(*pair) for pair in pairs)))

    async def learn(self, plan: Plan, moments: bool) -> Learnt:
        """One phase.

        Args:
            plan: its packs.
            moments: hand over the optimiser's moments too.
        """
        self._moments = moments
        packs = [[pack.tensors() for pack in own] for own in plan.packs]
        olds = await self.log_probs(packs)
        await self.policy_model.async_run_method("begin", plan.steps)
        status = await self.ppo_local_train_policy(
            [self._buffer(*pair) for pair in zip(packs, olds, strict=True)], self.global_step
        )
        norms = (await self.policy_model.async_run_method("norms"))[0]
        gpu_gb = max(await self.policy_model.async_run_method("gpu_gb"))
        self.global_step += 1
        state, self._state = self._state, None
        return Learnt(state, dict(status), norms, gpu_gb, _kl(packs, olds))

    def _buffer(
        self, packs: Sequence[PackTensors], olds: Sequence[torch.Tensor]
    ) -> NaiveReplayBuffer:
        """A worker's packs, in the order in which they are trained."""
        with orz_imported():  # it asks for a CUDA device
            buffer = NaiveReplayBuffer(sample_batch_size=1, packing_samples=True)
        for pack, old in zip(packs, olds, strict=True):
            buffer.append(_experience(pack, old))
        return buffer

    async def _sync_policy_weights_to_vllm(self) -> None:
        """After the steps: the weights go to our own engines, by way of our trainer."""
        self._state = await self.gather(self._moments)

    async def gather(self, moments: bool) -> dict[str, Any]:
        """See `PolicyActor.gather`."""
        return (await self.policy_model.async_run_method("gather", moments))[0]

    def close(self) -> None:
        """End the workers."""
        for actor in self.policy_model._actor_handlers if hasattr(self, "policy_model") else ():
            ray.kill(actor)
        self.writer.close()


def _experience(pack: PackTensors, old: torch.Tensor) -> Experience:
    """A pack as ORZ trains it. What is not known of the reference is taken from the policy before
    the phase, which pulls nowhere at first.
    """
    unknown = pack.reference.isnan()
    numbers = dict(
        kl=0.0,
        response_length=sum(pack.num_actions) / len(pack.num_actions),
        total_length=sum(pack.packed_seq_lens) / len(pack.packed_seq_lens),
    )
    numbers["return"] = float(pack.advantages.mean())
    return Experience(
        sequences=pack.sequences,
        action_log_probs=old,
        base_action_log_probs=torch.where(unknown, old, pack.reference),
        values=None,
        returns=pack.advantages,
        advantages=pack.advantages,
        attention_mask=pack.attention_mask,
        action_mask=None,
        num_actions=torch.tensor([pack.num_actions], dtype=torch.float),
        packed_seq_lens=torch.tensor([pack.packed_seq_lens], dtype=torch.float),
        info={name: torch.tensor([value]) for name, value in numbers.items()},
    )


def _kl(packs: Sequence[Sequence[PackTensors]], olds: Sequence[Sequence[torch.Tensor]]) -> float:
    """Mean k3 estimate over the tokens whose reference is known; 0 where there is none."""
    ours = torch.cat([old.flatten() for own in olds for old in own])
    reference = torch.cat([pack.reference.flatten() for own in packs for pack in own])
    known = ~reference.isnan()
    if not known.any():
        return 0.0
    return float(kl_estimate(ours[known], reference[known], "k3").mean())


class OrzSession:
    """The real `Session`: Ray, workers, model, asked without asyncio.

    Args:
        arguments: see `orz_arguments`; with `pretrain`.
        cluster: is closed with the session.
        start_timeout, timeout: seconds the workers may take to load the model; and a phase.

    Raises:
        OrzFailure: the workers did not start.
    """

    def __init__(
        self, arguments: SimpleNamespace, cluster: Cluster, start_timeout: float, timeout: float
    ) -> None:
        orz_logger.disable("orz")  # its own log repeats what our metrics say
        logger.info("ORZ runs with these mends of newer packages: %s", ", ".join(MENDS) or "none")
        self._cluster, self._timeout = cluster, timeout
        self._logs = f"the workers' logs: {worker_logs()}"
        # A loop of its own: the caller may stand in one.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="orz")
        remote = ray.remote(num_gpus=1, runtime_env=cluster.environment())(PolicyActor)
        self._trainer: DecisionTrainer | None = None
        try:
            self._trainer = DecisionTrainer(arguments, cluster)
            self._do(self._trainer.build_models(remote), start_timeout)
        except BaseException:
            self.close()
            raise

    def learn(self, plan: Plan, moments: bool) -> Learnt:
        """See `Session.learn`."""
        return self._do(self._trainer.learn(plan, moments), self._timeout)

    def gather(self) -> dict[str, Any]:
        """See `Session.gather`."""
        return self._do(self._trainer.gather(True), self._timeout)

    def log_probs(self, plan: Plan) -> list[list[torch.Tensor]]:
        """Those of every worker's packs, see `DecisionTrainer.log_probs`.

        Raises:
            OrzFailure: a worker did not answer.
        """
        packs = [[pack.tensors() for pack in own] for own in plan.packs]
        return self._do(self._trainer.log_probs(packs), self._timeout)

    def restore(self, state: dict[str, Any]) -> None:
        """See `Session.restore`."""
        kept = ray.put(state)
        self._do(self._trainer.policy_model.async_run_method("restore", kept), self._timeout)

    def close(self) -> None:
        """See `Session.close`."""
        if self._trainer is not None:
            self._trainer.close()
        self._cluster.close()
        self._thread.shutdown()

    def _do(self, work, timeout: float):
        try:
            return self._thread.submit(asyncio.run, asyncio.wait_for(work, timeout)).result()
        except TimeoutError as error:
            raise OrzFailure(f"no answer in {timeout:.0f} s; {self._logs}") from error
        except ray.exceptions.RayError as error:
            raise OrzFailure(f"{_told(error)}; {self._logs}") from error


def _told(error: ray.exceptions.RayError) -> str:
    """An error of Ray's in a line: of what a worker raised the last, which names it, of the rest
    the first.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    line = lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0]
    return f"{type(error).__name__}: {line[:_LONGEST]}"
