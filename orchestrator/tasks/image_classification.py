"""Image classification, which the advisor prices and `run` does not train yet."""

from __future__ import annotations

from orchestrator.tasks.base import AdvisedTask


class ImageClassification(AdvisedTask):
    """See the module."""

    name = "image-classification"
    is_classification = True
    tokens_per_example = 197  # the patches of an image for a ViT-B/16 (Dosovitskiy 2021)
    assumed_base = (86_000_000, 2.8e9)  # ViT-B/16 on ImageNet-21k: 14M images of 197 patches
