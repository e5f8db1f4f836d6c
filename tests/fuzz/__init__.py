"""Specs, options and data files that nobody would write on purpose, each answered or refused, never a traceback.

Generators are pure: the same seed gives the same cases. `python -m tests.fuzz SEED CASES` prints what it finds.
"""
