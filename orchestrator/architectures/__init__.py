"""A model before it exists: the shapes of families, the names of weights, what stored weights hold. No torch."""
