"""Times anomalib's AUPRO in its own environment. Usage: peer_aupro.py FOLDER RUNS

FOLDER holds ``maps.npy`` (float32, N×H×W) and ``masks.npy`` (bool, N×H×W). Prints one JSON object: ``aupro``,
``seconds`` (one a run), ``threads``, ``version``.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from anomalib.metrics.aupro import _AUPRO  # AUPRO itself wants its batches; the computation is this class's


def main() -> None:
    folder, runs = Path(sys.argv[1]), int(sys.argv[2])
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    maps = torch.from_numpy(np.load(folder / "maps.npy", allow_pickle=False))
    masks = torch.from_numpy(np.load(folder / "masks.npy", allow_pickle=False)).long()
    seconds, aupro = [], float("nan")
    for _ in range(runs):
        start = time.perf_counter()
        metric = _AUPRO(fpr_limit=0.3)
        metric.update(maps, masks)
        aupro = float(metric.compute())
        seconds.append(time.perf_counter() - start)
    threads, release = torch.get_num_threads(), version("anomalib")
    print(json.dumps({"aupro": aupro, "seconds": seconds, "threads": threads, "version": release}))


if __name__ == "__main__":
    main()
