from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.yaml_file import MOST_BYTES, parse_yaml, read_yaml


def refusal(text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, source="spec.yaml")
    return caught.value


BROKEN = {
    "a: 1\nb:\n\tc: 2": (3, "spaces, not tabs"),
    "a: 1\n\tb: 2": (2, "spaces, not tabs"),
    "a: 1\nb: c: d": (2, "quote a value that holds ': '"),
    "a: 1\n b: 2": (2, "quote a value that holds ': '"),
    "a: 1\nb: 'x\nc: 2": (3, "close the quote"),
    'a: "x': (1, "close the quote"),
    "a: [1\nb: 2": (2, "close the ["),
    "a: {b: 1\nc: 2": (2, "close the {"),
    "a: {": (1, "close"),
    "a: 1\n---\nb: 2": (2, "keep one document"),
    "a: 1\nb": (2, "key: value"),
    "a: 1\n- b": (2, "alike"),
    "a: *there": (1, "define the anchor"),
    "a: \x07": (1, "remove that character"),
    'a: "\\q"': (1, "'single quotes'"),
    "%YAML 9.9\n---\na: 1": (1, "remove the %YAML line"),
    "a: 1\nb: 2\na: 3": (3, "remove one of them"),
    "x:\n  a: 1\n  a: 2": (3, "remove one of them"),
    "a: 1\nb: !!python/object:os.system x": (2, "without a tag"),
    "a: !!int x": (1, "quote it"),
    "a: !!map [1]": (1, "without a tag"),
    "a: !!timestamp x": (1, "without a tag"),
    "a: 1\n? [b]\n: 2": (2, "quote"),
    "a: {[b]: 2}": (1, "quote"),
    "a: " + "9" * 5000: (1, "quote it"),
    "a: &a [*a]": (1, "write out what is meant"),
    "a: &a {b: *a}": (1, "write out what is meant"),
    "a: 1\nb: {<<: 3}": (2, "*ANCHOR of a mapping"),
    "a: 1\nb: " + "[" * 3000: (2, "close some of them"),
}


@pytest.mark.parametrize("text", BROKEN, ids=[text[:20] for text in BROKEN])
def test_what_is_wrong_is_told_with_its_line_and_the_way_out(text: str) -> None:
    line, remedy = BROKEN[text]
    error = refusal(text)
    assert error.what == "spec.yaml is not valid YAML"
    assert (error.got or "").startswith(f"line {line}: ")
    assert remedy in (error.do or "")


def test_the_line_itself_is_shown_and_where_what_is_open_begins() -> None:
    error = refusal("a: 1\nb: [1\nc: 2\n")
    assert error.got == "line 3: did not find expected ',' or ']' (it begins in line 2): c: 2"


@pytest.mark.parametrize("merged", [False, True])
def test_aliases_of_aliases_are_counted_before_they_are_followed(merged: bool) -> None:
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, 30):
        refs = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{refs}]}}" if merged else f"[{refs}]"))
    error = refusal("\n".join(lines))
    assert "aliases of aliases stand for more than 100,000 values" in str(error)
    assert "line 6" in str(error)
    chain = ["a0: &a0 [1]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 3000))]
    assert "levels" in str(refusal("\n".join(chain)))


def test_merge_keys_bring_what_a_mapping_does_not_say_itself() -> None:
    text = """
defaults: &defaults {steps: 3, seed: 1}
more: &more {seed: 2, epochs: 4}
one: {<<: *defaults, steps: 5}
two:
  <<: [*more, *defaults]
three: {<<: *three_base, a: 1}
""".replace("three: {<<: *three_base, a: 1}\n", "base: &deep {<<: *defaults, seed: 9}\nthree: {<<: *deep, a: 1}\n")
    value = parse_yaml(text, source="x")
    assert value["one"] == {"steps": 5, "seed": 1}
    assert value["two"] == {"steps": 3, "seed": 2, "epochs": 4}
    assert value["three"] == {"steps": 3, "seed": 9, "a": 1}


def test_an_anchor_used_twice_gives_two_values_that_are_changed_apart() -> None:
    value = parse_yaml("a: &a {x: 1}\nb: *a\n", source="x")
    value["a"]["x"] = 2
    assert value["b"] == {"x": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3E+2", 300.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-1.5e3", -1500.0),
        ("1_000", 1000),
        ("0x1f", 31),
        ("0b11", 3),
        ("0", 0),
        ("-7", -7),
        ("007", "007"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("2026-11-28", "2026-11-28"),
        ("2026-99-99", "2026-99-99"),
        ("=", "="),
        ("yes", True),
        ("off", False),
        ("~", None),
    ],
)
def test_plain_words_are_read_as_people_mean_them(text: str, value: object) -> None:
    read = parse_yaml(f"a: {text}", source="x")["a"]
    assert read == value
    assert type(read) is type(value)


def file_refusal(file: Path) -> str:
    with pytest.raises(SpecError) as caught:
        read_yaml(file)
    assert caught.value.do
    return str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "spec.yaml").write_bytes("näme: 1\n".encode(encoding))
        assert read_yaml(tmp_path / "spec.yaml") == {"näme": 1}


def test_another_encoding_is_named_with_its_line_and_converted(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_bytes("a: 1\nname: café\n".encode("latin-1"))
    text = file_refusal(tmp_path / "spec.yaml")
    assert "the byte 0xe9 in line 2" in text
    assert "iconv -f latin1 -t utf-8" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "an empty file"), ("# nothing\n", "an empty file"), ("- a\n", "a list"), ("a", "a single value")],
)
def test_a_file_that_holds_no_mapping_says_what_it_holds(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "spec.yaml").write_text(content)
    assert says in file_refusal(tmp_path / "spec.yaml")


def test_a_folder_a_missing_file_and_data_are_told_apart(tmp_path: Path) -> None:
    assert "give the path of a file in it" in file_refusal(tmp_path)
    assert "No such file" in file_refusal(tmp_path / "none.yaml")
    assert "null byte" in file_refusal(Path("a\x00b"))
    (tmp_path / "data.csv").write_bytes(b"a" * (MOST_BYTES + 1))
    assert "give the path of a spec, not of data" in file_refusal(tmp_path / "data.csv")


def test_a_file_without_the_right_to_read_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # as root every file can be read
    assert "chmod u+r" in file_refusal(tmp_path / "spec.yaml")
