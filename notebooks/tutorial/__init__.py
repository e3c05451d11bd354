"""What the notebooks import: plain functions, tested without a notebook.

This file puts scripts/ where they can import from it, as a training job has it.
"""

import sys
from pathlib import Path

SCRIPTS = str(Path(__file__).resolve().parents[2] / "scripts")
if SCRIPTS not in sys.path:
    sys.path.insert(0, SCRIPTS)
if sys.prefix == "/opt/conda" and Path("/opt/ml/metadata/resource-metadata.json").exists():
    print('This is Studio\'s own Python. Choose the kernel "Video tutorial": see aws/README.md.')
