"""A folder has one writer: alive, dead, of another machine, stopped and woken up again."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from miles.common import json_lines, lease, storage
from miles.common.lease import (
    EXPIRE_SECONDS,
    LEASE,
    RENEW_SECONDS,
    TRUST_SECONDS,
    Clock,
    Lease,
    take,
)
from miles.common.patient_file import PatientFile
from miles.common.process_identity import ProcessIdentity
from miles.errors import LeaseError, WriteError
from tests.support.disks import small_disk
from tests.support.fault_table import NOTHING, observed
from tests.support.leases import PassingClock, elsewhere, file_of, takes_over
from tests.support.object_storage import s3_bucket
from tests.support.processes import PROJECT, wait_until


def taken(folder: str, clock: Clock | None = None, notes: list[str] | None = None) -> Lease:
    """Take the lease of a folder, without a thread."""
    notify = (notes if notes is not None else []).append
    return take(folder, "--save", "miles train", notify, clock or PassingClock())


def content_of(folder: str) -> bytes:
    copy = file_of(folder).read()
    assert copy is not None
    return copy.content


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """One bucket for the whole file: its server takes a second to start."""
    with pytest.MonkeyPatch.context() as patch, s3_bucket(patch) as url:
        yield url


@pytest.fixture(params=["disk", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "run")
    store: str = request.getfixturevalue("store")
    return f"{store}/{tmp_path.name}/run"


HOLD = """\
import sys
from miles.common import lease
with lease.hold(sys.argv[1], "--save", "miles train", print):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Have another process hold a folder."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_process_of_this_machine_is_looked_up(tmp_path: Path) -> None:
    """Alive, also while it is stopped: refused at once. Killed: taken over at once."""
    folder, notes = tmp_path / "run", list[str]()
    with other_process(folder) as process:
        refusal = rf"process {process.pid}, begun \d+ s ago"
        for number in (signal.SIGCONT, signal.SIGSTOP):
            process.send_signal(number)
            with pytest.raises(LeaseError, match=refusal) as refused:
                taken(str(folder), notes=notes)
        process.send_signal(signal.SIGKILL)
        # As with a shell that does not ask for its exit status at once.
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
        taken(str(folder), notes=notes).release()
    assert not notes, "nothing was waited for"
    assert not list(folder.iterdir())
    observed("second run on one `--save`", str(refused.value), "another run", NOTHING)


def fail_while_holding(folder: Path) -> None:
    with lease.hold(str(folder), "--save", "miles train", print):
        assert (folder / LEASE).exists()
        raise ZeroDivisionError


def test_folder_is_free_when_its_run_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with other_process(folder) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0
    assert not folder.exists(), "it is as it was"

    with pytest.raises(ZeroDivisionError):
        fail_while_holding(folder)
    assert not folder.exists()

    (folder / "kept").mkdir(parents=True)
    with lease.hold(str(folder), "--save", "miles train", print):
        pass
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_same_process_takes_a_folder_once_at_a_time(tmp_path: Path) -> None:
    """As in a notebook. What an earlier call could not remove is no hindrance."""
    first = taken(str(tmp_path))
    with pytest.raises(LeaseError, match="another run is writing there"):
        taken(str(tmp_path))
    content = content_of(str(tmp_path))
    first.release()
    (tmp_path / LEASE).write_bytes(content)
    taken(str(tmp_path)).release()


def test_other_machine_that_renews_is_alive(folder: str) -> None:
    holder, notes = elsewhere(), list[str]()

    def renew(seconds: float) -> None:
        if seconds == RENEW_SECONDS + 1:  # it polls every two seconds
            takes_over(folder, holder.next())

    assert file_of(folder).create(holder.encode())
    with pytest.raises(
        LeaseError, match=r"on host node-7, process 4711, begun \d+ s ago"
    ) as raised:
        taken(folder, PassingClock(renew), notes)
    assert len(notes) == 1
    assert f"waiting up to {EXPIRE_SECONDS:g} s" in notes[0]
    assert "node-7" in notes[0]
    assert "writing there" in str(raised.value)


def test_other_machine_that_is_silent_is_dead(folder: str) -> None:
    clock = PassingClock()
    assert file_of(folder).create(elsewhere().encode())
    mine = taken(folder, clock)
    assert clock.seconds == EXPIRE_SECONDS
    mine.require_held()
    mine.release()
    assert file_of(folder).read() is None


def test_other_machine_that_ends_makes_room(folder: str) -> None:
    file = file_of(folder)
    assert file.create(elsewhere().encode())

    def end(seconds: float) -> None:
        copy = file.read()
        if seconds >= 10 and copy is not None and b"node-7" in copy.content:
            file.remove(copy)

    clock = PassingClock(end)
    taken(folder, clock).require_held()
    assert clock.seconds < 12


@pytest.mark.parametrize("content", [b"", b'{"process": {"host"', b"null", b"\xff" * 64])
def test_broken_lease_is_watched(tmp_path: Path, content: bytes) -> None:
    """It may be that of a process which is just writing it."""
    (tmp_path / LEASE).write_bytes(content)
    clock, notes = PassingClock(), list[str]()
    taken(str(tmp_path), clock, notes).release()
    assert clock.seconds == EXPIRE_SECONDS
    assert "its lease cannot be read" in notes[0]


def append(file: PatientFile) -> None:
    file.add("{}")
    file.flush()


def test_holder_that_was_taken_over_writes_nothing(folder: str) -> None:
    """It was stopped, and wakes up before its thread has looked."""
    clock = PassingClock()
    mine = taken(folder, clock)
    mine.require_held()
    metrics = storage.join(folder, "metrics.jsonl")
    with lease.write_guard.guarding(storage.place_of(folder), mine.require_held):
        file = PatientFile(metrics, report=pytest.fail)
        file.replace(["{}"])
        takes_over(folder, elsewhere())
        theirs = content_of(folder)
        clock.seconds += TRUST_SECONDS + 1

        for write in (
            lambda: append(file),
            lambda: storage.write_text(metrics, ""),
            lambda: storage.remove(folder),
        ):
            with pytest.raises(LeaseError, match=r"taken over by another run \(.*host node-7"):
                write()
        file.close()
        storage.write_text(f"{folder}-other/file", "of nobody")

    assert json_lines.read(metrics) == [{}]
    with pytest.raises(LeaseError, match="It ends here and writes nothing more") as raised:
        mine.require_not_taken()
    mine.release()
    assert content_of(folder) == theirs
    observed("run that was stopped for minutes, and replaced", str(raised.value), "taken", NOTHING)


def test_renewals_are_trusted_for_a_while(tmp_path: Path) -> None:
    """Between steps nothing is read, as long as they arrive."""
    clock = PassingClock()
    mine = taken(str(tmp_path), clock)
    mine.require_held()
    takes_over(str(tmp_path), elsewhere())
    clock.seconds += TRUST_SECONDS
    mine.require_held()
    clock.seconds += 1
    with pytest.raises(LeaseError):
        mine.require_held()


def test_renewal_does_not_touch_the_lease_of_another(folder: str) -> None:
    """Between reading and writing, it may be taken over."""
    mine = taken(folder)
    file = file_of(folder)
    before = file.read()
    assert before is not None
    takes_over(folder, elsewhere())
    theirs = content_of(folder)
    assert not file.renew(before, before.content)
    assert not file.take_over(before, before.content)
    file.remove(before)
    assert content_of(folder) == theirs
    mine.release()
    assert content_of(folder) == theirs


def test_removed_lease_is_written_again(tmp_path: Path) -> None:
    mine = taken(str(tmp_path))
    (tmp_path / LEASE).unlink()
    mine.renew()
    with pytest.raises(LeaseError):
        taken(str(tmp_path))
    mine.release()
    mine.renew()
    assert not list(tmp_path.iterdir()), "not after its end"


def test_one_of_many_takes_over(folder: str) -> None:
    assert file_of(folder).create(replace(elsewhere(), process=_dead_process()).encode())
    barrier, won, refused = threading.Barrier(8), list[Lease](), list[str]()

    def contend() -> None:
        barrier.wait()
        try:
            won.append(taken(folder, Clock()))
        except LeaseError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 7), refused
    won[0].require_held()


def _dead_process() -> ProcessIdentity:
    return replace(ProcessIdentity.of_this(), start="0")


def test_full_or_read_only_disk_does_not_end_the_holder(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=64k") as disk:
        clock = PassingClock()
        mine = taken(str(disk), clock)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        before = content_of(str(disk))
        mine.renew()
        assert content_of(str(disk)) != before, "it takes no new room"

        with pytest.raises(WriteError, match=r"/disk/sub: cannot be written: no space left"):
            taken(f"{disk}/sub")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            mine.renew()
        clock.seconds += 10 * EXPIRE_SECONDS
        mine.require_held()


def test_store_without_conditions_keeps_the_last_writer(store: str) -> None:
    """Both found no lease, both wrote one: the first finds out before it writes anything else."""
    folder = f"{store}/plain"
    mine = taken(folder)
    fs, path = storage.filesystem(storage.join(folder, LEASE))
    fs.pipe_file(path, elsewhere().encode())
    with pytest.raises(LeaseError, match="host node-7"):
        mine.require_held()


def test_bucket_that_is_not_there_is_named(store: str) -> None:
    with pytest.raises(WriteError, match=r"s3://mistyped/run: cannot be written: no such bucket"):
        taken("s3://mistyped/run")
