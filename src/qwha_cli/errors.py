"""Every error a user can meet: what went wrong, where, and what to do about it.

An expected failure is raised as one of these kinds; the command line prints cause and remedy in a few lines and leaves with
`exit_code`. Anything else is a bug of ours and shows a traceback. Exit codes: 1 failed or a gate said no, 2 usage or recipe
error, 130 interrupted with the state saved.
"""

from __future__ import annotations

from dataclasses import dataclass


class QwhaError(Exception):
    """An expected failure.

    Args:
        message: What happened, and what was expected instead. One sentence.
        where: The layer, key, file or `file:line:column` it happened at.
        remedy: What the user can do now. One sentence.
    """

    code: str = "error"
    exit_code: int = 1

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        """The message as one line, its place in front."""
        return f"{self.where}: {self.message}" if self.where else self.message

    def lines(self) -> list[str]:
        """What a person reads: the problem, then the remedy."""
        return [str(self)] + ([f"remedy: {self.remedy}"] if self.remedy else [])


class UsageError(QwhaError):
    """The command line asks for something impossible."""

    code = "usage"
    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One fault of a recipe: its place (`file:line:column` or `override KEY`), what is wrong, and the nearest valid name."""

    where: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class RecipeError(QwhaError):
    """A recipe that cannot be run. Carries every problem found, not only the first."""

    code = "recipe"
    exit_code = 2

    def __init__(self, problems: list[Problem], *, remedy: str | None = None) -> None:
        count = len(problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in the recipe", remedy=remedy)
        self.problems = problems

    def lines(self) -> list[str]:
        """One line a problem, then the remedy."""
        return [str(p) for p in self.problems] + ([f"remedy: {self.remedy}"] if self.remedy else [])


class ArtifactError(QwhaError):
    """A stage's folder is missing, incomplete, corrupted or not ours."""

    code = "artifact"


class ModelError(QwhaError):
    """A model that cannot be found, loaded or adapted."""

    code = "model"


class DataError(QwhaError):
    """Data that cannot be found or read, or may not be used for this purpose."""

    code = "data"


class KernelError(QwhaError):
    """A kernel asked for a size, dtype or backend that it does not have."""

    code = "kernel"


class NumericsError(QwhaError):
    """A number that is not finite, or a factorisation that failed."""

    code = "numerics"


class ResourceError(QwhaError):
    """The machine ran out of memory or disk."""

    code = "resource"


class RanksError(QwhaError):
    """Another of the processes that train together is gone."""

    code = "ranks"


class GateError(QwhaError):
    """A measured result is worse than the recipe or the method allows."""

    code = "gate"


class Interrupted(QwhaError):
    """The user stopped the run; its state is saved."""

    code = "interrupted"
    exit_code = 130
