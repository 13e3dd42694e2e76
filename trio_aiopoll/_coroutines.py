"""Coroutine functions that themselves yield to Trio, where ``async def`` would have to await something that does."""

from __future__ import annotations

import functools
import inspect
import types
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


def yielding(overridden: Callable[..., Any]) -> Callable[[Callable[..., Generator[Any, Any, Any]]], Any]:
    """Make a coroutine function of a generator function, in whose body ``yield from`` is ``await``. To who looks at it
    it is the method that it overrides.

    As `types.coroutine` does, but what it makes is a coroutine in all respects: `trio.Nursery.start_soon` takes it,
    and it complains if it is never awaited. To CPython the two are one and the same but for a flag of the code. Each
    coroutine on the way between a task and Trio costs 0.2 us a message, which is what this saves.
    """

    def make(function: Callable[..., Generator[Any, Any, Any]]) -> Any:
        generator = cast("types.FunctionType", function)
        flags = generator.__code__.co_flags & ~inspect.CO_GENERATOR | inspect.CO_COROUTINE
        coroutine = types.FunctionType(
            generator.__code__.replace(co_flags=flags),
            generator.__globals__,
            generator.__name__,
            generator.__defaults__,
            generator.__closure__,
        )
        coroutine.__kwdefaults__ = generator.__kwdefaults__
        return functools.update_wrapper(coroutine, overridden)

    return make
