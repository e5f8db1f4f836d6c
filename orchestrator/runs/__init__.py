"""The protocol of a run folder, which driver and workers share. No torch, no ray."""
