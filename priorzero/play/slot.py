"""A running episode, and what its player must decide next. Collector and evaluator share both."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from priorzero.data.segment import Segment, StepRecord
from priorzero.decisions.record import Moment
from priorzero.play.place import Place
from priorzero.search.context import EpisodeContext
from priorzero.search.roots import Root, SearchOutput
from priorzero.types import ActionScores, HistoryItem, TextState, TokenisedRequest, world_text

if TYPE_CHECKING:
    from ding.envs import BaseEnvTimestep

    from priorzero.decisions.recorder import Tape


class Slot:
    """One running episode; the next episode of the same environment gets a new one.

    Attributes:
        env_id: of the environment it is played in.
        episode_id: of the episode.
        observation: the environment's present observation (`TextGameEnv.reset` names its keys).
        vector: `[E]` embedding of the present text; None until `see`.
        context: what a root looks back on.
        timestep: actions played so far.
        segment: where the collector writes; None where nothing is learnt from the episode.
        transcript: lines of the episode as the evaluator writes it down.
        tape: where the decisions of the episode are recorded; None where they are not.
        before: the steps that the collector's first segment follows; none at a game's start.
        began: steps and score of the visited state at which the episode began; None at a game's
            start.
        game: plain name of the game where the run plays several; else empty.

    Args:
        goal: line of the game's goal for the prompts.
        history_length: past steps the LLM may see.
        context_steps: `C`, observations a root looks back on.
    """

    def __init__(
        self,
        env_id: int,
        episode_id: int,
        observation: dict[str, Any],
        *,
        goal: str,
        history_length: int,
        context_steps: int,
        game: str = "",
    ) -> None:
        self.env_id, self.episode_id = env_id, episode_id
        self.game = game
        self.observation = observation
        self.vector: np.ndarray | None = None
        self.context = EpisodeContext(context_steps)
        self.timestep = 0
        self.segment: Segment | None = None
        self.transcript: list[str] = []
        self.tape: Tape | None = None
        self.before: tuple[StepRecord, ...] = ()
        self.began: tuple[int, float] | None = None
        self._goal = goal
        self._history: deque[HistoryItem] = deque(maxlen=history_length)

    @property
    def state(self) -> TextState:
        """All the LLM may know of the present state."""
        return TextState(
            self.observation["text"],
            tuple(self.observation["valid_actions"]),
            tuple(self._history),
            self._goal,
            float(self.observation["score"]),
        )

    @property
    def world_text(self) -> str:
        """What the world model sees of the present state, before it is encoded."""
        return world_text(self.observation["text"], self.game)

    def state_dict(self) -> dict[str, Any]:
        """The episode as its player remembers it: plain values and arrays. The environment's own
        state and the open segment are not in it.
        """
        return {
            "env_id": self.env_id,
            "episode_id": self.episode_id,
            "timestep": self.timestep,
            "began": None if self.began is None else list(self.began),
            "history": [[h.observation, h.action, h.reward] for h in self._history],
            "context_observations": self.context.observations,
            "context_actions": self.context.actions,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; made for the same episode, nothing seen yet."""
        assert (self.env_id, self.episode_id) == (state["env_id"], state["episode_id"])
        self.timestep = state["timestep"]
        began = state.get("began")  # older checkpoints have none
        self.began = None if began is None else (began[0], began[1])
        self._history.extend(HistoryItem(*item) for item in state["history"])
        observations = np.asarray(state["context_observations"])
        self.context.restore(observations, np.asarray(state["context_actions"]))
        self.vector = observations[-1]

    def begin_at(self, place: Place, vector: np.ndarray) -> None:
        """The episode begins at a visited state, instead of `see`: with the steps, the context and
        the history that it would have come with.

        Args:
            vector: `[E]` embedding of the present text.
        """
        assert self.vector is None and self.timestep == 0
        before = place.before
        observations = np.stack([*(step.observation for step in before), vector])
        self.context.restore(observations, np.array([step.action_id for step in before], np.int64))
        self._history.extend(place.history)
        self.vector, self.before = vector, before
        self.timestep, self.began = place.steps, (place.steps, place.score)

    def see(self, vector: np.ndarray) -> None:
        """Give the present text its embedding `[E]`; once per state that is searched."""
        assert self.vector is None, "each text is encoded once"
        self.vector = vector
        self.context.observe(vector)

    def advance(
        self,
        action: str,
        reward: float,
        observation: dict[str, Any],
        action_id: int | None = None,
    ) -> None:
        """`action` was played, earned `reward` and led to `observation`.

        Args:
            action_id: of the action in the vocabulary; None where the episode is played without a
                search.
        """
        self._history.append(HistoryItem(self.observation["text"], action, reward))
        if action_id is not None:
            self.context.act(action_id)
        self.observation = observation
        self.vector = None
        self.timestep += 1


@dataclass(eq=False)
class Decision:
    """A state where an action is due: text for the LLM, ids for the search.

    Attributes:
        state: the whole state, with every valid action.
        valid_actions: what may be chosen from, `A` of them; those of the state, less any for which
            a full vocabulary has no id.
        valid_ids: `[A]` their ids; None where no search needs them.
        request: what the LLM is asked; None where it is not asked.
        scores: its answer; None where there is none.
    """

    state: TextState
    valid_actions: tuple[str, ...]
    valid_ids: np.ndarray | None = None
    request: TokenisedRequest | None = None
    scores: ActionScores | None = None

    def llm_logprobs(self, reduction: str) -> np.ndarray | None:
        """`[A]` log-probabilities from the LLM; None where it gave no answer.

        Args:
            reduction: how token log-probabilities become one number per action.
        """
        if self.scores is None:
            return None
        return np.asarray(self.scores.totals(reduction), dtype=np.float64)

    def root(self, slot: Slot, reduction: str, llm_target_prior: str = "mixture") -> Root:
        """What the search plans from.

        Args:
            slot: where the decision is due.
            reduction: see `llm_logprobs`.
            llm_target_prior: see `Root`; only what the LLM learns from needs another one.
        """
        context = slot.context
        llm = self.llm_logprobs(reduction)
        keep_tree = slot.tape is not None and slot.tape.wants_tree
        return Root(
            context.observations,
            context.actions,
            self.valid_ids,
            llm,
            keep_tree,
            llm_target_prior,
        )

    def record(
        self,
        slot: Slot,
        command: str,
        outcome: BaseEnvTimestep,
        action_of: Callable[[int], str | None],
        plan: SearchOutput | None = None,
        **facts: Any,
    ) -> None:
        """Write the decision down, where its episode is recorded.

        Args:
            slot: of the episode, before it moves on.
            command: what was played. outcome: what the environment answered.
            action_of: the vocabulary's name of an action id.
            plan: the search's; None where none was made.
            facts: of this decision, see `Tape.write`.
        """
        if slot.tape is None:
            return
        moment = Moment(
            self.state, self.valid_actions, command, outcome, self.request, self.scores, plan
        )
        slot.tape.write(slot.timestep, moment, self.valid_ids, action_of, **facts)


def decide(
    slots: Sequence[Slot], register: Callable[[Sequence[str]], Sequence[int | None]]
) -> list[Decision]:
    """The decisions due in these slots.

    Args:
        register: ids of valid actions, None for those the vocabulary had to drop.
    """
    due = []
    for slot in slots:
        state = slot.state
        ids = register(state.valid_actions)
        known = [(a, i) for a, i in zip(state.valid_actions, ids, strict=True) if i is not None]
        due.append(Decision(state, tuple(a for a, _ in known), np.asarray([i for _, i in known])))
    return due
