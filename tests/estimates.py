"""Estimates that tests change in the figures they are about."""

from __future__ import annotations

from orchestrator.planning.memory import MemoryEstimate

NO_MEMORY = MemoryEstimate(
    weights_gib=0,
    gradients_gib=0,
    optimizer_gib=0,
    activations_gib=0,
    logits_gib=0,
    step_gib=0,
    gathered_gib=0,
    buffers_gib=0,
    reserve_gib=0,
    load_gib=0,
    checkpoint_gib=0,
    host_gib=0,
)
