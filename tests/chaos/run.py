"""`make chaos`: every fault on a real local cluster, and a table of what became of the training.

python -m tests.chaos.run [--only NAME ...] [--quick] [--seed N] [--rounds R] [--json] [--keep]

The exit code is 1 when a scenario ended otherwise than it should.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos import hosts, table
from tests.chaos.runner import Row, Stage
from tests.chaos.scenarios import LAYOUTS, SCENARIOS, Scenario, random_scenario
from tests.chaos.servers import can_store_objects


def main(arguments: Sequence[str]) -> int:
    """Plays what was asked for; the exit code."""
    options = _parse(arguments)
    if not hosts.inside() and hosts.available():
        hosts.enter("tests.chaos.run", arguments)
    chosen, left_out = _choose(options)
    for name, why in left_out.items():
        _say(f"{name}: left out, {why}")
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))  # short: Ray's sockets have 107 bytes
    stage = Stage(folder)
    rows: list[Row] = []
    try:
        for scenario in chosen:
            row = stage.play(scenario)
            rows.append(row)
            figures = f"{row.pause_s:.1f} s to the first new step, {row.seconds:.0f} s in all"
            _say(f"{row.name}: {row.outcome}", figures, *row.problems, *row.notes)
    finally:
        stage.close()
        if options.keep:
            _say(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print(table.as_json(rows) if options.json else table.markdown(rows))
    return 1 if any(row.problems for row in rows) else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.run")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[s.name for s in SCENARIOS], help="these alone")
    parser.add_argument("--quick", action="store_true", help="the half that is part of `make test`")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--keep", action="store_true", help="leave logs and runs in the temporary folder")
    parser.add_argument("--seed", type=int, help="random faults alone, with this seed in the first round")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of random faults, each with the next seed")
    return parser.parse_args(arguments)


def _choose(options: argparse.Namespace) -> tuple[list[Scenario], dict[str, str]]:
    """What to play, sorted by layout so that each cluster starts once, and why the rest cannot be played here."""
    order = list(LAYOUTS)
    wanted = [s for s in SCENARIOS if (not options.only or s.name in options.only) and (s.quick or not options.quick)]
    wanted.sort(key=lambda scenario: order.index(scenario.layout))
    alone = options.seed is not None
    if alone or not (options.only or options.quick):
        seed = options.seed if alone else time.time_ns() % 1_000_000
        drawn = [random_scenario(number) for number in range(seed, seed + options.rounds)]
        _say(f"random faults: --seed {seed} --rounds {options.rounds}")
        wanted = drawn if alone else [*drawn, *wanted]
    left_out = {scenario.name: why for scenario in wanted if (why := _cannot_play(scenario))}
    return [scenario for scenario in wanted if scenario.name not in left_out], left_out


def _cannot_play(scenario: Scenario) -> str:
    """Why not on this machine; empty when it can be."""
    if (LAYOUTS[scenario.layout].on_hosts or scenario.small_disk) and not hosts.inside():
        return "it needs namespaces and mounts: be root"
    if scenario.objects and not can_store_objects():
        return "it needs an S3 server: pip install moto[s3]"
    return ""


def _say(*parts: str) -> None:
    print("  ".join(parts), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
