"""Helpers that several tests share, and where the checkout and its golden numbers are."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN_FOLDER = ROOT / "tests" / "golden"
