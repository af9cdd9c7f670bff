"""One run, or two beside each other, as one HTML page: curves, evaluations, recorded decisions.

    python -m priorzero.view data_priorzero/RUN [data_priorzero/OTHER] [--out page.html]
    python -m priorzero.view data_priorzero/RUN --serve

The page needs a browser and nothing else: no server, no network. With --serve a small server on
this machine makes it anew from the files of a run that goes on.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from priorzero.run.logs import setup_logging
from priorzero.settings.record import require
from priorzero.types import PriorZeroError
from priorzero.viewer.page import make_page
from priorzero.viewer.runs import read_run
from priorzero.viewer.server import make_server

logger = logging.getLogger("priorzero.view")  # also where this module is __main__

PAGE = "decisions.html"
"""The page's name in a run's folder."""
EPISODES = 200
"""Most recorded episodes per run, unless told otherwise."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m priorzero.view", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="an experiment's folder")
    parser.add_argument(
        "other", type=Path, metavar="RUN2", nargs="?", help="a second one, to stand beside it"
    )
    parser.add_argument(
        "--out", type=Path, help=f"file to write; default: {PAGE} in the (first) run"
    )
    parser.add_argument(
        "--episodes",
        type=int,
        default=EPISODES,
        help="most recorded episodes per run; evaluations first, newest first (default: "
        f"{EPISODES})",
    )
    parser.add_argument(
        "--serve", action="store_true", help="show a run that goes on, instead of writing a file"
    )
    parser.add_argument("--port", type=int, default=8642, help="of --serve; 0: a free one")
    return parser.parse_args(arguments)


def stamp_of(runs: list[Path]) -> str:
    """Changes when a run has written something that the page shows."""
    files = [
        path
        for run in runs
        for path in (run / "log" / "metrics.jsonl", *(run / "decisions").glob("*.jsonl.gz"))
        if path.is_file()
    ]
    newest = max((path.stat().st_mtime_ns for path in files), default=0)
    return f"{newest}-{sum(path.stat().st_size for path in files)}"


def write_page(runs: list[Path], out: Path, episodes: int = EPISODES) -> None:
    """Write the page to a file.

    Raises:
        PriorZeroError: a run cannot be read, or the file cannot be written.
    """
    page = make_page([read_run(run, episodes) for run in runs])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise PriorZeroError(f"{out} could not be written ({error}); name another --out") from error


def serve(runs: list[Path], port: int, episodes: int) -> None:
    """Show the page until Ctrl-C.

    Raises:
        PriorZeroError: a run cannot be read, or the port is taken.
    """

    def page() -> str:
        stamp = stamp_of(runs)
        return make_page([read_run(run, episodes) for run in runs], stamp)

    page()  # a wrong folder is told here, not in the browser
    with make_server(port, lambda: stamp_of(runs), page) as server:
        logger.info("http://127.0.0.1:%d shows it; Ctrl-C ends", server.server_address[1])
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


def main(arguments: list[str] | None = None) -> int:
    """The command.

    Returns:
        The exit status: 0, or 2 for a fault the user can mend.
    """
    setup_logging(None)
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    runs = [run for run in (args.run, args.other) if run is not None]
    try:
        require(
            {
                "--episodes": (args.episodes, args.episodes > 0, "it must be positive"),
                "--port": (args.port, 0 <= args.port < 65536, "it must lie in 0..65535"),
            }
        )
        if args.serve:
            serve(runs, args.port, args.episodes)
        else:
            out = args.out or args.run / PAGE
            write_page(runs, out, args.episodes)
            logger.info("✓ Wrote %s (%.1f MB)", out, out.stat().st_size / 1e6)
    except PriorZeroError as error:
        logger.error("Error: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
