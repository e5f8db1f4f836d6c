"""Inside a worker, where nothing is trained: a causal language model is asked for the class of every held-out row.

The score of a class is the log-probability of its name behind the prompt (Brown et al. 2020, section 2.4). Keys and
values of what all prompts begin with are computed once. Rows are asked about together only where their prompts are
equally long, so nothing is padded and a row's scores do not depend on its neighbours' lengths. Scores are kept on the
way: whoever goes on with the run asks about the other rows alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers

from orchestrator.architectures.families import model_config, model_shape
from orchestrator.atomic_file import draft_of
from orchestrator.checkpoints.catalog import storage_errors
from orchestrator.errors import DataError, ModelError
from orchestrator.methods.few_shot import PROMPT, SCORES
from orchestrator.methods.registry import method_of
from orchestrator.object_store import PATIENCE_S
from orchestrator.planning.asking import words_of
from orchestrator.runs.job import Outcome, Status, TrainingJob, WorkerContext
from orchestrator.samples.forms.labelled_texts import LabelledSamples
from orchestrator.samples.open_split import open_split
from orchestrator.samples.prompts import BETWEEN, CONTENT_FREE, Question, draw_examples, opening, questions, written
from orchestrator.tasks.registry import task_of
from orchestrator.worker.consensus import ControlSignal
from orchestrator.worker.models import load_language_model
from orchestrator.worker.scorer import Scorer
from orchestrator.worker.untrained import UntrainedRank, carried_out

_KEEP_EVERY_S = 30.0
"""Between writings of the scores so far: what a death costs at most, beside the start (a guess)."""


def ask(job: TrainingJob, context: WorkerContext) -> Outcome:
    """Runs one rank to the end, its budget's end or a requested stop; rank 0's outcome is the run's.

    Raises ModelError where the base cannot be asked or the prompts do not fit into its context, DataError where
    `few_shot.words` are others than the data's classes, StorageError when the scores cannot be kept, FencedError when
    a newer attempt has begun.
    """
    return carried_out(_Asking, job, context)


class _Asking(UntrainedRank):
    """One rank's share of asking."""

    def __init__(self, job: TrainingJob, context: WorkerContext) -> None:
        super().__init__(job, context)
        self._note(f"what was asked is in {PROMPT} of the run folder, what came of each row in {SCORES}")
        train, self._rows = (_labelled(job.data.path, split) for split in ("train", "validation"))
        prompts = _Prompts(job, train)
        self._questions = prompts.about(self._rows)
        prompts.check(self._questions)
        if self._leads:
            self._fence.check()
            with storage_errors(job.run_folder):
                (job.run_folder / PROMPT).write_text(prompts.pattern, encoding="utf-8")
            self._show(PROMPT)
            self._exchange.fetch(SCORES, patience_s=PATIENCE_S)
        self._scores = _kept(job.run_folder, (len(self._rows), len(job.data.label_names or ())))
        shared = torch.from_numpy(self._scores).to(self._device)
        dist.broadcast(shared, src=0)
        self._scores = shared.cpu().numpy()
        self._without_content = prompts.without_content() if job.spec.few_shot.calibrate else []
        self._scorer = Scorer(load_language_model(job.spec, job.plan), self._device, prompts.opening_ids)

    @property
    def _share(self) -> float:
        """See `UntrainedRank`: of the rows that have their scores."""
        return float(np.mean(~self._unasked))

    @property
    def _unasked(self) -> np.ndarray:
        """Of each row, whether it has no scores yet."""
        found: np.ndarray = np.isnan(self._scores).any(axis=1)
        return found

    def run(self) -> Status:
        """Asks about all rows that have no scores yet."""
        world_size, micro_batch = self._job.plan.workers, self._job.plan.micro_batch
        batches = list(_batches(self._questions, np.flatnonzero(self._unasked), micro_batch))
        kept_s, done = time.monotonic(), len(self._scores) - sum(map(len, batches))
        self._tell(done, len(self._scores))
        for start in range(0, len(batches), world_size):
            began_s = time.monotonic()
            chosen = batches[start : start + world_size]
            wish = self._ask_about(chosen)
            self._account.add_evaluation(time.monotonic() - began_s)
            done += sum(map(len, chosen))
            self._tell(done, len(self._scores))
            if wish != ControlSignal.GO_ON and start + world_size < len(batches):
                return "interrupted" if wish == ControlSignal.STOP else "stopped_by_budget"
            if time.monotonic() - kept_s > _KEEP_EVERY_S:
                self._keep()
                kept_s = time.monotonic()
        return "finished"

    def _ask_about(self, batches: Sequence[np.ndarray]) -> ControlSignal:
        """One batch of rows for each rank, whose scores all ranks get, with rank 0's wish."""
        rows = np.concatenate(batches)
        shared = torch.zeros(len(rows) + 1, self._scores.shape[1], dtype=torch.float64)
        if self._context.rank < len(batches):
            self._context.heartbeat.enter("evaluating", 0)
            begin = sum(map(len, batches[: self._context.rank]))
            mine = batches[self._context.rank]
            found = self._scorer.scores([self._questions[row] for row in mine], at_a_time=self._job.plan.micro_batch)
            shared[begin : begin + len(mine)] = found.double().cpu()
        if self._leads:
            shared[-1, 0] = float(self._wish())
        self._context.heartbeat.enter("waiting", 0)
        sent = shared.to(self._device)
        dist.all_reduce(sent)
        values = sent.cpu().numpy()
        if np.isnan(values).any():
            raise ModelError(
                "the base gives no number for the probability of a class",
                got=f"precision {self._job.plan.precision}",
                do="set training.precision=fp32, or check the base's weights",
            )
        self._scores[rows] = values[:-1]
        return ControlSignal(int(values[-1, 0]))

    def _figures(self) -> dict[str, float]:
        """The task's own, with the scores as logits."""
        objective = task_of(self._job.spec.task).objective
        scores = SimpleNamespace(logits=torch.from_numpy(self._scores) - self._preference())
        labels = torch.from_numpy(self._rows.labels(np.arange(len(self._rows))))
        sums: list[float] = objective.evaluate(lambda: scores, {"labels": labels}).sum(0).tolist()
        return objective.summarize(*sums)

    def _preference(self) -> torch.Tensor:
        """Log-probability of each class, on average over texts without content; zeros without calibration."""
        if not self._without_content:
            return torch.zeros(self._scores.shape[1], dtype=torch.float64)
        found = [self._scorer.scores([one], at_a_time=self._job.plan.micro_batch) for one in self._without_content]
        return torch.cat(found).double().cpu().softmax(-1).mean(0).log()

    def _keep(self) -> None:
        if not self._leads:
            return
        self._fence.check()
        with storage_errors(self._job.run_folder), draft_of(self._job.run_folder / SCORES) as draft:
            with draft.open("wb") as stream:
                np.save(stream, self._scores)
            draft.replace(self._job.run_folder / SCORES)
        self._show(SCORES)


def _labelled(path: Path, split: Any) -> LabelledSamples:
    samples = open_split(path, split)
    assert isinstance(samples, LabelledSamples), "rows with classes are asked about"
    return samples


def _kept(folder: Path, shape: tuple[int, int]) -> np.ndarray:
    """Scores that an earlier attempt has kept; not a number for those that are not known."""
    try:
        found: np.ndarray = np.load(folder / SCORES)
    except (OSError, ValueError, EOFError):
        found = np.empty(0)
    return found if found.shape == shape else np.full(shape, np.nan)


def _batches(asked: Sequence[Question], rows: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Rows with equally long contexts, at most so many together."""
    lengths = np.array([len(asked[row].context) for row in rows], dtype=np.int64)
    for length in np.unique(lengths):
        same = rows[lengths == length]
        yield from (same[start : start + most] for start in range(0, len(same), most))


class _Prompts:
    """The text of a run's prompts, and their ids by the base's own tokenizer."""

    def __init__(self, job: TrainingJob, train: LabelledSamples) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(job.data.tokenizer_folder)
        self._settings = job.spec.few_shot
        self._words = words_of(self._settings, job.data.label_names or ())
        config = model_config(job.spec.model)
        self._context = model_shape(config, task=method_of(job.spec.method).model_task(job.spec)).context
        count, longest = self._settings.examples, self._longest_example(job)
        labels, lengths = (of(np.arange(len(train))) for of in (train.labels, train.lengths))
        chosen = draw_examples(labels, lengths, count=count, longest=longest, seed=job.spec.training.seed)
        if len(chosen) < count and longest < lengths.max():
            raise self._too_long(
                f"few_shot.examples: {count}, which leaves {max(0, longest)} tokens for each; {len(chosen)} training "
                "rows are so short"
            )
        examples = [
            (text, self._words[label]) for text, label in zip(self._texts(train, chosen), labels[chosen], strict=True)
        ]
        self.opening = opening(self._settings, examples)
        self.opening_ids = (*self._begins_with(), *self._encode([self.opening])[0])

    @property
    def pattern(self) -> str:
        """A whole prompt, as it is before a row and a class are put in."""
        return f"{self.opening}{BETWEEN if self.opening else ''}{self._settings.template}\n"

    def about(self, rows: LabelledSamples) -> list[Question]:
        """What is asked about each row."""
        return self._questions(self._texts(rows, np.arange(len(rows))))

    def without_content(self) -> list[Question]:
        """The same about texts without content."""
        return self._questions(CONTENT_FREE)

    def _questions(self, texts: Sequence[str]) -> list[Question]:
        return questions(self._settings, texts, self._words, begins=self.opening, encode=self._encode)

    def check(self, asked: Sequence[Question]) -> None:
        """Raises ModelError where a prompt is longer than the context, DataError where classes have the same ids."""
        longest = len(self.opening_ids) + max(question.length for question in asked)
        if self._context is not None and longest > self._context:
            raise self._too_long(f"a prompt of {longest} tokens")
        if len(set(asked[0].answers)) < len(self._words):
            raise DataError(
                "the base's tokenizer does not tell the names of the classes apart",
                got=", ".join(self._words),
                do="name them with few_shot.words",
            )

    def _longest_example(self, job: TrainingJob) -> int:
        """Tokens that a row may have to be an example: what the context leaves, shared out equally."""
        cut_off, count = job.spec.data.sequence_length, self._settings.examples
        if self._context is None or not count:
            return cut_off
        around = len(self._encode([written(self._settings, "", max(self._words, key=len)) + BETWEEN])[0]) + 1
        before = len(self._encode([self._settings.instruction])[0]) + len(self._begins_with())
        room = self._context - before - around - (job.data.counts.longest or cut_off)
        return min(cut_off, room // count - around)

    def _too_long(self, got: str) -> ModelError:
        return ModelError(
            "the prompts do not fit into the model's context",
            got=got,
            allowed=f"{self._context} tokens",
            do="lower few_shot.examples or data.sequence_length",
        )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return found

    def _begins_with(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text."""
        plain, whole = self._encode(["x"])[0], self._tokenizer("x")["input_ids"]
        places = range(len(whole) - len(plain) + 1)
        return tuple(whole[: next((at for at in places if whole[at : at + len(plain)] == plain), 0)])

    def _texts(self, rows: LabelledSamples, chosen: np.ndarray) -> list[str]:
        """Rows as text again, cut where their samples are."""
        texts = []
        for row in chosen:
            ids = rows.batch(np.array([row]), pad_to=int(rows.lengths(np.array([row]))[0]))["input_ids"][0]
            texts.append(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return texts
