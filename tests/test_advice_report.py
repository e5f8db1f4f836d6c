from __future__ import annotations

import base64
import re
from html import escape
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.errors import StorageError
from orchestrator.policy.advise import Recommendation, advise
from orchestrator.policy.candidates import candidates
from orchestrator.policy.citations import SOURCES, cited
from orchestrator.policy.flips import Flip
from orchestrator.policy.question import Base, Given, Question, ask
from orchestrator.policy.strategies import STRATEGIES
from orchestrator.policy.views.html import write_advice_report
from orchestrator.policy.views.pictures import front_picture
from orchestrator.policy.views.sweep import REACH, flips_along, sweep
from orchestrator.quantities import parse_budget

MINILM = Base(parameters=22_700_000, tokens=1e10, name="MiniLM <small> & quick")
LABELLED = Given(
    task="text-classification", examples=1000, classes=2, base=MINILM, gpu="A100-80GB", budget=parse_budget("50usd")
)
RAW = Given(task="causal-lm", tokens=20e9, base=Base(parameters=7_000_000_000, tokens=2e12), domain="far")
NO_BASE = Given(task="causal-lm", tokens=25e9, no_base=True, budget=parse_budget("9.2e21flops"))
ONLY_BUDGET = Given(budget=parse_budget("1000usd"))
UNPRICED = Given(
    task="image-classification", examples=300, classes=4, unlabeled_tokens=5e9, base=MINILM, domain="far", gpu="TPUv4"
)
QUESTIONS = {"labelled": LABELLED, "raw": RAW, "no base": NO_BASE, "only a budget": ONLY_BUDGET, "unpriced": UNPRICED}
COMMAND = "orchestrator run 'a <b> & c'"


@pytest.fixture(
    scope="module", params=[LABELLED, RAW, NO_BASE, UNPRICED], ids=["labelled", "raw", "no base", "unpriced"]
)
def answered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Question, str]:
    question = ask(request.param)
    path = tmp_path_factory.mktemp("page") / "reports" / "advice.html"
    write_advice_report(path, advise(question), question, next_command=COMMAND)
    return question, path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_names_every_strategy_and_why_one_cannot_be_done(answered: tuple[Question, str]) -> None:
    question, page = answered
    for one in candidates(question):
        if one.feasible:
            assert f"</span>{one.strategy}" in page, "a row of the table"
        else:
            assert escape(f"{one.strategy}: {one.why}") in page


@pytest.mark.slow
def test_the_page_states_what_was_assumed_once(answered: tuple[Question, str]) -> None:
    question, page = answered
    for sentence in question.assumed:
        assert page.count(escape(sentence)) == 1


@pytest.mark.slow
def test_the_page_loads_nothing(answered: tuple[Question, str]) -> None:
    _, page = answered
    assert "<script" not in page
    assert "@import" not in page
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert len(loaded) == 2, "the front and the curves"
    for address in loaded:
        kind, _, data = address.partition(";base64,")
        assert kind == "data:image/svg+xml"
        drawing = base64.b64decode(data).decode()
        assert "<svg" in drawing
        assert not re.findall(r"""href="(?!#)""", drawing), "a drawing refers only to itself"


@pytest.mark.slow
def test_names_and_commands_are_escaped(answered: tuple[Question, str]) -> None:
    question, page = answered
    assert escape(COMMAND) in page
    assert COMMAND not in page
    if question.base is MINILM:
        assert "MiniLM &lt;small&gt; &amp; quick" in page
        assert "<small>" not in page


@pytest.mark.slow
def test_the_same_advice_is_the_same_picture() -> None:
    advice = advise(ask(NO_BASE))
    assert front_picture(advice.candidates) == front_picture(advice.candidates)


@pytest.mark.slow
def test_an_uncertain_answer_says_so_with_its_rivals(tmp_path: Path) -> None:
    question = ask(LABELLED)
    sure = advise(question)
    doubtful = Recommendation(
        strategy="uncertain",
        leading="full",
        confidence=0.5,
        candidates=sure.candidates,
        flips=(),
        reasons=sure.reasons,
        rivals=("full", "features"),
    )
    write_advice_report(tmp_path / "page.html", doubtful, question, next_command="x")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "full or features cannot be told apart" in page
    assert "confidence 50%" in page
    assert "Where it would change" not in page


@pytest.mark.slow
def test_a_page_that_cannot_be_written_is_an_error_of_storage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    question = ask(NO_BASE)
    with pytest.raises(StorageError, match=r"the report cannot be written(.|\n)*--report"):
        write_advice_report(tmp_path / "file" / "page.html", advise(question), question, next_command="x")


@pytest.mark.parametrize("given", QUESTIONS.values(), ids=QUESTIONS)
def test_every_expectation_cites_a_source_that_is_written_out(given: Given) -> None:
    for one in candidates(ask(given)):
        if one.expectation is not None and one.expectation.reasons[0] != "no base model to compare with":
            assert cited(one.expectation.reasons[:1]), one.expectation.reasons[0]


def test_only_what_was_used_is_cited() -> None:
    assert [name for name, _ in cited(["less error (dapt-*)", "more of it (film reviews; Hernandez 2021)"])] == [
        "Hernandez 2021",
        "film reviews",
        "dapt-*",
    ]
    assert all(SOURCES.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "what"), [(LABELLED, "labels"), (RAW, "tokens"), (NO_BASE, "tokens"), (ONLY_BUDGET, "usd")]
)
def test_the_curves_reach_a_hundredfold_to_both_sides_of_what_was_asked(given: Given, what: str) -> None:
    swept = sweep(ask(given))
    assert swept is not None
    assert swept.what == what
    assert swept.amounts[0] == pytest.approx(swept.asked / REACH)
    assert swept.amounts[-1] == pytest.approx(swept.asked * REACH)
    assert set(swept.expectations) <= set(STRATEGIES)
    assert all(len(values) == len(swept.amounts) for values in (*swept.expectations.values(), swept.advised))


def test_the_curves_stop_at_one_label() -> None:
    swept = sweep(ask(Given(task="text-classification", examples=20, classes=2, base=MINILM)))
    assert swept is not None
    assert swept.amounts[0] >= 0.5


def test_the_curves_pass_through_the_advice() -> None:
    question = ask(LABELLED)
    swept, advice = sweep(question), advise(question)
    assert swept is not None
    middle = len(swept.amounts) // 2
    assert swept.amounts[middle] == pytest.approx(1000)
    assert swept.advised[middle] == advice.leading
    for one in advice.candidates:
        if one.feasible:
            assert swept.expectations[one.strategy][middle] == one.expectation


def test_the_ribbon_changes_where_the_flips_say() -> None:
    question = ask(LABELLED)
    swept = sweep(question)
    assert swept is not None
    amounts = [amount for amount, _ in flips_along(advise(question).flips, "labels")]
    inside = [amount for amount in amounts if swept.amounts[0] < amount < swept.amounts[-1]]
    assert inside
    borders = [low for _, low, _ in swept.stretches()[1:]]
    for amount in inside:
        assert min(abs(border / amount - 1) for border in borders) < 0.2


def test_stretches_meet_and_cover_the_range() -> None:
    swept = sweep(ask(LABELLED))
    assert swept is not None
    stretches = swept.stretches()
    assert stretches[0][1] == swept.amounts[0]
    assert stretches[-1][2] == swept.amounts[-1]
    for (left, _, end), (right, start, _) in pairwise(stretches):
        assert end == start
        assert left != right


def test_flips_along_the_data_come_by_rising_amount() -> None:
    flips = (
        Flip(when="above 6.8B tokens", then="full wins", along="tokens", at=6.8e9),
        Flip(when="below 71 labels", then="features wins", along="labels", at=71.0),
        Flip(when="above 12M labels", then="scratch wins", along="labels", at=12e6),
        Flip(when="above 1.5k labels", then="peft wins", along="labels", at=1500.0),
        Flip(when="the goal is cost instead of quality", then="peft wins"),
    )
    assert [amount for amount, _ in flips_along(flips, "labels")] == [71.0, 1500.0, 12e6]
    assert flips_along(flips, "tokens") == ((6.8e9, flips[0]),)
