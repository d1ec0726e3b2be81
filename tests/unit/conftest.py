"""Make the helper modules in this folder importable (tiny_graph, transformers_oracle)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
