"""How far a data set lies from what a base model was trained on, in three words."""

from __future__ import annotations

from typing import Literal

Domain = Literal["same", "near", "far"]
DOMAINS: tuple[Domain, ...] = ("same", "near", "far")
