"""Checks of what modules are made with; ``name`` is the class that the user called."""

import inspect
import math

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


def refuse_no_memory(name: str, key: str, place: Tensor, value: Tensor) -> None:
    """A copy to the meta device does nothing, and says nothing."""
    if place.is_meta and not value.is_meta:
        raise ValueError(
            f"{name}: load_checkpoint wants a module with memory for {key}, got one on the meta device; call to_empty(device=...) first"
        )


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
