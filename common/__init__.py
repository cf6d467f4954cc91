"""What producer, workers and commands share."""

#: The version of all of Maskwatch: three numbers, as docs/versions.md explains them. pyproject.toml says the same.
__version__ = "0.2.0"
