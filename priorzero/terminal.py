"""Play a run's game in a terminal, with its agent's advice. `python -m priorzero.play` starts it.

    python -m priorzero.play data_priorzero/RUN [--no-llm]

Before every command the agent plans as in an evaluation and shows its numbers. What is typed may
be a command of one's own, the number of one of the agent's, or nothing, which plays the agent's
choice. Lines that begin with a slash speak to this program. Without a terminal the lines are
read from stdin, and the game ends with them.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING

from priorzero.run.cli import calm_openmp
from priorzero.run.logs import setup_logging
from priorzero.say import say
from priorzero.settings.env import SUITE, plain_name
from priorzero.settings.record import parse_assignment, require
from priorzero.types import PriorZeroError

if TYPE_CHECKING:
    from priorzero.agent.agent import Agent
    from priorzero.games.env import TextGameEnv
    from priorzero.llm.prior import LLMPrior
    from priorzero.play.slot import Decision, Slot
    from priorzero.search.roots import SearchOutput

logger = logging.getLogger(__name__)

SHOWN = 8  # commands of the advice; /all shows the others

HELP = """\
  a command        type it, whether or not it is among those listed
  a number         play that command of the list
  (nothing)        play the agent's choice
  /go N            let the agent play N commands
  /all             the whole list
  /line            what the search expects to come of the agent's choice
  /prompt          what the LLM reads
  /help, /quit
"""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.play", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="an experiment's folder")
    parser.add_argument(
        "--checkpoint", default="latest", help="latest, best or a checkpoint folder's name"
    )
    parser.add_argument("--no-llm", action="store_true", help="advice of the world model alone")
    parser.add_argument("--game", help="which game, as --env-id takes it; default: the run's first")
    parser.add_argument("--seed", type=int, help="of the episode; default: the run's")
    parser.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="GROUP.SETTING=VALUE",
        help="another setting, such as policy.num_simulations=100; may be given several times",
    )
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Advice:
    """What the agent makes of the present state.

    Attributes:
        decision: state and commands.
        plan: what the search found, in the order of the commands.
        order: positions of the commands, best first.
        q: per position the mean return of the command in the search; missing where it was not
            tried, or where the root policy shows no tree.
    """

    decision: Decision
    plan: SearchOutput
    order: list[int]
    q: dict[int, float]

    @property
    def choice(self) -> str:
        """The agent's command."""
        return self.decision.valid_actions[self.plan.action_index]


class Session:
    """One episode, played by somebody with an agent at hand.

    Args:
        env: the game; not yet reset.
        agent: gives the advice.
        prior: the LLM; None for none.
        history_length: past steps the LLM may see.
        env_steps: of the training, for the mixture's schedule.
        tell: where the text goes.
        game: plain name of the game where the run plays several; else empty.
    """

    def __init__(
        self,
        env: TextGameEnv,
        agent: Agent,
        prior: LLMPrior | None,
        *,
        history_length: int,
        env_steps: int,
        tell: Callable[[str], None],
        game: str = "",
    ) -> None:
        self._env, self._agent, self._prior = env, agent, prior
        self._history_length, self._env_steps = history_length, env_steps
        self._tell, self._game = tell, game

    async def play(self, lines: Iterator[str]) -> None:
        """Play until the game ends, or the lines do.

        Raises:
            PriorZeroError: the game cannot be started, or the LLM fails.
        """
        slot = self._start()
        alone = 0  # commands that the agent still plays by itself
        while True:
            advice = await self._advise(slot)
            self._tell(f"\n{slot.observation['text']}\n")
            self._tell(self._table(advice, SHOWN))

            if alone:
                alone, command = alone - 1, advice.choice
            else:
                command, alone = self._asked(lines, slot, advice)
            if command is None:
                self._tell(f"\nLeft after {slot.timestep} commands, {self._score(slot)}.\n")
                return
            self._tell(f"\n> {command}\n")
            if self._step(slot, command):
                self._tell(f"\n{slot.observation['text']}\n")
                self._tell(f"\nThe end after {slot.timestep} commands, {self._score(slot)}.\n")
                return

    def _start(self) -> Slot:
        from priorzero.play.slot import Slot

        observation = self._env.reset()
        return Slot(
            0,
            self._env.episode_seed,
            observation,
            goal=self._env.game.goal,
            history_length=self._history_length,
            context_steps=self._agent.settings.context_steps,
            game=self._game,
        )

    async def _advise(self, slot: Slot) -> Advice:
        """Plan as an evaluation does."""
        from priorzero.play.slot import decide

        slot.see(self._agent.encode([slot.world_text])[0])
        (decision,) = decide([slot], self._agent.ids)
        if self._prior is not None:
            (decision.request,) = self._prior.requests([decision.state], [decision.valid_actions])
            (decision.scores,) = await self._prior.ask([decision.request])
        root = decision.root(slot, self._agent.settings.root_prior.reduction)
        plan = self._agent.plan(root, self._env_steps)

        q: dict[int, float] = {}
        if plan.tree is not None:
            position = {action: at for at, action in enumerate(decision.valid_ids.tolist())}
            for node in range(1, len(plan.tree.parent)):
                if plan.tree.parent[node] == 0:
                    q[position[int(plan.tree.action[node])]] = float(plan.tree.q[node])
        order = sorted(range(len(decision.valid_actions)), key=lambda at: -plan.target_policy[at])
        return Advice(decision, plan, order, q)

    def _asked(self, lines: Iterator[str], slot: Slot, advice: Advice) -> tuple[str | None, int]:
        """The next command and how many the agent plays after it by itself; None at the end."""
        for line in lines:
            word, _, rest = line.strip().partition(" ")
            if word == "/quit":
                return None, 0
            if word == "/go" and rest.isdecimal() and int(rest):
                return advice.choice, int(rest) - 1
            if word.startswith("/"):
                self._tell(self._answer(word, slot, advice))
            elif not word:
                return advice.choice, 0
            elif line.strip().isdecimal():
                if 1 <= int(line) <= len(advice.order):
                    return advice.decision.valid_actions[advice.order[int(line) - 1]], 0
                self._tell(f"there are commands 1 to {len(advice.order)}\n")
            else:
                return line.strip(), 0
        return None, 0

    def _answer(self, word: str, slot: Slot, advice: Advice) -> str:
        if word == "/all":
            return self._table(advice, len(advice.order))
        if word == "/line":
            return self._line(advice)
        if word == "/prompt":
            if self._prior is None:
                return "no LLM is asked\n"
            return self._prior.engine.tokeniser.decode(advice.decision.request.prompt_ids) + "\n"
        return HELP

    def _step(self, slot: Slot, command: str) -> bool:
        """Type it; whether that ended the game."""
        # What the list does not know gets an id too: the network is to know that it was typed.
        (action_id,) = self._agent.ids([command])
        outcome = self._env.step(command, listed_only=False)
        slot.advance(command, float(outcome.reward), outcome.obs, action_id)
        if outcome.reward:
            self._tell(f"[reward {outcome.reward:g}]\n")
        if outcome.info["fault"]:
            self._tell(f"[the interpreter failed: {outcome.info['fault']}]\n")
        return outcome.done

    def _score(self, slot: Slot) -> str:
        return f"score {slot.observation['score']:g} of {self._env.game.max_score:g}"

    def _table(self, advice: Advice, most: int) -> str:
        """The agent's numbers, a line per command."""
        plan, commands = advice.plan, advice.decision.valid_actions
        shown = advice.order[:most]
        width = max(len(commands[at]) for at in shown)
        llm = plan.prior.log_llm
        head = f"{'LLM %':>7}{'model %':>9}{'visits':>8}{'value':>8}"
        lines = [
            f"[value {plan.root_value:.2f}, the network's own {plan.predicted_value:.2f}]",
            f"{'':4} {'':{width}} {head}",
        ]
        for number, at in enumerate(shown, 1):
            asked = f"{100 * exp(llm[at]):.1f}" if llm is not None else "–"
            value = f"{advice.q[at]:.2f}" if at in advice.q else "–"
            mark = "▶" if at == plan.action_index else " "
            lines.append(
                f"{mark}{number:>3} {commands[at]:{width}} {asked:>7}"
                f"{100 * exp(plan.prior.log_wm[at]):>9.1f}{plan.visit_counts[at]:>8g}{value:>8}"
            )
        if len(shown) < len(commands):
            lines.append(f"     and {len(commands) - len(shown)} more: /all")
        return "\n".join(lines) + "\n"

    def _line(self, advice: Advice) -> str:
        """The most visited way down from the agent's choice, with what it is imagined to earn."""
        plan, decision = advice.plan, advice.decision
        if plan.tree is None:
            return "this root policy does not show its tree\n"
        tree = plan.tree
        names = self._agent.tree_commands(plan, decision.valid_ids, decision.valid_actions)
        lines, node, action = [], 0, decision.valid_ids[plan.action_index]
        while True:
            below = [n for n in range(len(tree.parent)) if tree.parent[n] == node]
            if node == 0:
                below = [n for n in below if tree.action[n] == action]
            if not below:
                return "\n".join(lines or ["the search did not try it"]) + "\n"
            node = max(below, key=lambda n: tree.visits[n])
            lines.append(
                f"{names[node]}: {tree.visits[node]:g} visits, imagined reward "
                f"{tree.reward[node]:.2f}, value there {tree.value[node]:.2f}"
            )


def typed_lines() -> Iterator[str]:
    """Lines of the terminal, or of stdin."""
    prompt = "\n? " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            return


async def play(args: argparse.Namespace) -> None:
    """The command, for its parsed arguments.

    Raises:
        PriorZeroError: the run, its game or its LLM cannot be had.
    """
    # These load torch, which should not delay --help or a wrong option.
    from priorzero.agent.load import make_agent, make_prior, read_checkpoint, read_settings
    from priorzero.games.env import TextGameEnv

    settings = read_settings(args.run, *(parse_assignment(one) for one in args.assignments))
    saved = read_checkpoint(args.run, args.checkpoint, settings)
    seed = settings.seed if args.seed is None else args.seed
    game = args.game or settings.env.env_id
    if not isinstance(game, str) or game in ("auto", SUITE):
        # These may find other games here than they did there. Older checkpoints are of one game.
        game = saved.meta.get("games", [saved.meta["game"]])[0]
    env = TextGameEnv(settings.env.as_dict() | {"env_id": game, "split": "eval", "seed": seed})
    prior = None
    try:
        agent = make_agent(saved)
        if settings.llm.enable and not args.no_llm:
            prior = make_prior(saved)
        session = Session(
            env,
            agent,
            prior,
            history_length=settings.llm.prompt.history_length,
            env_steps=saved.meta["env_steps"],
            tell=say,
            game=plain_name(game) if settings.env.several else "",
        )
        say(f"{env.game.title}: {env.game.goal}\n/help tells what may be typed.\n")
        await session.play(typed_lines())
    finally:
        env.close()
        if prior is not None:
            await prior.engine.close()


def main(arguments: list[str] | None = None) -> int:
    """The command.

    Returns:
        The exit status: 0, or 2 for a fault the user can mend.
    """
    calm_openmp()
    setup_logging(None)
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        right = args.seed is None or args.seed >= 0
        require({"--seed": (args.seed, right, "it must not be negative")})
        asyncio.run(play(args))
    except PriorZeroError as error:
        logger.error("Error: %s", error)
        return 2
    return 0
