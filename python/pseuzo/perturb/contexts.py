"""Contexts whose clean-up survives an interrupt: dropout off, no cached casts, and their helpers.

Python may raise KeyboardInterrupt at any line, including the lines of a clean-up. A context here
therefore records what it has to put back before it changes anything. Its clean-up works from that
record alone, so that it may run twice.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from pseuzo.interrupts import undoing


@contextmanager
def no_cached_casts() -> Iterator[None]:
    """Keep autocast from caching casts of weights, and from using casts made before the block.

    Its cache holds the casts of fp32 weights until the outermost autocast block ends, whatever is
    written to the weights in between.
    """
    before = torch.is_autocast_cache_enabled()

    def put_back() -> None:
        # A block inside another one must not turn the cache off again: an interrupt can delay its
        # end until the traceback is freed, after the end of the other block.
        if before:
            torch.set_autocast_cache_enabled(True)
        torch.clear_autocast_cache()

    with undoing(put_back):
        torch.set_autocast_cache_enabled(False)  # autocast blocks made inside inherit this
        torch.clear_autocast_cache()
        yield


def outside_inference_mode() -> AbstractContextManager[None]:
    """Leave inference mode if it is on.

    torch.inference_mode(False) also puts back whether autograd records, when its guard is freed. An
    interrupt can delay that until the traceback is freed. Within a step, where autograd does not
    record, no such guard may be made.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def frozen_mode(model: nn.Module | None) -> Iterator[None]:
    """Turn dropout off and freeze batch statistics; put every module's own mode back after it."""
    modules = [] if model is None else [model]
    seen = set(modules)
    for module in modules:  # model.modules() takes several times as long
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
    training = [module for module in modules if module.training]

    def put_back() -> None:
        for module in training:
            module.training = True

    with undoing(put_back):
        for module in training:
            module.training = False
        yield


def leave(mode: TorchDispatchMode | TorchFunctionMode) -> None:
    """Take a mode off its stack, unless it is off already. Modes above it stay there."""
    dispatch = isinstance(mode, TorchDispatchMode)
    stack = _get_current_dispatch_mode_stack if dispatch else _get_current_function_mode_stack
    if not any(entered is mode for entered in stack()):
        return
    above = []
    while (top := stack()[-1]) is not mode:
        top.__exit__(None, None, None)
        above.append(top)
    mode.__exit__(None, None, None)
    for other in reversed(above):
        other.__enter__()
