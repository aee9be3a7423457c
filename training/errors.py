"""The two ways a run ends that are nobody's bug. The doors print them as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "RESOURCE_EXHAUSTED")
"What frameworks say of it."


class UserError(Exception):
    """Something the user can mend: says what was given, what was expected, which key to change.

    The doors print it without a traceback and exit with `code`.
    """

    code = 2


class RunStopped(UserError):
    """A run that had to end early; what it had reached is saved. `code` says why.

    1: a non-finite loss or a failed write. 85: asked to by SIGTERM or SIGUSR1 (Slurm requeues on
    it). 130: interrupted from the keyboard.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a failed allocation, of whichever framework, into one sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        if not isinstance(error, MemoryError) and not any(word in said for word in OUT_OF_MEMORY):
            raise
        raise RunStopped(
            f"the memory of this machine does not suffice: {said}. Lower data.batch_size or other "
            "sizes, or raise optim.accumulate; --dry-run says what training needs"
        ) from error
