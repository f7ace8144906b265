"""What one of several training processes does in tests/test_fitting.py; writes what it saw to OUT-RANK.pt.

python -m tests.ranks FUNCTION OUT
"""

import sys

import torch

from tests import test_fitting
from training.fitting import processes

if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, ranks = processes()
    torch.save(getattr(test_fitting, sys.argv[1])(rank, ranks), f"{sys.argv[2]}-{rank}.pt")
