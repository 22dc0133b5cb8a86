"""Every error that Tidegate raises on purpose, under one root.

Library errors are turned into these at the seam where they appear (Docker, OpenResty, files), so
that code inside never has to know a library. What may be tried again is a class, not a string.

    TidegateError
    ├── SettingsError            the configuration cannot be used; says key path and value
    ├── StoreUnavailable         (Retryable) the store with the configuration does not answer
    ├── DiscoveryError           a source of workloads failed
    │   ├── DockerUnavailable        (Retryable) no answer, refused, timed out
    │   ├── DockerRefused            the engine answered with an error
    │   ├── WatchUnavailable         (Retryable) SwarmKit's Watch cannot be opened or broke
    │   ├── WatchCompacted           (Retryable) the manager forgot our version: list again
    │   └── StaticFileError          the static file cannot be read or is not valid
    ├── ComposeFileError         a compose or stack file cannot be used; says file and line
    ├── RenderError              a template cannot be read or fails
    └── DriverError              an OpenResty instance failed
        ├── InstanceUnreachable      (Retryable) no answer, refused, timed out
        ├── InstanceUnauthorized     the token was refused, or ours cannot be read
        ├── InstanceBusy             (Retryable) another push is being applied
        ├── RevisionConflict         (Retryable) base revision differs; carries the current one
        ├── LeaseHeld                (Retryable) another writer holds the lease
        ├── PushRefused              the instance refused the push whole; carries the reasons
        └── SiteRefused              nginx refused the site; carries its message and the file
"""

from __future__ import annotations


class TidegateError(Exception):
    """Root of all errors raised by Tidegate."""


def innermost(error: BaseException) -> str:
    """The innermost reason of a library's error; the outer ones only repeat where."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return getattr(error, "strerror", None) or str(error)


class Retryable(Exception):
    """Mixed into errors after which the same call may succeed later."""


class SettingsError(TidegateError):
    """The configuration cannot be used.

    Args:
        problems: one sentence each: where (file and key path), what was found, what is expected.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class StoreUnavailable(TidegateError, Retryable):
    """The store that holds the configuration cannot be read now; what is in force stays."""


class DiscoveryError(TidegateError):
    """A source of workloads failed; what it published before stays in force."""


class DockerUnavailable(DiscoveryError, Retryable):
    """The engine cannot be reached or did not answer in time."""


class DockerRefused(DiscoveryError):
    """The engine answered, with an error."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class WatchUnavailable(DiscoveryError, Retryable):
    """SwarmKit's Watch cannot be opened, or its stream broke."""


class WatchCompacted(DiscoveryError, Retryable):
    """The manager no longer holds the version to resume from: list again."""


class StaticFileError(DiscoveryError):
    """The static file cannot be read or is not valid; the last good one stays in force."""


class ComposeFileError(TidegateError):
    """A compose or stack file cannot be used; the message begins with file and line."""


class RenderError(TidegateError):
    """A template cannot be read or failed."""


class DriverError(TidegateError):
    """An OpenResty instance failed."""


class InstanceUnreachable(DriverError, Retryable):
    """The instance cannot be reached or did not answer in time."""


class InstanceUnauthorized(DriverError):
    """The instance refused the token."""


class InstanceBusy(DriverError, Retryable):
    """The instance is applying another push or site change; the same call succeeds shortly."""


class RevisionConflict(DriverError, Retryable):
    """The instance holds another revision than the delta was made from."""

    def __init__(self, message: str, *, current: int) -> None:
        super().__init__(message)
        self.current = current


class LeaseHeld(DriverError, Retryable):
    """Another writer holds the lease of the instance; stand by until it lapses."""

    def __init__(self, message: str, *, writer: str, expires_in: float) -> None:
        super().__init__(message)
        self.writer = writer
        self.expires_in = expires_in


class PushRefused(DriverError):
    """The instance refused a membership push whole; what it had before serves on.

    Args:
        status: HTTP status of the refusal (400, 413, 422, 507).
        reasons: upstream name to the reason; empty where the refusal is not about one upstream.
    """

    def __init__(self, message: str, *, status: int, reasons: dict[str, str]) -> None:
        super().__init__(message)
        self.status = status
        self.reasons = reasons


class SiteRefused(DriverError):
    """nginx refused the staged site, or the reload did not come through; the old site serves on.

    Args:
        file: the staged file that nginx named, or None where it named none.
    """

    def __init__(self, message: str, *, file: str | None) -> None:
        super().__init__(message)
        self.file = file
