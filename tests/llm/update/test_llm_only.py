"""The LLM alone with every part real but the game: it finds out which of two levers pays."""

from __future__ import annotations

import math

import pytest
from ding.envs import BaseEnvTimestep

from game_buffer_priorzero import PriorZeroGameBuffer
from priorzero.games.group import GameEnvGroup
from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.prior import LLMPrior
from priorzero.llm.update.groups import GroupDraw
from priorzero.llm.update.phase import LLMPhase
from priorzero.settings.llm import RFTSettings, SFTSettings
from priorzero_collector import PriorZeroCollector
from tests.conftest import DIM
from tests.llm.decisions import policy, settings, trainer_of
from tests.playing import ScriptedEnv, make_watched

ACTIONS = ("up", "us")  # one letter apart


class Levers(ScriptedEnv):
    """Two moves an episode, the same two levers each time; `pays` says what one earns."""

    def __init__(self, number: int, pays: dict[str, float]) -> None:
        super().__init__(number, length=2)
        self.pays = pays

    def _observation(self):
        return super()._observation() | {"text": "Two levers.", "valid_actions": ACTIONS}

    def step(self, action):
        self.t += 1
        info = dict(done_kind="running", steps=self.t, score=0.0, max_score=2.0)
        if self.t == self.length:
            info |= dict(done_kind="terminated", eval_episode_return=0.0)
        return BaseEnvTimestep(self._observation(), self.pays[action], self.t == self.length, info)


class Run:
    """Collector, buffer and phase of an LLM that plays alone."""

    def __init__(self, cfg, encoder, model, tokeniser, pays: dict[str, float], **rft) -> None:
        fields = dict(
            rft=RFTSettings(enable=True, samples=32, max_staleness=0, **rft),
            sft=SFTSettings(enable=False),
            batch_size=16,
            learning_rate=3e-3,
        )
        self.rft, self.trainer = fields["rft"], trainer_of(model, **fields)
        engine = TransformersEngine(self.trainer.weights().module, tokeniser)
        prior = LLMPrior(engine, lambda state: ("", f"{state.observation}\nAction:", False))
        self.asked = tokeniser.requests([("", "Two levers.\nAction:")], [ACTIONS])[0]
        self.envs = GameEnvGroup([Levers(i, pays) for i in range(4)], seed=0)
        self.buffer = PriorZeroGameBuffer(cfg.policy.settings, DIM, seed=0)
        self.phase = LLMPhase(settings(**fields), self.trainer, engine)
        self.collector = PriorZeroCollector(
            cfg.policy.settings,
            make_watched(cfg, encoder),
            self.envs,
            encoder,
            prior,
            history_length=0,
            seed=0,
        )

    @property
    def paying(self) -> float:
        """Probability of the first lever."""
        return math.exp(float(policy(self.trainer, self.asked)[0]))

    async def round(self) -> dict[str, float]:
        """Eight episodes and a phase; the phase's metrics."""
        played = await self.collector.collect(99, 0, 1.0, "llm", new_episodes=8)
        assert (played.begun, played.running, played.steps) == (8, 0, 16)
        self.buffer.push_game_segments(played.segments)
        draw = GroupDraw(self.buffer.sample_episodes, self.rft, self.trainer.version)
        return await self.phase.run(draw) | draw.metrics


@pytest.fixture
def start(compiled_cfg, encoder, byte_model, tokeniser):
    runs = []

    def make(pays: dict[str, float], **rft) -> Run:
        runs.append(Run(compiled_cfg(), encoder, byte_model, tokeniser, pays, **rft))
        return runs[-1]

    yield make
    for run in runs:
        run.envs.close()


@pytest.mark.parametrize("better", ACTIONS)
@pytest.mark.parametrize(
    "rft",
    [
        dict(advantage="group"),
        dict(advantage="group_mean", group_return="to_go", objective="token"),
        dict(advantage="leave_one_out", objective="sequence", epochs=2),
    ],
    ids=lambda rft: rft["advantage"],
)
async def test_what_pays_becomes_likelier(start, better, rft):
    run = start({action: float(action == better) for action in ACTIONS}, **rft)
    before = run.paying if better == ACTIONS[0] else 1 - run.paying
    assert 0.1 < before < 0.9, "the two must be found"
    seen = [await run.round() for _ in range(8)]

    after = run.paying if better == ACTIONS[0] else 1 - run.paying
    assert 1 - after < 0.5 * (1 - before), (before, after)
    assert seen[-1]["rft_group_return"] > seen[0]["rft_group_return"]
    for metrics in seen:
        if "rft_loss" in metrics:
            # Played by the very weights that learn from it.
            assert metrics["rft_staleness"] == 0.0
            assert metrics["rft_importance_mean"] == pytest.approx(1.0, abs=1e-3)


async def test_where_all_pays_the_same_nothing_is_learnt_and_it_is_counted(start):
    run = start(dict.fromkeys(ACTIONS, 1.0), advantage="group")
    before = run.paying
    for rounds in (1, 2):
        # The weights stay, so the group grows.
        assert await run.round() == dict(
            rft_groups=1.0,
            rft_groups_flat=1.0,
            rft_group_episodes=8.0 * rounds,
            rft_group_return=2.0,
            rft_group_spread=0.0,
        )
    assert run.paying == before and run.trainer.version == 0
