"""Kernels that implement the canonical attention op, one file per family, and the table of platforms."""
