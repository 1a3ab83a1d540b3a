"""README's list of files is what `scripts/list_files` prints: whole, and with no file that is gone."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_list_of_files_is_up_to_date() -> None:
    command = [sys.executable, ROOT / "scripts" / "list_files"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    section = (ROOT / "README.md").read_text().split("## Files\n")[1].split("\nMore:")[0].strip()
    assert section == printed, "Put what scripts/list_files prints under '## Files' of README.md"
