"""What `advise` finds in a data set: sizes, classes, duplicates, lengths, and how far it lies from a base."""
