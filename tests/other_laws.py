"""Other published fits of the pretraining law, which what the code does with any such law is checked against."""

from __future__ import annotations

from orchestrator.policy.laws.scaling import REFIT, PretrainingLaw

HOFFMANN = PretrainingLaw(
    name="Chinchilla (Hoffmann, unrounded)",
    irreducible=1.6934,
    size_scale=406.4,
    data_scale=410.7,
    size_exponent=0.33917084,
    data_exponent=0.2849083,
    fitted=REFIT.fitted,
    source="Hoffmann 2022, arXiv 2203.15556, approach 3, digits from its TeX source; mean error on its runs 0.56 %",
)
"""For comparison. Its optimum is 59 tokens per parameter for Chinchilla's own compute, where 20 were trained."""

HOFFMANN_PRINTED = PretrainingLaw(
    name="Chinchilla (Hoffmann, as printed)",
    irreducible=1.69,
    size_scale=406.4,
    data_scale=410.7,
    size_exponent=0.34,
    data_exponent=0.28,
    fitted=REFIT.fitted,
    source="Hoffmann 2022, arXiv 2203.15556, approach 3 as printed; biased by rounding, mean error 1.78 %",
)
"""For comparison, and because others built on it (Sardana 2023). Never to allocate by."""
