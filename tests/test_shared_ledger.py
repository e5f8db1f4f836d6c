"""The budget of a search whose machines see no common folder: its ledger lies in a bucket, on a real S3 server."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StorageError
from orchestrator.planning.plan import make_plan
from orchestrator.quantities import Budget
from orchestrator.runs import budget_ledger
from orchestrator.runs.budget_ledger import Cost, Entry, Ledger, LedgerBudget, open_ledger
from orchestrator.runs.file_exchange import BucketExchange
from orchestrator.worker.budget import Account
from tests.s3 import BUCKET
from tests.specs import PRETRAIN, spec
from tests.training_runs import CLUSTER

pytestmark = pytest.mark.slow  # a server

PLAN = make_plan(spec(PRETRAIN), CLUSTER)
BUDGET = Budget(amount=100.0, unit="flops")
Open = Callable[[str], Ledger]


@pytest.fixture
def uri(s3: Any, tmp_path: Path) -> str:
    return f"s3://{BUCKET}/{tmp_path.name}/search"


@pytest.fixture
def ledger(uri: str, tmp_path: Path) -> Open:
    """A machine's view of the ledger, by the machine's name."""
    return lambda name: open_ledger(tmp_path / name / "ledger", uri)


def flops(amount: float) -> Cost:
    return Cost(flops=amount)


def test_trials_on_different_machines_spend_one_budget(ledger: Open) -> None:
    one, two = ledger("one"), ledger("two")
    assert one.claim(BUDGET, "a", Entry(spent=flops(20), ahead=flops(10), closing=flops(5))).go_on
    assert two.claim(BUDGET, "b", Entry(spent=flops(40), ahead=flops(20), closing=flops(5))).go_on
    assert not one.claim(BUDGET, "a", Entry(spent=flops(20), ahead=flops(10.1), closing=flops(5))).go_on
    two.settle("b", PLAN, flops=40)
    assert one.claim(BUDGET, "a", Entry(spent=flops(20), ahead=flops(35), closing=flops(5))).go_on


def test_a_claim_of_the_same_second_and_length_as_the_one_before_is_seen(ledger: Open) -> None:
    """S3 tells the times of objects in whole seconds, so neither time nor size says that one was replaced."""
    mine, theirs = ledger("one"), ledger("two")
    for _ in range(3):
        for spent in (10, 20, 80):
            theirs.claim(BUDGET, "b", Entry(spent=flops(spent)))
            assert mine.claim(BUDGET, "a", Entry(ahead=flops(25))).go_on == (spent < 80)


def test_nothing_of_the_ledger_is_kept_on_any_machine(ledger: Open, tmp_path: Path) -> None:
    ledger("one").claim(BUDGET, "a", Entry(spent=flops(20)))
    assert ledger("two").is_running("a")
    assert list(tmp_path.iterdir()) == []


class SlowBucket(BucketExchange):
    """Each answer comes when it will."""

    def put(self, name: str, value: Mapping[str, Any], *, patience_s: float = 0.0) -> None:
        time.sleep(random.uniform(0, 0.2))
        super().put(name, value, patience_s=patience_s)
        time.sleep(random.uniform(0, 0.2))

    def texts(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        time.sleep(random.uniform(0, 0.2))
        found = super().texts(*args, **kwargs)
        time.sleep(random.uniform(0, 0.2))
        return found


def test_however_slow_the_bucket_is_the_budget_is_not_overspent(uri: str, tmp_path: Path) -> None:
    """Each trial spends all that it is granted, a step at a time, as fast as it can."""
    spent = dict.fromkeys("abcd", 0.0)

    def train(name: str) -> None:
        own = Ledger(tmp_path / name / "ledger", SlowBucket(tmp_path / name, uri))
        while own.claim(BUDGET, name, Entry(spent=flops(spent[name]), ahead=flops(7), closing=flops(2))).go_on:
            spent[name] += 7
        spent[name] += 2
        own.settle(name, PLAN, flops=spent[name])

    threads = [threading.Thread(target=train, args=(name,)) for name in spent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not any(thread.is_alive() for thread in threads)
    assert 70 < sum(spent.values()) <= 100
    entry = open_ledger(tmp_path / "driver" / "ledger", uri).entry("a")
    assert entry is not None
    assert (entry.spent.flops, entry.running) == (spent["a"], False)


def test_a_driver_on_an_empty_machine_knows_what_was_spent_and_how_long_the_search_has_run(
    ledger: Open, uri: str, tmp_path: Path
) -> None:
    first = Ledger(tmp_path / "one" / "ledger", BucketExchange(tmp_path / "one", uri), clock=lambda: 1000.0)
    first.start_clock()
    first.claim(BUDGET, "a", Entry(spent=flops(30), ahead=flops(10), closing=flops(5)))
    later = Ledger(tmp_path / "new" / "ledger", BucketExchange(tmp_path / "new", uri), clock=lambda: 9000.0)
    later.settle_dead()
    assert later.entry("a") == Entry(spent=flops(40))
    later.start_clock()
    hours = Budget(amount=1.0, unit="hours")
    assert later.claim(hours, "b", Entry(ahead=Cost(hours=0.9))).go_on, "nobody ran in between"


def test_a_bucket_that_stays_away_lets_no_trial_take_another_step(
    tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_ledger, "PATIENCE_S", 0.0)
    nowhere = open_ledger(tmp_path / "ledger", f"s3://no-such-{BUCKET}/search")
    with pytest.raises(StorageError, match=f"no-such-{BUCKET}"):
        nowhere.claim(BUDGET, "a", Entry(ahead=flops(1)))


def test_a_trial_that_was_begun_anew_elsewhere_writes_over_no_claim_and_long_steps_are_claimed_at_a_time(
    ledger: Open, uri: str, tmp_path: Path
) -> None:
    budget = LedgerBudget(
        amount=1.0,
        unit="hours",
        ledger=tmp_path / "one" / "ledger",
        ledger_at=uri,
        member="a",
        eval_every_steps=None,
        save_every_steps=None,
    )
    account = Account(
        replace(PLAN, steps=1000), evaluated_samples=1, clock=iter(float(each) for each in range(1000)).__next__
    )
    account.add_step(seconds=0.1, tokens=1, padded_tokens=1)
    assert account.decide(budget, may_claim=lambda: False).go_on, "its fence ends it"
    assert ledger("two").entry("a") is None
    assert account.decide(budget).go_on
    entry = ledger("two").entry("a")
    assert entry is not None
    assert entry.ahead.hours * 3600 >= 4, "a claim costs a look into the bucket"
