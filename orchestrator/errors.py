"""The exception tree. The branch says whose fault it is, and the retry rule reads the branch.

    OrchestratorError                  exit code 1
    ├── UserError                      exit code 2, never retried
    │   ├── SpecError                  the spec file, an override or a command-line option
    │   ├── DataError                  the dataset does not hold what the spec says
    │   ├── ModelError                 the base model or its tokenizer cannot be used as the spec says
    │   └── DivergedError              the training diverges, whatever data is skipped
    ├── ClusterError                   the machines: capacity, disk, a store; retried only where stated
    │   ├── CapacityError              fewer resources than the plan needs
    │   ├── StorageError               a disk or store that cannot be written or read
    │   └── FencedError                another command has taken the run over
    ├── TransientError                 a worker or node died; the same work may succeed when tried again
    │   ├── HangError                  a rank stopped stepping while the others waited for it
    │   └── MemoryExhaustedError       a step did not fit; half its micro-batch may
    └── Interrupted                    the user or the cluster asked the run to stop; work was kept

Every message has up to four lines: what is wrong, what was given (`got`), what would have been accepted
(`allowed`), and what to do about it (`do`). All of them pickle, so the cause survives the way from a worker.

Messages quote data and file names, so `shown`, which makes any text safe to print, stands here too. No part of a
message holds a credential, whatever it quotes, and none is longer than a screen.
"""

from __future__ import annotations

from typing import Any, Self

from orchestrator.credentials import without_credentials

LONGEST_PART = 2000
"""Characters of a part of a message: about a screen (a guess)."""

_UNPRINTABLE = (
    *(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"),  # C0, DEL and C1 of ECMA-48
    *(0x2028, 0x2029),  # they end a line where no line is seen to end
    *(*range(0x202A, 0x202F), *range(0x2066, 0x206A)),  # they reorder what stands around them (Unicode UAX 9)
    *range(0xD800, 0xE000),  # halves of a surrogate pair, as in a file name that is not UTF-8: no stream takes them
)
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _UNPRINTABLE}


def shown(text: str) -> str:
    """Text as it can be printed: what would command a terminal, or reorder a line, becomes its escape (`\\x1b`).

    Tabs and line ends stay. Text that was made printable stays as it is.
    """
    return text.translate(_ESCAPES)


def message_part(value: Any) -> str | None:
    """A part of a message as it is kept: no longer than a screen, and without credentials."""
    if value is None:
        return None
    try:
        text = str(value)
    except ValueError:  # a whole number of more digits than Python writes out
        text = "a number of thousands of digits"
    text = without_credentials(text[: 10 * LONGEST_PART])
    return text if len(text) <= LONGEST_PART else f"{text[:LONGEST_PART]}..."


def one_line(said: object, *, most: int | None = 300) -> str:
    """What an error of another library says, in one line: its first `most` characters, or None for all."""
    return " ".join(str(said).split())[:most]


class OrchestratorError(Exception):
    """Base of every error this project raises on purpose.

    `what` states the problem in one sentence; `got`, `allowed` and `do` are optional single lines.
    """

    exit_code = 1

    def __init__(self, what: str, *, got: Any = None, allowed: Any = None, do: str | None = None) -> None:
        self.what = message_part(what) or ""
        self.got, self.allowed, self.do = message_part(got), message_part(allowed), message_part(do)
        super().__init__(self.what)

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (("got", self.got), ("allowed", self.allowed), ("do", self.do)):
            if text is not None:
                lines.append(f"  {label + ':':<9}{text}")
        return shown("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.what, self.got, self.allowed, self.do))

    def within(self, where: str) -> Self:
        """The same error, told of one part of what was asked for: `stage classify: ...`."""
        return type(self)(f"{where}: {self.what}", got=self.got, allowed=self.allowed, do=self.do)


def _rebuild(
    kind: type[OrchestratorError],
    what: str,
    got: str | None,
    allowed: str | None,
    do: str | None,
) -> OrchestratorError:
    return kind(what, got=got, allowed=allowed, do=do)


class UserError(OrchestratorError):
    """A mistake in what the user gave; trying again unchanged cannot help."""

    exit_code = 2


class SpecError(UserError):
    """The spec file, a `key=value` override or a command-line option is wrong."""


class DataError(UserError):
    """The dataset is missing, empty, or does not hold what the spec says."""


class ModelError(UserError):
    """The base model, its tokenizer or its size cannot be used as the spec says."""


class DivergedError(UserError):
    """The loss is not finite or leaps again and again, whatever data is skipped."""


class ClusterError(OrchestratorError):
    """The machines or stores cannot do what was planned."""


class CapacityError(ClusterError):
    """The cluster has fewer resources than the plan needs."""


class StorageError(ClusterError):
    """A disk or store cannot be written or read."""


class FencedError(ClusterError):
    """A newer attempt of the same run has begun, so this one may write nothing more."""


class TransientError(OrchestratorError):
    """A worker or node died; the same work may succeed when tried again."""


class HangError(TransientError):
    """A rank stopped stepping while the others waited for it; it was ended."""


class MemoryExhaustedError(TransientError):
    """A training step needed more memory than its worker had; the same step in smaller parts may fit."""


class Interrupted(OrchestratorError):
    """Someone asked the run to stop, and it did, keeping its work."""
