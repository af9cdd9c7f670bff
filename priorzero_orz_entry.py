"""Train PriorZero from the command line: build the parts, run the loop, tell what came of it.

    python -m priorzero_orz_entry --env-id detective.z5 --iterations 500
    DEBUG_MODE=True python -m priorzero_orz_entry

The loop itself is `priorzero/loop/train.py`. Another program calls `train_priorzero_orz(config)`,
or `build(config)` where it wants the parts.

Processes that vLLM starts import this module again as `__main__`. So the top of the file imports
what is light; what loads torch is imported inside `build` and the functions that make single parts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from priorzero.export import trained_llm
from priorzero.games.catalogue import resolve_games
from priorzero.orz import ORZ_AVAILABLE, orz_status  # noqa: F401 (users look for it here)
from priorzero.quiet import quiet_base
from priorzero.ranks import ALONE, LostRank, Ranks, join, leave
from priorzero.ray_link import ray_missing
from priorzero.run.cli import calm_openmp, option_parser
from priorzero.run.data_parallel import CommonStop, own_settings, require_possible
from priorzero.run.experiment import set_aside
from priorzero.run.logs import setup_logging
from priorzero.run.report import banner
from priorzero.run.signals import StopRequest
from priorzero.settings.env import one_or_several, plain_name, split_games
from priorzero.settings.record import merge, parse_assignment
from priorzero.types import PriorZeroError
from priorzero_config import PRESETS, SCHEDULE, HybridTrainingConfig

if TYPE_CHECKING:
    from easydict import EasyDict

    from priorzero.collectors.messages import Share
    from priorzero.collectors.remote import RemoteCollector
    from priorzero.collectors.worker import WorkerParts
    from priorzero.decisions.recorder import Recorder
    from priorzero.games.group import GameEnvGroup
    from priorzero.games.records import GameSpec
    from priorzero.llm.build import LLMParts
    from priorzero.llm.prior import LLMPrior
    from priorzero.loop.parts import Parts
    from priorzero.run.metrics import MetricsWriter, NoMetrics, Stopwatch
    from priorzero.settings.experiment import ExperimentSettings
    from priorzero.text.encoder import SentenceEncoder
    from priorzero_collector import PriorZeroCollector
    from priorzero_evaluator import PriorZeroEvaluator
    from priorzero_policy import PriorZeroPolicy

logger = logging.getLogger("priorzero_orz_entry")


async def train_priorzero_orz(
    config: HybridTrainingConfig, eval_only: bool = False, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Run the whole experiment; returns its summary (also written to `<exp>/summary.json`).

    Args:
        config: checked again here, so attributes may have been overwritten since its construction.
        eval_only: load the checkpoint, evaluate once, and stop.
        ranks: the processes of a data-parallel run, which all call this; the first returns the
            summary, the others nothing.

    Raises:
        PriorZeroError: a fault the user can mend, before anything is lost.
    """
    with ranks.in_order():
        config.validate()
        if ranks.several:
            require_possible(config, eval_only)
        if ranks.first and not (config.resume or eval_only):
            set_aside(Path(config.priorzero_cfg.exp_name))

    with StopRequest() as asked:
        stop = CommonStop(asked, ranks) if ranks.several else asked
        async with await build(config, eval_only, ranks) as parts:
            from priorzero.loop import reporting, saving, stages
            from priorzero.loop.train import train

            if config.resume or eval_only:
                await saving.load(parts, config.checkpoint)

            if eval_only:
                await stages.evaluate(parts)
            else:
                if ranks.first:
                    reporting.write_config(parts)
                await train(parts, stop)

            summary = reporting.write_summary(parts) if ranks.first else {}
            saving.require_saved(parts)

    settings = config.priorzero_cfg
    if settings.decisions.page and ranks.first and not eval_only:
        _leave_page(Path(settings.exp_name), settings.decisions.page_mib)  # records are closed now
    return summary


def _leave_page(folder: Path, most_mib: int) -> None:
    """Write the run's page, if its records are at most `most_mib`. A run that recorded nothing, or
    a full disk, costs the page alone.
    """
    from priorzero.decisions.reader import recorded_mib
    from priorzero.view import PAGE, write_page

    recorded = recorded_mib(folder)
    if recorded > most_mib:
        logger.info(
            "There is no page of this run yet: its records are %.1f MiB, more than "
            "decisions.page_mib (%d), and take many times as much memory when it is made; "
            "python -m priorzero.view %s makes it",
            recorded,
            most_mib,
            folder,
        )
        return
    try:
        write_page([folder], folder / PAGE)
    except PriorZeroError as error:
        logger.warning("there is no page of this run: %s", error)
        return
    logger.info("✓ Wrote %s: the run's decisions, to be opened in a browser", folder / PAGE)


async def build(
    config: HybridTrainingConfig, eval_only: bool = False, ranks: Ranks = ALONE
) -> Parts:
    """Make every part of a run, cheapest check first, so that a wrong game or model fails before
    minutes are spent.

    Args:
        config: schedule and settings.
        eval_only: leave the training run's config, summary and checkpoints as they are.
        ranks: the processes of a data-parallel run, which all build.

    Returns:
        the parts; `close` them, or use them in `async with`. A build that fails closes what it
        opened.

    Raises:
        PriorZeroError: the game or a model cannot be had, or a required engine does not start.
    """
    settings, folder = config.priorzero_cfg, Path(config.priorzero_cfg.exp_name)
    workers = 0 if eval_only else config.collector_workers
    if workers and (missing := ray_missing()):
        raise PriorZeroError(f"collector_workers is {workers}, and {missing}")
    seed, settings = settings.seed, own_settings(settings, ranks)
    own_folder = folder if ranks.first else folder / "ranks" / str(ranks.rank)
    # Before the imports: a wrong name should not cost the seconds they take.
    not_orz = config.settle_trainer(eval_only)
    games, eval_games = _games_of(settings)

    with quiet_base():
        from ding.utils import set_pkg_seed
    from game_buffer_priorzero import PriorZeroGameBuffer
    from priorzero.compute import resolve_device
    from priorzero.data.archive import SegmentArchive
    from priorzero.lightzero import compile_priorzero
    from priorzero.loop.parts import Parts
    from priorzero.run.checkpoint import CheckpointStore
    from priorzero.run.metrics import Stopwatch
    from priorzero_policy import PriorZeroPolicy

    async with AsyncExitStack() as opened:
        watch = Stopwatch()
        metrics = _closed_with(opened, _metrics(settings, folder, ranks))

        # The world model.
        device = resolve_device(settings.policy.device)
        set_pkg_seed(seed, use_cuda=device == "cuda")
        encoder = await asyncio.to_thread(_encoder, settings, device)
        compiled = compile_priorzero(settings, config.priorzero_create_cfg, encoder.dim)
        policy = await asyncio.to_thread(PriorZeroPolicy, compiled.policy)
        policy.attach_encoder(encoder.encode)
        if ranks.several:
            policy.train_with(ranks)
            # One network from here on; dropout is each process's own.
            set_pkg_seed(settings.seed, use_cuda=device == "cuda")
        buffer = PriorZeroGameBuffer(settings.policy, encoder.dim, settings.seed)

        # Before ORZ's trainer, which would end a cluster that it joined with its own failure.
        if workers:
            await _join_ray(config, opened)

        # The LLM: trainer, engine, prior and training phase.
        llm = await _build_llm(settings, device, opened, own_folder)
        if llm is not None and settings.llm.trainer == "orz":
            from priorzero.ray_link import keep_signals

            keep_signals()

        # The players, each with environments of its own, which begin with the first game.
        collect_envs = None
        if not workers:
            collect_envs = _closed_with(opened, _collect_envs(settings, compiled, games))
        eval_envs = _closed_with(opened, _eval_envs(settings, compiled, eval_games))
        recorder = _closed_with(opened, _recorder(settings, folder, llm, again=eval_only))
        prior = llm.prior if llm is not None else None
        shared = _Shared(settings, policy, encoder, prior, watch, recorder)
        if workers:
            collector = await _remote_collector(config, games, policy, encoder, llm, watch, opened)
        else:
            collector = _collector(shared, collect_envs)
        evaluator = _evaluator(shared, eval_envs, folder, games, eval_games)

        parts = Parts(
            config=config,
            settings=settings,
            folder=folder,
            eval_only=eval_only,
            device=device,
            games=games,
            eval_games=eval_games,
            encoder=encoder,
            policy=policy,
            buffer=buffer,
            llm=llm,
            collect_envs=collect_envs,
            collector=collector,
            evaluator=evaluator,
            recorder=recorder,
            metrics=metrics,
            watch=watch,
            checkpoints=CheckpointStore(own_folder / "ckpt"),
            archive=SegmentArchive(own_folder / "replay", settings.policy.replay_save_mib * 2**20),
            ranks=ranks,
            closing=opened,
        )
        _tell(parts, not_orz)
        parts.closing = opened.pop_all()
        return parts


async def build_worker(plan: Mapping[str, Any], share: Share) -> WorkerParts:
    """The parts of a collector worker (`priorzero/collectors/worker.py`), in its process.

    Args:
        plan: `settings` and `create` of the run, see `_worker_plan`.
        share: of the environments.

    Raises:
        PriorZeroError: a game or a model cannot be had on this machine.
    """
    with quiet_base():
        from ding.utils import set_pkg_seed
    from priorzero.collectors.worker import WorkerParts
    from priorzero.compute import resolve_device
    from priorzero.lightzero import compile_priorzero
    from priorzero.run.metrics import Stopwatch
    from priorzero_policy import PriorZeroPolicy

    settings = share.settings(plan["settings"])
    games = resolve_games(settings.env.env_id, settings.env.games_dir)
    async with AsyncExitStack() as opened:
        device = resolve_device(settings.policy.device)
        set_pkg_seed(settings.seed, use_cuda=device == "cuda")
        encoder = _encoder(settings, device)
        compiled = compile_priorzero(settings, plan["create"], encoder.dim)
        policy = PriorZeroPolicy(compiled.policy)
        policy.attach_encoder(encoder.encode)
        policy = policy.snapshot()  # which cannot learn, and needs no optimiser

        llm = await _build_llm(settings, device, opened)
        envs = _closed_with(opened, _collect_envs(settings, compiled, games, share))

        watch = Stopwatch()
        prior = llm.prior if llm is not None else None
        collector = _collector(_Shared(settings, policy, encoder, prior, watch), envs)
        return WorkerParts(collector, policy, llm, watch, opened.pop_all())


# ---- the parts, one by one -----------------------------------------------------------------------


def _games_of(settings: ExperimentSettings) -> tuple[tuple[GameSpec, ...], tuple[GameSpec, ...]]:
    """The games that are trained on, and those that are evaluated."""
    env = settings.env
    games = resolve_games(env.env_id, env.games_dir)
    if env.eval_env_id is None:
        return games, games
    return games, resolve_games(env.eval_env_id, env.games_dir)


def _metrics(settings: ExperimentSettings, folder: Path, ranks: Ranks) -> MetricsWriter | NoMetrics:
    """Where the numbers go; only the first of several processes writes them."""
    from priorzero.run.boards.wandb import open_wandb
    from priorzero.run.metrics import MetricsWriter, NoMetrics

    if not ranks.first:
        return NoMetrics()
    return MetricsWriter(folder / "log", open_wandb(folder, settings.metrics))


def _encoder(settings: ExperimentSettings, device: str) -> SentenceEncoder:
    """The frozen encoder of observations and actions."""
    from priorzero.text.encoder import SentenceEncoder

    return SentenceEncoder(
        settings.text.encoder, device=device, cache_bytes=settings.text.cache_mib * 2**20
    )


def _recorder(
    settings: ExperimentSettings, folder: Path, llm: LLMParts | None, again: bool
) -> Recorder:
    """Who writes decisions down.

    Args:
        folder: of the run.
        again: an evaluation of a run that is over.
    """
    from priorzero.decisions.recorder import Recorder

    return Recorder(
        folder / "decisions",
        settings.decisions,
        reduction=settings.policy.root_prior.reduction,
        decode=llm.engine.tokeniser.decode if llm is not None else None,
        again=again,
    )


def _tell(parts: Parts, not_orz: str) -> None:
    """Log what is about to run.

    Args:
        not_orz: why ORZ's trainer does not train; empty where it does.
    """
    text = banner(
        parts.config,
        folder=parts.folder,
        games=parts.games,
        eval_games=parts.eval_games,
        llm=parts.llm_name,
        device=parts.device,
        parameters=sum(p.numel() for p in parts.policy.network.parameters()),
        orz=orz_status(),
        not_orz=not_orz,
        warning=parts.llm_warning,
        processes=parts.ranks.size,
    )
    logger.info(text)


async def _join_ray(config: HybridTrainingConfig, opened: AsyncExitStack) -> None:
    """Bring this process into the run's Ray cluster, until `opened` is closed."""
    from priorzero.ray_link import connect, disconnect, keep_signals

    settings = config.priorzero_cfg.collectors
    ours = await asyncio.to_thread(
        connect,
        config.cluster,
        cpus=math.ceil(config.collector_workers * settings.worker_cpus),
        gpus=None if settings.worker_gpus else 0,
    )
    keep_signals()
    if ours:
        opened.callback(disconnect)


def _worker_plan(config: HybridTrainingConfig, games: Sequence[GameSpec]) -> dict[str, Any]:
    """What `build_worker` is given. What settings leave to the machine is said as it was found
    here: another machine may have other games and models.
    """
    from priorzero.llm.model import resolve_llm

    settings = config.priorzero_cfg.as_dict()
    if len(games) > 1 or settings["env"]["env_id"] == "auto":
        settings["env"]["env_id"] = one_or_several([game.env_id for game in games])
    if settings["llm"]["enable"] and settings["llm"]["model"] == "auto":
        found = resolve_llm("auto")
        settings["llm"]["model"] = "embedded" if found.source == "embedded" else found.path
    return {"settings": settings, "create": config.priorzero_create_cfg}


async def _remote_collector(
    config: HybridTrainingConfig,
    games: Sequence[GameSpec],
    policy: PriorZeroPolicy,
    encoder: SentenceEncoder,
    llm: LLMParts | None,
    watch: Stopwatch,
    opened: AsyncExitStack,
) -> RemoteCollector:
    """The collector of a run with workers, which have started; those of a resumed run start once
    it is known what has been played. Closed with `opened`.
    """
    from priorzero.collectors.remote import RemoteCollector

    settings = config.priorzero_cfg
    if settings.decisions.collect_share:
        logger.info(
            "Decisions of training episodes are not recorded: they are taken in workers (those of "
            "evaluations are, where decisions.evaluation is set)"
        )
    collector = RemoteCollector(
        settings.collectors,
        "priorzero_orz_entry:build_worker",
        await asyncio.to_thread(_worker_plan, config, games),
        workers=config.collector_workers,
        environments=settings.env.collector_env_num,
        policy=policy,
        encoder=encoder,
        llm=llm,
        seed=settings.seed,
        watch=watch,
        several_games=settings.env.several,
    )
    _closed_with(opened, collector)
    if not config.resume:
        await collector.start()
    return collector


@dataclass(frozen=True)
class _Shared:
    """What collector and evaluator both play with; the prior is None without an LLM."""

    settings: ExperimentSettings
    policy: PriorZeroPolicy
    encoder: SentenceEncoder
    prior: LLMPrior | None
    watch: Stopwatch
    recorder: Recorder | None = None


def _collector(shared: _Shared, envs: GameEnvGroup) -> PriorZeroCollector:
    """A collector in this process."""
    from priorzero_collector import PriorZeroCollector

    settings = shared.settings
    return PriorZeroCollector(
        settings.policy,
        shared.policy,
        envs,
        shared.encoder,
        shared.prior,
        history_length=settings.llm.prompt.history_length,
        seed=settings.seed,
        llm_target_prior=settings.llm.sft.target_prior,
        watch=shared.watch,
        recorder=shared.recorder,
        several_games=settings.env.several,
    )


def _evaluator(
    shared: _Shared,
    envs: GameEnvGroup,
    folder: Path,
    games: Sequence[GameSpec],
    eval_games: Sequence[GameSpec],
) -> PriorZeroEvaluator:
    """The evaluator of a run.

    Args:
        folder: of the run.
        games: that are trained on, by which checkpoints are judged. eval_games: that are played.
    """
    from priorzero_evaluator import PriorZeroEvaluator

    settings = shared.settings
    trained_on = {plain_name(g.env_id) for g in eval_games if g in games}
    if not trained_on:
        logger.warning(
            "env.eval_env_id %s names no game that is trained on: no checkpoint will be marked "
            "as the best, and --checkpoint best finds none",
            settings.env.eval_env_id,
        )
    return PriorZeroEvaluator(
        settings.policy,
        shared.policy,
        envs,
        shared.encoder,
        shared.prior,
        history_length=settings.llm.prompt.history_length,
        seed=settings.seed,
        temperature=settings.eval.temperature,
        transcripts=folder / "transcripts" if settings.eval.transcripts else None,
        watch=shared.watch,
        recorder=shared.recorder,
        games=eval_games if settings.env.several or eval_games != games else None,
        judged_by=trained_on,
        several_games=settings.env.several,
    )


def _collect_envs(
    settings: ExperimentSettings,
    compiled: EasyDict,
    games: Sequence[GameSpec],
    share: Share | None = None,
) -> GameEnvGroup:
    """The training environments, which begin with the first game.

    Args:
        share: a worker's; None: all of them.
    """
    with quiet_base():
        from ding.envs import get_vec_env_setting
    from priorzero.games.group import GameEnvGroup
    from priorzero.games.rota import Rota

    make_env, cfgs, _ = get_vec_env_setting(compiled.env, eval_=False)
    seed, first, rota = settings.seed, 0, None
    if share is not None:
        seed, first = share.seed, share.place
    if len(games) > 1:
        rota = Rota(games, len(cfgs), weights=settings.env.game_weights, seed=seed)
    if share is not None:
        cfgs = cfgs[share.first : share.first + share.environments]
    for cfg in cfgs:
        cfg.env_id = games[0].env_id
    return GameEnvGroup([partial(make_env, cfg=cfg) for cfg in cfgs], seed, rota, first)


def _eval_envs(
    settings: ExperimentSettings, compiled: EasyDict, games: Sequence[GameSpec]
) -> GameEnvGroup:
    """The environments of the evaluation."""
    with quiet_base():
        from ding.envs import get_vec_env_setting
    from priorzero.games.group import GameEnvGroup

    make_env, _, cfgs = get_vec_env_setting(compiled.env, collect=False)
    for cfg in cfgs:
        cfg.env_id = games[0].env_id
    return GameEnvGroup([partial(make_env, cfg=cfg) for cfg in cfgs], seed=settings.seed)


async def _build_llm(
    settings: ExperimentSettings, device: str, opened: AsyncExitStack, folder: Path | None = None
) -> LLMParts | None:
    """The LLM's parts, closed with `opened`; None without one.

    Args:
        device: of the world model.
        folder: of the run; None in a worker.
    """
    if not settings.llm.enable:
        return None
    from priorzero.compute import resolve_device
    from priorzero.llm.build import build_llm
    from priorzero_prompts import ACTION_MARKER, prompt_builder

    chosen = settings.llm.device
    llm = await build_llm(
        settings.llm,
        device=device if chosen == "auto" else resolve_device(chosen, "llm.device"),
        reduction=settings.policy.root_prior.reduction,
        seed=settings.seed,
        marker=ACTION_MARKER,
        make_prompt=partial(prompt_builder, settings.llm.prompt),
        folder=folder,
    )
    _closed_with(opened, llm.trainer)
    _closed_with(opened, llm.engine)
    return llm


Closable = TypeVar("Closable")


def _closed_with(opened: AsyncExitStack, part: Closable) -> Closable:
    """The part, which `_close` closes with `opened`."""
    opened.push_async_callback(_close, part)
    return part


async def _close(part: Any) -> None:
    """Close one part of a run; a fault is logged and goes no further."""
    try:
        outcome = part.close()
        if asyncio.iscoroutine(outcome):
            await outcome
    except Exception:  # of any kind: it must neither keep other parts open nor hide the run's own
        logger.exception("closing %s failed; the rest is closed all the same", type(part).__name__)


# ---- command line --------------------------------------------------------------------------------


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; see `priorzero.run.cli`."""
    return option_parser(__doc__.splitlines()[0], list(PRESETS)).parse_args(arguments)


def config_from(args: argparse.Namespace, debug_mode: bool) -> HybridTrainingConfig:
    """The configuration a command line asks for.

    Raises:
        PriorZeroError: an unknown or impossible setting.
    """
    if args.llm_from is not None and (args.llm is not None or args.no_llm):
        raise PriorZeroError("--llm-from names the LLM; leave out --llm and --no-llm")
    layers = [parse_assignment(a) for a in args.assignments]
    for path, value in (
        ("llm.model", args.llm),
        ("llm.engine", args.engine),
        ("text.encoder", args.encoder),
        ("policy.device", args.device),
        ("llm.required", args.llm_required or None),
        ("metrics.wandb", args.wandb),
        ("env.eval_env_id", args.eval_env_id and _games(args.eval_env_id)),
    ):
        if value is not None:
            layers.append(parse_assignment(f"{path}={json.dumps(value)}"))

    # Options that have the name of an attribute of the schedule; None: not given.
    given = {name: getattr(args, name, None) for name in SCHEDULE}
    schedule = {name: value for name, value in given.items() if value is not None}

    return HybridTrainingConfig(
        env_id=_games(args.env_id),
        seed=args.seed,
        exp_name=args.exp_name,
        enable_llm=not args.no_llm,
        enable_rft=args.rft,
        debug_mode=debug_mode,
        presets=tuple(args.preset),
        overrides=merge(*layers),
        **schedule,
    )


def _games(words: list[str]) -> str | list[str]:
    """Games as `--env-id` has them: words, each of which may name several."""
    return one_or_several([game for word in words for game in split_games(word)])


async def main(arguments: list[str] | None = None) -> int:
    """The command line's run.

    Returns:
        the exit status: 0 also after SIGINT or SIGTERM, 2 for a fault the user can mend.
    """
    calm_openmp()
    setup_logging(None)
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    debug_mode = os.environ.get("DEBUG_MODE", "").lower() in ("1", "true", "yes")

    ranks = ALONE
    try:
        ranks = join()
        if not ranks.first:
            setup_logging(None, logging.WARNING, f"[rank {ranks.rank}] ")

        with ranks.in_order():
            config = config_from(args, debug_mode)
            if args.llm_from is not None:
                config.priorzero_cfg.llm.model = str(trained_llm(Path(args.llm_from)))
            folder = Path(config.priorzero_cfg.exp_name)
            if ranks.first:
                if not (config.resume or args.eval_only):
                    set_aside(folder)  # before this run's log is opened in it
                setup_logging(folder / "log")

        await train_priorzero_orz(config, args.eval_only, ranks)
        leave(ranks)

    except LostRank as lost:
        logger.info("This process stops: %s", lost)
        return 1
    except PriorZeroError as error:
        logger.error("Error: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
