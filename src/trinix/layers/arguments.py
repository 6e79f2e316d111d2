"""Checks of what modules are made with; ``name`` is the class that the user called."""

import inspect
import math

import torch
from torch import Tensor, nn


def check_sizes(name: str, least: int = 1, **sizes: int) -> None:
    for argument, size in sizes.items():
        if type(size) is not int or size < least:
            raise ValueError(f"{name}: {argument} must be an int from {least} on, got {size!r}")


def check_dropout(name: str, dropout: float) -> None:
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"{name}: dropout must be at least 0 and below 1, got {dropout!r}")


def check_scores(name: str, softcap: float, scale: float | None) -> None:
    if not isinstance(softcap, int | float) or not 0 <= softcap < math.inf:
        raise ValueError(f"{name}: softcap must be a finite number from 0 (none) on, got {softcap!r}")
    if scale is not None and not isinstance(scale, int | float):
        raise ValueError(f"{name}: scale must be a number or None, got {scale!r}")


def check_use_triton(name: str, use_triton: bool | None) -> None:
    if use_triton is not None and type(use_triton) is not bool:
        raise TypeError(f"{name}: use_triton must be None, True or False, got {use_triton!r}; None lets trinix choose")


def refuse_made_weights(name: str, *modules: nn.Module | None) -> None:
    """A copy into what a parametrization, pruning or a wrapper has made would be lost."""
    for module in modules:
        if module is not None and "weight" not in module._parameters:
            raise ValueError(
                f"{name}: load_checkpoint writes parameters, and a {type(module).__name__} makes its weight of others; load before "
                "it is parametrized, pruned or wrapped"
            )


def check_state(name: str, state) -> None:
    if not (hasattr(state, "keys") and hasattr(state, "__getitem__")):
        raise TypeError(
            f"{name}: load_checkpoint wants state as a dict of names and tensors, got {type(state).__name__}; a module's is "
            "state_dict()"
        )


def check_numbers(name: str, key: str, value, same: torch.dtype | None = None) -> None:
    """Refuse what is no weight by itself; ``same`` is the dtype that a module keeps, whatever it is."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: a checkpoint's {key} must be a tensor, got {type(value).__name__}; convert it first")
    if value.dtype != same and (not value.is_floating_point() or value.dtype.itemsize < 2):
        raise TypeError(
            f"{name}: a checkpoint's {key} must be floating point of 16 bits or more, got {value.dtype}; a quantised "
            "checkpoint holds codes: multiply them by their scales first"
        )


def check_entry(name: str, key: str, place: Tensor, value: Tensor) -> None:
    """Refuse what a copy into ``place`` would broadcast, lose, or take for numbers that it is not, before anything is written."""
    check_numbers(name, key, value, place.dtype)
    if value.shape != place.shape:
        raise ValueError(f"{name}: {key} must be {list(place.shape)}, got {list(value.shape)}")
    if place.is_meta and not value.is_meta:  # a copy there does nothing, and says nothing
        raise ValueError(
            f"{name}: load_checkpoint wants a module with memory for {key}, got one on the meta device; call to_empty(device=...) first"
        )
    if value.layout != torch.strided or (value.is_meta and not place.is_meta):
        got = "a meta tensor" if value.is_meta else f"layout {value.layout}"
        raise ValueError(
            f"{name}: load_checkpoint wants {key} as a dense tensor with memory, got {got}; load or convert it"
        )
    if sharded(value) != sharded(place):
        raise ValueError(
            f"{name}: load_checkpoint wants {key} as the module is, sharded or not, got {type(value).__name__} for "
            f"{type(place).__name__}; load before the module is sharded, or give {key}.full_tensor()"
        )


def sharded(t: Tensor) -> bool:
    """Whether it is a DTensor, whose parts are copies. (Without torch.distributed, which a PyTorch may lack.)"""
    return hasattr(t, "device_mesh")


def refuse_unknown(made: type, unknown: dict) -> None:
    """Python's own message would name a base class, which nobody called, and not say what there is."""
    if unknown:
        classes = [
            one
            for one in made.__mro__
            if issubclass(one, nn.Module) and one is not nn.Module and "__init__" in vars(one)
        ]
        own, *bases = (inspect.signature(one.__init__).parameters for one in classes)
        passed_on = [n for more in bases for n, p in more.items() if p.kind is p.KEYWORD_ONLY and n not in own]
        known = [n for n, p in own.items() if n != "self" and p.kind is not p.VAR_KEYWORD] + passed_on
        raise TypeError(f"{made.__name__}: there is no argument {next(iter(unknown))!r}; known are {known}")
