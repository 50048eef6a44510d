"""The `trilith` command. torch is imported only where a command needs it; a mistake in the input ends with exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trilith.errors import ConfigError, ScheduleError, TopologyError, TrilithError

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 the run failed, 2 the input is wrong, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    except TrilithError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trilith", description="Train large models over DP x PP x TP from one JSON file."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train what a config describes")
    _config_arguments(train)
    train.set_defaults(run=_train)

    check = commands.add_parser("check", help="print the resolved run, or everything that is wrong with it")
    _config_arguments(check)
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(run=_check)

    schedule = commands.add_parser("schedule", help="draw and price a pipeline schedule")
    which = schedule.add_mutually_exclusive_group(required=True)
    which.add_argument("--name", help="its name, as in pipeline.schedule (with --stages and --microbatches)")
    which.add_argument("--file", type=Path, help="the text file that holds it, as in pipeline.schedule_file")
    schedule.add_argument("--stages", type=int, help="pipeline ranks")
    schedule.add_argument("--microbatches", type=int)
    schedule.add_argument("--virtual", type=int, help="stages per rank (default: what the schedule asks for, or 1)")
    schedule.add_argument(
        "--costs",
        default="1,1,1,0",
        metavar="F,B,W,TRANSFER",
        help="times of forward, input gradient, weight gradient of a stage, and of a message (default 1,1,1,0)",
    )
    schedule.add_argument("--png", type=Path, help="write the timeline as a picture")
    schedule.add_argument("--write", type=Path, metavar="FILE", help="write it as a text file, to change and to run")
    schedule.add_argument("--json", action="store_true", help="print one JSON object")
    schedule.set_defaults(run=_schedule)

    trace = commands.add_parser("trace", help="show the last step of a run, measured beside simulated")
    trace.add_argument("path", type=Path, metavar="RUN", help="the run's directory, or the timeline.json in it")
    trace.add_argument("--png", type=Path, metavar="FILE", help="write it as a picture")
    trace.add_argument(
        "--chrome", type=Path, metavar="FILE", help="write it as a trace for Perfetto or chrome://tracing"
    )
    trace.set_defaults(run=_trace)

    parity = commands.add_parser("parity", help="run two configs and name the first tensor that differs")
    parity.add_argument("a", type=Path, metavar="A.json")
    parity.add_argument("b", type=Path, metavar="B.json", nargs="?", help="default: A on one process")
    parity.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="for both")
    parity.add_argument(
        "--set-b", dest="overrides_b", action="append", default=[], metavar="KEY=VALUE", help="for B only"
    )
    parity.add_argument("--steps", type=int, default=2, help="steps to compare (default 2)")
    parity.add_argument("--rtol", type=float, help="default 1e-10 in fp64, 1e-4 in fp32, 2e-2 in half precision")
    parity.add_argument("--json", action="store_true", help="print one JSON object")
    parity.set_defaults(run=_parity)

    data = commands.add_parser("data", help="build a data set").add_subparsers(required=True, metavar="ACTION")
    build = data.add_parser(
        "build", help="tokenise text, JSON lines (also .gz) or parquet into PREFIX.bin and PREFIX.idx"
    )
    build.add_argument("inputs", nargs="+", type=Path, help=".txt, .jsonl, .jsonl.gz or .parquet")
    build.add_argument("--output", required=True, type=Path, metavar="PREFIX")
    build.add_argument("--tokenizer", type=Path, help="a tokenizer.json; without it one is trained")
    build.add_argument("--vocab-size", type=int, default=4096, help="of a tokenizer trained here (default 4096)")
    build.add_argument("--json-key", default="text", help="field or column that holds the text (default text)")
    build.set_defaults(run=_data_build)

    doctor = commands.add_parser("doctor", help="print the environment in one block")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.json")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, e.g. training.steps=20",
    )
    parser.add_argument("--world-size", type=int, help="number of ranks (default: the product of the degrees)")


def _train(args: argparse.Namespace) -> int:
    import trilith_launcher
    from trilith import preflight
    from trilith.data.batch import prepare_data

    try:
        joined = trilith_launcher.join_from_environment()
    except ValueError as error:
        raise TopologyError(str(error)) from None
    world_size = joined.world_size if joined else args.world_size
    local_ranks = joined.local_world_size if joined else None
    plan = preflight.plan(args.config, args.overrides, world_size, local_ranks)
    if joined:
        from trilith import runner

        return runner.run_under_torchrun(joined, plan)
    prepare_data(plan.config.data, lambda text: print(text, flush=True))
    return trilith_launcher.launch(
        "trilith.runner:run_rank",
        {"resolved": plan.resolved.to_json()},
        num_ranks=plan.world_size,
        threads_per_rank=plan.config.run.threads,
        preload=("torch", "trilith.runner"),
    )


def _check(args: argparse.Namespace) -> int:
    from trilith import preflight

    plan = preflight.plan(args.config, args.overrides, args.world_size)
    print(json.dumps(preflight.to_json(plan), indent=1) if args.json else preflight.describe(plan))
    return 0


def _schedule(args: argparse.Namespace) -> int:
    from trilith.pipeline import timeline
    from trilith.pipeline.schedule_file import read_schedule, write_schedule

    sizes = {"--stages": args.stages, "--microbatches": args.microbatches}
    if args.file is None:
        missing = [option for option, value in sizes.items() if value is None]
        if missing:
            raise ScheduleError(f"schedule --name {args.name}: needs {' and '.join(missing)}")
        schedule = timeline.named_schedule(args.name, args.stages, args.virtual, args.microbatches)
    else:
        given = [option for option, value in {**sizes, "--virtual": args.virtual}.items() if value is not None]
        if given:
            raise ScheduleError(f"schedule --file {args.file}: the file says {' and '.join(given)}. Leave it out")
        schedule = read_schedule(args.file)
    if args.write is not None:
        write_schedule(schedule, args.write)
    shown = timeline.show(schedule, timeline.parse_costs(args.costs), args.png)
    print(json.dumps(shown.summary, indent=1) if args.json else shown.text)
    return 0


def _trace(args: argparse.Namespace) -> int:
    from trilith.pipeline.trace_file import read_trace

    trace = read_trace(args.path)
    if args.png is not None:
        trace.draw(args.png)
    if args.chrome is not None:
        args.chrome.write_text(json.dumps(trace.chrome()) + "\n", encoding="utf-8")
    print(trace.text())
    return 0


def _parity(args: argparse.Namespace) -> int:
    from trilith import parity

    result = parity.compare(
        parity.Side(args.a, tuple(args.overrides)),
        parity.other_side(args.a, args.b, args.overrides, args.overrides_b),
        steps=args.steps,
        rtol=args.rtol,
        report=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(json.dumps(result.to_json(), indent=1) if args.json else result.describe())
    return 0 if result.equal else 1


def _data_build(args: argparse.Namespace) -> int:
    from trilith.data.build import build
    from trilith.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    vocab_size = None if tokenizer else args.vocab_size
    print(build(args.inputs, args.output, tokenizer, vocab_size=vocab_size, json_key=args.json_key, report=print))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from trilith import doctor

    report = doctor.examine()
    print(json.dumps(report, indent=1) if args.json else doctor.describe(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
