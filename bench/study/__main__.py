"""Command line of the study."""

import argparse
import signal
import sys
from pathlib import Path

from .plan import DEFAULT, load_plan
from .report import write_page, write_report
from .runner import run_in_turn, run_plan, status
from .summary import load_summary
from .worker import run_one


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of `python -m bench.study`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.study",
        description="Train the runs of a plan and compare them. A study that was stopped goes on where it was: "
        "finished runs are kept as one JSON file each, begun ones go on from their last epoch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--plan", type=Path, default=DEFAULT, metavar="FILE", help="which runs there are")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("bench/results/study"),
        metavar="DIR",
        help="where finished runs are kept, one file each",
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/study"), metavar="DIR", help="of unfinished runs, logs and maps"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--status", action="store_true", help="say what is done and how long the rest takes")
    what.add_argument("--report", type=Path, metavar="DIR", help="write study.md and its plots of what is done")
    what.add_argument(
        "--in-turn",
        action="store_true",
        help="do the runs one after the other in this process, which saves their start; several such processes can "
        "work on one plan",
    )
    what.add_argument("--only", metavar="NAME", help="do this one run, in this process")
    parser.add_argument(
        "--summary", type=Path, metavar="FILE", help="with --report: where its figures go (default: study.json in DIR)"
    )
    parser.add_argument(
        "--from-summary", type=Path, metavar="FILE", help="with --report: from these figures, without plan and runs"
    )
    args = parser.parse_args(argv)
    for flag in ("summary", "from_summary"):
        if getattr(args, flag) and not args.report:
            parser.error(f"--{flag.replace('_', '-')} needs --report DIR")
    if args.summary and args.from_summary:
        parser.error("--summary writes the file that --from-summary reads: give one of them")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes that were started end too
    try:
        if args.from_summary:
            write_page(load_summary(args.from_summary), args.report)
            return 0
        plan = load_plan(args.plan)
        if args.status:
            print(status(plan, args.results, args.work, args.jobs))
        elif args.report:
            write_report(plan, args.results, args.report, args.summary)
        elif args.only:
            specs = {spec.name: spec for spec in plan.specs}
            if args.only not in specs:
                raise ValueError(f"--only must be a run of the plan, such as {next(iter(specs))}, got {args.only}")
            return run_one(specs[args.only], args.results, args.work)
        elif args.in_turn:
            return 1 if run_in_turn(plan, args.results, args.work) else 0
        else:
            return 1 if run_plan(plan, args.results, args.work, args.jobs) else 0
    except (ValueError, OSError, ImportError) as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
