"""Pickles like those of NVlabs' code, without that code: the same names, layouts and quirks, from any state dict.

Objects of classes that carry their source are pickled as a call of `_reconstruct_persistent_obj`, a function of
`torch_utils.persistence`: a stand-in of that name has to be importable while one is written, and only then.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def _reconstruct_persistent_obj(meta):
    raise AssertionError("nothing reads these pickles but cmtool")


class EasyDict(dict):
    pass


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
EasyDict.__module__ = "dnnlib.util"
HOMES = {
    "torch_utils": {},
    "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
    "dnnlib": {},
    "dnnlib.util": {"EasyDict": EasyDict},
}
SOURCE = "import torch\n# the source code of the whole module, which is executed by the original loader\n" * 100


class Persistent:
    """Whatever is pickled together with the source code of its class."""

    source = SOURCE

    def __reduce__(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": self.__dict__.get("_class", type(self).__name__),
            "state": {name: value for name, value in self.__dict__.items() if name != "_class"},
        }
        return _reconstruct_persistent_obj, (meta,), None


class Module(Persistent, nn.Module):
    """A layer or network of the class that it is told."""

    def __init__(self, name: str, **attributes: Any) -> None:
        super().__init__()
        self._class = name
        self._init_args, self._init_kwargs = (), dict(attributes)
        for key, value in attributes.items():
            setattr(self, key, value)


class Loss(Persistent):
    """ECT's: one of its attributes is a method of its own, which is pickled as a call of getattr."""

    def __init__(self) -> None:
        self._class = "ECMLoss"
        self.P_mean = -1.1
        self.t_to_r = self.t_to_r_sigmoid

    def __reduce__(self):  # the same dictionary each time: the object stands within itself
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": self._class,
            "state": self.__dict__,
        }
        return _reconstruct_persistent_obj, (meta,), None

    def t_to_r_sigmoid(self, t):
        return t


class Encoder(Persistent):
    """EDM2's, with the arrays of its latents."""

    def __init__(self) -> None:
        self._class = "StabilityVAEEncoder"
        self.scale = np.float32(0.5) / np.float32([4.17, 4.62, 3.71, 3.28])
        self._vae = None


def network(
    state: Mapping[str, Tensor],
    name: str,
    *,
    buffers: tuple[str, ...] = (),
    constructed: Mapping[str, Any],
    **told: Any,
) -> Module:
    """A module of the class `name` with these tensors.

    Args:
        buffers: the names that are no parameters.
        constructed: the arguments it was made with. told: its attributes.
    """
    root = Module(name, **told)
    root._init_kwargs = dict(constructed)
    for path, tensor in state.items():
        *parents, leaf = path.split(".")
        place: nn.Module = root
        for parent in parents:
            if parent not in place._modules:
                child = nn.ModuleDict() if parent in ("enc", "dec") else Module("UNetBlock", skip_scale=np.sqrt(0.5))
                place._modules[parent] = child
            place = place._modules[parent]
        if path in buffers:
            place.register_buffer(leaf, tensor)
        else:
            place.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        # as they are there: a bias that is not, a buffer that is not, one that is not saved
        place.register_parameter("absent", None)
        place.register_buffer("none", None)
        place.register_buffer("scratch", torch.ones(2), persistent=False)
    return root


def edm(meta: Mapping[str, Any], state: Mapping[str, Tensor], name: str = "", **told: Any) -> Module:
    """The network of one of the goldens, constructed as its `meta.json` says."""
    made = dict(meta)
    buffers = tuple(made.pop("buffers"))
    name = name or made["precond"]
    del made["precond"]
    attributes = {key: made[key] for key in ("img_resolution", "img_channels", "label_dim")}
    attributes |= {"EDMPrecond": {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5}}.get(name, {})
    return network(state, name, buffers=buffers, constructed=made, **{**attributes, **told})


@contextlib.contextmanager
def homes() -> Iterator[None]:
    """The modules of the stand-ins, for as long as something is pickled."""
    for name, values in HOMES.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(values)
    try:
        yield
    finally:
        for name in HOMES:
            del sys.modules[name]


def dumps(content: Any, protocol: int = 4) -> bytes:
    """What `pickle.dumps` makes of it where the originals live."""
    with homes():
        return pickle.dumps(content, protocol)


def storage(numbers: Tensor) -> bytes:
    """A storage as torch writes it into a pickle of somebody else's."""
    written = io.BytesIO()
    torch.save(numbers._typed_storage(), written, _use_new_zipfile_serialization=False)
    return written.getvalue()
