"""The two ways a run ends that are nobody's bug. The doors print them as one sentence."""

from __future__ import annotations


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
