"""Where there is no GPU: is every tensor where it has to be?"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_nothing_mixes_devices():
    """In a process of its own, for the pretended device changes torch for good: detectors, their training,
    feature generators, and rounds that practise, with `cut` guided by a detector (`test_practice.py`)."""
    words = ["-q", "-p", "tests.pretend_device", "-p", "no:cacheprovider"]
    files = ["tests/on_device.py", "tests/test_practice.py"]
    command = [sys.executable, "-m", "pytest", *words, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
