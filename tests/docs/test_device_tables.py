"""Are the computed tables of the pages about devices those that the code computes?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_pages_are_up_to_date() -> None:
    command = [sys.executable, ROOT / "docs" / "devices" / "tables.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
