"""Open-Reasoner-Zero's Ray PPO trainer does the reinforcement step; docs/ORZ.md has the manual.

The model in this process stays what everybody else knows: it scores, it is saved and exported, and
engines get their weights from it. Before a phase it says what a decision is worth (`RFT.prepare`,
as for the built-in trainer); ORZ's workers train on that and hand their weights back into it. So a
checkpoint is one of the built-in trainer's, each of the two goes on from the other's, and a run
whose workers died has lost nothing but the update they were at.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from priorzero import plugins
from priorzero.llm.update.bad_steps import NotFinite
from priorzero.llm.update.build import OBJECTIVES, make_objectives
from priorzero.llm.update.objective import Objective
from priorzero.llm.update.orz.arguments import orz_arguments
from priorzero.llm.update.orz.contract import MOMENTS, Learnt, OrzFailure, Session
from priorzero.llm.update.orz.packs import Plan, plan_packs, rate
from priorzero.llm.update.rft import Rating, RFTTarget
from priorzero.llm.update.samples import LLMSample
from priorzero.llm.update.trainers.builtin import BuiltinTrainer, return_freed_memory
from priorzero.llm.weights.trained import lay_over
from priorzero.orz import orz_status
from priorzero.types import PriorZeroError

if TYPE_CHECKING:
    from priorzero.settings.llm import LLMSettings

logger = logging.getLogger(__name__)

# (folder with the model, folder for ORZ's own files) -> the workers, with that model
OpenSession = Callable[[Path, Path], Session]


def make(
    model: torch.nn.Module,
    tokenizer,
    settings: LLMSettings,
    reduction: str,
    folder: Path | None = None,
) -> OrzTrainer:
    """Plug-in contract of `trainers/`; see `OrzTrainer`.

    Args:
        tokenizer: not needed; decisions are token ids.

    Raises:
        PriorZeroError: ORZ is not there, cannot be imported, or its workers do not start.
    """
    cuda = next(model.parameters()).device.type == "cuda"
    rating = plugins.load(OBJECTIVES, settings.rft.objective)
    return OrzTrainer(
        model,
        settings,
        make_objectives(settings, reduction),
        folder,
        rating=rating.make(reduction, settings.rft.cot_weight),
        open_session=lambda base, own: _open(settings, cuda, base, own),
    )


def _open(settings: LLMSettings, cuda: bool, base: Path, own: Path) -> Session:
    found, reason = orz_status()
    if not found:
        raise PriorZeroError(
            f"Open-Reasoner-Zero cannot be used: {reason}. docs/ORZ.md says how to get it; or "
            "leave use_orz_trainer and llm.trainer out"
        )
    try:
        from priorzero.llm.update.orz.cluster import Cluster
        from priorzero.llm.update.orz.session import OrzSession
    except Exception as error:  # whatever an unmaintained package does on import
        raise PriorZeroError(
            f"Open-Reasoner-Zero ({reason}) does not import on these packages: "
            f"{type(error).__name__}: {error}. requirements/orz.lock has those it was tried with"
        ) from error

    arguments = orz_arguments(settings, cuda=cuda, model=base, folder=own)
    cluster = Cluster(settings.orz, cuda=cuda)
    return OrzSession(arguments, cluster, settings.orz.start_timeout_s, settings.orz.timeout_s)


class OrzTrainer(BuiltinTrainer):
    """The built-in trainer, whose reinforcement ORZ's workers carry out; an `LLMTrainer`.

    Args:
        model, settings, objectives, folder: see `BuiltinTrainer`; what of the settings ORZ cannot
            do, their rules refuse (`LLMSettings.rules`).
        rating: the objective's own part.
        open_session: starts the workers.

    Raises:
        PriorZeroError: they do not start.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: LLMSettings,
        objectives: Mapping[str, Objective],
        folder: Path | None,
        *,
        rating: Rating,
        open_session: OpenSession,
    ) -> None:
        super().__init__(model, settings, objectives, folder)
        self._llm_settings, self._rating = settings, rating
        self._mirrored = settings.orz.on_failure == "builtin"
        self._failures = 0
        self._own = contextlib.ExitStack()
        if folder is None:
            files = Path(self._own.enter_context(tempfile.TemporaryDirectory(prefix="orz-")))
        else:
            files = folder / "orz"
        self._session: Session | None = None
        try:
            self._session = self._start(open_session, files)
        except OrzFailure as failure:
            raise PriorZeroError(f"ORZ's workers do not start: {failure}") from failure

    def _start(self, open_session: OpenSession, files: Path) -> Session:
        """The workers read the model from a folder, and keep nothing of it."""
        base = files / "base"
        shutil.rmtree(base, ignore_errors=True)
        self.weights().save(base)
        # ORZ loads a float32 worker in the format the folder names, which is the original model's.
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = "float32"
        (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            return open_session(base, files)
        finally:
            shutil.rmtree(base, ignore_errors=True)

    # ---- training --------------------------------------------------------------------------------

    def update(self, samples: Mapping[str, Sequence[LLMSample]]) -> dict[str, float]:
        """See `LLMTrainer.update`.

        Metrics are named as the built-in trainer's; those it cannot know of ORZ's steps are
        missing. Of its own: rft_orz_token_entropy, rft_orz_packs and rft_orz_gpu_gb.
        """
        if self._session is None:
            return super().update(samples)
        drawn = samples.get("rft", ())
        if not drawn:
            return {}

        objective = self._objectives["rft"]
        remembered = objective.state_dict()
        try:
            metrics = self._train_with_orz(objective, drawn)
        except OrzFailure as failure:
            objective.load_state_dict(remembered)
            self._give_up(failure)
            return super().update(samples)
        self.version += 1
        return_freed_memory()
        return {f"rft_{name}": value for name, value in metrics.items()}

    def _train_with_orz(
        self, objective: Objective, samples: Sequence[LLMSample]
    ) -> dict[str, float]:
        started = time.perf_counter()
        done = {"samples": float(len(samples)), "skipped_steps": 0.0}
        try:
            targets, metrics = objective.prepare(samples, self._answers)
        except NotFinite as fault:
            self._skip(fault, "rft", samples, ())
            return done | {"skipped_steps": 1.0, "seconds": time.perf_counter() - started}

        plan = self._plan(samples, targets)
        # The workers want the memory, where they are on this machine and on this GPU.
        return_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        learnt = self._session.learn(plan, self._mirrored)
        self._take(learnt)

        means = _metrics(learnt, plan, objective.passes)
        objective.finish(means)
        return metrics | means | done | {"seconds": time.perf_counter() - started}

    def _plan(self, samples: Sequence[LLMSample], targets: Sequence[RFTTarget]) -> Plan:
        orz, train = self._llm_settings.orz, self._llm_settings.train
        pairs = zip(samples, targets, strict=True)
        return plan_packs(
            [rate(sample, target, self._rating) for sample, target in pairs],
            step_size=train.batch_size,
            workers=orz.workers,
            max_tokens=train.max_batch_tokens if orz.packing else 0,
        )

    def _take(self, learnt: Learnt) -> None:
        """Let the model in this process be what ORZ made of it.

        Raises:
            OrzFailure: what it made is not finite; nothing was taken.
        """
        weights = learnt.state["model"]
        odd = [name for name, value in weights.items() if not value.isfinite().all()]
        if odd:
            raise OrzFailure(f"its weights became NaN or infinite, for example {odd[0]}")

        with self.lock:
            differing = lay_over(self._model, weights)
            assert not differing, f"ORZ trains other weights than this model has: {differing[:3]}"
            self._steps = learnt.state["steps"]
            if self._mirrored:
                self._keep_moments(learnt.state)

    def _keep_moments(self, state: Mapping[str, Any]) -> None:
        """The optimiser of this process becomes ORZ's."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and MOMENTS[0] in state:
                kept = {key: state[key][name].to(parameter.device) for key in MOMENTS}
                step = torch.tensor(float(state["steps"]))
                self._optimizer.state[parameter] = {"step": step} | kept

    def _give_up(self, failure: OrzFailure) -> None:
        """Go on without ORZ, where that is wanted.

        Raises:
            PriorZeroError: it is not.
        """
        self._failures += 1
        self._close_session()
        if not self._mirrored:
            raise PriorZeroError(
                f"ORZ's trainer failed ({failure}); the weights are those of version "
                f"{self.version}, before this update. Continue the last checkpoint with --resume, "
                "or set llm.orz.on_failure to builtin, which goes on without ORZ"
            ) from failure
        logger.error(
            "ORZ's trainer failed (%s); the built-in trainer does this update and all that follow, "
            "from weights %d and their optimiser",
            failure,
            self.version,
        )

    # ---- weights and state -----------------------------------------------------------------------

    def state_dict(self) -> dict:
        """See `BuiltinTrainer.state_dict`: the optimiser's state is ORZ's."""
        if self._session is not None and not self._mirrored:
            try:
                self._keep_moments(self._session.gather())
            except OrzFailure as failure:
                # The next update will say so again; a checkpoint without moments is better than
                # none.
                self._failures += 1
                logger.error("ORZ does not hand its optimiser over, which begins anew: %s", failure)
        state = super().state_dict()
        if self._session is not None and not self._mirrored:
            self._optimizer.state.clear()  # the memory is ORZ's; `state` holds what is written
        return state

    def load_state_dict(self, state: dict) -> None:
        """See `BuiltinTrainer.load_state_dict`; ORZ's workers go on from there too.

        Raises:
            PriorZeroError: the state belongs to another model, or the workers do not take it.
        """
        super().load_state_dict(state)
        if self._session is None:
            return
        named = {n: p.detach().cpu() for n, p in self._model.named_parameters() if p.requires_grad}
        given: dict[str, Any] = {"model": named, "steps": self._steps}
        moments = self._optimizer.state_dict()["state"]
        if moments:
            for key in MOMENTS:
                values = (moments[i][key].cpu() for i in range(len(self._parameters)))
                given[key] = dict(zip(named, values, strict=True))
        try:
            self._session.restore(given)
        except OrzFailure as failure:
            raise PriorZeroError(
                f"ORZ's workers do not take the checkpoint: {failure}; start again with --resume"
            ) from failure
        if not self._mirrored:
            self._optimizer.state.clear()

    def stats(self) -> dict[str, float]:
        """See `LLMTrainer.stats`: how often ORZ failed."""
        return super().stats() | {"orz_failures": float(self._failures)}

    def close(self) -> None:
        """See `LLMTrainer.close`."""
        self._close_session()
        self._own.close()

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        try:
            session.close()
        except Exception:  # of a cluster that is gone already
            logger.exception("closing ORZ failed; what it held ends with its cluster")


def _metrics(learnt: Learnt, plan: Plan, passes: int) -> dict[str, float]:
    """ORZ's numbers under the names they have here."""
    packs = [pack for own in plan.packs for pack in own]
    return {
        "policy_loss": learnt.status["policy_loss"],
        "clip_fraction": learnt.status["clip_ratio"],
        "kl_reference": learnt.kl,
        "orz_token_entropy": learnt.status["entropy"],
        "grad_norm": sum(learnt.norms) / len(learnt.norms),
        "learning_rate": learnt.status["actor_lr"],
        "epochs": float(passes),
        "orz_packs": float(len(packs)),
        "orz_gpu_gb": learnt.gpu_gb,
        "tokens": float(passes * sum(len(d.ids) for pack in packs for d in pack.decisions)),
    }
