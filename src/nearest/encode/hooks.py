"""See what goes into a module, without being seen by other threads that run the same model.

torch forgets that a hook takes keyword arguments before it forgets the hook itself, so that a hook
which one thread removes may be called by another without them. Hence a module has one `InputHook`
at most, which every thread shares, and which shows each thread the inputs of its own calls alone.
A session keeps its hook for as long as it is attached.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_changing = threading.Lock()  # held while a hook is looked for, added or removed
_passing = threading.local()  # whether this thread's calls are shown


class InputHook:
    """The hook by which all threads see the first input of a module's calls."""

    def __init__(self) -> None:
        self.users = 0
        self.handle: RemovableHandle | None = None
        self._here = threading.local()

    def _show(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        # Without its keyword arguments only where the hook is just being added or removed by
        # another thread; this one then listens to nothing.
        listeners = self.listeners()
        if listeners and not getattr(_passing, "unseen", False):
            states = args[0] if args else next(iter((kwargs or {}).values()))
            for see in listeners:
                see(states.detach())

    # Dynamo does not trace it: who listens keeps what it is shown.
    __call__: Callable[..., None] = torch.compiler.disable(_show)

    def __deepcopy__(self, _: dict[int, Any]) -> "InputHook":
        """For a copy of the module, to which nobody listens."""
        return InputHook()

    def listeners(self) -> list[Callable[[Tensor], None]]:
        """Those of the present thread."""
        found: list[Callable[[Tensor], None]] = vars(self._here).setdefault("listeners", [])
        return found


@contextmanager
def hooked(module: nn.Module) -> Iterator[InputHook]:
    """Keep the module's one hook in place; it goes when nobody needs it any more."""
    with _changing:
        hook = input_hook_of(module)
        if hook is None:
            hook = InputHook()
            hook.handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        hook.users += 1
    try:
        yield hook
    finally:
        with _changing:
            hook.users -= 1
            if not hook.users and hook.handle is not None:
                hook.handle.remove()


def input_hook_of(module: nn.Module) -> InputHook | None:
    """The hook that a module has at present."""
    hooks = list(module._forward_pre_hooks.values())
    return next((hook for hook in hooks if isinstance(hook, InputHook) and hook.users), None)


def without_input_hook(module: nn.Module) -> None:
    """Take the hook out of a copy of a module."""
    for number, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, InputHook):
            del module._forward_pre_hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)


@contextmanager
def inputs_shown(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show `see` the first input of every call of `module` by this thread, in the context."""
    with hooked(module) as hook:
        listeners = hook.listeners()
        listeners.append(see)
        try:
            yield
        finally:
            listeners.remove(see)


@contextmanager
def unseen() -> Iterator[None]:
    """Show no calls of this thread: for a pass that a model makes while it is asked for another."""
    before = getattr(_passing, "unseen", False)
    _passing.unseen = True
    try:
        yield
    finally:
        _passing.unseen = before


@contextmanager
def captured_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the first input of every call of `module` by this thread, in the context."""
    seen: list[Tensor] = []
    with inputs_shown(module, seen.append):
        yield seen


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a hook so that it fires only in the thread that wrapped it."""
    owner = threading.get_ident()

    def called(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == owner else None

    untraced: Callable[..., Any] = torch.compiler.disable(called)
    return untraced
