"""Makes questions.jsonl from the docstrings of a Python's standard library:

python3.11 configs/data/stdlib-questions/make_questions.py
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "pydoc_data",
    "__pycache__",
}
SHORTEST, LONGEST = 30, 400
"""Characters of an answer."""


def named(body: list[ast.stmt], before: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """(dotted name, definition) of the public functions and classes in a body."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{before}.{node.name}", node


def first_paragraph(docstring: str) -> str:
    """Its sentences on one line."""
    return re.sub(r"\s+", " ", docstring.split("\n\n")[0]).strip()


def question(name: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    """What somebody would ask about a definition."""
    if isinstance(node, ast.ClassDef):
        return f"What is {name}?"
    arguments = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
    return f"What does {name}({', '.join(arguments)}) do?"


def rows() -> Iterator[dict[str, object]]:
    """One conversation for each definition, in the order of files and lines; the same answer only once."""
    library, seen = Path(sysconfig.get_path("stdlib")), set[str]()
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        if LEFT_OUT & set(parts) or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        for name, node in named(ast.parse(file.read_text(encoding="utf-8")).body, module):
            answer = first_paragraph(ast.get_docstring(node) or "")
            if SHORTEST <= len(answer) <= LONGEST and answer not in seen:
                seen.add(answer)
                yield {
                    "messages": [
                        {"role": "user", "content": question(name, node)},
                        {"role": "assistant", "content": answer},
                    ]
                }


if __name__ == "__main__":
    target = Path(__file__).with_name("questions.jsonl")
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()), encoding="utf-8")
