"""Rows and documents -> token ids on disk -> the batches of a step."""
