"""The errors that are told in a line: what a user's input can cause, and the end of another process."""

class InputError(ValueError):
    """What is wrong with ``value`` (usually of setting ``key``) and what to do about it; the command exits with 2."""

    def __init__(self, value: str, problem: str, remedy: str, key: str = ""):
        value = value or "(empty)"
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy
        super().__init__(f"{key + ' ' if key else ''}{value}: {problem}; {remedy}")


class PeerError(RuntimeError):
    """Another process ended while this one waited for it."""
