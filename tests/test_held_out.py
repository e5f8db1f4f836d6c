"""The held-out set in figures: what makes its fingerprint, and what stands in both splits."""

from __future__ import annotations

import json
import random

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.held_out import Account, HeldOut

TEXTS = st.lists(st.text(max_size=5), max_size=12)


def account(
    held: list[str], training: list[str], labels: list[str] | None = None, asked: float | None = 0.5
) -> HeldOut:
    seen = Account()
    assert list(seen.held_out(held, labels)) == held
    assert list(seen.training(training)) == training
    return seen.result("rows" if labels else "documents", asked=asked)


@given(TEXTS, st.integers(0, 99))
def test_the_order_of_the_examples_does_not_matter_to_their_fingerprint(texts: list[str], seed: int) -> None:
    mixed = random.Random(seed).sample(texts, len(texts))
    assert account(mixed, []).fingerprint == account(texts, ["x"]).fingerprint


@given(TEXTS, TEXTS)
def test_other_examples_have_another_fingerprint(one: list[str], other: list[str]) -> None:
    assert (account(one, []).fingerprint == account(other, []).fingerprint) == (sorted(one) == sorted(other))


def test_labels_belong_to_the_examples() -> None:
    labels = ["good", "bad"]
    first = account(["a", "b"], [], labels)
    assert account(["b", "a"], [], labels[::-1]).fingerprint == first.fingerprint
    assert account(["a", "b"], [], labels[::-1]).fingerprint != first.fingerprint


@given(TEXTS, TEXTS)
def test_every_held_out_example_that_stands_in_the_training_data_too_is_counted(
    held: list[str], training: list[str]
) -> None:
    assert account(held, training).repeated == sum(text in training for text in held)


def test_the_share_of_documents_is_one_of_bytes_and_that_of_rows_one_of_rows() -> None:
    documents = account(["ü"], ["a", "bcdef"])
    assert (documents.examples, documents.bytes, documents.share) == (1, 2, 0.25)
    assert account(["u"], ["a", "bcdef"], ["label"]).share == 1 / 3


def test_the_sentence_names_share_size_and_fingerprint_and_what_is_repeated() -> None:
    found = account(["a", "b"], ["a", "bcdefg"])
    assert found.sentence() == (
        f"held out: 2 documents, 2 bytes (22.22%, asked 50%), fingerprint {found.fingerprint}; "
        "1 of them also in the training data"
    )
    given = account(["b"], ["a"], ["label"], asked=None)
    assert given.sentence() == f"held out: 1 row, 1 bytes (50.00%), fingerprint {given.fingerprint}"


def test_what_is_kept_with_the_data_is_read_again() -> None:
    found = account(["a"], ["b"])
    assert HeldOut.of(json.loads(json.dumps(found.to_dict()))) == found
