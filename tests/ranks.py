"""Two processes under torchrun: `launch` starts them, the rest is what they do.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.ranks WORK FOLDER ...
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def launch(work: str, folder: Path, *arguments: str, **environment: str):
    """Let two processes do a work of this file, and wait for them.

    Args:
        work: name of the function. folder: for its files. arguments: handed on to it.
        environment: variables besides this process's own.

    Returns:
        the completed process; both ranks' output is its stdout.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.ranks", work, str(folder), *arguments]
    return subprocess.run(
        command,
        cwd=CHECKOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def without_dropout(network) -> None:
    """So that rows are computed alike in any batch."""
    import torch

    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def halves(folder: Path, *_) -> None:
    """Updates with one half of every batch in `task.pt` each, from the first's weights; then the
    second dies, and the first asks for it.
    """
    import torch

    from priorzero.ranks import LostRank, join
    from priorzero_policy import PriorZeroPolicy
    from tests.conftest import HashEncoder

    ranks = join()
    task = torch.load(folder / "task.pt", weights_only=False)
    torch.set_num_threads(1)
    torch.manual_seed(ranks.rank)
    policy = PriorZeroPolicy(task["cfg"])
    policy.attach_encoder(HashEncoder().encode)
    without_dropout(policy.network)
    if ranks.first:
        policy.network.load_state_dict(task["weights"])
        policy.target_network.load_state_dict(task["weights"])
    policy.train_with(ranks)

    # The second knows the first's actions by the meeting alone, but for one, which it asks for.
    actions = [f"action {i}" for i in range(8)]
    if ranks.first:
        policy.register_actions(actions)
    ranks.gather(None)
    if not ranks.first:
        assert policy.register_actions(actions[3:4]) == [3]
    policy.meet(ranks)

    kept = {"gradients": [], "metrics": [], "totals": ranks.total(ranks.rank, 5)}
    for pair in task["halves"]:
        output = policy.learn_mode.forward(pair[ranks.rank])
        named = policy.network.named_parameters()
        kept["gradients"].append({n: p.grad.clone() for n, p in named if p.grad is not None})
        kept["metrics"].append(output.metrics)
    kept["learnt"] = policy.learn_mode.state_dict()

    if ranks.first:
        try:
            ranks.any(False)
            kept["lost"] = ""
        except LostRank as lost:
            kept["lost"] = str(lost)
    torch.save(kept, folder / f"{ranks.rank}.pt")
    os._exit(0)


def run(folder: Path, *arguments: str) -> None:
    """The main job; at its end every rank keeps what it has in `<rank>.pt`."""
    import torch

    import priorzero_orz_entry as entry
    from priorzero.loop import saving

    require_saved = saving.require_saved

    def keep(parts) -> None:
        require_saved(parts)
        kept = {
            "learnt": parts.policy.learn_mode.state_dict(),
            "texts": parts.policy.network.state_dict(),
            "progress": parts.progress,
            "history": parts.history,
            "seed": parts.settings.seed,
            "held": parts.buffer.get_num_of_transitions(),
            "played": [
                [(step.state.observation, step.action, step.action_id) for step in segment.steps]
                for _, segment in parts.buffer.numbered_segments()
            ],
        }
        torch.save(kept, folder / f"{parts.ranks.rank}.pt")

    saving.require_saved = keep
    sys.exit(asyncio.run(entry.main(list(arguments))))


if __name__ == "__main__":
    {"halves": halves, "run": run}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
