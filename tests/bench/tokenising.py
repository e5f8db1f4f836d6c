"""Tokenising a corpus: our Ray tasks against `datasets.map(batched=True, num_proc=cores)`, with the same tokenizer."""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import time
from pathlib import Path

import numpy as np

from orchestrator.data.documents import open_documents
from orchestrator.data.sources import find_sources
from orchestrator.samples.new_tokenizer import train_tokenizer
from orchestrator.samples.tokenization import document_chunks, encode_documents
from orchestrator.spec import RunSpec


def compare(spec: RunSpec, folder: Path, *, rounds: int) -> tuple[float, float, float]:
    """(our seconds, theirs, megabytes of text); medians, Ray already up and imports already done, as in a run."""
    import datasets
    import ray
    import transformers

    from orchestrator.scheduling.session import ray_session
    from orchestrator.scheduling.tokenize import encode_on_ray

    datasets.disable_progress_bars()
    sources = find_sources(str(spec.data.train), exclude=spec.data.exclude)
    documents = open_documents(sources, text_column="text")
    everything = np.arange(len(documents))
    tokenizer = train_tokenizer(documents.read(everything), vocab_size=8192, sequence_length=256)
    tokenizer.save(folder / "tokenizer")
    slow = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    slow.model_max_length = 10**9
    megabytes = sum(len(text.encode(errors="replace")) for text in documents.read(everything)) / 1e6
    encode = functools.partial(encode_documents, tokenizer=tokenizer.json, after=(tokenizer.eos_id,))

    def ours() -> None:
        with (folder / "ours.bin").open("wb") as out:
            for ids in encode_on_ray(encode, document_chunks(documents.read(everything))):
                out.write(ids.data)

    def theirs() -> None:
        cache = folder / "datasets"
        shutil.rmtree(cache, ignore_errors=True)
        loaded = datasets.load_dataset(
            "text",
            data_files=[str(file) for source in sources for file in source.files],
            sample_by="document",
            split="train",
            cache_dir=str(cache),
            encoding_errors="replace",
        )
        loaded.map(
            lambda rows: {"input_ids": slow(rows["text"], add_special_tokens=False)["input_ids"]},
            batched=True,
            num_proc=os.cpu_count(),
            remove_columns=["text"],
            load_from_cache_file=False,
        )

    with ray_session():
        assert ray.is_initialized()
        taken: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(rounds + 1):
            for name, work in (("ours", ours), ("theirs", theirs)):
                started = time.perf_counter()
                work()
                if number:  # the first round warms workers and caches
                    taken[name].append(time.perf_counter() - started)
    return statistics.median(taken["ours"]), statistics.median(taken["theirs"]), megabytes
