"""The error tree. Every message says what is wrong, where, and what to do about it."""


class ParedownError(Exception):
    """Any error that a user can cause or mend. The command line prints it as one sentence."""

    exit_code = 2


class UnsupportedModel(ParedownError):
    """The model's architecture, or a part of it, is not one that Paredown can cut."""


class BadData(ParedownError):
    """A data file is missing, unreadable, or holds something that the model cannot use."""


class InfeasibleBudget(ParedownError):
    """No plan meets the budget. `closest` is the nearest value that can be reached, in the budget's own unit."""

    def __init__(self, message: str, *, closest: float):
        super().__init__(message)
        self.closest = closest


class FingerprintMismatch(ParedownError):
    """A plan or checkpoint belongs to another model than the one given."""


class CorruptBundle(ParedownError):
    """A bundle lacks a file, or a file's sha256 differs from the one recorded."""


class MissingExtra(ParedownError):
    """An optional package is needed; the message names the pip line that installs it."""

    def __init__(self, package: str, extra: str):
        super().__init__(f'{package} is not installed. Install it with: pip install "paredown[{extra}]"')


class ParityFailure(ParedownError):
    """An exported file does not compute what the model computes."""


class GateFailed(ParedownError):
    """No candidate passed the quality gate. `result` holds the run's whole outcome, with the closest candidate."""

    exit_code = 3

    def __init__(self, message: str, *, result: object = None):
        super().__init__(message)
        self.result = result
