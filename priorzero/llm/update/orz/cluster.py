"""The Ray cluster ORZ's workers live in: started for the run, or joined; and their place in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from priorzero.llm.update.orz.mends import ACCELERATOR
from priorzero.orz import find_source
from priorzero.ray_link import connect, counted, disconnect
from priorzero.types import PriorZeroError

if TYPE_CHECKING:
    from priorzero.settings.orz import OrzSettings

_ROOT = Path(__file__).resolve().parents[4]  # where the workers find this package


class Cluster:
    """Ray, with room for the workers.

    The room is ours to give back: ORZ makes such groups too, and forgets them, after which their
    GPUs are never free again.

    Attributes:
        placement: the room, one bundle per machine.

    Args:
        settings: the `llm.orz` group.
        cuda: whether the workers have GPUs; without, Ray's resource GPU only counts workers.

    Raises:
        PriorZeroError: there is no such cluster, or no room in it.
    """

    def __init__(self, settings: OrzSettings, *, cuda: bool) -> None:
        self._settings, self._cuda = settings, cuda
        # torch's count: Ray's own is 0 where the driver's library is not to be asked.
        gpus = torch.cuda.device_count() if cuda else settings.workers
        self._ours = connect(settings.ray_address, cpus=settings.workers, gpus=gpus)
        try:
            self.placement = self._reserve()
        except BaseException:
            self._disconnect()
            raise

    def _reserve(self):
        settings = self._settings
        each = settings.actor_gpus_per_node
        bundles = [{"GPU": each, "CPU": each} for _ in range(settings.actor_nodes)]
        placement = placement_group(bundles, strategy=settings.placement)
        try:
            ray.get(placement.ready(), timeout=settings.start_timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            remove_placement_group(placement)
            raise PriorZeroError(
                f"Ray found no room for {settings.actor_nodes} x {bundles[0]} "
                f"({settings.placement}) in {settings.start_timeout_s:.0f} s; it has "
                f"{counted(ray.cluster_resources())}, free are "
                f"{counted(ray.available_resources())}. Set llm.orz.actor_nodes and "
                "actor_gpus_per_node to what there is"
            ) from error
        return placement

    def environment(self) -> dict[str, Any]:
        """Ray's `runtime_env` of a worker: it finds this package and ORZ at the same paths."""
        source, _ = find_source()
        paths = [str(_ROOT), str(source), os.environ.get("PYTHONPATH", "")]
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if not self._cuda:
            threads = max(1, torch.get_num_threads() // self._settings.actor_gpus_per_node)
            variables |= {ACCELERATOR: "cpu", "OMP_NUM_THREADS": str(threads)}
        return {"env_vars": variables}

    def close(self) -> None:
        """Give the room back; end Ray where it was started, or joined, for this."""
        if ray.is_initialized():
            remove_placement_group(self.placement)
        self._disconnect()

    def _disconnect(self) -> None:
        if self._ours:
            disconnect()
