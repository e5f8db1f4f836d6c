"""`python -m tests.fuzz SEED CASES [specs|options|files]`: each fault once, with how often it came."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import tests.conftest  # noqa: F401  # no hub, few threads, nobody's own store
from tests.fuzz.case import Finding, run_case
from tests.fuzz.cases import GENERATORS, cases


def main() -> None:
    """Runs the cases of a seed."""
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    kinds = sys.argv[3:] or list(GENERATORS)
    sys.argv = ["orchestrator"]  # `advise` repeats its command line
    found: dict[str, Finding] = {}
    often: Counter[str] = Counter()
    for kind in kinds:
        began, answered = time.process_time(), 0
        with tempfile.TemporaryDirectory() as folder:
            for case in cases(kind, seed=seed, count=count):
                result = run_case(case, Path(folder) / "case")
                answered += result.answered
                if (finding := result.finding) is not None:
                    often[finding.what] += 1
                    found.setdefault(finding.what, finding)
        print(f"{kind}: {count} cases, {answered} answered, in {time.process_time() - began:.1f} s")
    for what, times in often.most_common():
        print(f"\n== {times} x {found[what]}")


main()
