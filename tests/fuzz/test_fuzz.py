"""No traceback, no endless loop, no crash: 10,000 cases of a fixed seed; `python -m tests.fuzz` tries others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.case import run_case
from tests.fuzz.cases import cases

CASES = {"specs": 5_500, "options": 3_000, "files": 1_500}
"""By kind, 10,000 in all: a minute and a half of one core."""
LEAST_ANSWERED = {"specs": 0.15, "options": 0.2, "files": 0.07}
"""Share of cases that are answered, so that more is met than the first check."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_every_case_is_answered_or_refused_in_words(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["orchestrator"])  # `advise` repeats its command line
    results = [run_case(case, tmp_path / "case") for case in cases(kind, seed=11, count=CASES[kind])]
    findings = [result.finding for result in results if result.finding is not None]
    assert not findings, "\n\n".join(map(str, findings[:5]))
    assert sum(result.answered for result in results) >= LEAST_ANSWERED[kind] * len(results)


def test_the_limits_of_a_case_find_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator import cli
    from tests.fuzz import case as limits

    monkeypatch.setattr(limits, "CASE_CPU_S", 0.05)
    case = limits.Case(arguments=("estimate", "--params", "7B", "--tokens", "1T", "--gpu", "H100", "--json"))
    assert run_case(case, tmp_path / "case").answered

    def endless(*_: object, **__: object) -> None:
        while True:
            pass

    def broken(*_: object, **__: object) -> None:
        raise KeyError("x")

    for stand_in, says in ((endless, "TooLong"), (broken, "KeyError")):
        monkeypatch.setattr(cli, "_count", stand_in)
        finding = run_case(case, tmp_path / "case").finding
        assert finding is not None
        assert says in finding.what
