"""What was read of a data set: all of it, or blocks drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.data.columns import Columns


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows that lie together: the unit in which a large dataset is drawn."""

    texts: tuple[str, ...]
    """Texts of the rows that begin in the block; empty ones included."""
    labels: tuple[str | None, ...]
    """Class of each row, None where it has none; no entries when there is no class column."""
    extent: int
    """Size of the block in the unit of `Reading.extent`."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read of a dataset."""

    location: str
    blocks: tuple[Block, ...]
    extent: int
    """Size of the whole dataset: bytes on disk, or rows where only these are known."""
    columns: Columns
    document_bytes: tuple[int, ...] = ()
    """Size of every document where the file system tells it; none for tables."""
    notes: tuple[str, ...] = ()
    """What a reader of the files may not expect, a sentence each."""

    def complete_labels(self) -> list[str | None]:
        """Class of each row that has one and a text, else None; no entries when there is no class column."""
        return [
            label if text and not text.isspace() else None
            for block in self.blocks
            for text, label in zip(block.texts, block.labels, strict=bool(block.labels))
        ]

    @property
    def share(self) -> float:
        """The part that was read, 0..1."""
        return min(1.0, sum(block.extent for block in self.blocks) / self.extent)
