import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.quantities import divisors, human_count, human_duration, parse_budget, parse_count


@pytest.mark.parametrize(
    ("text", "number"),
    [("2M", 2_000_000), ("10B", 10**10), ("1.5k", 1500), ("1e6", 10**6), ("2_000", 2000), (7, 7), (3.0, 3)],
)
def test_counts_are_read_as_people_write_them(text: object, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["ten", "1.5", "2X", "-3", True, None, 1.5])
def test_what_is_no_count_is_left_for_the_type_check(text: object) -> None:
    assert parse_count(text) is text


@given(st.integers(1, 10**15))
def test_a_count_written_in_digits_is_itself(number: int) -> None:
    assert parse_count(str(number)) == number


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("500usd", 500, "usd"),
        ("100gpu-hours", 100, "gpu-hours"),
        ("1e20flops", 1e20, "flops"),
        ("0.5 hours", 0.5, "hours"),
    ],
)
def test_budgets_have_an_amount_and_a_unit(text: str, amount: float, unit: str) -> None:
    budget = parse_budget(text)
    assert (budget.amount, budget.unit) == (amount, unit)


@pytest.mark.parametrize("text", ["5 bananas", "usd", "0usd", "-3usd", "12"])
def test_nonsense_budgets_are_refused_with_the_units(text: str) -> None:
    with pytest.raises(ValueError, match=r"usd|above zero"):
        parse_budget(text)


def test_durations_read_as_a_clock() -> None:
    assert [human_duration(s) for s in (5, 65, 7500)] == ["5s", "1m05s", "2h05m"]


def test_counts_are_exact_beyond_what_floats_hold() -> None:
    assert parse_count("9007199254740993") == 2**53 + 1
    assert parse_count("4.503599627370497k") == "4.503599627370497k"
    assert parse_count("1234567.890123456789012345E18") == 1234567890123456789012345


@pytest.mark.parametrize("text", ["1e400", "9" * 90, "1e308T", "1e999999", 1e300])
def test_a_number_beyond_all_use_is_no_count(text: object) -> None:
    assert parse_count(text) == float("inf")


def test_a_budget_may_begin_with_its_point() -> None:
    assert parse_budget(".001usd") == parse_budget("0.001usd")


@pytest.mark.parametrize("text", ["1e400usd", "1e-300usd", "0usd", "9" * 400 + "usd", ".usd", "-1usd"])
def test_a_budget_of_nothing_or_beyond_all_use_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a budget"):
        parse_budget(text)


@given(st.integers(1, 10_000), st.integers(1, 200), st.integers(1, 200))
def test_divisors_are_those_that_counting_finds(number: int, least: int, width: int) -> None:
    wanted = [n for n in range(least, least + width) if number % n == 0 and n <= number]
    assert divisors(number, least=least, most=least + width - 1) == wanted


def test_divisors_of_a_large_number_take_no_time() -> None:
    assert len(divisors(963_761_198_400)) == 6720


@pytest.mark.parametrize(
    ("number", "text"),
    [(999.4, "999"), (999.5, "1k"), (999_499, "999k"), (999_500, "1M"), (12_345, "12.3k"), (0.5, "0.5")],
)
def test_a_count_that_rounds_up_takes_the_next_suffix(number: float, text: str) -> None:
    assert human_count(number) == text
