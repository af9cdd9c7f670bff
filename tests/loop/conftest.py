"""Parts of a run whose work is made up: they write down when they were asked."""

from __future__ import annotations

import copy
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from priorzero.data.archive import SegmentArchive
from priorzero.data.batch import LearnOutput
from priorzero.llm.seen import Seen
from priorzero.loop.parts import Parts
from priorzero.play.results import CollectResult, EvalResult, Totals
from priorzero.run.checkpoint import CheckpointStore
from priorzero.run.metrics import MetricsWriter, Stopwatch
from priorzero.settings.policy import AnnealingSettings


class Schedule:
    """What the loop reads of `HybridTrainingConfig`."""

    wm_training_mode = "parallel"
    wm_train_freq = 1
    llm_train_freq = 2
    sequential_wm_updates = 5
    sequential_llm_phases = 2
    sequential_repeat = False
    alternating_wm_updates = 4
    alternating_llm_phases = 2
    alternating_first = "world_model"
    alternating_llm_collect = "everything"
    off_policy_degree = 0
    async_eval = False
    llm_only_episodes = 2
    iterations = 4
    eval_freq = 2
    save_freq = 3
    sample_prompt_freq = 0

    def as_dict(self):
        return {"iterations": self.iterations}


GAME = SimpleNamespace(env_id="made-up", kind="jericho", title="Made up", max_score=10.0)

SETTINGS = dict(
    seed=0,
    env=SimpleNamespace(n_evaluator_episode=1),
    eval=SimpleNamespace(modes=["world_model", "world_model_llm"]),
    text=SimpleNamespace(encoder="none"),
    metrics=SimpleNamespace(live=True),
    llm=SimpleNamespace(
        sft=SimpleNamespace(enable=True, recent_transitions=6),
        rft=SimpleNamespace(enable=False, recent_transitions=1000, relative=False),
    ),
    policy=SimpleNamespace(
        num_segments=1,
        game_segment_length=3,
        replay_buffer_size=100,
        batch_size=2,
        use_priority=True,
        replay_ratio=0.5,
        train_start_after_envsteps=0,
        fixed_temperature_value=0.5,
        annealing=AnnealingSettings(),
        root_prior=SimpleNamespace(reduction="sum", calibrated=False),
    ),
)


class Played(list):
    """A segment of so many transitions, none of which shows a prompt."""

    steps = ()


class Made:
    """Parts, and what happened to them.

    Attributes:
        events: what was asked of them, in order.
        returns: of the evaluations to come, of the judging mode; 0 when none are left.
        plays: steps of the calls of the collector to come: of finished segments, and all.
        episodes: of the calls to come: begun, and still running.
        held: transitions in the buffer.
        learns: whether the LLM finds decisions to learn from.
        lost: running episodes that do not come back at a resume.
    """

    def __init__(self, folder, llm: bool = True, eval_only: bool = False, **schedule) -> None:
        self.events: list[str] = []
        self.revisits: list = []
        self.returns: list[float] = []
        self.plays: list[tuple[int, int]] = []
        self.episodes: list[tuple[int, int]] = []
        self.held, self.learns, self.lost = 0, True, 0
        self.config = Schedule()
        for name, value in schedule.items():
            setattr(self.config, name, value)

        nothing = SimpleNamespace(
            stats=lambda: dict(hits=0, misses=0),
            state_dict=dict,
            load_state_dict=lambda state: None,
        )
        counted = dict(hits=0, misses=0, state_hits=0, state_misses=0)
        self.trainer = SimpleNamespace(
            version=0, state_dict=lambda: {"weights": 1}, load_state_dict=self._load_llm
        )
        phase = SimpleNamespace(
            run=self._train_llm,
            publish=self._publish,
            stats=dict,
            weights_kept=self._weights_kept,
        )
        prior = SimpleNamespace(stats=dict)
        self.parts = Parts(
            config=self.config,
            settings=SimpleNamespace(**copy.deepcopy(SETTINGS)),
            folder=folder,
            eval_only=eval_only,
            device="cpu",
            games=(GAME,),
            eval_games=(GAME,),
            encoder=nothing,
            policy=SimpleNamespace(
                learn_mode=SimpleNamespace(
                    forward=self._learn,
                    state_dict=lambda: {"model": 1},
                    load_state_dict=lambda state: self.events.append(f"world model {state}"),
                ),
                reanalyse=self._reanalyse,
                snapshot=lambda: f"snapshot after {self.updates} updates",
                act_apart=self._act_apart,
                offer_weights=self._offer,
                acting_version=0,
                vocabulary=nothing,
            ),
            buffer=SimpleNamespace(
                push_game_segments=self._push,
                remove_oldest_data_to_fit=lambda: 0,
                get_num_of_transitions=lambda: self.held,
                sample=lambda size: SimpleNamespace(
                    indices=np.arange(size), revisits=self.revisits
                ),
                update_priority=self._priorities,
                sample_llm="the buffer's draw",
                numbered_segments=lambda: iter(()),
                state_dict=lambda: {"pushed": 1},
                load_state_dict=self._load_buffer,
            ),
            llm=SimpleNamespace(
                trainer=self.trainer,
                engine=SimpleNamespace(thought_calls=4),
                prior=prior,
                phase=phase,
                name="a made-up LLM",
                seen=Seen(),
            )
            if llm
            else None,
            collect_envs=None,
            collector=SimpleNamespace(
                collect=self._collect,
                totals=lambda: Totals(counted, counted, {}, {"positions_clamped": 0.0}),
                state_dict=lambda: {"slots": [1, 2]},
                resume=self._resume,
            ),
            evaluator=SimpleNamespace(evaluate=self._evaluate, playing=self._playing),
            recorder=SimpleNamespace(stats=dict),
            metrics=MetricsWriter(folder / "log"),
            watch=Stopwatch(),
            checkpoints=CheckpointStore(folder / "ckpt"),
            archive=SegmentArchive(folder / "replay", 2**20),
            closing=AsyncExitStack(),
        )
        self.updates = 0

    async def _collect(self, num_segments, env_steps, temperature, player, new_episodes):
        assert (num_segments, temperature) == (1, 0.5)
        told = {"search": "", "search_alone": " without the LLM", "llm": f" alone, {new_episodes}"}
        self.events.append(f"collect from {env_steps}{told[player]}")
        transitions, steps = self.plays.pop(0) if self.plays else (3, 5)
        begun, running = self.episodes.pop(0) if self.episodes else (0, 0)
        played = [Played([None] * transitions)]
        return CollectResult(played, steps, {"segments": 1.0}, {}, begun, running)

    def _act_apart(self, version):
        self.events.append(f"act apart from {version}")
        self.parts.policy.acting_version = version

    def _offer(self, version):
        self.events.append(f"weights {version}")
        self.parts.policy.acting_version = version

    @asynccontextmanager
    async def _weights_kept(self):
        self.events.append("LLM kept")
        yield
        self.events.append("LLM free")

    def _playing(self, policy):
        async def evaluate(*arguments):
            self.events.append(policy)
            return await self._evaluate(*arguments)

        return SimpleNamespace(evaluate=evaluate)

    def _push(self, segments):
        self.held += sum(len(segment) for segment in segments)

    def _reanalyse(self, batch, env_steps):
        self.events.append(f"reanalyse {batch.revisits} at {env_steps}")
        return batch, {"reanalyse_share": 0.5}

    def _learn(self, batch):
        self.updates += 1
        self.events.append("update")
        return LearnOutput({"wm_loss": float(self.updates)}, np.full(2, self.updates))

    def _priorities(self, indices, priorities):
        assert indices.tolist() == [0, 1] and priorities.tolist() == [self.updates] * 2

    async def _train_llm(self, draw):
        assert draw == "the buffer's draw"
        self.events.append("llm")
        if not self.learns:
            return {}
        self.trainer.version += 1
        return {"sft_loss": 0.25}

    def _load_buffer(self, state, segments):
        self.events.append(f"buffer {state} {segments}")
        return 3

    async def _resume(self, state):
        self.events.append(f"episodes {state}")
        return self.lost

    async def _publish(self):
        self.events.append(f"publish {self.trainer.version}")
        return {}

    def _load_llm(self, state):
        self.events.append(f"llm {state}")

    async def _evaluate(self, mode, episodes, env_steps, label):
        self.events.append(f"evaluate {mode} {label} at {env_steps}")
        judged = mode == "world_model_llm" and self.returns
        value = self.returns.pop(0) if judged else 0.0
        return EvalResult(mode, (value,), (value,), (7,), ("terminated",), 10.0)

    def take(self) -> list[str]:
        """The events so far; they are forgotten."""
        events, self.events[:] = list(self.events), []
        return events


@pytest.fixture
def made(tmp_path):
    """`made(**schedule)`: see `Made`; its files lie in `tmp_path`."""
    return lambda **settings: Made(tmp_path, **settings)
