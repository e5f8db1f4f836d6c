from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.columns import FIELDS, Columns, Preview, choose_columns
from orchestrator.errors import DataError
from orchestrator.tasks.names import Task

REVIEW = "a film with several words"


def table(*rows: dict[str, object]) -> Preview:
    return Preview(location="data.csv", names=tuple(dict.fromkeys(name for row in rows for name in row)), rows=rows)


DOCUMENTS = Preview(location="books/", names=(), rows=())


@pytest.mark.parametrize("text", ["text", "content", "Review", "SENTENCE", "body"])
@pytest.mark.parametrize("label", ["label", "Class", "target", "sentiment"])
def test_usual_names_are_found_in_any_case(text: str, label: str) -> None:
    found = choose_columns(table({"id": 1, text: REVIEW, label: "good"}))
    assert (found.text, found.label) == (text, label)
    assert len(found.assumed) == 2


def test_given_columns_are_taken_and_nothing_is_assumed() -> None:
    found = choose_columns(table({"text": "x", "b": REVIEW, "c": "yes"}), text_column="b", label_column="c")
    assert found == Columns(text="b", label="c")


def test_more_telling_name_wins() -> None:
    found = choose_columns(table({"rating": 3, "description": "d", "label": "good", "text": REVIEW}))
    assert (found.text, found.label) == ("text", "label")


def test_only_wordy_column_is_the_text() -> None:
    assert choose_columns(table({"id": "17", "blurb": REVIEW, "label": "good"})).text == "blurb"


def test_two_wordy_columns_are_refused_by_name_and_look() -> None:
    with pytest.raises(DataError, match="plainly the text") as caught:
        choose_columns(table({"before": REVIEW, "after": REVIEW, "label": "0"}))
    assert caught.value.got == "before (text of about 5 words); after (text of about 5 words); label (identifiers)"
    assert "--text-column" in str(caught.value.do)


@pytest.mark.parametrize("value", [2.2667, "2.2667", ["a"], {"a": 1}])
def test_fractions_and_lists_are_no_classes(value: object) -> None:
    assert choose_columns(table({"text": REVIEW, "label": value})).label is None


@pytest.mark.parametrize("value", [1, True, "positive", 3.0, "3.0", None, "v1.5", "1.0", "1e3", "2E5", "3.e2"])
def test_strings_whole_numbers_and_truth_values_are_classes(value: object) -> None:
    assert choose_columns(table({"text": REVIEW, "label": value})).label == "label"


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm"])
def test_language_modelling_looks_for_no_class(task: Task) -> None:
    assert choose_columns(table({"text": REVIEW, "label": "x"}), task=task).label is None


def test_classification_without_a_class_column_is_refused() -> None:
    with pytest.raises(DataError, match="plainly the class") as caught:
        choose_columns(table({"text": REVIEW, "date": "today"}), task="text-classification")
    assert caught.value.got == "text (text of about 5 words); date (short text)"


@pytest.mark.parametrize("option", ["text_column", "label_column"])
def test_unknown_column_names_the_nearest_and_all(option: str) -> None:
    with pytest.raises(DataError) as caught:
        choose_columns(
            table({"text": REVIEW, "label": "x"}),
            text_column="txt" if option == "text_column" else None,
            label_column="lable" if option == "label_column" else None,
        )
    assert caught.value.allowed == "text, label"
    assert f"--{option.replace('_', '-')} {option.partition('_')[0]}?" in str(caught.value.do)


def test_documents_have_no_columns() -> None:
    assert choose_columns(DOCUMENTS) == Columns(text=None, label=None)
    assert choose_columns(DOCUMENTS, task="causal-lm", text_column="text").text is None


@pytest.mark.parametrize(("label", "task"), [("label", None), (None, "text-classification")])
def test_documents_carry_no_labels(label: str | None, task: Task | None) -> None:
    with pytest.raises(DataError, match="carries no labels"):
        choose_columns(DOCUMENTS, label_column=label, task=task)


def test_a_column_named_text_is_the_text_even_where_it_is_empty() -> None:
    found = choose_columns(table({"text": "", "label": "a film"}), task="causal-lm")
    assert found.text == "text", "as `run` reads it: another column must not take its place unsaid"


def test_a_column_named_text_may_be_named_as_the_class() -> None:
    found = choose_columns(table({"text": "good", "mail": REVIEW}), label_column="text")
    assert (found.text, found.label) == ("mail", "text")


def rows_of(count: int, **columns: object) -> Preview:
    """So many rows; a callable gives each row's value, a sequence is gone through again and again."""

    def value(of: object, number: int) -> object:
        if callable(of):
            return of(number)
        return of[number % len(of)] if isinstance(of, list | tuple) else of

    return table(*({name: value(of, number) for name, of in columns.items()} for number in range(count)))


def sentence(number: int) -> str:
    return f"the film was good and number {number}"


def test_unusual_names_are_found_by_content_and_said() -> None:
    found = choose_columns(rows_of(300, Sentence=sentence, Polarity=("bad", "fair", "good"), id=str))
    assert (found.text, found.label) == ("Sentence", "Polarity")
    assert found.assumed[0] == "column 'Polarity' is taken as the class: 3 values in 300 rows, bad, fair, good"
    assert found.assumed[1] == (
        "column 'Sentence' is taken as the text; other columns: id (identifiers); --label-column NAME to choose another"
    )


def test_a_spec_is_told_to_name_its_fields_in_its_own_terms() -> None:
    found = choose_columns(rows_of(30, Sentence=sentence, Polarity=("bad", "good"), id=str), asking=FIELDS)
    assert "data.label_column=NAME to choose another" in found.assumed[1]
    with pytest.raises(DataError) as caught:
        choose_columns(rows_of(30, a=sentence, b=sentence, label="1"), asking=FIELDS)
    assert str(caught.value.do) == "name the column with data.text_column=a"


UNUSUAL = {
    "mail, number and truth": ({"id": str, "raw_mail": sentence, "is_spam": ("0", "1")}, "raw_mail", "is_spam"),
    "true numbers": ({"id": int, "raw_mail": sentence, "is_spam": (0, 1)}, "raw_mail", "is_spam"),
    "a telling word among others": (
        {"tweet": sentence, "airline": ("a", "b"), "airline_sentiment": ("pos", "neg")},
        "tweet",
        "airline_sentiment",
    ),
    "names in camel case": (
        {"mailText": sentence, "isSpam": (True, False), "folder": ("in", "out")},
        "mailText",
        "isSpam",
    ),
    "short texts": (
        {"name": lambda n: "Ann" + "abcdefghij"[n % 10] * (n // 10 + 1), "gender": ("m", "f")},
        "name",
        "gender",
    ),
    "a subject and its mail": (
        {"subject": lambda n: f"how are you {n}", "mail": lambda n: sentence(n) * 9, "kind": ("ham", "spam")},
        "mail",
        "kind",
    ),
    "a language and a source": (
        {"text": sentence, "lang": ("de", "en"), "source": ("a", "b"), "author": ("x", "y")},
        "text",
        "author",
    ),
    "a telling name among several texts": (
        {"source": lambda n: f"<a>from a device {n}</a>", "full_text": sentence, "place": ("x", "y")},
        "full_text",
        "place",
    ),
    "a topic that is free text": ({"text": sentence, "topic": sentence, "mood": ("up", "down")}, "text", "mood"),
    "unspaced script": (
        {"句子": lambda n: "这部电影非常好看我很喜欢它真的很棒非常推荐" + str(n), "极性": ("好", "坏")},
        "句子",
        "极性",
    ),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_text_and_class_are_told_by_what_stands_in_them(case: str) -> None:
    columns, text, label = UNUSUAL[case]
    found = choose_columns(rows_of(60, **columns))
    assert (found.text, found.label) == (text, label)


def test_several_columns_that_may_be_the_class_are_listed_and_asked_for() -> None:
    with pytest.raises(DataError, match="2 columns that may be the class") as caught:
        choose_columns(rows_of(60, tweet=sentence, airline=("a", "b"), mood=("up", "down")))
    assert "airline (2 values: a, b); mood (2 values: down, up)" in str(caught.value.got)
    assert "--label-column airline (or another of mood)" in str(caught.value.do)
    assert "--task causal-lm" in str(caught.value.do)


def test_several_yes_or_no_labels_are_told_to_be_as_many_trainings() -> None:
    with pytest.raises(DataError, match="3 columns that may be the class") as caught:
        choose_columns(rows_of(60, comment=sentence, toxic=("0", "1"), obscene=("1", "0"), threat=("0", "1", "1")))
    assert "several yes-or-no labels" in str(caught.value.allowed)


NO_CLASS = {
    "dates": lambda number: f"2024-01-{1 + number % 5:02d}",
    "years": ("1999", "2001", "2004", "2010"),
    "fractions": ("0.5", "1.5", "2.0"),
    "identifiers": lambda number: f"row-{number}",
    "counts": lambda number: str(number * number % 23),
    "one value": "en",
    "empty": "",
}


@pytest.mark.parametrize("kind", NO_CLASS)
def test_what_is_no_class_is_listed_as_what_it_is(kind: str) -> None:
    found = choose_columns(rows_of(60, text=sentence, other=NO_CLASS[kind]))
    assert found.label is None
    assert "other (" in found.assumed[0]
    assert "--label-column NAME if one of them is the class" in found.assumed[0]
    with pytest.raises(DataError, match="plainly the class"):
        choose_columns(rows_of(60, text=sentence, other=NO_CLASS[kind]), task="text-classification")


def test_a_usual_name_of_a_value_for_every_row_is_no_class() -> None:
    found = choose_columns(rows_of(60, text=sentence, target=lambda number: f"t{number}", mood=("up", "down")))
    assert found.label == "mood"


@given(st.permutations(["id", "Sentence", "Polarity", "when"]))
def test_the_order_of_columns_changes_no_choice(names: list[str]) -> None:
    columns = {"id": str, "Sentence": sentence, "Polarity": ("good", "bad"), "when": "2024-01-01"}
    found = choose_columns(rows_of(30, **{name: columns[name] for name in names}))
    assert (found.text, found.label) == ("Sentence", "Polarity")


@pytest.mark.slow
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                name: st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text())
                for name in ("text", "label", "\x1b[31m", "")
            },
        ),
        max_size=8,
    )
)
def test_any_table_gets_columns_or_a_reason(rows: list[dict[str, object]]) -> None:
    preview = table(*rows)
    with suppress(DataError):
        found = choose_columns(preview)
        assert {found.text, found.label} - {None} <= set(preview.names)


CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
ALPACA = {"instruction": "Say it.", "input": REVIEW, "output": REVIEW.upper()}
PREFERENCE = {"prompt": REVIEW, "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize("row", [CHAT, ALPACA, PREFERENCE])
def test_instructions_are_taken_whole_where_that_is_asked_for(row: dict[str, object]) -> None:
    found = choose_columns(table(row), takes_answers=True)
    assert (found.text, found.label) == (None, None)
    assert found.used == tuple(row)
    assert "the rows are" in found.assumed[0]


@pytest.mark.parametrize("row", [CHAT, ALPACA, PREFERENCE])
def test_instructions_are_refused_as_what_they_are_where_raw_text_is_learnt(row: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"which (another task|no task) reads") as caught:
        choose_columns(table(row), task="causal-lm", asking=FIELDS)
    assert ("into one column `text`" if row is PREFERENCE else "set task=chat") in str(caught.value.do)
    named = f"data.text_column={next(iter(row))}" in str(caught.value.do)
    assert named == isinstance(next(iter(row.values())), str), "a list is no raw text"


def test_a_column_that_was_named_is_raw_text_whatever_the_table_is() -> None:
    found = choose_columns(table(ALPACA), text_column="output", task="causal-lm")
    assert found == Columns(text="output", label=None)


def test_a_class_beside_instructions_can_be_learnt() -> None:
    preview = rows_of(
        30, instruction=sentence, response=lambda n: f"a long answer with words {n}", category=("open", "closed")
    )
    with pytest.raises(DataError, match="plainly the text"):
        choose_columns(preview, task="text-classification")
    found = choose_columns(preview, task="text-classification", text_column="instruction")
    assert (found.text, found.label) == ("instruction", "category")


def test_a_first_row_in_place_of_names_is_refused_and_not_lost() -> None:
    with pytest.raises(DataError, match="has no header") as caught:
        choose_columns(rows_of(60, **{"a film with several words": sentence, "good": ("good", "bad")}))
    assert "put a line of names before it" in str(caught.value.do)
    assert choose_columns(rows_of(60, good=("good", "bad"), text=sentence)).label == "good"


@pytest.mark.parametrize(("value", "why"), [(0.5, "a score to be predicted"), (["a"], "several classes a row")])
def test_a_label_that_is_no_class_is_told_apart(value: object, why: str) -> None:
    found = choose_columns(
        rows_of(60, text=sentence, label=lambda n: value if isinstance(value, list) else n % 3 + 0.5, other="x")
    )
    assert found.label is None
    assert why in found.assumed[0]


def test_objects_alone_are_to_be_written_as_columns() -> None:
    with pytest.raises(DataError) as caught:
        choose_columns(rows_of(9, data=lambda _: {"text": REVIEW}))
    assert "as columns of their own" in str(caught.value.do)


def test_short_texts_that_repeat_are_no_classes_where_they_are_named_as_texts() -> None:
    assert choose_columns(rows_of(60, review=("good film", "bad film"), mood=("up", "down"))).label == "mood"


def test_all_yes_or_no_labels_are_counted_where_some_have_telling_names() -> None:
    columns = dict.fromkeys(("toxic", "severe_toxic", "threat"), ("0", "1"))
    with pytest.raises(DataError, match="3 columns that may be the class"):
        choose_columns(rows_of(60, comment=sentence, **columns))
