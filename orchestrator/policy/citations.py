"""What the advice's reasons cite, written out: papers, evidence rows and own measurements by the names used there.

Reasons name their sources in a word or two. The advisor's page lists those that were used; a test holds every reason to
citing one of these.
"""

from __future__ import annotations

from collections.abc import Iterable

SOURCES: dict[str, str] = {
    "Besiroglu 2024": (
        "arXiv 2404.10102, the refit of Hoffmann 2022 (Chinchilla): loss from parameters and tokens; 240 training runs"
    ),
    "Muennighoff 2023": "arXiv 2305.16264: what repeated tokens are still worth; the trend holds, the level is shifted",
    "Hernandez 2021": "arXiv 2102.01293: the fresh data that pretraining stands in for; measured on text to Python",
    "film reviews": (
        "own runs: MiniLM (22.7M parameters) on 100, 1,000 and 8,570 film reviews, trained fully, by LoRA, by its head "
        "and from scratch"
    ),
    "curves": "14 published fine-tunings of 23M to 355M encoders on 100 to 392,702 labels; e^0.5 up or down",
    "lora-*": (
        "decisions.csv: LoRA against full fine-tuning on GLUE (microsoft/LoRA, 125M and 1.5B) and on code with "
        "Llama-2-7B (Biderman 2024, arXiv 2405.09673)"
    ),
    "peft-metamath-3B": "decisions.csv: LoRA and full fine-tuning of Llama-3.2-3B on 20,000 answers (huggingface/peft)",
    "setfit-8shot": "decisions.csv: frozen features and 3B models at 8 labels a class (SetFit, arXiv 2209.11055)",
    "raft-50": "decisions.csv: GPT-3 prompted against trained models, 50 labels, 11 tasks (RAFT, in arXiv 2209.11055)",
    "lescao-RTE-0": "decisions.csv: a 355M encoder prompted without labels is at chance (Le Scao and Rush 2021)",
    "dapt-*": (
        "decisions.csv: continued pretraining of RoBERTa-base before five tasks (Gururangan 2020, arXiv 2004.10964)"
    ),
    "ibrahim-strong": "decisions.csv: 405M parameters continued on German, with and without replay (arXiv 2403.08763)",
}
"""Name in the reasons to what it is, where it stands, and what it covers."""


def cited(reasons: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """(name, description) of every source that a reason names, in the order of `SOURCES`."""
    text = "\n".join(reasons)
    return tuple((name, description) for name, description in SOURCES.items() if name in text)
