"""Batches that fit: what memory a worker has, asked once before a configuration's first shard.

The batch is part of the recipes, so it is settled here and stored with the round's settings; a run that goes
on elsewhere keeps it. Should memory run out all the same, the generator halves the batch and its rows say so.
"""

from __future__ import annotations

import os
from pathlib import Path

from generation import registry
from manifests.errors import FlawsmithError
from workflows.config import Cluster, Generation
from workflows.stages import device

RESERVE = 0.15  # of what is free: prediction is not exact, and pictures need room too


def fitted(generation: Generation, cluster: Cluster) -> tuple[Generation, list[str]]:
    """The settings with batches that fit this machine's memory, and a line on each generator with a model.

    Workers elsewhere are on machines that are not known here: nothing is changed for them.
    """
    chosen, notes = dict(generation.generators), []
    for name, settings in generation.generators.items():
        fit = registry.get(name).fit
        if settings.share <= 0 or fit is None or cluster.address or cluster.slurm:
            continue
        room = available(cluster)
        try:
            params, need = fit(settings.params, room, device())
        except (FlawsmithError, RuntimeError) as error:  # a plan may be made where the model is not at hand
            notes.append(f"{name}: its need for memory is not known ({error}); its batch stays as it is")
            continue
        smaller = f"; batch {params['batch']}, because more does not fit" if params != settings.params else ""
        notes.append(f"{name}: {need / 1e9:.2f} GB a worker of {room / 1e9:.2f} GB that are free{smaller}")
        chosen[name] = settings.model_copy(update={"params": params})
    return generation.model_copy(update={"generators": chosen}), notes


def available(cluster: Cluster) -> int:
    """Bytes that one worker of a local cluster may use, on the device that models run on."""
    if device() == "cuda":  # one worker a GPU
        import torch

        return int(torch.cuda.mem_get_info()[0] * (1 - RESERVE))
    workers = cluster.workers or os.cpu_count() or 1
    return int(_free() * (1 - RESERVE) / (workers * cluster.threads))


def _free() -> int:
    """What the kernel says new programs may use without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
