"""Puts scripts/ and notebooks/ where the tests can import from them."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "notebooks")]
