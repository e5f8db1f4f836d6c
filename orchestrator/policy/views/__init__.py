"""A recommendation for a person, a program and a browser."""
