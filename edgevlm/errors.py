"""Named errors: each says what happened and what to do next, in one line.

The command line prints `str(error)` and exits with `error.exit_code`; a traceback appears only with `-v`.
"""

import difflib
from collections.abc import Iterable


class EdgeVLMError(Exception):
    """Base of every error a user can cause or mend.

    Args:
        what: what happened, and where.
        fix: what to do next; starts with a verb.
    """

    exit_code = 1

    def __init__(self, what: str, fix: str = "") -> None:
        self.what = what.rstrip(".")
        self.fix = fix.rstrip(".")
        super().__init__(f"{self.what}. {self.fix}." if self.fix else f"{self.what}.")


class RecipeError(EdgeVLMError):
    """The recipe has an unknown key, a wrong value, or does not exist."""


class DataError(EdgeVLMError):
    """A dataset folder, file or record is missing or malformed."""


class ImageError(DataError):
    """A file is not an image that can be decoded safely."""


class TextError(DataError):
    """A question or sentence is empty or longer than the model's limit."""


class CheckpointError(EdgeVLMError):
    """A checkpoint is missing, altered or does not fit the model."""


class BundleError(EdgeVLMError):
    """A bundle is missing a file, or a file's hash differs from the manifest."""


class TargetError(EdgeVLMError):
    """A target, precision or rung is unknown, or its library is not installed."""


class CalibrationError(EdgeVLMError):
    """A calibration set is too small, stale or was preprocessed differently."""


class GovernorError(EdgeVLMError):
    """A governor is missing, malformed, or was calibrated for another model."""


class LatencyError(EdgeVLMError):
    """A latency table is missing, lacks times, or was measured on another device or bundle."""


class OutputInUse(EdgeVLMError):
    """The output exists already, or another process is writing to it."""


class TrainingError(EdgeVLMError):
    """Training cannot go on (for example, the loss is not a number)."""


class GateFailed(EdgeVLMError):
    """A quality gate failed: the artifacts are written, but should not be shipped."""

    exit_code = 2


def nearest(word: str, choices: Iterable[str]) -> str:
    """`" Did you mean 'x'?"`-style hint for a mistyped word, or an empty string if nothing is near."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"Did you mean '{matches[0]}'?" if matches else ""
