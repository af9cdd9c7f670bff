"""Temperature and root noise by schedule: closed forms, and what reaches the draw and the root."""

from __future__ import annotations

import re

import numpy as np
import pytest

from priorzero.search.exploration import noise_weight_at, temperature_at, with_noise_at
from priorzero.search.roots import Root
from priorzero.settings.policy import AnnealingSettings, PolicySettings
from priorzero.types import PriorZeroError

FALLING = AnnealingSettings(
    duration=1000, temperature_start=2.0, temperature_end=0.5, noise_start=0.1, noise_end=0.6
)


@pytest.mark.parametrize(
    ("now", "temperature", "noise"),
    [(0, 2.0, 0.1), (250, 1.625, 0.225), (500, 1.25, 0.35), (1000, 0.5, 0.6), (9000, 0.5, 0.6)],
)
def test_by_hand(now, temperature, noise):
    settings = PolicySettings(annealing=FALLING, root_policy="puct")
    assert temperature_at(settings, now) == pytest.approx(temperature)
    assert noise_weight_at(settings, now) == pytest.approx(noise)


def test_without_a_schedule_the_settings_are_the_very_same():
    settings = PolicySettings(fixed_temperature_value=0.7, root_noise_weight=0.4)
    for now in (0, 10_000):
        assert (temperature_at(settings, now), noise_weight_at(settings, now)) == (0.7, 0.4)
        assert with_noise_at(settings, now) is settings


def test_only_the_noise_is_another_in_what_root_policies_read():
    settings = PolicySettings(annealing=FALLING, root_noise_weight=0.9, root_policy="puct")
    read = with_noise_at(settings, 250)
    assert read.root_noise_weight == pytest.approx(0.225) and settings.root_noise_weight == 0.9
    read.root_noise_weight = settings.root_noise_weight
    assert read == settings


@pytest.mark.parametrize("root_policy", ["puct", "lightzero"])
def test_the_scheduled_noise_enters_the_root(make_policy, root_policy):
    """An untrained network and one simulation: the visited action is the noisy prior's favourite.
    With no noise every search takes the same one, with noise alone they do not.
    """
    policy = make_policy(
        root_policy=root_policy,
        num_simulations=1 if root_policy == "puct" else 8,
        annealing=dict(duration=100, noise_start=0.0, noise_end=1.0),
    )
    roots = [Root(np.zeros((1, 6), np.float32), np.array([]), np.arange(8))] * 30

    def visited(env_steps: int) -> set[bytes]:
        outputs = policy.collect_mode.forward(roots, 1.0, env_steps)
        return {o.visit_counts.tobytes() for o in outputs}

    late = len(visited(100))
    assert late > 4
    if root_policy == "puct":
        assert len(visited(0)) == 1


def test_a_root_policy_that_draws_by_itself_has_no_schedule():
    with pytest.raises(PriorZeroError, match=re.escape("annealing.duration is 1000")):
        PolicySettings(annealing=FALLING, root_policy="gumbel")
