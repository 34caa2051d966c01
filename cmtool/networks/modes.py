"""What is wanted of a pass besides its values: gradients, derivatives, neither."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.autograd import forward_ad


def derived() -> bool:
    """Whether forward-mode derivatives or torch.func's transformations are at work, which only autograd knows of."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def plain() -> bool:
    """Whether values are all that is wanted. Autograd's own way around them takes Python as long as they do a GPU."""
    return not torch.is_grad_enabled() and not derived()


def prompt(function: Any) -> Any:
    """An autograd function whose calls do not wait for Python.

    torch asks for the signature of `forward` at every call, and Python takes as long to find it as a small operation
    takes to compute: it is found once.
    """
    function.forward.__signature__ = inspect.signature(function.forward)
    return function
