"""A lease on a folder: one run at a time writes there, and the next one need not ask a person.

The lease is a file `.lease.json` in the folder. It names the process that holds it. A thread writes
it anew every 15 s, with a counter. Who finds one of another process, decides so:

    the process is of this machine, and runs         refused at once
    the process is of this machine, and has ended    taken over at once
    it is of another machine                         watched: refused when the file changes, taken
                                                     over when it stays the same for 60 s

No clock is compared with that of another machine: the 60 s are those of the one who watches. The
other side of the same rule: a holder that did not renew for 30 s (it was stopped, or cut off from
the storage) reads the lease before it writes anything else in the folder, and ends if another one
has it. Where a renewal fails (a full disk), the holder goes on as long as the file is its own.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import msgspec

from miles.common import storage, write_guard
from miles.common.lease_file import LeaseCopy, LeaseFile, lease_file
from miles.common.process_identity import ProcessIdentity
from miles.common.redact import redact
from miles.errors import LeaseError

LEASE = ".lease.json"
"""Name of the file."""
RENEW_SECONDS = 15.0
TRUST_SECONDS = 30.0
"""After a renewal, nobody can have taken the folder for as long: half of `EXPIRE_SECONDS`."""
EXPIRE_SECONDS = 60.0
_POLL_SECONDS = 2.0
_CONTENT_BYTES = 1024
"""The file always has them: so it can be renewed in place, and on a full disk."""
_MAX_TRIES = 50

_held_tokens: set[str] = set()
"""The tokens of the leases that this process holds."""


class Clock:
    """The seconds that pass for this machine, also while it sleeps."""

    def now(self) -> float:
        """Return the seconds since some moment."""
        if hasattr(time, "CLOCK_BOOTTIME"):
            return time.clock_gettime(time.CLOCK_BOOTTIME)
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait; a signal's handler may raise meanwhile."""
        time.sleep(seconds)


@dataclass(frozen=True)
class Holder:
    """The content of a lease: who has it."""

    process: ProcessIdentity
    token: str
    """of this lease alone"""
    command: str
    """such as "miles train" """
    since: str
    """when it was taken, by the clock of its machine"""
    renewed: str
    """when it was written last, by the same clock"""
    num_renewals: int = 0

    @classmethod
    def of_this_process(cls, command: str) -> Holder:
        """Return the holder that a new lease of this process has."""
        now = _time_now()
        return cls(ProcessIdentity.of_this(), secrets.token_hex(8), command, now, now)

    @classmethod
    def decode(cls, content: bytes) -> Holder | None:
        """Return the holder in a file; None: the file is not whole."""
        try:
            return msgspec.json.decode(content, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def encode(self) -> bytes:
        """Return the content of the file, always of the same length."""
        return msgspec.json.encode(self).ljust(_CONTENT_BYTES)

    def next(self) -> Holder:
        """Return the holder one renewal later."""
        return replace(self, renewed=_time_now(), num_renewals=self.num_renewals + 1)

    def __str__(self) -> str:
        return (
            f"{self.command} on host {self.process.host}, process {self.process.pid}, begun "
            f"{_ago(self.since)} and last seen {_ago(self.renewed)}"
        )


class Lease:
    """A folder that this process holds; made by `hold`.

    Args:
        name: of the folder in messages, such as "--save /runs/a".
    """

    def __init__(self, name: str, file: LeaseFile, holder: Holder, clock: Clock) -> None:
        self._name = name
        self._file = file
        self._holder = holder
        self._clock = clock
        self._taken_over_by: str | None = None
        # Unknown at first: a store without conditional requests may have let two runs in.
        self._confirmed_at = -math.inf
        self._lock = threading.Lock()
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="miles-lease", daemon=True)

    def start(self) -> None:
        """Begin to renew the lease, in a thread."""
        self._thread.start()

    def require_held(self) -> None:
        """Make sure that no other run has taken the folder over.

        It takes no time while the renewals arrive. Otherwise the file is read.

        Raises:
            LeaseError: one has.
        """
        if self._clock.now() - self._confirmed_at > TRUST_SECONDS:
            with contextlib.suppress(Exception):  # nobody can tell: the write itself will fail
                self.renew()
        self.require_not_taken()

    def require_not_taken(self) -> None:
        """Do what `require_held` does, by the last renewal alone: nothing is read.

        Raises:
            LeaseError: another run has taken the folder over.
        """
        if self._taken_over_by is not None:
            raise LeaseError(
                f"{self._name}: taken over by another run ({self._taken_over_by}), because this "
                f"one, process {self._holder.process.pid} on host {self._holder.process.host}, "
                f"gave no sign of life for {EXPIRE_SECONDS:g} s: it was stopped, or cut off from "
                "its storage. It ends here and writes nothing more there; the other run goes on"
            )

    def renew(self) -> None:
        """Write the file anew, if it is still that of this lease.

        Raises:
            Exception: the storage cannot be read or written.
        """
        with self._lock:
            if self._has_ended.is_set():  # released, while the thread was on its way here
                return
            begun = self._clock.now()
            copy = self._file.read()
            if copy is None:  # somebody removed it: it is claimed again
                holder = self._holder.next()
                is_written = self._file.create(holder.encode())
            else:
                found = Holder.decode(copy.content)
                if found is None or found.token != self._holder.token:
                    self._taken_over_by = str(found or "its lease cannot be read")
                    return
                self._confirmed_at = begun
                holder = self._holder.next()
                is_written = self._file.renew(copy, holder.encode())

            if is_written:
                self._holder = holder
                self._confirmed_at = begun

    def release(self) -> None:
        """End the renewals and remove the file, if it is still that of this lease."""
        self._has_ended.set()
        # A storage that hangs must not hold up the end: the lease expires.
        if not self._lock.acquire(timeout=RENEW_SECONDS):
            return
        try:
            copy = self._file.read()
            found = Holder.decode(copy.content) if copy else None
            if copy is not None and found is not None and found.token == self._holder.token:
                self._file.remove(copy)
        except Exception:  # noqa: S110
            pass  # the lease expires
        finally:
            _held_tokens.discard(self._holder.token)
            self._lock.release()

    def _keep(self) -> None:
        while not self._has_ended.wait(RENEW_SECONDS) and self._taken_over_by is None:
            with contextlib.suppress(Exception):  # tried again; `require_held` reads the file
                self.renew()


@dataclass(frozen=True)
class _Request:
    """The folder that a process wants to hold, and the file of its lease."""

    folder: str
    name: str
    """of the folder in messages, such as "--save /runs/a" """
    file: LeaseFile
    notify: Callable[[str], None]
    clock: Clock

    def read(self) -> LeaseCopy | None:
        """Return the file as it is now; None: there is none."""
        with storage.writing(self.folder):
            return self.file.read()


@contextlib.contextmanager
def hold(
    folder: str,
    flag: str,
    command: str,
    notify: Callable[[str], None],
    clock: Clock | None = None,
) -> Iterator[Lease]:
    """Hold a folder until the context ends: no other run writes there, and none of this is lost.

    Args:
        folder: fsspec URL; it is created if need be.
        flag: that names the folder, for messages.
        command: "miles train" or another one, for those who find the lease.
        notify: is given a sentence before the folder of another machine is watched.

    Raises:
        LeaseError: another run has it.
        WriteError: nothing can be written there.
    """
    is_new = storage.is_local(folder) and not storage.exists(folder)
    lease = take(folder, flag, command, notify, clock or Clock())
    try:
        lease.start()
        with write_guard.guarding(storage.place_of(folder), lease.require_held):
            yield lease
    finally:
        lease.release()
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(storage.filesystem(folder)[1])


def take(
    folder: str, flag: str, command: str, notify: Callable[[str], None], clock: Clock
) -> Lease:
    """Take a lease that nobody has, or whose holder is dead. No thread renews it yet.

    Args:
        folder, flag, command, notify: as of `hold`.

    Raises:
        LeaseError: another run has it.
        WriteError: the file cannot be written.
    """
    name = f"{flag} {redact(folder)}"
    request = _Request(folder, name, lease_file(storage.join(folder, LEASE)), notify, clock)
    own = Holder.of_this_process(command)
    _held_tokens.add(own.token)  # before others can read it
    try:
        _write_own(request, own)
    except BaseException:
        _held_tokens.discard(own.token)
        raise
    return Lease(name, request.file, own, clock)


def _write_own(request: _Request, own: Holder) -> None:
    """Write a lease where there is none, or that of a dead holder.

    Raises:
        MilesError: as `take`.
    """
    for _ in range(_MAX_TRIES):
        copy = request.read()
        is_free = copy is None or _is_dead(request, copy)
        if is_free:
            with storage.writing(request.folder):
                content = own.encode()
                if request.file.take_over(copy, content) if copy else request.file.create(content):
                    return
        request.clock.sleep(0.1)  # another one was quicker
    raise LeaseError(
        f"{request.name}: another process keeps changing the lease there ({LEASE}); try again"
    )


def _is_dead(request: _Request, copy: LeaseCopy) -> bool:
    """Return whether the holder of a lease is dead; False: the file is another one by now.

    Raises:
        LeaseError: it is alive.
    """
    holder = Holder.decode(copy.content)
    if holder is not None:
        is_alive = _is_alive(holder)
        if is_alive is not None:
            if is_alive:
                raise _refusal(request, holder)
            return True

    request.notify(
        f"{request.name}: waiting up to {EXPIRE_SECONDS:g} s for a sign of life of the run that "
        f"has it ({holder or 'its lease cannot be read'})"
    )
    watched_since = request.clock.now()
    while request.clock.now() - watched_since < EXPIRE_SECONDS:
        request.clock.sleep(_POLL_SECONDS)
        current = request.read()
        if current != copy:
            if current is not None:
                found = Holder.decode(current.content)
                if found is not None and holder is not None and found.token == holder.token:
                    raise _refusal(request, found)
            return False
    return True


def _is_alive(holder: Holder) -> bool | None:
    """Return whether a holder is alive; None: it is of another machine."""
    if holder.process.machine and holder.process == ProcessIdentity.of_this():
        return holder.token in _held_tokens  # else of an earlier run of this process
    return holder.process.is_alive()


def _refusal(request: _Request, holder: Holder) -> LeaseError:
    """Return the error of a folder whose holder is alive."""
    return LeaseError(
        f"{request.name}: another run is writing there: {holder}. Two runs in one folder would "
        "overwrite each other's files: wait until it has ended, stop it, or give another folder"
    )


def _time_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _ago(time_text: str) -> str:
    """Return how long ago a moment was, by this machine's clock; another one may differ."""
    try:
        moment = datetime.datetime.fromisoformat(time_text)
        seconds = (datetime.datetime.now(datetime.UTC) - moment).total_seconds()
    except (ValueError, TypeError):
        return f"at {time_text[:40]!r}"
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s ago"
    minutes = seconds // 60
    return f"{minutes} min ago" if minutes < 120 else f"{minutes // 60} h ago"
