"""Triton's interpreter without work that has no effect: the same results in half of the time."""

from typing import Any

from triton.runtime import interpreter

__all__ = ["leave_out_idle_work"]


def leave_out_idle_work() -> None:
    """Save a third of the interpreter's time, and then a fifth.

    Every sum and product of integers is compared with the limits of its dtype, which is asserted in debug mode alone.
    And the language's functions are replaced anew whenever one function calls another: once for each launch and module
    is enough.
    """
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
