"""Open-Reasoner-Zero on a GPU that this process and its worker share; skipped without one. On a
GPU host: pytest tests/llm/update/test_orz_cuda.py
"""

from __future__ import annotations

import copy

import pytest
import torch

from priorzero.llm.update.trainers import builtin
from priorzero.orz import orz_status
from tests.llm.update.test_orz_real import gradient
from tests.llm.update.test_orz_trainer import PHASES, far, orz_settings, weights

FOUND, REASON = orz_status()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(not FOUND, reason=f"Open-Reasoner-Zero: {REASON}"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_on_a_gpu_and_goes_on_from_a_checkpoint(byte_model, dtype):
    """The built-in trainer's gradient; and what another trainer restores goes the same way."""
    from priorzero.llm.update.trainers import orz

    of = orz_settings(batch_size=0)
    of.orz.dtype = of.dtype = dtype
    theirs = builtin.make(copy.deepcopy(byte_model).cuda(), None, of, "sum")
    ours = orz.make(copy.deepcopy(byte_model).cuda(), None, of, "sum")
    try:
        expected, metrics = (t.update({"rft": PHASES[0]}) for t in (theirs, ours))
        cosine = torch.cosine_similarity(gradient(ours).cpu(), gradient(theirs).cpu(), dim=0)
        assert cosine > (0.9999 if dtype == "float32" else 0.99)
        close = 1e-3 if dtype == "float32" else 0.05
        assert metrics["rft_grad_norm"] == pytest.approx(expected["rft_grad_norm"], rel=close)

        saved = copy.deepcopy(ours.state_dict())
        ours.update({"rft": PHASES[1]})
        after = weights(ours)
        ours.load_state_dict(saved)
        ours.update({"rft": PHASES[1]})
        assert far(weights(ours), after) < 1e-5
    finally:
        ours.close()
