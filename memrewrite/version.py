"""The version of the package, also written into its files."""

__version__ = "0.1.0"
