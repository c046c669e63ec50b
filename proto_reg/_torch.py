"""Imports torch before anything else of this package does, without a word on NumPy, which it can do without."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # torch says so when it is imported where there is none. What needs NumPy here, the extras, asks for it.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    import torch  # noqa: F401
