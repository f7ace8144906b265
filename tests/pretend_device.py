"""A second device where there is none: its tensors say that they are elsewhere, the processor computes them.

A plugin of pytest (``-p tests.pretend_device``) that makes the product take this device for its GPU. What a
GPU refuses is refused: operators on tensors of two devices, NumPy out of a tensor that is elsewhere, indices
that are elsewhere into a tensor that is here, random numbers for there from a generator that is here. Nothing
is shown of a GPU's speed, memory, kernels or rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretend"
aten = torch.ops.aten


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of a device beside its tensors."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = 0) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = 0) -> None:
        torch.set_rng_state(state)


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)
# Copies between devices, and indices from here into a tensor that is there: see `_refuse`.
ACROSS = {
    aten.copy_.default,
    aten._to_copy.default,
    aten.set_.source_Tensor,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device; ``here`` holds its numbers."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Elsewhere:
        return torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            layout=here.layout, device=DEVICE, requires_grad=here.requires_grad,
        )  # fmt: skip

    def __init__(self, here: torch.Tensor) -> None:
        self.here = here.detach()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.here})"

    def numpy(self, *_args: Any, **_kwargs: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """While it is entered, tensors can be made on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator, by the processor; what comes out is where a GPU would have left it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    _refuse(func, args, tensors, there)
    wanted = kwargs.get("device")
    if func is aten.copy_.default:
        stays = isinstance(args[0], Elsewhere)
    elif wanted is not None:
        stays = torch.device(wanted).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    else:
        stays = bool(there)
    generator = kwargs.get("generator")
    if stays and generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.here, (args, kwargs))
    own = {id(tensor.here): tensor for tensor in there}  # an operator in place gives back what it was given

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        if not stays or isinstance(tensor, Elsewhere):
            return tensor
        return own[id(tensor)] if id(tensor) in own else Elsewhere(tensor)

    return tree_map_only(torch.Tensor, placed, func(*args, **kwargs))


def _refuse(func: Any, args: Any, tensors: list[torch.Tensor], there: list[Elsewhere]) -> None:
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim() > 0]
    if not there or not here:
        return
    if func not in ACROSS:
        shapes = [(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {shapes}")
    if "index" in func.name():
        if not isinstance(args[0], Elsewhere):
            raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
        if len(args) > 2 and not isinstance(args[2], Elsewhere) and args[2].dim() > 0:
            raise RuntimeError("Expected all tensors to be on the same device: values put by index")


_library = torch.library.Library("aten", "IMPL")


def _kernel(name: str):
    def register(work):
        _library.impl(name, work, "PrivateUse1")
        return work

    return register


@_kernel("empty_strided")
def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


@_kernel("empty.memory_format")
def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Elsewhere(torch.empty(size, dtype=dtype))


@_kernel("copy_")
def _copy(self, source, non_blocking=False):
    return _run(aten.copy_.default, (self, source), {})


class _NoGradient(torch.no_grad):
    """In place of inference mode, whose tensors have no version and cannot be wrapped."""

    def __init__(self, mode: bool = True) -> None:
        super().__init__()


def pytest_configure() -> None:
    """Before any module of the product is imported."""
    torch.inference_mode = _NoGradient
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    Pretended().__enter__()
    from workflows import comparing, detecting, room, stages

    for module in (stages, comparing, detecting, room):
        module.device = lambda: NAME
