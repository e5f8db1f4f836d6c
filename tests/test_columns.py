from __future__ import annotations

import pytest

from orchestrator.errors import DataError
from orchestrator.policy.columns import Columns, Preview, choose_columns, class_name
from orchestrator.policy.question import Task

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


def test_two_wordy_columns_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="plainly the text") as caught:
        choose_columns(table({"premise": REVIEW, "hypothesis": REVIEW, "label": "0"}))
    assert caught.value.got == "premise, hypothesis, label"
    assert "--text-column" in str(caught.value.do)


@pytest.mark.parametrize("value", [2.2667, "2.2667", ["a"], {"a": 1}])
def test_fractions_and_lists_are_no_classes(value: object) -> None:
    assert choose_columns(table({"text": REVIEW, "label": value})).label is None


@pytest.mark.parametrize("value", [1, True, "positive", 3.0, "3.0", None, "v1.5", "1.0"])
def test_strings_whole_numbers_and_truth_values_are_classes(value: object) -> None:
    assert choose_columns(table({"text": REVIEW, "label": value})).label == "label"


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm"])
def test_language_modelling_looks_for_no_class(task: Task) -> None:
    assert choose_columns(table({"text": REVIEW, "label": "x"}), task=task).label is None


def test_classification_without_a_class_column_is_refused() -> None:
    with pytest.raises(DataError, match="plainly the class") as caught:
        choose_columns(table({"text": REVIEW, "date": "today"}), task="text-classification")
    assert caught.value.got == "text, date"


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


@pytest.mark.parametrize(
    ("value", "name"), [(3.0, "3"), (True, "True"), ("x", "x"), (0, "0"), (None, None), ("", None)]
)
def test_classes_have_names(value: object, name: str | None) -> None:
    assert class_name(value, column="label", location="data.csv") == name


@pytest.mark.parametrize("value", [0.5, ["a"]])
def test_what_is_no_class_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="no class column"):
        class_name(value, column="label", location="data.csv")
