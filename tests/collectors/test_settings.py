"""What is refused of collectors in other processes and why; where their cluster is."""

from __future__ import annotations

import importlib.util

import pytest

from priorzero.types import PriorZeroError
from priorzero_config import HybridTrainingConfig
from priorzero_orz_entry import config_from, main, parse_arguments


def config(**given) -> HybridTrainingConfig:
    settings = {"presets": ("pure_unizero",), **given}
    return HybridTrainingConfig(env_id="tw-simple", **settings)


def test_there_are_none_unless_they_are_asked_for():
    made = config()
    assert made.collector_workers == 0 and made.ray_address == made.cluster == ""
    arguments = ["--env-id", "tw-simple", "--collector-workers", "3", "--ray-address", "auto"]
    made = config_from(parse_arguments(arguments), debug_mode=True)
    assert (made.collector_workers, made.cluster) == (3, "auto")
    assert made.as_dict()["schedule"]["collector_workers"] == 3


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (dict(collector_workers=-1), "collector_workers is -1, but it must be an integer >= 0"),
        (dict(collector_workers=True), "it must be an integer"),
        (dict(collector_workers=9), "env.collector_env_num is 8; .*policy.num_segments is 8"),
        (
            dict(collector_workers=4, overrides=dict(policy=dict(num_segments=3))),
            "policy.num_segments is 3",
        ),
        (
            dict(collector_workers=1, overrides=dict(policy=dict(restarts=dict(share=0.5)))),
            "remembers visited states",
        ),
        (dict(ray_address=6379), "ray_address is 6379, but it must be host:port, auto or empty"),
        (
            dict(ray_address="a:1", overrides=dict(llm=dict(orz=dict(ray_address="b:1")))),
            "ray_address is 'a:1', but llm.orz.ray_address is 'b:1', and a run is in one",
        ),
        (
            dict(collector_workers=2, presets=(), use_orz_trainer=True),
            "ORZ's workers and collectors need one Ray cluster",
        ),
        (dict(overrides=dict(collectors=dict(worker_cpus=0.0))), "worker_cpus is 0.0"),
        (dict(overrides=dict(collectors=dict(placement="PACK"))), "SPREAD or DEFAULT"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(given, reason):
    with pytest.raises(PriorZeroError, match=reason):
        config(**given)


def test_an_address_is_said_once_and_serves_both():
    """Whichever names it; ORZ's own rules see it too."""
    spread = dict(llm=dict(orz=dict(actor_nodes=2)))
    for given in (
        dict(ray_address="head:1", overrides=spread),
        dict(overrides=dict(llm=dict(orz=dict(actor_nodes=2, ray_address="head:1")))),
    ):
        made = config(presets=("orz",), collector_workers=2, **given)
        assert made.cluster == made.priorzero_cfg.llm.orz.ray_address == "head:1"
    late = config(collector_workers=2)
    late.ray_address = "head:2"
    late.settle_trainer()
    assert late.priorzero_cfg.llm.orz.ray_address == "head:2"


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
async def test_without_ray_the_error_names_the_lock(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["--env-id=tw-simple", "--no-llm", "--collector-workers=2", "--exp-name=run"]
    assert await main(asked) == 2
    told = capsys.readouterr().err
    assert "Error: collector_workers is 2, and the package ray is not installed" in told
    assert "requirements/ray.lock" in told
