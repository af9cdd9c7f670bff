"""One recorded decision again, from the run's checkpoint, beside what was recorded.

    python -m priorzero.replan RUN --episode 3 --step 37 --prior off --simulations 200

The checkpoint's network searches from the recorded state, without noise, as an evaluation does.
Episodes are counted as on the page of priorzero.view; their names are taken too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from priorzero.run.cli import calm_openmp
from priorzero.run.logs import setup_logging
from priorzero.say import say
from priorzero.settings.env import plain_name
from priorzero.settings.record import parse_assignment
from priorzero.types import HistoryItem, PriorZeroError, TextState, world_text

if TYPE_CHECKING:
    import numpy as np

    from priorzero.agent.load import Checkpoint
    from priorzero.decisions.reader import RecordedEpisode

logger = logging.getLogger("priorzero.replan")  # also where this module is __main__

SERIES = ("llm", "world_model", "mixture", "visits", "improved")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.replan", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="an experiment's folder")
    parser.add_argument("--episode", required=True, help="number or name of a recorded episode")
    parser.add_argument("--step", type=int, required=True, help="its decision, from 0")
    parser.add_argument(
        "--prior",
        choices=["recorded", "ask", "off"],
        default="recorded",
        help="the LLM's recorded log-probabilities; asking the checkpoint's LLM; without an LLM",
    )
    parser.add_argument("--simulations", type=int, help="of the search; default: as the run's")
    parser.add_argument(
        "--checkpoint", default="latest", help="latest, best or a checkpoint folder's name"
    )
    parser.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="GROUP.SETTING=VALUE",
        help="another setting, such as policy.root_policy=gumbel; may be given several times",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write both there, with trees")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Replanned:
    """A decision as it was recorded, and as it was planned again.

    Attributes:
        episode: its name.
        step: number of the decision.
        checkpoint: name of the checkpoint that planned again.
        facts: of that checkpoint: iteration, env_steps.
        recorded: the record; docs/DECISIONS.md tells its fields.
        again: the same fields of the new search.
    """

    episode: str
    step: int
    checkpoint: str
    facts: Mapping[str, Any]
    recorded: Mapping[str, Any]
    again: Mapping[str, Any]


async def replan(
    run: Path,
    episode: str,
    step: int,
    *,
    prior: str,
    checkpoint: str,
    layers: Sequence[Mapping[str, Any]] = (),
) -> Replanned:
    """Plan one recorded decision again.

    Args:
        run: The experiment's folder.
        episode: Number or name of the episode.
        step: Of the decision.
        prior: recorded, ask or off, as the command line says.
        checkpoint: latest, best or a checkpoint folder's name.
        layers: Settings laid over the run's.

    Raises:
        PriorZeroError: There is no such decision or checkpoint, or the LLM cannot be had.
    """
    # These load torch, which should not delay --help or a wrong option.
    from priorzero.agent.load import make_agent, read_checkpoint, read_settings
    from priorzero.decisions.reader import find_episode, read_episodes
    from priorzero.decisions.record import search_fields
    from priorzero.search.roots import Root

    settings = read_settings(run, *layers)
    found = find_episode(read_episodes(run), episode)
    if not 0 <= step < len(found.steps):
        raise PriorZeroError(
            f"episode {found.name} has no decision {step}; its decisions are 0 to "
            f"{len(found.steps) - 1}"
        )
    record = found.steps[step]
    saved = read_checkpoint(run, checkpoint, settings)
    agent = make_agent(saved)

    # The root looks back on as many real steps as it did then.
    past = found.steps[max(step + 1 - settings.policy.context_steps, 0) : step + 1]
    game = plain_name(record["game"]) if settings.env.several else ""
    observations = agent.encode([world_text(one["text"], game) for one in past])
    actions = [agent.ids(one["commands"])[one["chosen"]] for one in past[:-1]]
    valid_ids = agent.ids(record["commands"])
    if None in valid_ids:
        raise PriorZeroError(
            "the vocabulary is full and drops commands of this state; raise "
            "policy.action_vocabulary.capacity in the run"
        )

    llm = await _llm(prior, found, step, saved)
    root = Root(observations, _integers(actions), _integers(valid_ids), llm)
    plan = agent.plan(root, record["env_steps"], use_llm=llm is not None)
    again = search_fields(plan, agent.tree_commands(plan, root.valid_ids, record["commands"]))
    again["chosen"] = plan.action_index
    if llm is not None:
        again |= {"llm_logprobs": llm.tolist(), "llm": _shares(plan.prior.log_llm)}
    return Replanned(found.name, step, saved.name, _facts(saved), record, again)


async def _llm(
    prior: str, episode: RecordedEpisode, step: int, saved: Checkpoint
) -> np.ndarray | None:
    """`[A]` log-probabilities of the commands; None without an LLM."""
    import numpy as np

    from priorzero.agent.load import make_prior

    record = episode.steps[step]
    if prior == "off":
        return None
    if prior == "recorded":
        known = record.get("llm_logprobs")
        if known is None:
            logger.warning("no LLM was asked when this was recorded: the search is without one")
        return None if known is None else np.asarray(known, dtype=np.float64)

    llm = make_prior(saved)
    try:
        state = state_of(episode, step, saved.settings.llm.prompt.history_length)
        (answer,) = await llm.ask(llm.requests([state], [record["commands"]]))
    finally:
        await llm.engine.close()
    return np.asarray(answer.totals(saved.settings.policy.root_prior.reduction))


def state_of(episode: RecordedEpisode, step: int, history_length: int) -> TextState:
    """What the LLM may know of a recorded state. Commands that a full vocabulary had dropped are
    not in the record, nor in this state.
    """
    record = episode.steps[step]
    past = episode.steps[max(step - history_length, 0) : step]
    history = tuple(
        HistoryItem(one["text"], one["commands"][one["chosen"]], one["reward"]) for one in past
    )
    return TextState(
        record["text"], tuple(record["commands"]), history, record["goal"], record["score"]
    )


def _integers(values: Sequence[int]) -> np.ndarray:
    import numpy as np

    return np.asarray(values, dtype=np.int64)


def _shares(logs: np.ndarray) -> list[float]:
    import numpy as np

    return np.round(np.exp(logs), 5).tolist()


def _facts(saved: Checkpoint) -> dict[str, Any]:
    return {name: saved.meta.get(name) for name in ("iteration", "env_steps", "llm_version")}


# ---- telling -------------------------------------------------------------------------------------


def table(replanned: Replanned) -> str:
    """Both as text: a line per command with percentages, recorded | again; ▶ was played, or would
    be.
    """
    old, new = replanned.recorded, replanned.again
    commands = old["commands"]
    width = max(map(len, [*commands, "command"]))
    heads = {"llm": "LLM", "world_model": "model"} | {n: n for n in SERIES[2:]}

    def row(record: Mapping[str, Any], at: int) -> str:
        played = "▶" if record["chosen"] == at else " "
        return played + "".join(f"{_percent(record, name, at):>9}" for name in SERIES)

    lines = [
        f"{replanned.episode}, decision {replanned.step}, after {old['env_steps']} environment "
        f"steps; again: {replanned.checkpoint}, after {replanned.facts['env_steps']}",
        "",
        old["text"],
        "",
        f"{'':{width}}  {'recorded':^46}  {'again':^46}",
        f"{'command':{width}}  " + "  ".join([" " + "".join(f"{heads[n]:>9}" for n in SERIES)] * 2),
    ]
    order = sorted(range(len(commands)), key=lambda at: -new["improved"][at])
    lines += [f"{commands[at]:{width}}  {row(old, at)}  {row(new, at)}" for at in order]
    lines += [
        "",
        f"played {commands[old['chosen']]!r}; again {commands[new['chosen']]!r}",
        f"value before and after the search: recorded {_value(old)}; again {_value(new)}",
        f"simulations: recorded {_simulations(old)}; again {_simulations(new)}; "
        f"the LLM's share: recorded {old.get('llm_share', '–')}; again {new['llm_share']}",
    ]
    if old["source"] == "collect":
        lines.append("(recorded in training, with noise at the root; again without)")
    return "\n".join(lines) + "\n"


def _percent(record: Mapping[str, Any], name: str, at: int) -> str:
    if name not in record:
        return "–"
    scale = sum(record[name]) if name == "visits" else 1.0
    return f"{100 * record[name][at] / scale:.1f}"


def _value(record: Mapping[str, Any]) -> str:
    if "value" not in record:
        return "–"
    return f"{record['predicted_value']:.3f}, {record['value']:.3f}"


def _simulations(record: Mapping[str, Any]) -> str:
    return f"{sum(record['visits']):g}" if "visits" in record else "–"


def write_json(path: Path, replanned: Replanned) -> None:
    """Both, with their trees.

    Raises:
        PriorZeroError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(vars(replanned), indent=1), encoding="utf-8")
    except OSError as error:
        raise PriorZeroError(f"{path} could not be written ({error})") from error


def main(arguments: list[str] | None = None) -> int:
    """The command.

    Returns:
        The exit status: 0, or 2 for a fault the user can mend.
    """
    calm_openmp()
    setup_logging(None)
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        layers = [parse_assignment(one) for one in args.assignments]
        if args.simulations is not None:
            layers.append({"policy": {"num_simulations": args.simulations}})
        replanned = asyncio.run(
            replan(
                args.run,
                args.episode,
                args.step,
                prior=args.prior,
                checkpoint=args.checkpoint,
                layers=layers,
            )
        )
        if args.json is not None:
            write_json(args.json, replanned)
    except PriorZeroError as error:
        logger.error("Error: %s", error)
        return 2
    say(table(replanned))
    return 0


if __name__ == "__main__":
    sys.exit(main())
