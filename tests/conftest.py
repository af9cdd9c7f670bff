"""Shared by the tests of policy, search, world model, buffer and collector: a tiny policy, made-up
texts, story files.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from priorzero.run.cli import calm_openmp

calm_openmp()  # as the main command does, before any test loads torch

DIM = 6
CHECKOUT = Path(__file__).resolve().parents[1]


def text_vector(text: str, dim: int = DIM) -> np.ndarray:
    """A unit vector that depends on the text alone: stands in for a sentence encoder."""
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
    vector = np.random.default_rng(seed).normal(size=dim)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class HashEncoder:
    """`SentenceEncoder`'s interface without a language model."""

    dim = DIM

    def encode(self, texts) -> np.ndarray:
        return (
            np.stack([text_vector(t) for t in texts])
            if len(texts)
            else np.zeros((0, DIM), np.float32)
        )


@pytest.fixture(scope="session")
def encoder() -> HashEncoder:
    return HashEncoder()


@pytest.fixture(scope="session")
def compiled_cfg():
    """Compiled settings of a tiny pure-UniZero policy on 6-dimensional texts; keyword arguments are
    policy settings.
    """
    from priorzero.lightzero import compile_priorzero
    from priorzero.settings.record import merge
    from priorzero_config import get_priorzero_config

    small = dict(
        device="cpu",
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        group_size=8,
        num_simulations=8,
        support_scale=10,
        num_unroll_steps=5,
        td_steps=3,
        context_steps=3,
        batch_size=8,
        game_segment_length=5,
        action_vocabulary=dict(kind="stable", capacity=12, overflow=2),
    )

    def make(env: dict | None = None, **policy):
        overrides = dict(policy=merge(small, policy), env=env or {})
        main, create = get_priorzero_config(
            env_id="tw-simple", presets=("pure_unizero",), overrides=overrides
        )
        return compile_priorzero(main, create, DIM)

    return make


@pytest.fixture(scope="session")
def scalar_of():
    """The tiny policy's transform of categorical logits `[n, S]` to scalars `[n, 1]`."""
    from lzero.policy import InverseScalarTransform

    return InverseScalarTransform(10, "cpu", True)


@pytest.fixture(scope="session")
def randomise():
    """LightZero starts the heads' last layers at zero, where any two computations agree; draw all
    weights anew.
    """
    import torch

    def redraw(model, seed: int = 0, scale: float = 0.5):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=generator)
                        * scale
                        / parameter.shape[-1] ** 0.5
                    )
                elif name.endswith("bias"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model.eval()

    return redraw


@pytest.fixture
def one_thread():
    """These networks are so small that torch's threads only wait for each other: 20 times slower on
    a busy machine.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_policy(compiled_cfg, encoder, one_thread):
    """A fresh tiny `PriorZeroPolicy` whose vocabulary knows "action 0".."action 7" as ids 0..7."""
    import torch

    from priorzero_policy import PriorZeroPolicy

    def make(seed: int = 0, actions: int = 8, **settings):
        torch.manual_seed(seed)
        policy = PriorZeroPolicy(compiled_cfg(**settings).policy)
        policy.attach_encoder(encoder.encode)
        policy.register_actions([f"action {i}" for i in range(actions)])
        return policy

    return make


@pytest.fixture
def make_buffer():
    """An empty buffer with a policy's settings."""
    from game_buffer_priorzero import PriorZeroGameBuffer

    def make(policy, seed: int = 0):
        return PriorZeroGameBuffer(policy.settings, DIM, seed)

    return make


@pytest.fixture(scope="session")
def story():
    """Path of a story file by name, from $PRIORZERO_GAMES or ../shared/games."""

    def find(name: str) -> str:
        folders = [Path(p) for p in os.environ.get("PRIORZERO_GAMES", "").split(os.pathsep) if p]
        for folder in (*folders, CHECKOUT.parent / "shared" / "games"):
            if (folder / name).is_file():
                return str(folder / name)
        pytest.skip(f"{name} is neither in $PRIORZERO_GAMES nor in ../shared/games")

    return find


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory) -> str:
    """A random LLM of 1.6 M parameters with a real tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from priorzero.llm.model import embedded_checkpoint
    from priorzero.types import PriorZeroError

    try:
        tokenizer = AutoTokenizer.from_pretrained(embedded_checkpoint())
    except PriorZeroError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("llm")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
