"""Updates per second of the world model: ours against LightZero 0.2.0's stock text path, in one
process, in turns.

    python -m benchmarks.world_model --env-id detective.z5 --batch-size 64 --unroll 10 --embed-dim
    512 --layers 2

    --also float32,bfloat16+default,bfloat16+reduce-overhead    adds variants of ours

Both learn from the same steps of random play of a real game, with the same batch size, unroll,
width, layers, heads, action space and sentence encoder. An update of ours draws a batch from the
buffer, computes bootstrap values with the target network, does forward, backward and optimiser step
and moves the target network. An update of the stock path is `UniZeroPolicy._forward_learn` on
`obs_type='text'`: every observation of every unrolled step goes through the language model twice,
once for the online and once for the target network.

What favours the stock path here, so that the ratio is a lower bound:

* its encoder is the embedded all-MiniLM-L6-v2 (22 M parameters), not the BERT-base (110 M)
  LightZero takes by default;
* its texts are tokenised once beforehand, its batches are assembled outside the clock, and its
  value targets are given (in LightZero the buffer computes them with a further pass of the target
  network over re-encoded texts);
* LightZero calls the language model under `torch.no_grad()` by default, so its backward pass is not
  part of the cost. The benchmark checks this and reports it as `stock_encoder_gradients`.

LightZero pads every text to 512 tokens (`padded`, the stock path as it is). `trimmed` is a kinder
variant that pads to the longest text of the game only. The stock path encodes all rows of a batch
at once: with batch 64 and unroll 10 that is 640 rows of 512 tokens, several GiB and minutes per
update on a CPU; the default sizes are the debug run's.

Our encoder sees each distinct text once; that cost is reported beside the speed (`encode_seconds`)
and once spread over the updates that were timed (`ours_with_encoding`: with few timed updates it
says little about a run of thousands).

`ours` is timed as the training stage works: a block of updates, whose numbers are read at the end,
so that a GPU computes while the next batch is drawn. `batch` says what drawing costs: milliseconds,
and as a share of an update's time (on a GPU they overlap). A variant of ours is a number format,
and after a plus a mode of `policy.compile_update`; `first_update_seconds` holds its compilation.
`losses` are means over the same batches from the same weights, after `--settle` updates: what
bfloat16 may change little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common import (
    PlayedStep,
    finish,
    quiet_logging,
    random_play,
    say,
    synchronize,
)
from priorzero.run.provenance import machine_facts

VARIANTS = ("padded", "trimmed")
OURS = "ours"
"""The name of our update with the settings' defaults; variants of it add their own."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.world_model", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--env-id", default="tw-simple", help="game the texts come from")
    parser.add_argument("--steps", type=int, default=200, help="steps of random play in the buffer")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--unroll", type=int, default=5)
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--updates", type=int, default=30, help="timed updates of ours")
    parser.add_argument(
        "--stock-updates", type=int, default=3, help="timed updates of each stock variant, at most"
    )
    parser.add_argument(
        "--stock-seconds", type=float, default=300.0, help="a stock variant stops after this"
    )
    parser.add_argument(
        "--stock", default=",".join(VARIANTS), help=f"variants, of {','.join(VARIANTS)}"
    )
    parser.add_argument(
        "--also",
        default="",
        help="variants of ours: float32 or bfloat16, +default or +reduce-overhead",
    )
    parser.add_argument("--settle", type=int, default=10, help="updates before losses are compared")
    parser.add_argument("--max-seq-len", type=int, default=512, help="tokens LightZero pads to")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=int, default=0)

    args = parser.parse_args(arguments)
    unknown = [v for v in filter(None, args.stock.split(",")) if v not in VARIANTS]
    if unknown:
        parser.error(f"--stock {', '.join(unknown)} is unknown; there are {', '.join(VARIANTS)}")
    if args.unroll < 4:
        parser.error("--unroll must be at least 4: LightZero's loss reports on a middle step")
    return args


def build_ours(
    args: argparse.Namespace, played: list[PlayedStep], encoder, folder: str, **changes: str
):
    """A policy of this project, always with the same weights, that knows the actions.

    DI-engine wants a folder for the experiment; `folder` is a temporary one.

    Args:
        changes: of the policy's settings.

    Returns:
        (policy, compiled policy settings).
    """
    import torch

    from priorzero.lightzero import compile_priorzero
    from priorzero_config import get_priorzero_config
    from priorzero_policy import PriorZeroPolicy

    actions = len({a for step in played for a in step.state.valid_actions})
    overrides = {
        "policy": dict(
            device=args.device,
            batch_size=args.batch_size,
            num_unroll_steps=args.unroll,
            embed_dim=args.embed_dim,
            num_layers=args.layers,
            num_heads=args.heads,
            context_steps=min(4, args.unroll),
            action_vocabulary=dict(capacity=actions + 2, overflow=1),
            **changes,
        )
    }
    cfg, create = get_priorzero_config(
        env_id=args.env_id, seed=args.seed, exp_name=folder, enable_llm=False, overrides=overrides
    )
    compiled = compile_priorzero(cfg, create, encoder.dim).policy
    torch.manual_seed(args.seed)
    policy = PriorZeroPolicy(compiled)
    policy.attach_encoder(encoder.encode)
    for step in played:
        policy.register_actions(step.state.valid_actions)
    return policy, compiled


def build_variants(args: argparse.Namespace, played: list[PlayedStep], encoder, folder: str):
    """Policies of ours by name, the default one first, and its compiled settings."""
    policy, compiled = build_ours(args, played, encoder, folder)
    policies = {OURS: policy}
    for name in filter(None, args.also.split(",")):
        dtype, _, mode = name.partition("+")
        changes = dict(train_dtype=dtype, compile_update=mode or "off")
        policies[f"{OURS} {name}"], _ = build_ours(args, played, encoder, folder, **changes)
    return policies, compiled


def make_segments(played: list[PlayedStep], policy, encoder) -> list:
    """Segments as the collector writes them, with one visit per action in place of a search."""
    from priorzero.data.segment import Segment, StepRecord

    vectors = encoder.encode([s.state.observation for s in played])
    after = encoder.encode([s.next_text for s in played])
    segments, current = [], None
    for number, step in enumerate(played):
        if current is None or current.episode_id != step.episode or current.is_full():
            current = Segment(0, step.episode, policy.settings.game_segment_length)
            segments.append(current)
        valid = step.state.valid_actions
        ids = np.asarray(policy.register_actions(valid))
        uniform = np.full(len(valid), 1 / len(valid))
        record = StepRecord(
            state=step.state,
            observation=vectors[number],
            valid_actions=valid,
            valid_ids=ids,
            action_index=valid.index(step.action),
            visit_counts=np.ones(len(valid)),
            behaviour=uniform,
            target_policy=uniform,
            root_value=0.0,
            predicted_value=0.0,
            reward=step.reward,
            done_kind=step.done_kind,
            timestep=step.timestep,
        )
        current.record(record, after[number])
    return segments


def build_stock(
    args: argparse.Namespace, device: str, actions: int, tokens: int, encoder_folder: str
):
    """LightZero's own policy on text observations of `tokens` tokens."""
    from easydict import EasyDict

    from priorzero.quiet import quiet_base

    with quiet_base():
        from ding.utils import deep_merge_dicts
        from lzero.policy.unizero import UniZeroPolicy

        world_model = dict(
            continuous_action_space=False,
            tokens_per_block=2,
            max_blocks=args.unroll,
            max_tokens=2 * args.unroll,
            context_length=2 * min(4, args.unroll),
            device=device,
            action_space_size=actions,
            num_layers=args.layers,
            num_heads=args.heads,
            embed_dim=args.embed_dim,
            obs_type="text",
            env_num=1,
            num_simulations=1,
            rotary_emb=False,
            group_size=8,
            support_size=101,
        )
        model = dict(
            model_type="mlp",
            observation_shape=tokens,
            action_space_size=actions,
            encoder_url=encoder_folder,
            continuous_action_space=False,
            norm_type="LN",
            world_model_cfg=world_model,
        )
        changes = dict(
            model=model,
            device=device,
            cuda=device == "cuda",
            batch_size=args.batch_size,
            num_unroll_steps=args.unroll,
            collector_env_num=1,
            evaluator_env_num=1,
            use_wandb=False,
            multi_gpu=False,
        )
        return UniZeroPolicy(EasyDict(deep_merge_dicts(UniZeroPolicy.default_config(), changes)))


def tokenise(
    encoder_folder: str, texts: list[str], limit: int, trimmed: bool
) -> dict[str, np.ndarray]:
    """Token ids `[L]` of each distinct text, padded as LightZero's Jericho environment does, or to
    the longest.
    """
    from transformers import AutoTokenizer

    distinct = sorted(set(texts))
    ids = AutoTokenizer.from_pretrained(encoder_folder)(
        distinct, truncation=True, max_length=limit, padding="longest" if trimmed else "max_length"
    )["input_ids"]
    return {text: np.asarray(row, dtype=np.int64) for text, row in zip(distinct, ids, strict=True)}


def stock_data(
    batch, played: list[PlayedStep], tokens: dict[str, np.ndarray], cfg, iteration: int
) -> list:
    """One of our batches in the shape `UniZeroPolicy._forward_learn` takes: the same rows, as token
    ids.
    """
    unroll = cfg.num_unroll_steps
    rows = []
    for index in batch.indices:
        texts = []
        for k in range(unroll + 1):
            at = int(index) + k
            inside = at < len(played) and played[at].episode == played[index].episode
            texts.append(
                tokens[played[at].state.observation if inside else _last_text(played, int(index))]
            )
        rows.append(np.concatenate(texts))
    size = len(batch)

    def pad(x: np.ndarray) -> np.ndarray:
        """One more step, masked out."""
        return np.concatenate([x, np.zeros_like(x[:, :1])], axis=1)

    timesteps = np.tile(np.arange(unroll), (size, 1))
    policies = np.concatenate([batch.policies, batch.policies[:, -1:]], axis=1)
    current = [
        np.stack(rows),
        batch.actions,
        batch.actions,
        pad(batch.mask_step),
        batch.indices,
        batch.weights,
        [],
        timesteps,
    ]
    return [current, [pad(batch.rewards), pad(batch.returns), policies], iteration]


def _last_text(played: list[PlayedStep], index: int) -> str:
    while index + 1 < len(played) and played[index + 1].episode == played[index].episode:
        index += 1
    return played[index].next_text


def timed(work: Callable[[], Any]) -> float:
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


class OurUpdates:
    """A policy of ours and what it learns from.

    Args:
        sample: draws a batch.
    """

    def __init__(self, policy, sample: Callable[[], Any]) -> None:
        self._learn, self._sample = policy.learn_mode.forward, sample

    def settle(self, batches: list, seed: int) -> tuple[float, dict[str, float]]:
        """Learn from these batches, with the same dropout whoever does it.

        Returns:
            seconds of the first update, and the losses' means over the second half.
        """
        import torch

        torch.manual_seed(seed)
        first = timed(lambda: self._learn(batches[0]).metrics)
        told = [self._learn(batch).metrics for batch in batches]
        later = told[len(told) // 2 :]
        losses = [name for name in later[0] if name.endswith("loss")]
        return first, {n: statistics.mean(one[n] for one in later) for n in losses}

    def block(self, count: int) -> None:
        """So many updates, as the training stage makes them."""
        outputs = [self._learn(self._sample()) for _ in range(count)]
        assert all(output.metrics for output in outputs)


def measure(
    args: argparse.Namespace, ours: dict[str, OurUpdates], stock: dict[str, Callable[[], Any]]
) -> dict[str, list[float]]:
    """Seconds per update, in turns: a share of our updates, then one of each stock variant, and
    again. An update of ours is timed as the mean of its block.
    """
    seconds: dict[str, list[float]] = {name: [] for name in (*ours, *stock)}
    rounds = max(1, args.stock_updates)
    for turn in range(rounds):
        count = args.updates * (turn + 1) // rounds - args.updates * turn // rounds
        for name, updates in ours.items():
            if count:
                mean = timed(lambda updates=updates, count=count: updates.block(count)) / count
                seconds[name] += [mean] * count
        for name, update in stock.items():
            if not seconds[name] or sum(seconds[name]) < args.stock_seconds:
                seconds[name].append(timed(update))
                say(
                    f"stock ({name}) update {len(seconds[name])}: {seconds[name][-1]:.2f} s; "
                    f"ours so far: {statistics.median(seconds[OURS]):.4f} s"
                )
    return seconds


def report(
    args: argparse.Namespace, seconds: dict[str, list[float]], extra: dict[str, Any]
) -> dict[str, Any]:
    """The JSON line. Speeds are from median times; `speedup` is against the stock path as it is."""
    rate = {name: 1 / statistics.median(s) for name, s in seconds.items()}
    spread = extra["encode_seconds"] / len(seconds[OURS])
    counts = {name: len(s) for name, s in seconds.items()}
    result = {
        "benchmark": "world_model",
        "updates_per_second": rate,
        "timed_updates": counts,
        "ours_with_encoding": 1 / (1 / rate[OURS] + spread),
    }
    for name in seconds:
        if not name.startswith(OURS):
            result["speedup" if name == "padded" else f"speedup_{name}"] = rate[OURS] / rate[name]
    keys = ("env_id", "batch_size", "unroll", "embed_dim", "layers", "heads", "seed")
    return (
        result
        | extra
        | {"settings": {k: getattr(args, k) for k in keys}, "machine": machine_facts()}
    )


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    quiet_logging()

    from game_buffer_priorzero import PriorZeroGameBuffer
    from priorzero.lightzero import resolve_device
    from priorzero.text.encoder import SentenceEncoder

    played = random_play(args.env_id, args.steps, args.seed)
    encoder = SentenceEncoder("auto", device=resolve_device(args.device), cache_bytes=256 * 2**20)
    with tempfile.TemporaryDirectory(prefix="priorzero-benchmark-") as work:
        policies, cfg = build_variants(args, played, encoder, work)
    buffer = PriorZeroGameBuffer(cfg.settings, encoder.dim, seed=args.seed)
    buffer.push_game_segments(make_segments(played, policies[OURS], encoder))
    counted = encoder.stats()
    say(
        f"{len(played)} steps of {args.env_id}: {counted['misses']:.0f} distinct texts encoded in "
        f"{counted['seconds']:.2f} s"
    )

    # Ours: the same batches for every variant first, which also warms it up.
    drawing: list[float] = []
    same: list = []
    for _ in range(max(2, args.settle)):
        drawing.append(timed(lambda: same.append(buffer.sample(args.batch_size))))
    ours, settled = {}, {}
    for name, policy in policies.items():
        ours[name] = OurUpdates(policy, lambda: buffer.sample(args.batch_size))
        settled[name] = ours[name].settle(same, args.seed)
        say(f"{name}: first update {settled[name][0]:.2f} s")

    stock, stock_policies, lengths = build_all_stock(args, played, cfg, same[0])
    seconds = measure(args, ours, stock)
    language_models = [s._model.representation_network.model for s in stock_policies]
    gradients = any(p.grad is not None for model in language_models for p in model.parameters())

    draw_seconds = statistics.median(drawing)
    facts = {
        "batch": {
            "ms": 1000 * draw_seconds,
            "share": draw_seconds / statistics.median(seconds[OURS]),
        },
        "first_update_seconds": {name: first for name, (first, _) in settled.items()},
        "losses": {name: losses for name, (_, losses) in settled.items()},
        "distinct_texts": int(counted["misses"]),
        "encode_seconds": counted["seconds"],
        "stock_tokens": lengths,
        "stock_encoder_gradients": gradients,
        "device": cfg.device,
    }
    finish(report(args, seconds, facts))
    return 0


def build_all_stock(args: argparse.Namespace, played: list[PlayedStep], cfg, batch):
    """One update of each stock variant, all on the rows of this batch, as functions by name; their
    policies; and the tokens of their texts by name.
    """
    from priorzero.text.encoder import embedded_folder

    folder, texts = (
        str(embedded_folder()),
        [t for s in played for t in (s.state.observation, s.next_text)],
    )
    updates, policies, lengths = {}, [], {}
    for name in filter(None, args.stock.split(",")):
        tokens = tokenise(folder, texts, args.max_seq_len, trimmed=name == "trimmed")
        lengths[name] = len(next(iter(tokens.values())))
        policy = build_stock(args, cfg.device, cfg.model.action_space_size, lengths[name], folder)
        data = stock_data(batch, played, tokens, cfg, 0)
        updates[name] = lambda policy=policy, data=data: policy._forward_learn(data)
        policies.append(policy)
    return updates, policies, lengths


if __name__ == "__main__":
    sys.exit(main())
