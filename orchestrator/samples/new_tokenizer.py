"""A corpus -> a tokenizer of its own, for a model with new weights. Called by `prepare`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from orchestrator.errors import ModelError
from orchestrator.samples.tokenization import TextTokenizer, from_files

END_OF_TEXT = "<|endoftext|>"
BPE_SAMPLE_BYTES = 20_000_000
"""Text that a new tokenizer is trained on at most: about 10 s on two cores. That more would not help is a guess."""
LOOK_SAMPLE_BYTES = 4_000_000
"""The same for a look at data, which does with a fifth: 2 s."""
LONGEST_WORD = 256
"""Characters of a word that a new tokenizer learns from: longer runs of letters or of white space are cut, because the
training goes over a whole word for each merge in it (one of 200,000 equal letters took 23 s). A guess, beyond any word
of a language and any line of a program."""
ENCODER_TOKENS = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
"""Special tokens of an encoder's tokenizer, with the names and in the order of RoBERTa's (Liu et al. 2019)."""
BYTES = 256
"""Entries that a byte-level BPE cannot do without, beside its special tokens."""
_LONG_WORD = re.compile(rf"(?<!\S)\S{{{LONGEST_WORD + 1}}}|(?<!\s)\s{{{LONGEST_WORD + 1}}}")
_PART_OF_IT = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, sequence_length: int, for_encoder: bool = False
) -> TextTokenizer:
    """A byte-level BPE (Radford et al. 2019) of the first `BPE_SAMPLE_BYTES` of texts; equal for equal texts.

    That of a decoder has one special token, the end of a text; that of an encoder has `ENCODER_TOKENS`, and puts texts
    between the first and the last. Small corpora give fewer entries than asked for. Raises ModelError when `vocab_size`
    has no room for every byte and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    named = (
        ENCODER_TOKENS
        if for_encoder
        else dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT)
    )
    special = list(dict.fromkeys(named.values()))
    if vocab_size < BYTES + len(special):
        raise ModelError(
            "the tokenizer's vocabulary is too small",
            got=f"model.vocab_size={vocab_size}",
            allowed=f"at least {BYTES + len(special)}: {BYTES} bytes and {', '.join(special)}",
            do="set model.vocab_size=8192",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    if for_encoder:
        tokenizer.post_processor = _between_special_tokens(tokenizer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": sequence_length, **named}
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=2)}
    return from_files({name: text.encode() for name, text in files.items()}, {}, "a tokenizer of the corpus")


def _between_special_tokens(tokenizer: Any) -> Any:
    """What puts the special tokens around a text, or around two, as RoBERTa's tokenizer does."""
    from tokenizers import processors

    first, last = ENCODER_TOKENS["cls_token"], ENCODER_TOKENS["sep_token"]
    return processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} {last} $B {last}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last)],
    )


def _sample(texts: Iterable[str]) -> Iterator[str]:
    left = BPE_SAMPLE_BYTES
    for text in texts:
        yield from _without_long_words(text[:left])
        left -= len(text)
        if left <= 0:
            return


def _without_long_words(text: str) -> Iterator[str]:
    """The text in one, or in as many parts as leave no word above `LONGEST_WORD`."""
    start = 0
    if _LONG_WORD.search(text):
        for part in _PART_OF_IT.finditer(text):
            yield text[start : part.end()]
            start = part.end()
    yield text[start:]


def size_note(prepared: Mapping[str, Any], asked: int) -> tuple[str, ...]:
    """A sentence where a corpus gave fewer entries than were `asked`; `prepared` holds the tokenizer's `vocab_size`."""
    learnt = prepared["vocab_size"]
    if learnt >= asked:
        return ()
    return (f"the new tokenizer has {learnt:,} entries, not the {asked:,} asked for: nothing else in the text repeats",)
