"""Errors reported in one line: those caused by a user's input, and the failure of another rank."""


class InputError(ValueError):
    """State what is wrong with ``value`` (usually of setting ``key``) and how to fix it.

    The command exits with code 2.
    """

    def __init__(self, value: str, problem: str, remedy: str, key: str = ""):
        value = value or "(empty)"
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy
        super().__init__(f"{key + ' ' if key else ''}{value}: {problem}; {remedy}")


class PeerError(RuntimeError):
    """Another rank failed while this one waited for it."""
