"""Reading and splitting a large labelled csv: what `run` does up to its split, against `datasets` and its own split.

Each contestant is a process of its own, in turn: python -m tests.bench.reading ours|theirs FILE FOLDER
"""

from __future__ import annotations

import contextlib
import csv
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

BYTES = 500_000_000
HELD_OUT = 0.05
_POLL_S = 0.01


def write_rows(file: Path, *, size: int = BYTES) -> int:
    """Rows of 10 to 60 words, a third with quotes and commas, a twentieth with a line break; gives their number."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    count = 0
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        while stream.tell() < size:
            for _ in range(1000):
                text = " ".join(draw.choices(words, k=draw.randint(10, 60)))
                if draw.random() < 0.3:
                    text = text.replace(" ", ', "', 1) + '"'
                if draw.random() < 0.05:
                    text = text.replace(" ", "\n", 1)
                writer.writerow([text, draw.choice("abcd")])
                count += 1
    return count


def ours(file: Path) -> dict[str, Any]:
    """Classes counted, gaps looked for, split stratified; then every text of both splits once, as for encoding."""
    import numpy as np
    import pyarrow.compute
    import pyarrow.csv  # noqa: F401  Neither contestant pays for its imports.

    from orchestrator.data.sources import find_sources
    from orchestrator.data.splits import split_rows
    from orchestrator.load_spec import load_spec

    fields = [f"train={file}", "text_column=text", "label_column=label", f"validation_fraction={HELD_OUT}"]
    spec = load_spec("configs/finetune/reviews.yaml", [f"data.{field}" for field in fields])
    started = time.perf_counter()
    found = split_rows(spec, find_sources(str(file)), ())
    split_s, peak = time.perf_counter() - started, peak_bytes()
    counts = {split: np.bincount(labels).tolist() for split, (_, labels) in found.splits.items()}
    texts = sum(1 for texts, _ in found.splits.values() for _ in texts)
    return {"rows": texts, "split_s": split_s, "peak": peak, "all_s": time.perf_counter() - started, "counts": counts}


def theirs(file: Path, cache: Path) -> dict[str, Any]:
    """The same with `datasets`, whose split is not even asked to be stratified, and counts nothing."""
    import datasets

    datasets.disable_progress_bars()
    started = time.perf_counter()
    table = datasets.load_dataset("csv", data_files=[str(file)], split="train", cache_dir=str(cache))
    splits = table.train_test_split(test_size=HELD_OUT, seed=0)
    split_s, peak = time.perf_counter() - started, peak_bytes()
    texts = sum(len(batch["text"]) for split in splits.values() for batch in split.iter(batch_size=1000))
    return {"rows": texts, "split_s": split_s, "peak": peak, "all_s": time.perf_counter() - started}


def peak_bytes() -> int:
    """The largest resident set of this process so far, as Linux counts it (`ru_maxrss` counts the parent's too)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def compare(folder: Path, *, rounds: int) -> dict[str, dict[str, float]]:
    """By contestant the medians of seconds to the split, seconds until all texts were read too, and peak bytes."""
    file = folder / "rows.csv"
    rows = write_rows(file)
    taken: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for number in range(rounds):
        for name in taken:
            cache = folder / f"cache-{number}-{name}"
            found, children = _run([sys.executable, "-m", "tests.bench.reading", name, str(file), str(cache)])
            assert found["rows"] == rows, f"{name} has lost rows: {found['rows']} of {rows}"
            # Children count as much as they had at once; neither contestant starts any at the time of writing.
            taken[name].append({**found, "peak": found["peak"] + children})
            print(f"{name:7} {found['split_s']:.2f} s, {found['peak'] / 1e6:.0f} MB", file=sys.stderr)
    return {
        name: {key: statistics.median(one[key] for one in every) for key in ("split_s", "all_s", "peak")}
        for name, every in taken.items()
    }


def _run(command: list[str]) -> tuple[dict[str, Any], int]:
    """(what it printed, the most that its children held together)."""
    most = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                most = max(most, sum(child.memory_info().rss for child in watched.children(recursive=True)))
            time.sleep(_POLL_S)
        assert process.stdout is not None
        printed = process.stdout.read()
    assert process.returncode == 0, command
    return json.loads(printed), most


if __name__ == "__main__":
    who, table, place = sys.argv[1:]
    print(json.dumps(ours(Path(table)) if who == "ours" else theirs(Path(table), Path(place))))
