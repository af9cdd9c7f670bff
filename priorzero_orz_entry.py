"""Train PriorZero: evaluate, collect, train the world model, train the LLM, log, save; one process,
one asyncio loop.

    python -m priorzero_orz_entry --env-id detective.z5 --iterations 500
    DEBUG_MODE=True python -m priorzero_orz_entry

Who talks to whom: the collector plays (environments, policy's collect mode, LLM prior) and fills
the buffer; the learner trains the policy's network from the buffer; the LLM learner trains the LLM
from the same buffer and publishes its weights to the engine behind the prior; the evaluator plays
with what both have learned. `Run` holds the parts and the order.

The processes vLLM starts import this module again, so everything heavy is imported inside
functions.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from priorzero.run.cli import calm_openmp, option_parser
from priorzero.run.experiment import set_aside
from priorzero.run.logs import setup_logging
from priorzero.run.orz import ORZ_AVAILABLE
from priorzero.run.report import banner, evaluation_line, first_and_last
from priorzero.settings.record import parse_assignment
from priorzero.types import PriorZeroError
from priorzero_config import PRESETS, HybridTrainingConfig

logger = logging.getLogger("priorzero_orz_entry")


async def train_priorzero_orz(
    config: HybridTrainingConfig, eval_only: bool = False
) -> dict[str, Any]:
    """Run the whole experiment; returns its summary (also written to `<exp>/summary.json`).

    Args:
        config: checked again here, so attributes may have been overwritten since its construction.
        eval_only: load the checkpoint, evaluate once, and stop.
    Raises:
        PriorZeroError: a fault the user can mend, before anything is lost.
    """
    config.validate()
    from priorzero.run.signals import StopRequest

    folder = Path(config.priorzero_cfg.exp_name)
    if not (config.resume or eval_only):
        set_aside(folder)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        run = Run(config, folder, eval_only)
        try:
            await run.build()
            if config.resume or eval_only:
                run.load(config.checkpoint)
                await run.publish_llm()
            if eval_only:
                await run.evaluate()
                return run.summary()
            run.write_config()
            await run.loop(stop)
            return run.summary()
        finally:
            await run.close()


class Run:
    """One experiment: its parts, its counters and its stages. `build` first, `close` on every way
    out.

    Args:
        config: schedule and settings.
        folder: where everything of the run is written.
        eval_only: leave config.json, summary.json and the checkpoints as the training run wrote
            them.
    """

    def __init__(self, config: HybridTrainingConfig, folder: Path, eval_only: bool = False) -> None:
        self.config, self.cfg, self.folder, self.eval_only = (
            config,
            config.priorzero_cfg,
            folder,
            eval_only,
        )
        self.iteration, self.best_return = 0, -math.inf
        self.evaluations: list[dict[str, Any]] = []
        self.engine = self.trainer = self.llm_phase = self.prior = None
        self._open: list = []  # what close() has to end, newest last
        self._started = time.time()
        self._peak_memory = 0.0
        self._totals = {"segments": 0, "transitions": 0}
        self._saved: int | None = None
        self._reported: dict[str, float] = {}
        self._losses: dict[str, list[float]] = {}

    # ---- building --------------------------------------------------------------------------------

    async def build(self) -> None:
        """Make every part, cheapest check first, so that a wrong game or model fails before minutes
        are spent.
        """
        from priorzero.games.catalogue import resolve_game
        from priorzero.run.metrics import MetricsWriter, Stopwatch

        self.game = resolve_game(self.cfg.env.env_id, self.cfg.env.games_dir)
        self.watch = Stopwatch()
        self.metrics = MetricsWriter(self.folder / "log")
        self._open.append(self.metrics)
        await asyncio.to_thread(self._build_world_model)
        await self._build_llm()
        await asyncio.to_thread(self._build_players)
        parameters = sum(p.numel() for p in self.policy.network.parameters())
        device = self.compiled.policy.device
        logger.info(
            banner(
                self.config,
                self.folder,
                self.game,
                self.llm_name,
                device,
                parameters,
                ORZ_AVAILABLE,
            )
        )

    def write_config(self) -> None:
        """Keep the settings beside the run; only after a checkpoint was loaded, whose settings
        these may not be.
        """
        text = json.dumps(self.config.as_dict(), indent=1, default=str)
        (self.folder / "config.json").write_text(text, encoding="utf-8")
        self.metrics.text("config", f"```json\n{text}\n```", 0)

    def _build_world_model(self) -> None:
        from game_buffer_priorzero import PriorZeroGameBuffer
        from priorzero.compute import resolve_device
        from priorzero.lightzero import compile_priorzero
        from priorzero.quiet import quiet_base
        from priorzero.run.checkpoint import CheckpointStore
        from priorzero.text.encoder import SentenceEncoder
        from priorzero_policy import PriorZeroPolicy

        with quiet_base():
            from ding.utils import set_pkg_seed
        device = resolve_device(self.cfg.policy.device)
        set_pkg_seed(self.cfg.seed, use_cuda=device == "cuda")
        self.encoder = SentenceEncoder(
            self.cfg.text.encoder, device=device, cache_bytes=self.cfg.text.cache_mib * 2**20
        )
        self.compiled = compile_priorzero(
            self.cfg, self.config.priorzero_create_cfg, self.encoder.dim
        )
        self.policy = PriorZeroPolicy(self.compiled.policy)
        self.policy.attach_encoder(self.encoder.encode)
        self.buffer = PriorZeroGameBuffer(
            self.compiled.policy.settings, self.encoder.dim, self.cfg.seed
        )
        self.checkpoints = CheckpointStore(self.folder / "ckpt")

    async def _build_llm(self) -> None:
        if not self.cfg.llm.enable:
            self.llm_name = "none (pure UniZero)"
            return
        from priorzero.compute import resolve_device
        from priorzero.llm.build import build_llm
        from priorzero_prompts import ACTION_MARKER, PromptSettings, build_prompt

        llm, prompts = self.cfg.llm, PromptSettings(**self.cfg.llm.prompt.as_dict())

        def make_prompt(tokenizer):
            def prompt(state):
                parts = build_prompt(state, prompts, tokenizer)
                return parts.head, parts.body, bool(parts.truncation)

            return prompt

        device = (
            self.compiled.policy.device
            if llm.device == "auto"
            else resolve_device(llm.device, "llm.device")
        )
        parts = await build_llm(
            llm,
            device=device,
            reduction=self.cfg.policy.root_prior.reduction,
            seed=self.cfg.seed,
            marker=ACTION_MARKER,
            make_prompt=make_prompt,
        )
        self._open.append(parts.engine)
        self.engine, self.trainer, self.prior = parts.engine, parts.trainer, parts.prior
        self.llm_phase, self.llm_name = parts.phase, parts.name

    def _build_players(self) -> None:
        from functools import partial

        from ding.envs import get_vec_env_setting

        from priorzero.games.group import GameEnvGroup
        from priorzero.play.slot import HistoryWindow
        from priorzero_collector import PriorZeroCollector
        from priorzero_evaluator import PriorZeroEvaluator

        env_fn, collect_cfgs, eval_cfgs = get_vec_env_setting(self.compiled.env)
        self.collect_envs = GameEnvGroup(
            [partial(env_fn, cfg=c) for c in collect_cfgs], seed=self.cfg.seed
        )
        self._open.append(self.collect_envs)
        self.eval_envs = GameEnvGroup(
            [partial(env_fn, cfg=c) for c in eval_cfgs], seed=self.cfg.seed
        )
        self._open.append(self.eval_envs)
        history = HistoryWindow(self.cfg.llm.prompt.history_length)
        self.collector = PriorZeroCollector(
            self.compiled.policy,
            self.policy,
            self.collect_envs,
            self.encoder,
            self.prior,
            history,
            self.watch,
        )
        self.evaluator = PriorZeroEvaluator(
            self.policy,
            self.eval_envs,
            self.encoder,
            self.prior,
            history,
            self.cfg.policy.root_prior.reduction,
            self.folder / "transcripts" if self.cfg.eval.transcripts else None,
            self.cfg.seed,
            self.watch,
            self.cfg.eval.temperature,
            self.cfg.policy.context_steps,
        )

    # ---- the loop --------------------------------------------------------------------------------

    async def loop(self, stop) -> None:
        """Evaluate, collect, train, log and save until the iterations are done or a signal asks to
        stop.
        """
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        config = self.config
        with (
            logging_redirect_tqdm(),
            tqdm(
                total=config.iterations,
                initial=self.iteration,
                unit="iter",
                disable=not sys.stderr.isatty(),
            ) as bar,
        ):
            while self.iteration < config.iterations and not stop.requested:
                if config.eval_freq and self.iteration % config.eval_freq == 0:
                    await self.evaluate()
                if stop.requested:
                    break
                await self.iterate()
                self.iteration += 1
                bar.update()
                if (
                    config.save_freq
                    and self.iteration % config.save_freq == 0
                    and self.iteration < config.iterations
                ):
                    await asyncio.to_thread(self.save)
        if stop.requested:
            logger.info(
                "Stopped by a signal after iteration %d; continue with --resume", self.iteration
            )
        elif config.eval_freq:
            await self.evaluate()
        await asyncio.to_thread(self.save)

    async def iterate(self) -> None:
        """One iteration: collect, train what is due, log."""
        started = time.perf_counter()
        logger.info("[Iter %d] Collecting data...", self.iteration)
        with self.watch("collect"):
            result = await self.collector.collect(self.compiled.policy.num_segments)
        self.buffer.push_game_segments(result.segments)
        self.buffer.remove_oldest_data_to_fit()
        self._totals["segments"] += len(result.segments)
        self._totals["transitions"] += result.transitions
        logger.info(
            "✓ Collected %d segments (total: %d segments, %d transitions)",
            len(result.segments),
            self._totals["segments"],
            self._totals["transitions"],
        )
        self.metrics.scalars("collect", result.collect, self.collector.envstep)
        self.metrics.scalars("prior", result.prior, self.collector.envstep)
        wm = await self._train_world_model(result.transitions)
        llm = await self._train_llm()
        self._log_losses(wm, llm)
        self._sample_prompt(result.segments)
        self._perf(result.transitions, time.perf_counter() - started)

    async def _train_world_model(self, transitions: int) -> dict[str, float]:
        p = self.compiled.policy
        if (
            self.iteration % self.config.wm_train_freq
            or self.collector.envstep < p.train_start_after_envsteps
        ):
            return {}
        updates = math.ceil(p.replay_ratio * transitions * self.config.wm_train_freq)
        with self.watch("train_wm"):
            rows = await asyncio.to_thread(self._updates, updates)
        means = {name: sum(r[name] for r in rows) / len(rows) for name in rows[0]}
        return means | {"updates": float(len(rows))}

    def _updates(self, count: int) -> list[dict[str, float]]:
        rows = []
        for _ in range(count):
            batch = self.buffer.sample(self.compiled.policy.batch_size)
            output = self.policy.learn_mode.forward(batch)
            if self.compiled.policy.use_priority:
                self.buffer.update_priority(batch.indices, output.priorities)
            rows.append(output.metrics)
        return rows

    async def _train_llm(self) -> dict[str, float]:
        if self.llm_phase is None or (self.iteration + 1) % self.config.llm_train_freq:
            return {}
        with self.watch("train_llm"):
            return await self.llm_phase.run(self.buffer.sample_llm)

    def _log_losses(self, wm: dict[str, float], llm: dict[str, float]) -> None:
        step = self.collector.envstep
        parts = []
        if wm:
            self.metrics.scalars("wm", wm, step)
            parts.append(f"wm_loss: {wm['wm_loss']:.4f}")
        if llm:
            self.metrics.scalars("llm", llm, step)
            parts += [
                f"llm_{kind}_loss: {llm[f'{kind}_loss']:.4f}"
                for kind in ("sft", "rft")
                if f"{kind}_loss" in llm
            ]
        for name, value in (wm | llm).items():
            if name in ("wm_loss", "sft_loss", "rft_loss"):
                self._losses.setdefault(name, []).append(value)
        if parts:
            logger.info("✓ WM training done - %s", ", ".join(parts))

    def _perf(self, transitions: int, seconds: float) -> None:
        """Seconds per stage since the last call, speed, and cache hit rates of the run so far."""
        stages = {
            f"seconds_{k}": v - self._reported.get(k, 0.0) for k, v in self.watch.seconds.items()
        }
        self._reported = dict(self.watch.seconds)
        games = self.collect_envs.stats()
        lookups = games["state_hits"] + games["state_misses"]
        encoder = self.encoder.stats()
        asked = encoder["hits"] + encoder["misses"]
        perf = stages | {
            "seconds_iteration": seconds,
            "env_steps_per_second": transitions / seconds,
            "valid_action_hit_rate": games["state_hits"] / lookups if lookups else 1.0,
            "encoder_hit_rate": encoder["hits"] / asked if asked else 0.0,
            "positions_clamped": float(self.policy.positions_clamped),
            "memory_gb": self._memory(),
        }
        perf |= {f"games_{k}": float(v) for k, v in games.items()}
        perf |= {f"vocabulary_{k}": float(v) for k, v in self.policy.vocabulary.stats().items()}
        if self.prior is not None:
            perf |= {
                f"llm_{k}": v for k, v in (self.prior.stats() | self.llm_phase.stats()).items()
            }
        self.metrics.scalars("perf", perf, self.collector.envstep)
        self.metrics.flush()

    def _sample_prompt(self, segments: list) -> None:
        """One decision as text: the prompt, and the prior against the visit counts."""
        freq = self.config.sample_prompt_freq
        if self.prior is None or not freq or self.iteration % freq:
            return
        step = next(
            (
                s
                for segment in segments
                for s in segment.steps
                if s.scores and len(s.valid_actions) > 1
            ),
            None,
        )
        if step is None:
            return
        from priorzero.llm.prior import prior_table

        request = self.prior.request(step.state, step.valid_actions)
        table = prior_table(step, self.cfg.policy.root_prior.reduction)
        self.metrics.text(
            "prior/sample",
            f"```\n{request.head}{request.body}\n```\n\n{table}",
            self.collector.envstep,
        )

    # ---- evaluation ------------------------------------------------------------------------------

    async def evaluate(self) -> None:
        """Play evaluation episodes in every mode of the settings; keep the best checkpoint by the
        first mode with both.
        """
        step, row = (
            self.collector.envstep,
            {"iteration": self.iteration, "env_steps": self.collector.envstep},
        )
        with self.watch("evaluate"):
            for mode in self.cfg.eval.modes:
                episodes = self.cfg.env.n_evaluator_episode
                result = await self.evaluator.evaluate(
                    mode, episodes, step, f"iter{self.iteration:06d}"
                )
                values = result.metrics()
                self.metrics.scalars("eval", values, step)
                row[mode] = dict(returns=result.returns, lengths=result.lengths)
                logger.info(evaluation_line(self.iteration, mode, values))
        self.evaluations.append(row)
        self.metrics.flush()
        judged = "world_model_llm" if "world_model_llm" in row else self.cfg.eval.modes[0]
        mean = sum(row[judged]["returns"]) / len(row[judged]["returns"])
        # The untrained network's first evaluation is no checkpoint worth keeping.
        if self.iteration and not self.eval_only and mean > self.best_return:
            self.best_return = mean
            await asyncio.to_thread(self.save, True)

    # ---- checkpoints -----------------------------------------------------------------------------

    def save(self, best: bool = False) -> None:
        """Write a checkpoint of everything but the replay buffer."""
        if self._saved == self.iteration:  # the evaluation just before has written it
            return self.checkpoints.mark_best() if best else None
        with self.watch("save"):
            counters = {
                "iteration": self.iteration,
                "env_steps": self.collector.envstep,
                "best_return": self.best_return,
                **self._totals,
            }
            state = {
                "policy": self.policy.learn_mode.state_dict(),
                "counters": counters,
                "progress": {"evaluations": self.evaluations, "losses": self._losses},
            }
            llm = self.trainer.state_dict() if self.trainer is not None else None
            meta = counters | {
                "game": self.game.env_id,
                "encoder": self.cfg.text.encoder,
                "llm": self.llm_name,
            }
            path = self.checkpoints.save(self.iteration, state, llm, meta, best)
        self._saved = self.iteration
        logger.info("✓ Saved %s%s", path, " (best so far)" if best else "")

    def load(self, which: str) -> None:
        """Continue from a checkpoint; the replay buffer starts empty and is refilled by playing.

        Raises:
            PriorZeroError: there is none, it is damaged, or its network does not fit these
                settings.
        """
        state, llm, meta = self.checkpoints.load(which, self.compiled.policy.device)
        try:
            self.policy.learn_mode.load_state_dict(state["policy"])
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise PriorZeroError(
                f"the checkpoint's world model does not fit these settings (for example: {first}). Start it "
                f"with the settings in {self.folder / 'config.json'}"
            ) from error
        if self.trainer is not None and llm is not None:
            self.trainer.load_state_dict(llm)
        counters = state["counters"]
        self.iteration, self.best_return = counters["iteration"], counters["best_return"]
        self.collector.envstep = counters["env_steps"]
        self._totals = {k: counters[k] for k in self._totals}
        if not self.eval_only:  # the summary goes on where the run left off
            self.evaluations, self._losses = (
                state["progress"]["evaluations"],
                state["progress"]["losses"],
            )
        logger.info(
            "Resumed %s at iteration %d, %d environment steps; the replay buffer starts empty",
            meta["game"],
            self.iteration,
            self.collector.envstep,
        )

    async def publish_llm(self) -> None:
        """Bring the engine to the weights that were loaded."""
        if self.llm_phase is not None:
            await self.llm_phase.publish()

    # ---- the end ---------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Facts of the run; written to summary.json (evaluation.json with eval_only) and to the
        log.
        """
        first, last = first_and_last(self._losses)
        result = {
            "experiment": str(self.folder),
            "game": self.game.env_id,
            "seed": self.cfg.seed,
            "iterations": self.iteration,
            "env_steps": self.collector.envstep,
            "minutes": (time.time() - self._started) / 60,
            "memory_gb": self._memory(),
            "first_losses": first,
            "last_losses": last,
            "seconds_per_stage": {k: round(v, 2) for k, v in self.watch.seconds.items()},
            "llm": self.llm_name,
            "evaluations": self.evaluations,
        }
        path = self.folder / ("evaluation.json" if self.eval_only else "summary.json")
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")
        losses = ", ".join(f"{k} {first[k]:.4f} → {last[k]:.4f}" for k in last)
        logger.info(
            "Done: %d iterations, %d environment steps in %.1f minutes, %.1f GB at most. %s",
            self.iteration,
            self.collector.envstep,
            result["minutes"],
            result["memory_gb"],
            losses,
        )
        return result

    def _memory(self) -> float:
        """Most memory seen so far, in GiB; sampled once an iteration."""
        from priorzero.run.metrics import memory_gb

        self._peak_memory = max(self._peak_memory, memory_gb())
        return self._peak_memory

    async def close(self) -> None:
        """End engine, interpreters and writers, newest first; a failure to close one does not keep
        the others open.
        """
        while self._open:
            part = self._open.pop()
            try:
                outcome = part.close()
                if asyncio.iscoroutine(outcome):
                    await outcome
            except Exception:  # of any kind: it must neither keep the other parts open nor replace the run's own outcome
                logger.exception(
                    "closing %s failed; the rest is closed all the same", type(part).__name__
                )


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; see `priorzero.run.cli`."""
    return option_parser(__doc__.splitlines()[0], list(PRESETS)).parse_args(arguments)


def config_from(args: argparse.Namespace, debug_mode: bool) -> HybridTrainingConfig:
    """The configuration a command line asks for.

    Raises:
        PriorZeroError: an unknown or impossible setting.
    """
    from priorzero.settings.record import merge

    layers = [parse_assignment(a) for a in args.assignments]
    for path, value in (
        ("llm.model", args.llm),
        ("llm.engine", args.engine),
        ("text.encoder", args.encoder),
        ("policy.device", args.device),
        ("llm.required", args.llm_required or None),
    ):
        if value is not None:
            layers.append(parse_assignment(f"{path}={json.dumps(value)}"))
    names = ("iterations", "eval_freq", "save_freq", "wm_train_freq", "llm_train_freq")
    schedule = {name: getattr(args, name) for name in names if getattr(args, name) is not None} | {
        "resume": args.resume
    }
    return HybridTrainingConfig(
        env_id=args.env_id,
        seed=args.seed,
        exp_name=args.exp_name,
        enable_llm=not args.no_llm,
        enable_rft=args.rft,
        debug_mode=debug_mode,
        presets=tuple(args.preset),
        overrides=merge(*layers),
        checkpoint=args.checkpoint,
        **schedule,
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status (0 also after SIGINT or SIGTERM, 2 for a fault the user
    can mend).
    """
    calm_openmp()
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    debug_mode = os.environ.get("DEBUG_MODE", "").lower() in ("1", "true", "yes")
    setup_logging(None)
    try:
        config = config_from(args, debug_mode)
        folder = Path(config.priorzero_cfg.exp_name)
        if not (config.resume or args.eval_only):
            set_aside(folder)  # before this run's log is opened in it
        setup_logging(folder / "log")
        asyncio.run(train_priorzero_orz(config, args.eval_only))
    except PriorZeroError as error:
        logger.error("Error: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
