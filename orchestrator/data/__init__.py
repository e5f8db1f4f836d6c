"""Where data lies and how it is read: one reader for `advise`, `plan` and `run`."""
