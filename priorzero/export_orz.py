"""The decisions of a run as prompts for Open-Reasoner-Zero in an environment of its own.

    python -m priorzero.export_orz RUN OUT [--checkpoint latest|best|NAME]

Reads what `priorzero.export_samples` reads. OUT/prompts.json is what ORZ's experiments name in
`prompt_data`: a list of dialogues, each a question and the true answer. What ORZ then trains comes
back as a Hugging Face folder (`--llm FOLDER`). OUT appears by rename when it is whole.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from typing import Any

from priorzero.export import FACTS
from priorzero.export_samples import add_common_options, read_decisions
from priorzero.run.cli import calm_openmp
from priorzero.run.logs import setup_logging
from priorzero.run.output import new_folder, require_free
from priorzero.settings.record import require
from priorzero.types import PriorZeroError

logger = logging.getLogger("priorzero.export_orz")  # also where this module is __main__
PROMPTS = "prompts.json"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.export_orz", description=__doc__.splitlines()[0]
    )
    add_common_options(parser)
    return parser.parse_args(arguments)


def export_orz(args: argparse.Namespace) -> dict[str, Any]:
    """Write a run's decisions as prompts.

    Args:
        args: as `parse_arguments` gives them.

    Returns:
        What priorzero.json says.

    Raises:
        PriorZeroError: Something is missing, damaged or does not fit; nothing was written.
    """
    positive = args.count is None or args.count > 0
    require({"--count": (args.count, positive, "it must be positive")})
    require_free(args.out)
    decisions = read_decisions(args, "orz")

    # This loads torch, which should not delay --help or a wrong option.
    from priorzero.llm.update.rows import Texts, orz_dialogue

    texts, prompt = Texts(decisions.tokenizer), decisions.settings.llm.prompt
    dialogues = [orz_dialogue(one, texts, prompt, decisions.tokenizer) for one in decisions.samples]
    with new_folder(args.out) as whole:
        whole.mkdir()
        text = json.dumps(dialogues, ensure_ascii=False, indent=1, allow_nan=False)
        (whole / PROMPTS).write_text(text, encoding="utf-8")
        (whole / FACTS).write_text(json.dumps(decisions.facts, indent=1), encoding="utf-8")
    return decisions.facts


def main(arguments: list[str] | None = None) -> int:
    """The command.

    Returns:
        The exit status: 0, or 2 for a fault the user can mend.
    """
    calm_openmp()
    setup_logging(None)
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        facts = export_orz(args)
    except PriorZeroError as error:
        logger.error("Error: %s", error)
        return 2
    logger.info("✓ Wrote %s: %d decisions of %s", args.out, facts["decisions"], facts["run"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
