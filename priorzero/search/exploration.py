"""How much chance a training decision gets, by schedule: temperature of the draw and weight of the
root noise, as closed forms of the environment steps, so that a resumed run needs no state of them.

LightZero lowers the temperature by thresholds (1, 0.5, 0.25 at halves of the training); here both
fall or rise linearly:

    x(t) = x_start + (x_end - x_start) * min(t / T, 1)
"""

from __future__ import annotations

import copy

from priorzero.settings.policy import PolicySettings


def linear(start: float, end: float, steps: int, env_steps: int) -> float:
    """x(t) above, with T = `steps` >= 1 and t = `env_steps` >= 0."""
    return start + (end - start) * min(env_steps / steps, 1.0)


def temperature_at(settings: PolicySettings, env_steps: int) -> float:
    """Temperature of a collect call that begins after so many environment steps of the training."""
    annealing = settings.annealing
    if not annealing.duration:
        return settings.fixed_temperature_value
    start, end = annealing.temperature_start, annealing.temperature_end
    return linear(start, end, annealing.duration, env_steps)


def noise_weight_at(settings: PolicySettings, env_steps: int) -> float:
    """Share of the root noise in a decision's prior, after so many environment steps."""
    annealing = settings.annealing
    if not annealing.duration:
        return settings.root_noise_weight
    return linear(annealing.noise_start, annealing.noise_end, annealing.duration, env_steps)


def with_noise_at(settings: PolicySettings, env_steps: int) -> PolicySettings:
    """The settings as root policies are to read them: `root_noise_weight` is the scheduled one."""
    if not settings.annealing.duration:
        return settings
    scheduled = copy.copy(settings)
    scheduled.root_noise_weight = noise_weight_at(settings, env_steps)
    return scheduled
