"""The trained LLM of a run as an ordinary Hugging Face folder.

    python -m priorzero.export RUN OUT [--checkpoint latest|best|NAME] [--adapter]

Reads the run's config.json and the LLM's part of one checkpoint, loads the base model, lays the
trained weights over it and writes them with everything that a loader needs. Adapters are merged in
float32, or written apart in PEFT's format. OUT appears by rename when it is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from priorzero.llm.seen import FACTS, Seen, SeenGame, seen_of
from priorzero.run.cli import calm_openmp
from priorzero.run.experiment import saved_settings
from priorzero.run.logs import setup_logging
from priorzero.run.output import new_folder, require_free
from priorzero.settings.llm import LoraSettings
from priorzero.settings.record import overlay
from priorzero.types import PriorZeroError

if TYPE_CHECKING:
    import torch

    from priorzero.llm.weights.export import Weights

logger = logging.getLogger("priorzero.export")  # also where this module is __main__


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.export", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="an experiment's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; new, or empty")
    parser.add_argument(
        "--checkpoint", default="latest", help="latest, best or a checkpoint folder's name"
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write the low-rank adapters apart, in PEFT's format, instead of merged",
    )
    parser.add_argument(
        "--base", help="folder or hub name of the base model, where the run's own is gone"
    )
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class RunLLM:
    """What a run's config.json says of its LLM.

    Attributes:
        model: `llm.model`.
        lora: `llm.lora`, in which the adapters' scale stands.
    """

    model: str
    lora: LoraSettings


def read_run(folder: Path) -> RunLLM:
    """The LLM of a run.

    Raises:
        PriorZeroError: It is no run's folder, or the run has no LLM.
    """
    llm = read_settings(folder)["llm"]
    settings = overlay(LoraSettings(), llm["lora"], path="llm.lora.")
    settings.validate("llm.lora.")
    return RunLLM(llm["model"], settings)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings in the config.json of a run with an LLM, as nested dictionaries.

    Raises:
        PriorZeroError: It is no run's folder, or the run has no LLM.
    """
    settings = saved_settings(folder, "llm.enable", "llm.model", "llm.lora")
    if not settings["llm"]["enable"]:
        raise PriorZeroError(f"the run {folder} has no LLM (llm.enable is false): nothing to write")
    return settings


def export(
    run: Path, out: Path, *, checkpoint: str = "latest", adapter: bool = False, base: str | None
) -> dict[str, Any]:
    """Write the trained LLM of a run to a folder.

    Args:
        run: The experiment's folder.
        out: New, or an empty folder.
        checkpoint: latest, best or a checkpoint folder's name.
        adapter: Write adapters apart.
        base: Folder or hub name of the base model; None: as checkpoint and run say.

    Returns:
        What priorzero.json says.

    Raises:
        PriorZeroError: Something is missing, damaged or does not fit; nothing was written.
    """
    # These load torch, which should not delay --help or a wrong option.
    from priorzero.llm.weights.trained import base_of, has_adapters, restore
    from priorzero.run.checkpoint import CheckpointStore

    # Cheapest check first.
    require_free(out)
    llm = read_run(run)
    state, meta = CheckpointStore(run / "ckpt").load_llm(checkpoint)
    if "model" not in state:
        raise PriorZeroError(
            f"checkpoint {meta['checkpoint']} of {run} holds no weights of the built-in trainer; "
            "only what that one trains can be written"
        )
    if adapter and not has_adapters(state):
        raise PriorZeroError(f"the run {run} trained all weights, no adapters; leave out --adapter")

    # The checkpoint knows where its model lay; the folder may have moved since.
    trained_from = base_of(state)
    named = [trained_from.name] if trained_from else []
    weights, tokenizer = restore(state, [base] if base else [*named, llm.model], llm.lora)

    facts = {
        "run": str(run.resolve()),
        "checkpoint": meta["checkpoint"],
        "iteration": meta.get("iteration"),
        "llm_version": meta.get("llm_version"),
        "game": meta.get("game"),
        "base": trained_from.as_dict() if trained_from else {"name": base or llm.model},
        "form": "adapter" if adapter else "merged" if has_adapters(state) else "all weights",
        "seen": _seen(run, meta).as_list(),
    }
    write_llm(weights, tokenizer, facts, out, adapter)
    return facts


def trained_llm(run: Path, checkpoint: str = "latest") -> Path:
    """The trained LLM of a run as a folder in the cache, for `llm.model` of another run. Written
    once per checkpoint.

    Args:
        run: the experiment's folder.
        checkpoint: latest, best or a checkpoint folder's name.

    Raises:
        PriorZeroError: as `export`.
    """
    from priorzero.llm.model import cache_dir
    from priorzero.run.checkpoint import CheckpointStore

    read_run(run)
    saved = CheckpointStore(run / "ckpt").path_of(checkpoint)
    meta = (saved / "meta.json").stat()
    told = f"{saved.resolve()} {meta.st_size} {meta.st_mtime_ns}"
    digest = hashlib.sha256(told.encode()).hexdigest()[:12]
    folder = cache_dir() / f"from-{run.resolve().name}-{saved.name}-{digest}"
    if not (folder / FACTS).is_file():
        logger.info("Writing the LLM of %s to %s once", run, folder)
        export(run, folder, checkpoint=saved.name, base=None)
    return folder


def _seen(run: Path, meta: Mapping[str, Any]) -> Seen:
    """Games this LLM was trained on; checkpoints of early versions name the run's game alone."""
    if "llm_seen" in meta:
        return seen_of(meta["llm_seen"])
    game = str(meta.get("game"))
    return Seen((SeenGame(game, game, str(run.resolve())),))


def write_llm(
    weights: Weights,
    tokenizer,
    facts: dict[str, Any],
    out: Path,
    adapter: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> None:
    """Write an LLM as a Hugging Face folder, whole or not at all.

    Args:
        weights, tokenizer: of the LLM.
        facts: what `priorzero.json` says.
        out: new, or an empty folder.
        adapter: the low-rank adapters apart, in PEFT's format.
        adapter_dtype: of theirs; None: as they are.

    Raises:
        PriorZeroError: it cannot be written.
    """
    from safetensors import SafetensorError

    with new_folder(out, SafetensorError) as whole:
        if adapter:
            weights.save_adapter(whole, adapter_dtype)
        else:
            weights.save(whole)
        tokenizer.save_pretrained(whole)
        generation = weights.generation_config
        if generation is not None and not adapter:
            # save_pretrained would refuse what some published models say.
            generation.to_json_file(whole / "generation_config.json")
        (whole / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        # safetensors makes files that nobody else may read; this folder is for others too.
        for path in whole.glob("*.safetensors"):
            shutil.copymode(whole / FACTS, path)


def main(arguments: list[str] | None = None) -> int:
    """The command.

    Returns:
        The exit status: 0, or 2 for a fault the user can mend.
    """
    calm_openmp()
    setup_logging(None)
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        facts = export(
            args.run, args.out, checkpoint=args.checkpoint, adapter=args.adapter, base=args.base
        )
    except PriorZeroError as error:
        logger.error("Error: %s", error)
        return 2
    logger.info(
        "✓ Wrote %s: %s of %s, trained from %s on %s (%s)",
        args.out,
        facts["checkpoint"],
        facts["run"],
        facts["base"]["name"],
        facts["game"],
        facts["form"],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
