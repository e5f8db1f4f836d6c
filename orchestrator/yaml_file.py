"""A YAML file to a mapping: YAML 1.1 as PyYAML reads it, with the exceptions that people expect.

`1e-4` is a number; `007`, `1:30` and `2026-11-28` are text (YAML 1.1 reads seven, ninety and a date). A key that stands
twice is refused, `<<: *anchor` merges. Every refusal names the line and what to do about it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import SpecError, one_line

MOST_BYTES = 1_000_000
"""A longer file is taken for something else than a spec: the shipped ones have 1,500 bytes (a guess)."""
MOST_NODES = 100_000
"""Values that a file may stand for, aliases counted each time: a guess, hundreds of times what any spec holds."""
MOST_DEPTH = 50
"""Mappings and lists inside each other: a guess; the deepest field of a spec with a search lies 8 deep."""

_CORE = "tag:yaml.org,2002:"
_TAGS = {
    yaml.ScalarNode: tuple(f"{_CORE}{name}" for name in ("null", "bool", "int", "float", "str", "merge")),
    yaml.SequenceNode: (f"{_CORE}seq",),
    yaml.MappingNode: (f"{_CORE}map",),
}
_LEFT_OUT = tuple(f"{_CORE}{name}" for name in ("int", "float", "timestamp", "value"))
"""What YAML 1.1 sees in plain words, and this module does not, or in fewer of them."""
_BUILTIN = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C nine times as fast


class Loader(_BUILTIN):  # type: ignore[misc,valid-type]
    """PyYAML's, with the numbers of this module."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML copies it when a resolver is added
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _LEFT_OUT]
        for first, resolvers in _BUILTIN.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver(
    f"{_CORE}int",
    re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0b[01][01_]*|0x[0-9a-fA-F][0-9a-fA-F_]*)$"),
    list("-+0123456789"),
)
Loader.add_implicit_resolver(
    f"{_CORE}float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


class _Refusal(yaml.MarkedYAMLError):
    """A mistake that this module found, with its remedy."""

    def __init__(self, problem: str, mark: Any, do: str) -> None:
        super().__init__(problem=problem, problem_mark=mark)
        self.do = do


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises SpecError when there is none."""
    file = Path(path)
    text = _text(file, _bytes(file))
    raw = parse_yaml(text, source=str(file))
    if not isinstance(raw, dict):
        raise SpecError(
            f"{file} holds no spec",
            got="an empty file" if raw is None else f"a {'list' if isinstance(raw, list) else 'single value'}: {raw!r}",
            allowed="a mapping: lines of `key: value`",
            do="start from configs/",
        )
    return raw


def parse_yaml(text: str, *, source: str) -> Any:
    """The value that a YAML text stands for. Raises SpecError with the line and the way out when it is none."""
    loader = None
    try:
        _check_size(text)
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, (), {})
        return _value(loader, node)
    except yaml.YAMLError as error:
        raise _explained(error, text, source) from error
    finally:
        if loader is not None:
            loader.dispose()


def _bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        folder = file.parent
        nearby = sorted(p.name for p in _entries(folder) if p.suffix in (".yaml", ".yml"))[:8]
        remedies: dict[type[Exception], str] = {
            PermissionError: f"give yourself the right to read it: chmod u+r {file}",
            IsADirectoryError: "give the path of a file in it",
        }
        raise SpecError(
            "the spec file cannot be read",
            got=f"{file} ({getattr(error, 'strerror', None) or error})",
            allowed=f"YAML files here: {', '.join(nearby)}" if nearby else None,
            do=remedies.get(type(error), "give the path of a spec; configs/ holds some that run as they are"),
        ) from error
    if len(content) > MOST_BYTES:
        raise SpecError(
            f"{file} is too long for a spec",
            got=f"more than {MOST_BYTES:,} bytes",
            do="give the path of a spec, not of data; configs/ holds some",
        )
    return content


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (OSError, ValueError):
        return []


def _text(file: Path, content: bytes) -> str:
    """The file's text; a byte order mark is left out."""
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SpecError(
            "the spec file cannot be read as UTF-8 text",
            got=f"{file}: the byte 0x{content[error.start]:02x} in line {line}",
            do=f"save it as UTF-8, such as by iconv -f latin1 -t utf-8 {file}",
        ) from error


# -- what a text may hold ----------------------------------------------------------------------------------------------


def _check_size(text: str) -> None:
    """Refuses what is too deep or too long before anything recurses into it."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, _BUILTIN)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MOST_DEPTH:
            raise _Refusal(f"more than {MOST_DEPTH} levels inside each other", event.start_mark, "close some of them")
        if number > 2 * MOST_NODES:
            raise _Refusal(f"more than {MOST_NODES:,} values", event.start_mark, "give a spec, not data")


def _check(node: yaml.Node, above: tuple[yaml.Node, ...], seen: dict[yaml.Node, tuple[int, int]]) -> tuple[int, int]:
    """(values, levels) that a node stands for, aliases counted each time.

    Refuses what holds itself, too much of it, tags, and keys that are no words or stand twice.
    """
    if node in seen:
        return seen[node]
    if any(node is one for one in above):
        raise _Refusal("an anchor that holds itself", node.start_mark, "write out what is meant, without the alias")
    if node.tag not in _TAGS[type(node)]:
        shown = node.tag.replace(_CORE, "!!")
        raise _Refusal(f"the tag {shown} does not go here", node.start_mark, "write the value without a tag")
    children: list[yaml.Node] = [] if isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [child for pair in node.value for child in pair]
    size, depth = 1, 0
    for child in children:
        more, below = _check(child, (*above, node), seen)
        size, depth = size + more, max(depth, below)
    if size > MOST_NODES or depth >= MOST_DEPTH:
        too_much = f"{MOST_NODES:,} values" if size > MOST_NODES else f"{MOST_DEPTH} levels"
        raise _Refusal(f"aliases of aliases stand for more than {too_much}", node.start_mark, "write fewer of them")
    seen[node] = size, depth + 1
    return seen[node]


def _check_keys(node: yaml.MappingNode) -> None:
    seen: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            kind = "mapping" if isinstance(key, yaml.MappingNode) else "list"
            raise _Refusal(f"a key that is a {kind}", key.start_mark, "quote a value that begins with [ or {")
        same = (key.tag, key.value)
        if same in seen:
            raise _Refusal(
                f"the key {key.value!r} stands twice, first in line {seen[same]}", key.start_mark, "remove one of them"
            )
        seen[same] = key.start_mark.line + 1


def _value(loader: Any, node: yaml.Node) -> Any:
    """The value of a checked node; keys of a mapping itself go before those that it merges."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == f"{_CORE}merge":
            return node.value  # `<<` as a value is text
        try:
            return loader.construct_object(node)
        except yaml.YAMLError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            shown = node.value if len(node.value) < 60 else f"{node.value[:60]}..."
            kind = node.tag.replace(_CORE, "!!")
            raise _Refusal(f"{shown!r} cannot be read as {kind}", node.start_mark, "quote it, or correct it") from error
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, child) for child in node.value]
    merged: dict[Any, Any] = {}
    own: dict[Any, Any] = {}
    for key, child in node.value:
        if key.tag == f"{_CORE}merge":
            for one in _merged(child):
                merged = {**_value(loader, one), **merged}
        else:
            own[_value(loader, key)] = _value(loader, child)
    return {**merged, **own}


def _merged(node: yaml.Node) -> list[yaml.Node]:
    """The mappings of `<<: *a` or `<<: [*a, *b]`, of which the first goes before the second."""
    several = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for one in several:
        if not isinstance(one, yaml.MappingNode):
            raise _Refusal("<< merges mappings, and this is none", one.start_mark, "write <<: *ANCHOR of a mapping")
    return several


# -- what is wrong with it ---------------------------------------------------------------------------------------------

_REMEDIES = (
    ("tab character", "indent with spaces, not tabs"),
    ("mapping values are not allowed", "put the key on a line of its own, or quote a value that holds ': '"),
    ("could not find expected ':'", "write the line as `key: value`"),
    ("end of stream", "close the quote"),
    ("',' or ']'", "close the ["),
    ("',' or '}'", "close the {"),
    ("node content", "close the [ or {, or give the key a value"),
    ("expected key", "indent the keys of one block alike"),
    ("block end", "indent the keys of one block alike"),
    ("'-' indicator", "let all items of a list begin with `- `, indented alike"),
    ("undefined alias", "define the anchor above, as in `key: &NAME value`"),
    ("another document", "keep one document: remove this line and what does not belong to the spec"),
    ("not allowed", "remove that character"),
    ("escape character", "use 'single quotes', in which a backslash is a backslash"),
    ("hexdecimal", "use 'single quotes', in which a backslash is a backslash"),
    ("incompatible", "remove the %YAML line"),
    ("duplicate anchor", "give each anchor a name of its own"),
)
"""By words of PyYAML's and libyaml's messages."""


def _explained(error: yaml.YAMLError, text: str, source: str) -> SpecError:
    """The error with its line, that line's text, and what to do about it."""
    line, column = _position(error, text)
    problem = one_line(getattr(error, "problem", None) or getattr(error, "reason", None) or error, most=None)
    lines = text.splitlines() or [""]
    line = min(line, len(lines))  # what ends too soon is wrong where the text ends
    shown = lines[line - 1].strip()[:120]
    tabbed = "\t" in lines[line - 1][: column + 1] and "cannot start" in problem
    known = next((do for words, do in _REMEDIES if words in problem), "quote the value, or correct the line")
    begun = getattr(error, "context_mark", None)
    where = f" (it begins in line {begun.line + 1})" if begun is not None and begun.line + 1 != line else ""
    do = error.do if isinstance(error, _Refusal) else "indent with spaces, not tabs" if tabbed else known
    return SpecError(f"{source} is not valid YAML", got=f"line {line}: {problem}{where}: {shown}", do=do)


def _position(error: yaml.YAMLError, text: str) -> tuple[int, int]:
    """(line, column) from 1, of an error that has a mark or counts characters."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        return mark.line + 1, mark.column + 1
    at = getattr(error, "position", 0) or 0
    return text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
