"""Data sets in the hub's layout: which files are trained on, which are held out, and which are left alone."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data.sources import Source, find_sources
from orchestrator.data.split_names import split_named
from orchestrator.errors import DataError
from orchestrator.facts.measure import measure_dataset
from orchestrator.samples.prepare import PreparedData
from tests.test_prepare import classify, documents, pretrain, run


def place(folder: Path, *names: str) -> Path:
    """Files with their own names in them, tables and others."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            pq.write_table(pa.table({"text": [name] * 4, "label": ["a", "b"] * 2}), file)
        elif file.suffix == ".jsonl":
            file.write_text("\n".join(json.dumps({"text": name, "label": label}) for label in "abab"))
        else:
            file.write_text(f"{name}\n" * 4)
    return folder


def names(sources: tuple[Source, ...], below: Path) -> list[str]:
    return [str(file.relative_to(below)) for source in sources for file in source.files]


def found(location: str | Path, below: Path, **options: Any) -> tuple[list[str], list[str], str]:
    """(files to train on, files held out, what is said)."""
    sources = find_sources(str(location), **options)
    held = tuple(each for source in sources for each in source.validation)
    said = [source.note.removeprefix(f"{location}: ") for source in sources if source.note is not None]
    return names(sources, below), names(held, below), "".join(said)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/validation-00000-of-00001.parquet", "validation"),
        ("test/part-0.csv", "test"),
        ("wiki.valid.tokens", "validation"),
        ("sms_dev.tsv", "validation"),
        ("Test2.csv", "test"),
        ("train/test_of_time.txt", "train"),
        ("contest.csv", None),
        ("trained.csv", None),
        ("train_eval.csv", None),
        ("rows.csv", None),
    ],
)
def test_a_word_in_the_name_of_a_file_or_folder_names_its_split(path: str, split: str | None) -> None:
    assert split_named(PurePath(path)) == split


LAYOUTS: dict[str, tuple[str, str, str]] = {
    "shards": ("data/train-0.parquet", "data/validation-0.parquet", "data/test-0.parquet"),
    "folders": ("train/a.jsonl", "validation/a.jsonl", "test/a.jsonl"),
    "folders below": ("data/train/a.jsonl", "data/dev/a.jsonl", "data/test/a.jsonl"),
    "text": ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
    "folders of text": ("train/pos/1.txt", "valid/pos/1.txt", "test/pos/1.txt"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_splits_are_kept_and_the_test_split_is_left_alone(tmp_path: Path, layout: tuple[str, str, str]) -> None:
    train, validation, _ = layout
    place(tmp_path, *layout, "README.md", "dataset_infos.json")
    said = (
        "its train split is read (1 file), its validation split is held out (1 file); "
        "left out: test (1 file), README.md, dataset_infos.json"
    )
    assert found(tmp_path, tmp_path) == ([train], [validation], said)
    assert found(tmp_path, tmp_path, split="validation")[0] == [validation]


def test_given_validation_data_takes_the_place_of_the_split(tmp_path: Path) -> None:
    place(tmp_path, "train.jsonl", "dev.jsonl")
    files, held, said = found(tmp_path, tmp_path, with_validation=False)
    assert (files, held) == (["train.jsonl"], [])
    assert said == "its train split is read (1 file); left out: validation (1 file)"


def test_a_glob_keeps_splits_too_unless_it_names_one(tmp_path: Path) -> None:
    place(tmp_path, "train-0.jsonl", "validation-0.jsonl", "test-0.jsonl")
    files, held, _ = found(f"{tmp_path}/*.jsonl", tmp_path)
    assert (files, held) == (["train-0.jsonl"], ["validation-0.jsonl"])
    assert found(f"{tmp_path}/test-*", tmp_path)[0] == ["test-0.jsonl"]
    assert found(f"{tmp_path}/test-*", tmp_path, split="validation")[0] == ["test-0.jsonl"]
    assert found(tmp_path / "test-0.jsonl", tmp_path)[0] == ["test-0.jsonl"]


def test_a_folder_that_is_named_itself_is_read(tmp_path: Path) -> None:
    place(tmp_path, "train/train-0.jsonl", "test/test-0.jsonl", "test/test-1.jsonl")
    assert found(tmp_path / "test", tmp_path)[0] == ["test/test-0.jsonl", "test/test-1.jsonl"]
    assert found(tmp_path / "train", tmp_path)[0] == ["train/train-0.jsonl"]


def test_a_word_in_the_name_of_a_data_set_names_no_split(tmp_path: Path) -> None:
    folder = place(tmp_path / "test_results", "test-0.jsonl")
    with pytest.raises(DataError, match="holds no split to train on"):
        find_sources(str(folder))


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("files", [("test-0.jsonl",), ("test-0.jsonl", "README.md")])
def test_a_test_split_alone_is_neither_trained_on_nor_held_out(
    tmp_path: Path, split: str, files: tuple[str, ...]
) -> None:
    place(tmp_path, *files)
    with pytest.raises(DataError, match=rf"holds no split to [\s\S]*test \(1 file\)[\s\S]*data\.{split}[\s\S]*/test\*"):
        find_sources(str(tmp_path), split=split)  # type: ignore[arg-type]


def test_the_test_split_does_not_stand_in_for_a_validation_split(tmp_path: Path) -> None:
    place(tmp_path, "train.jsonl", "test.jsonl")
    files, held, said = found(tmp_path, tmp_path)
    assert (files, held, said) == (["train.jsonl"], [], "its train split is read (1 file); left out: test (1 file)")
    with pytest.raises(DataError, match=r"no split to validate on[\s\S]*train \(1 file\), test \(1 file\)"):
        find_sources(str(tmp_path), split="validation")


def test_tables_without_a_split_in_their_name_are_left_out_beside_a_train_split_and_trained_on_without_one(
    tmp_path: Path,
) -> None:
    place(tmp_path / "one", "train.jsonl", "test.jsonl", "sample_submission.jsonl")
    assert found(tmp_path / "one", tmp_path / "one")[::2] == (
        ["train.jsonl"],
        "its train split is read (1 file); left out: test (1 file), sample_submission.jsonl",
    )
    with pytest.raises(DataError, match="holds no split to validate on"):
        find_sources(str(tmp_path / "one"), split="validation")
    place(tmp_path / "two", "rows.jsonl", "test.jsonl")
    assert found(tmp_path / "two", tmp_path / "two")[::2] == (
        ["rows.jsonl"],
        "its train split is read (1 file); left out: test (1 file)",
    )


def test_documents_beside_tables_are_left_out_and_said(tmp_path: Path) -> None:
    place(tmp_path, "a.jsonl", "b.jsonl", "README.md", "LICENSE", "dataset_infos.json", "script.py", "CITATION.cff")
    files, held, said = found(tmp_path, tmp_path)
    assert (files, held) == (["a.jsonl", "b.jsonl"], [])
    assert said == "left out beside the tables: CITATION.cff, LICENSE, README.md, 2 more"


def test_source_code_is_read_whole_and_what_looks_like_a_test_split_in_it_is_said(tmp_path: Path) -> None:
    files = ("a.py", "b.py", "c.py", "README.md", "test_a.py", "test_b.py")
    place(tmp_path / "code", *files)
    assert found(tmp_path / "code", tmp_path / "code") == (sorted(files), [], "")
    place(tmp_path / "code", "train.py")
    read, _, said = found(tmp_path / "code", tmp_path / "code")
    assert read == sorted((*files, "train.py"))
    assert "2 of them named like a test split, such as test_a.py: data.exclude leaves them out" in said


def test_stray_files_do_not_hide_the_layout_of_a_text_corpus(tmp_path: Path) -> None:
    reviews = [f"{split}/{mood}/{n}.txt" for split in ("train", "test") for mood in ("pos", "neg") for n in range(3)]
    place(tmp_path, *reviews, "vocabulary", "scores.txt")
    files, _, said = found(tmp_path, tmp_path)
    assert files == sorted(name for name in reviews if name.startswith("train"))
    assert said == "its train split is read (6 files); left out: test (6 files), scores.txt, vocabulary"


def hub_layout(folder: Path) -> Path:
    """Parquet files of three splits below data/, each row saying whose it is, and a README."""
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 40), ("validation", 20), ("test", 30)):
        rows = {
            "text": [f"{split} row {n}" for n in range(count)],
            "label": [("bad", "good")[n % 2] for n in range(count)],
        }
        pq.write_table(pa.table(rows), folder / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("# a data set\n")
    return folder


def counts(data: PreparedData) -> tuple[int, int]:
    return data.counts.train_samples, data.counts.validation_samples


def test_a_run_on_a_hub_layout_keeps_its_splits(tmp_path: Path) -> None:
    folder = hub_layout(tmp_path / "hub")
    data = run(classify(folder), tmp_path / "cache")
    assert counts(data) == (40, 20)
    assert data.held_out.asked is None
    assert any("left out: test (1 file), README.md" in note for note in data.notes)
    train, validation, test = (
        folder / "data" / f"{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")
    )
    assert run(classify(train, data__validation=str(validation)), tmp_path / "cache").cached
    assert counts(run(classify(folder, data__validation=str(test)), tmp_path / "cache")) == (40, 30)


def test_language_modelling_keeps_splits_too(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for split in ("train", "valid", "test"):
        corpus.mkdir(exist_ok=True)
        (corpus / f"wiki.{split}.tokens").write_text("\n".join(f"{split} line {n}" for n in range(300)))
    data = run(pretrain(corpus), tmp_path / "cache")
    assert documents(data, "train") == [(corpus / "wiki.train.tokens").read_text()]
    assert documents(data, "validation") == [(corpus / "wiki.valid.tokens").read_text()]


def test_advice_on_a_hub_layout_is_about_the_train_split_and_says_so(tmp_path: Path) -> None:
    facts = measure_dataset(str(hub_layout(tmp_path / "hub")))
    assert facts.examples.mid == 40
    assert [each.name for each in facts.classes] in (["bad", "good"], ["good", "bad"])
    assert "its train split is read (1 file)" in facts.columns.assumed[0]


def test_without_a_validation_split_rows_of_the_train_split_are_held_out(tmp_path: Path) -> None:
    folder = hub_layout(tmp_path / "hub")
    (folder / "data" / "validation-00000-of-00001.parquet").unlink()
    data = run(classify(folder), tmp_path / "cache")
    assert counts(data) == (30, 10)
    assert data.held_out.repeated == 0
