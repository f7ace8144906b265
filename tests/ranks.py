"""What one of several training processes does in tests/test_fitting.py; writes what it saw to OUT-RANK.pt.

python -m tests.ranks OUT
"""

import sys

import torch

from tests.test_fitting import onenip_without_noise
from training.fitting import processes

if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, ranks = processes()
    torch.save(onenip_without_noise(rank, ranks), f"{sys.argv[1]}-{rank}.pt")
