"""The decisions that a run's LLM learns from, as data sets of TRL or verl.

    python -m priorzero.export_samples RUN OUT --format trl|verl [--checkpoint latest|best|NAME]

Reads the run's config.json, one checkpoint's replay buffer and the LLM's tokenizer; no model is
loaded. The samples are drawn by the run's own buffer, with its own value targets. OUT appears by
rename when it is whole.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from priorzero.export import read_settings
from priorzero.llm.seen import FACTS
from priorzero.quiet import quiet_base
from priorzero.run.cli import calm_openmp
from priorzero.run.logs import setup_logging
from priorzero.run.output import new_folder, require_free
from priorzero.settings.experiment import ExperimentSettings
from priorzero.settings.record import overlay, require
from priorzero.types import PriorZeroError

if TYPE_CHECKING:
    from priorzero.llm.update.rows import Row, Texts
    from priorzero.llm.update.samples import LLMSample

logger = logging.getLogger("priorzero.export_samples")  # also where this module is __main__

# The buffer is a root file, which no room imports: it is found as DI-engine finds it, by name.
_BUFFER = "game_buffer_priorzero"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.export_samples", description=__doc__.splitlines()[0]
    )
    add_common_options(parser)
    parser.add_argument("--format", choices=["trl", "verl"], required=True)
    parser.add_argument(
        "--draws",
        type=int,
        default=4,
        help="trl: rows per decision, drawn from the search's policy",
    )
    parser.add_argument(
        "--parquet", action="store_true", help="Parquet instead of JSON lines; needs pyarrow"
    )
    return parser.parse_args(arguments)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """What every export of a run's decisions asks: see `read_decisions`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="an experiment's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; new, or empty")
    parser.add_argument(
        "--checkpoint", default="latest", help="latest, best or a checkpoint folder's name"
    )
    parser.add_argument("--count", type=int, help="decisions to draw; default: all")
    parser.add_argument(
        "--tokenizer", help="folder or hub name of the LLM, where the run's own is gone"
    )


def export_samples(args: argparse.Namespace) -> dict[str, Any]:
    """Write the samples of a run to a folder.

    Args:
        args: as `parse_arguments` gives them.

    Returns:
        What priorzero.json says.

    Raises:
        PriorZeroError: Something is missing, damaged or does not fit; nothing was written.
    """
    # Cheapest check first.
    require(
        {
            f"--{name}": (value, value is None or value > 0, "it must be positive")
            for name, value in (("count", args.count), ("draws", args.draws))
        }
    )
    require_free(args.out)
    if args.parquet and importlib.util.find_spec("pyarrow") is None:
        raise PriorZeroError(
            "--parquet needs the package pyarrow, which is not installed: pip install pyarrow, or "
            "leave it out; TRL and verl read JSON lines too"
        )
    decisions = read_decisions(args, args.format)

    # This loads torch, which should not delay --help or a wrong option.
    from priorzero.llm.update.rows import Texts

    texts, facts = Texts(decisions.tokenizer), decisions.facts
    with new_folder(args.out) as whole:
        whole.mkdir()
        facts["rows"] = {
            file: _write_rows(whole / file, rows, args.parquet)
            for file, rows in _files(decisions, texts, args)
        }
        facts["texts_that_tokenise_otherwise"] = texts.differing
        (whole / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return facts


def _files(
    decisions: Decisions, texts: Texts, args: argparse.Namespace
) -> Iterable[tuple[str, Iterable[Row]]]:
    """Names of the files and their rows."""
    import numpy as np

    from priorzero.llm.update.rows import sft_rows, unpaired_rows, verl_rows

    samples, settings = decisions.samples, decisions.settings
    ending = "parquet" if args.parquet else "jsonl"
    if args.format == "verl":
        yield (
            f"train.{ending}",
            verl_rows(
                samples,
                texts,
                settings.llm.prompt,
                decisions.tokenizer,
                decisions.facts["game"],
            ),
        )
        return
    rng = np.random.default_rng(settings.seed)
    yield f"sft.{ending}", sft_rows(samples, texts, args.draws, rng)
    yield f"unpaired.{ending}", unpaired_rows(samples, texts)


@dataclass(frozen=True)
class Decisions:
    """What a run's LLM learns from, with all that an export needs to write it.

    Attributes:
        samples: in the order drawn.
        settings: of the run.
        tokenizer: of its LLM.
        facts: what `priorzero.json` begins with.
    """

    samples: list[LLMSample]
    settings: ExperimentSettings
    tokenizer: Any
    facts: dict[str, Any]


def read_decisions(args: argparse.Namespace, form: str) -> Decisions:
    """The decisions that a command line asks for.

    Args:
        args: of `add_common_options`.
        form: name of what is written, for the facts.

    Raises:
        PriorZeroError: something is missing, damaged or does not fit.
    """
    settings = overlay(ExperimentSettings(), read_settings(args.run))

    # This loads torch, which should not delay --help or a wrong option.
    from priorzero.llm.model import load_tokenizer, resolve_llm

    samples, meta = read_samples(args.run, settings, args.checkpoint, args.count)
    name = args.tokenizer or settings.llm.model
    tokenizer = load_tokenizer(resolve_llm(name))
    _require_same_tokenizer(samples, tokenizer, settings, name)
    facts = {
        "run": str(args.run.resolve()),
        "checkpoint": meta["checkpoint"],
        "iteration": meta.get("iteration"),
        "game": meta.get("game"),
        "tokenizer": name,
        "format": form,
        "decisions": len(samples),
    }
    return Decisions(samples, settings, tokenizer, facts)


def read_samples(
    run: Path, settings: ExperimentSettings, checkpoint: str, count: int | None
) -> tuple[list[LLMSample], dict[str, Any]]:
    """What the run's LLM would draw from a checkpoint's replay buffer, as `sample_llm` of the
    buffer draws it.

    Args:
        run: the experiment's folder.
        settings: of the run.
        checkpoint: latest, best or a checkpoint folder's name.
        count: how many; None: all.

    Returns:
        samples, in the order drawn, and the checkpoint's meta facts.

    Raises:
        PriorZeroError: there is no checkpoint, or none of its decisions teaches an LLM.
    """
    from priorzero.data.archive import SegmentArchive
    from priorzero.run.checkpoint import CheckpointStore

    with quiet_base():
        from ding.utils import BUFFER_REGISTRY, import_module
    import_module([_BUFFER])

    state, meta = CheckpointStore(run / "ckpt").load_state(checkpoint)
    replay = _as_arrays(state.get("replay", {"chunks": [], "buffer": None}))
    limit = settings.policy.replay_save_mib * 2**20
    segments = SegmentArchive(run / "replay", limit).read(replay["chunks"])

    samples: list[LLMSample] = []
    if segments:
        dim = next(iter(segments.values())).steps[0].observation.shape[0]
        buffer = BUFFER_REGISTRY.get(_BUFFER)(settings.policy, dim, settings.seed)
        missing = buffer.load_state_dict(replay["buffer"], segments)
        if missing:
            logger.warning("%d transitions of %s are not on disk any more", missing, run)
        samples = buffer.sample_llm(count or buffer.get_num_of_transitions())
    if not samples:
        raise PriorZeroError(
            f"checkpoint {meta['checkpoint']} of {run} holds no decision that a search and an LLM "
            "took part in: its replay buffer is empty, was not saved (policy.replay_save_mib), or "
            "the LLM played alone"
        )
    return samples, meta


def _as_arrays(tree: Any) -> Any:
    """Tensors as numpy arrays; the rest as it is."""
    if isinstance(tree, Mapping):
        return {name: _as_arrays(value) for name, value in tree.items()}
    return tree.numpy() if hasattr(tree, "numpy") else tree


def _require_same_tokenizer(
    samples: list[LLMSample], tokenizer, settings: ExperimentSettings, name: str
) -> None:
    """Raise PriorZeroError where a prompt does not end as every prompt does, in this tokenizer's
    eyes, or has ids that it does not know.
    """
    from priorzero.llm.prompts import opening_of
    from priorzero.llm.update.rows import given

    known = max(max(sample.request.prompt_ids) for sample in samples) < len(tokenizer)
    text = tokenizer.decode(list(given(samples[0]))) if known else ""
    if not text.endswith(opening_of(settings.llm.prompt)):
        raise PriorZeroError(
            f"the run's prompts were not made with the tokenizer of {name!r}; name the folder or "
            "hub name of the run's LLM with --tokenizer"
        )


def _write_rows(path: Path, rows: Iterable[Row], parquet: bool) -> int:
    """Write a file; returns the number of its rows."""
    if parquet:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(list(rows))
        pyarrow.parquet.write_table(table, path)
        return table.num_rows

    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, row in enumerate(rows, 1):  # noqa: B007 (the last number is the result)
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    return count


def main(arguments: list[str] | None = None) -> int:
    """The command.

    Returns:
        The exit status: 0, or 2 for a fault the user can mend.
    """
    calm_openmp()
    setup_logging(None)
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        facts = export_samples(args)
    except PriorZeroError as error:
        logger.error("Error: %s", error)
        return 2
    if facts["texts_that_tokenise_otherwise"]:
        logger.warning(
            "%d texts would be split into other tokens than were scored; the columns with token "
            "ids hold those",
            facts["texts_that_tokenise_otherwise"],
        )
    logger.info(
        "✓ Wrote %s: %d decisions of %s, %s",
        args.out,
        facts["decisions"],
        facts["run"],
        ", ".join(f"{count} rows in {file}" for file, count in facts["rows"].items()),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
