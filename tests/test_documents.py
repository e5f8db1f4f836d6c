from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.documents import open_documents
from orchestrator.data.labelled_rows import read_rows
from orchestrator.data.sources import find_sources
from orchestrator.errors import DataError, SpecError
from orchestrator.spec_data import DataFormat


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(location: Path | str, *, exclude: tuple[str, ...] = (), data_format: DataFormat = "auto") -> list[str]:
    documents = open_documents(
        find_sources(str(location), exclude=exclude, data_format=data_format), text_column="text"
    )
    return list(documents.read(np.arange(len(documents))))


def rows(location: Path, *, label: str = "label") -> tuple[list[str], list[str]]:
    found = read_rows(find_sources(str(location)), text_column="text", label_column=label)
    return list(found.texts()), [found.names[number] for number in found.labels]


def test_folder_gives_its_text_files_in_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.unknown", "c.txt.gz"):
        content = name.encode()
        write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert texts(tmp_path) == ["a/b/c.unknown", "a/z.md", "b.txt", "c.txt.gz"]


def test_glob_with_two_stars_reaches_every_depth(tmp_path: Path) -> None:
    for name in ("top.py", "one/two/deep.py", "one/other.txt"):
        write(tmp_path / name, name)
    assert texts(f"{tmp_path}/**/*.py") == ["one/two/deep.py", "top.py"]
    assert texts(f"{tmp_path}/*.py") == ["top.py"]
    assert texts(f"{tmp_path}/one/*/*.py") == ["one/two/deep.py"]


def test_relative_locations_start_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data/a.txt", "a")
    monkeypatch.chdir(tmp_path)
    assert texts("data/a.txt") == texts("data") == texts("*/*.txt") == texts("**/a.txt") == ["a"]


def test_excluded_names_leave_out_files_and_whole_folders(tmp_path: Path) -> None:
    for name in ("keep.py", "tests/a.py", "deep/tests/b.py", "deep/keep.py", "deep/drop_me.py"):
        write(tmp_path / name, name)
    assert texts(f"{tmp_path}/**/*.py", exclude=("tests", "drop_*")) == ["deep/keep.py", "keep.py"]


def test_exclude_says_nothing_about_folders_above_the_location(tmp_path: Path) -> None:
    write(tmp_path / "tests/data/a.txt", "a")
    assert texts(tmp_path / "tests/data", exclude=("tests",)) == ["a"]


def test_hidden_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / ".git/config", "secret")
    write(tmp_path / ".hidden", "secret")
    write(tmp_path / "seen.txt", "seen")
    assert texts(tmp_path) == ["seen"]


def test_folder_that_links_to_itself_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert texts(tmp_path) == ["a"]


def test_binary_files_of_a_folder_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "code.pyc", b"\0\1\2")
    write(tmp_path / "code.py", "x = 1")
    assert texts(tmp_path) == ["x = 1"]
    assert "code.pyc" in caplog.text


def test_binary_file_named_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not text"):
        texts(write(tmp_path / "model.bin", b"\0\1\2"))


@pytest.mark.parametrize(
    ("encoding", "content", "place", "named"),
    [
        ("latin-1", "café", "byte 0xe9 at position 4", "latin1"),
        ("cp1252", "cafe “quoted”", "byte 0x93 at position 6", "cp1252"),
        ("cp1252", "schön, für 5 €", "byte 0xf6 at position 4", "cp1252"),  # its first bad byte is Latin-1's too
        ("utf-16", "café", "UTF-16", "utf-16"),
    ],
)
def test_text_in_another_encoding_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, encoding: str, content: str, place: str, named: str
) -> None:
    file = write(tmp_path / "an old.txt", content.encode(encoding))
    with pytest.raises(DataError, match=r"line 1 of .* is not UTF-8") as caught:
        texts(file)
    assert place in str(caught.value.got)
    remedy = str(caught.value.do).partition(": ")[2]
    assert remedy == f"iconv -f {named} -t utf-8 '{file}' > '{tmp_path}/utf8-an old.txt'"
    subprocess.run(remedy, shell=True, check=True)
    assert texts(tmp_path / "utf8-an old.txt") == [content]


def test_byte_order_mark_is_no_part_of_a_document(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "windows.txt", "text".encode("utf-8-sig"))) == ["text"]


def test_package_and_sysconfig_locations_name_installed_files() -> None:
    assert '"""' in texts("sysconfig://stdlib/json/__init__.py")[0]
    assert len(texts("package://orchestrator/**/errors.py")) == 1
    with pytest.raises(SpecError, match="not installed"):
        texts("package://no_such_package/data")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"text": "one", "x": 1}\n{"text": "two", "x": 2}\n'),
        ("rows.json", '[{"text": "one"}, {"text": "two"}]'),
        ("rows.csv", 'text,x\none,1\n"two",2\n'),
        ("rows.tsv", "text\tx\none\t1\ntwo\t2\n"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "one"}\n{"text": "two"}\n', mtime=0)),
        ("rows.csv.gz", gzip.compress(b"text\none\ntwo\n", mtime=0)),
    ],
)
def test_tables_give_a_document_for_each_row(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert texts(write(tmp_path / name, content)) == ["one", "two"]


def test_parquet_gives_a_document_for_each_row(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(tmp_path / "rows.parquet")
    assert texts(tmp_path / "rows.parquet") == ["one", "two"]


def test_chosen_documents_come_from_every_source_in_order(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(2500)))
    write(tmp_path / "b.txt", "file")
    documents = open_documents(find_sources((str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt"))), text_column="text")
    assert len(documents) == 2501
    assert documents.sizes[[0, 2499, 2500]].tolist() == [5, 8, 4]
    assert list(documents.read(np.array([2500, 2400, 3]))) == ["row 3", "row 2400", "file"]


def test_format_of_the_spec_overrides_the_ending(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.txt", '{"text": "one"}\n')
    assert texts(file) == ['{"text": "one"}\n']
    assert texts(file, data_format="jsonl") == ["one"]
    write(tmp_path / "more.jsonl", '{"text": "two"}\n')
    assert texts(tmp_path, data_format="jsonl") == ["two"]


def test_text_beside_tables_is_refused_because_it_may_be_data(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "about")
    write(tmp_path / "rows.jsonl", '{"text": "one"}\n')
    with pytest.raises(DataError, match=r"mixes text files with tables[\s\S]*notes\.txt[\s\S]*data\.format"):
        texts(tmp_path)


def test_missing_path_names_the_first_part_that_is_missing_and_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "train/rows.csv", "text\na\n")
    with pytest.raises(DataError, match="does not exist") as caught:
        texts(tmp_path / "trian/rows.csv")
    assert caught.value.got is not None
    assert "'trian'" in caught.value.got
    assert caught.value.do == f"did you mean {tmp_path / 'train'}?"


def test_glob_and_folder_without_a_match_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    with pytest.raises(DataError, match="matches no file"):
        texts(f"{tmp_path}/*.csv")
    with pytest.raises(DataError, match=r"holds no file to read[\s\S]*data\.exclude"):
        texts(tmp_path, exclude=("*",))
    with pytest.raises(DataError, match="holds no file to read"):
        texts(tmp_path, data_format="parquet")


def test_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text"):
        texts(write(tmp_path / "empty.txt", ""))
    with pytest.raises(DataError, match="is empty"):
        texts(write(tmp_path / "empty.csv", ""))


def test_missing_column_lists_the_columns_and_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no column 'text'") as caught:
        texts(write(tmp_path / "rows.csv", "id,texts\n1,a\n"))
    assert caught.value.allowed == "id, texts"
    assert caught.value.do == "set data.text_column=texts"


def test_rows_without_text_are_left_out_of_a_corpus_and_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", '{"text": "a"}\n{"text": null}\n{"text": " "}\n{"x": 1}\n{"text": "b"}\n')
    documents = open_documents(find_sources(str(file)), text_column="text")
    assert list(documents.read(np.arange(len(documents)))) == ["a", "b"]
    (note,) = documents.notes
    assert note.startswith("3 of 5 rows of ")
    assert note.endswith("are left out; the first is row 2")


def test_words_that_pandas_takes_for_missing_are_text(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv", "text,label\nNone,NA\nnull,nan\n")
    assert rows(file) == (["None", "null"], ["NA", "nan"])


def test_column_of_numbers_can_be_text_and_a_list_cannot(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "digits.csv", "text\n12\n34\n")) == ["12", "34"]
    with pytest.raises(DataError, match="does not hold text"):
        texts(write(tmp_path / "chat.jsonl", '{"text": [{"role": "user"}]}\n'))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("bad.csv", "text,x\na,1\nb,2,3\n", "line 3, has more fields"),
        ("bad.jsonl", '{"text": "a"}\n{"text":\n', "line 2 of .* is not valid JSON"),
        ("bad.parquet", "nonsense", "Parquet magic bytes"),
        ("header.csv", "text,label\n", "holds no text"),
    ],
)
def test_file_that_does_not_parse_is_named_with_the_reason(
    tmp_path: Path, name: str, content: str, reason: str
) -> None:
    with pytest.raises(DataError, match=name) as caught:
        texts(write(tmp_path / name, content))
    assert re.search(reason, str(caught.value))


@pytest.mark.slow
def test_reading_tables_prints_nothing_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "good.csv", "text\na\n")
    write(tmp_path / "bad.csv", "text\na\nb,2\n")
    code = (
        "import sys; from orchestrator.data.sources import find_sources\n"
        "from orchestrator.data.documents import DataError, open_documents\n"
        "for name in ('good', 'bad'):\n"
        "    try: open_documents(find_sources(f'{sys.argv[1]}/{name}.csv'), text_column='text')\n"
        "    except DataError: print('refused')"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("refused\n", "")


def test_culprit_among_many_files_is_named(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"good-{number}.csv", "text\na\n")
    write(tmp_path / "good-1-not.csv", 'text\n"open\n')
    with pytest.raises(DataError, match=r"line 2 of .*good-1-not\.csv"):
        texts(tmp_path)


def test_hub_name_without_a_hub_says_it_is_neither_local_nor_reachable() -> None:
    (source,) = find_sources("nobody/such-dataset:config@test")
    assert source.reader == "hub"
    with pytest.raises(DataError, match="neither a local path nor a dataset that can be reached"):
        open_documents([source], text_column="text")


def test_what_looks_like_a_hub_name_is_a_path_when_its_folder_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="data/train does not exist"):
        find_sources("data/train")
    with pytest.raises(DataError, match=r"elsewhere/train\.csv does not exist"):
        find_sources("elsewhere/train.csv")


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["spam", "ham"], ["spam", "ham"]),
        ([3, -1], ["3", "-1"]),
        ([True, False], ["true", "false"]),
        ([1.0, 1], ["1.0", "1"]),
        ([1, "x"], ["1", "x"]),
    ],
)
def test_labels_may_be_names_numbers_or_truth_values(tmp_path: Path, values: list[object], labels: list[str]) -> None:
    # As the file has them: 1.0 is not 1, nor does one value change how the others are read.
    lines = [json.dumps({"text": "a", "label": value}) for value in values]
    assert rows(write(tmp_path / "rows.jsonl", "\n".join(lines)))[1] == labels


def test_class_labels_of_a_hub_dataset_keep_their_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    table.to_parquet(tmp_path / "rows.parquet")
    assert rows(tmp_path / "rows.parquet")[1] == ["yes", "no"]


def test_continuous_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no class column[\s\S]*0\.5"):
        rows(write(tmp_path / "rows.csv", "text,label\na,1\nb,0.5\n"))


def test_rows_without_a_label_or_text_are_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 2 rows .* column 'label'"):
        rows(write(tmp_path / "label.csv", "text,label\na,\nb,1\n"))
    with pytest.raises(DataError, match=r"1 of 2 rows .* column 'text'"):
        rows(write(tmp_path / "text.csv", "text,label\n  ,0\nb,1\n"))


def test_incomplete_rows_can_be_left_out_and_are_said(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv", "text,label\na,x\nb,\n ,y\nc,only here\nd, \ne,y\n")
    with pytest.raises(
        DataError, match=r"1 of 6 rows .* 'text', the first is row 3 and 2 of 6 rows .* 'label'"
    ) as caught:
        read_rows(find_sources(str(file)), text_column="text", label_column="label")
    assert "data.incomplete_rows=leave-out" in str(caught.value.do)
    found = read_rows(find_sources(str(file)), text_column="text", label_column="label", incomplete="leave-out")
    assert list(found.texts()) == ["a", "c", "e"]
    assert [found.names[number] for number in found.labels] == ["x", "only here", "y"]
    assert any("left out" in note for note in found.notes)


def test_text_files_carry_no_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="carries no labels"):
        rows(write(tmp_path / "a.txt", "a"))
