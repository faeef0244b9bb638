"""Faults on purpose: what a schedule says, whether each can be undone, and how a run is judged."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from disks import Disk
from hypothesis import given
from hypothesis import strategies as st

import hpcft
from hpcft.chaos import notes, schedule, verdict
from hpcft.chaos.campaign import Deed
from hpcft.chaos.clock import Clock
from hpcft.chaos.faults import Refused, Task
from hpcft.chaos.network import Lossy
from hpcft.chaos.notes import Note
from hpcft.chaos.processes import Hang, Kill, Node
from hpcft.chaos.schedule import KINDS, OF_RANKS, Order
from hpcft.chaos.storage import Corrupt, Full
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.save import Saver
from hpcft.ckpt.store import Store
from hpcft.cli.main import main
from hpcft.errors import UsageError
from hpcft.telemetry.events import Event

# -- schedules -----------------------------------------------------------------------------------


@st.composite
def orders(draw: st.DrawFn) -> Order:
    made = schedule.plain(float(draw(st.integers(0, 10**6))), draw(st.sampled_from(KINDS)))
    if made.kind in OF_RANKS:
        rank = draw(st.none() | st.integers(0, 999))
        made = replace(made, rank=rank, spare=rank is None and draw(st.booleans()))
    if made.kind not in ("full", "corrupt"):
        made = replace(made, host=draw(st.sampled_from(["", "n1", "node-7.cluster"])))
    if made.seconds:
        made = replace(made, seconds=float(draw(st.integers(1, 10**5))))
    if made.amount:
        made = replace(made, amount=float(draw(st.integers(1, 95))))
    return replace(made, newest=made.kind == "corrupt" and draw(st.booleans()))


@given(st.lists(orders(), min_size=1))
def test_a_schedule_is_read_as_it_is_written(written: list[Order]) -> None:
    text = "# faults\n\n" + "\n".join(f"{order.text}  # of many" for order in written)
    assert schedule.parse(text, "faults") == sorted(written, key=lambda order: order.at)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no faults"),
        ("# nothing", "has no faults"),
        ("10s", "line 1: '10s' is not all"),
        ("10s kill\nsoon kill", "line 2: the time 'soon' is no time"),
        ("10s explode", "there is no fault 'explode'"),
        ("10s kill rank=-1", "kill does not take 'rank=-1'"),
        ("10s kill for=3s", "kill does not take 'for=3s'"),
        ("10s kill rank=1 spare", "exclude each other"),
        ("10s hang for=ever", "'ever' is no time"),
        ("10s slow factor=0.5", "factor=0.5 makes no sense"),
        ("10s lossy percent=nan", "percent=nan makes no sense"),
        ("10s corrupt host=n1", "corrupt does not take 'host=n1'"),
        ("10s node rank=1", "node does not take 'rank=1'"),
        ("-3s kill", "'-3s' is no time"),
    ],
)
def test_what_is_no_schedule_is_said(text: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        schedule.parse(text, "faults")
    assert said in raised.value.message
    assert raised.value.remedy


@given(st.floats(1e-4, 1), st.floats(1, 1e4), st.integers())
def test_the_same_seed_draws_the_same(rate: float, length: float, seed: int) -> None:
    drawn = schedule.draw(rate, length, ["kill", "hang"], seed)
    assert drawn == schedule.draw(rate, length, ["kill", "hang"], seed)
    assert all(0 <= order.at < length for order in drawn)
    assert drawn == sorted(drawn, key=lambda order: order.at)


def test_so_many_are_drawn_as_the_rate_says() -> None:
    drawn = schedule.draw(schedule.rate("6/h"), 1000 * 3600, list(KINDS), seed=7)
    assert 5700 < len(drawn) < 6300
    assert {order.kind for order in drawn} == set(KINDS)


# -- faults --------------------------------------------------------------------------------------


def task(tmp_path: Path, **given: Any) -> Task:
    made = Task("", 1, 50, False, tmp_path, None, (), (), "", False, False)
    return replace(made, **given)


def saved(folder: Path, count: int) -> list[Path]:
    """The files of so many checkpoints."""
    saver = Saver(Store(folder).create(), Alone(), Engine(16 << 20))
    state = hpcft.State(model=torch.nn.Linear(300, 300))
    for step in range(1, count + 1):
        state.__dict__["step"] = step
        save = saver.begin(step, state.to_tree(frozen=False))
        while not save.advance(waiting=True):
            pass
        save.finish()
    return [checkpoint.state for checkpoint in Store(folder).committed()]


def good(file: Path) -> bool:
    return main(["ckpt", "verify", str(file)]) == 0


def test_wrong_bytes_are_found_and_put_back(tmp_path: Path) -> None:
    old, newest = saved(tmp_path / "checkpoints", 2)
    before = old.read_bytes(), newest.read_bytes()
    fault = Corrupt()
    how = fault.prepare(task(tmp_path, checkpoints=str(tmp_path / "checkpoints")))
    fault.do(how)
    assert (good(old), good(newest)) == (False, True)
    # By another process, and more than once.
    for _ in range(2):
        Corrupt().undo(how)
        assert (old.read_bytes(), newest.read_bytes()) == before


def test_a_checkpoint_that_another_has_taken_the_place_of_is_left_alone(tmp_path: Path) -> None:
    old, newest = saved(tmp_path / "checkpoints", 2)
    fault = Corrupt()
    how = fault.prepare(task(tmp_path, checkpoints=str(tmp_path / "checkpoints")))
    fault.do(how)
    os.replace(newest, old)
    fault.undo(how)
    assert good(old)
    old.unlink()
    fault.undo(how)


def test_the_only_checkpoint_is_not_damaged_unless_that_is_meant(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(Refused, match="not known where"):
        Corrupt().prepare(task(tmp_path))
    folder.mkdir()
    with pytest.raises(Refused, match="no checkpoint in"):
        Corrupt().prepare(task(tmp_path, checkpoints=str(folder)))
    (file,) = saved(folder, 1)
    with pytest.raises(Refused, match="only checkpoint"):
        Corrupt().prepare(task(tmp_path, checkpoints=str(folder)))
    how = Corrupt().prepare(task(tmp_path, checkpoints=str(folder), newest=True))
    notes.write(tmp_path, Note("corrupt", socket.gethostname(), how))
    with pytest.raises(Refused, match="wrong bytes already"):
        Corrupt().prepare(task(tmp_path, checkpoints=str(folder), newest=True))
    file.write_bytes(b"torn")
    with pytest.raises(Refused, match="cannot be read"):
        Corrupt().prepare(task(tmp_path / "other", checkpoints=str(folder), newest=True))


def test_a_disk_is_full_until_that_is_undone(disk: Disk, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="find it full"):
        Full().prepare(task(tmp_path, checkpoints=str(disk.path)))
    before = shutil.disk_usage(disk.path).free
    how = Full().prepare(task(tmp_path, checkpoints=str(disk.path), yes=True))
    Full().do(how)
    assert shutil.disk_usage(disk.path).free < 4 << 20 < before
    for _ in range(2):
        Full().undo(how)
    assert shutil.disk_usage(disk.path).free > before - (1 << 20)
    assert not list(disk.path.glob(".chaos-*"))


def test_only_ranks_are_harmed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        for fault in (Kill(), Hang()):
            with pytest.raises(Refused, match="no rank of yours"):
                fault.prepare(task(tmp_path, pid=other.pid))
        with pytest.raises(Refused, match="no rank of yours"):
            Node().prepare(task(tmp_path, pid=other.pid, pids=(other.pid,), yes=True))
        # One of the same number, but born at another time.
        Hang().undo({"pid": other.pid, "born": 1})
        with pytest.raises(Refused, match="has ended before"):
            Kill().do({"pid": other.pid, "born": 1})
        other.kill()
    with pytest.raises(Refused, match="is gone"):
        Kill().prepare(task(tmp_path, pid=other.pid))


def test_the_clock_is_left_alone_without_a_yes(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="another time of day"):
        Clock().prepare(task(tmp_path))


_HOSTS = """\
set -e
unshare -n sh -c 'echo $$ > "$0"; exec sleep 600' "$1" &
until [ -s "$1" ]; do :; done
other=$(cat "$1")
trap "kill $other" EXIT
ip link set lo up
ip link add here type veth peer name there netns "$other"
ip address add 10.77.0.1/24 dev here
ip link set here up
nsenter -t "$other" -n sh -c 'ip address add 10.77.0.2/24 dev there; ip link set there up'
shift
"$@" "$other"
"""

_LINKS = """\
import subprocess, sys, socket
from hpcft.chaos.faults import Refused, Task
from hpcft.chaos.network import Cut

LISTEN = (
    "import socket; s = socket.create_server(('10.77.0.2', 7777)); print(1, flush=True); s.accept()"
)
server = ["nsenter", "-t", sys.argv[1], "-n", sys.executable, "-c", LISTEN]

def reached():
    with subprocess.Popen(server, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        try:
            socket.create_connection(("10.77.0.2", 7777), timeout=1).close()
            return True
        except OSError:
            return False
        finally:
            other.kill()

fault = Cut()
task = Task("cut", 1, 5, False, None, None, (), ("10.77.0.2",), "", False, False)
how = fault.prepare(task)
assert reached()
fault.do(how)
assert not reached()
try:
    fault.prepare(task)
    raise AssertionError("it is cut already")
except Refused:
    pass
for _ in range(2):
    fault.undo(how)
    assert reached()
print("done")
"""


def _between_hosts(program: str, file: Path) -> str:
    """What a program prints between two network namespaces, which nobody else is in."""
    hosts = ["unshare", "-n", "sh", "-c", _HOSTS, "sh", str(file)]
    if subprocess.call([*hosts, "true"], stderr=subprocess.DEVNULL):
        pytest.skip("no network namespaces here")
    file.unlink()
    done = subprocess.run(
        [*hosts, sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_link_is_cut_and_healed(tmp_path: Path) -> None:
    assert _between_hosts(_LINKS, tmp_path / "other") == "done\n"


_PACKETS = """\
import socket, subprocess, sys
from hpcft.chaos.faults import Task
from hpcft.chaos.network import Lossy

subprocess.check_call(["ip", "address", "add", "10.77.0.9/24", "dev", "here"])
SEND = (
    "import socket, time; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('10.77.0.%d', 0));"
    "[(s.sendto(b'x', ('10.77.0.1', 7777)), time.sleep(2e-4)) for i in range(1000)]"
)
there = ["nsenter", "-t", sys.argv[1], "-n"]
subprocess.check_call([*there, "ip", "address", "add", "10.77.0.3/24", "dev", "there"])
mine = socket.socket(type=socket.SOCK_DGRAM)
mine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
mine.bind(("10.77.0.1", 7777))
mine.settimeout(1)

def come_in(host):
    subprocess.check_call([*there, sys.executable, "-c", SEND % host])
    count = 0
    try:
        while True:
            mine.recv(1)
            count += 1
    except TimeoutError:
        return count

fault = Lossy()
task = Task("lossy", 1, 50, False, None, None, (), ("10.77.0.2", "fd00::2"), "", False, False)
how = fault.prepare(task)
assert come_in(2) == 1000
fault.do(how)
# Ten standard deviations to each side.
assert 340 < come_in(2) < 660
assert come_in(3) == 1000
for _ in range(2):
    fault.undo(how)
    assert come_in(2) == 1000
assert not subprocess.check_output(["nft", "list", "tables"])
print("done")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_packets_of_the_hosts_that_are_meant_are_lost(tmp_path: Path) -> None:
    assert _between_hosts(_PACKETS, tmp_path / "other") == "done\n"


def test_links_of_a_run_on_one_host_are_not_cut(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cross no link"):
        Lossy().prepare(task(tmp_path))


def test_notes_are_there_until_all_is_undone(tmp_path: Path) -> None:
    assert list(notes.left(tmp_path)) == []
    first = notes.write(tmp_path, Note("hang", "n1", {"pid": 3}))
    second = notes.write(tmp_path, Note("slow", "n2", {}))
    (tmp_path / "chaos" / "torn.json").write_text('{"kind": "ha')
    assert {note.kind for _, note in notes.left(tmp_path)} == {"hang", "slow"}
    (tmp_path / "chaos" / "torn.json").unlink()
    notes.remove(first)
    notes.remove(second)
    notes.remove(second)
    assert list(tmp_path.iterdir()) == []


# -- verdicts ------------------------------------------------------------------------------------


def deed(at: float, text: str, step: int = 50, *worlds: int, undone: float | None = None) -> Deed:
    (order,) = schedule.parse(text, "test")
    done = runs.T0 + at
    over = None if undone is None else runs.T0 + undone
    return Deed(order, "somebody", "n2", worlds, None, step, done, over)


def judged(
    deeds: Sequence[Deed],
    events: Sequence[Event],
    expect: verdict.Expect = "recover",
    state: str = "training",
    step: int = 200,
    bad: bool = False,
) -> verdict.Verdict:
    checkpoints = [{"path": "ck/1", "ok": not bad}]
    return verdict.judge(deeds, events, expect, state, step, checkpoints)


SUBSTITUTED = [
    runs.start(9, 3, 1),
    runs.failure(20, 50, 2, 2, 1),
    runs.event("adoption", 20.2, 50, 2, epoch=1, world=3, host="n3"),
    runs.resume(20.2, 50, 1, "substitute", 3, 0),
    runs.event("recovered", 20.4, 51, epoch=1, stall_s=0.4),
]


def test_who_is_replaced_is_found_with_the_time_that_took() -> None:
    found = judged([deed(20, "0s kill rank=2", 50, 2)], SUBSTITUTED)
    assert found.passed
    (one,) = found.findings
    assert (one.answer, one.detail) == ("substitute", "killed by SIGKILL")
    assert one.recovery_s == pytest.approx(0.4)


def test_a_kill_that_nobody_has_answered_fails() -> None:
    found = judged([deed(20, "0s kill", 50, 1)], SUBSTITUTED)
    assert not found.passed
    assert [one.answer for one in found.findings] == ["open"]
    assert "nothing was done about it" in found.reasons[0]


def test_who_is_hit_twice_has_died_of_the_second() -> None:
    deeds = [deed(15, "0s slow for=1s", 40, 2, undone=16), deed(20, "5s kill", 50, 2)]
    answers = [one.answer for one in judged(deeds, SUBSTITUTED).findings]
    assert answers == ["went on", "substitute"]
    # A node is silent since it was last heard, which was before.
    deeds = [deed(15, "0s lossy for=1s", 40, 2, undone=16), deed(20.3, "5s cut for=3s", 50, 2)]
    answers = [one.answer for one in judged(deeds, SUBSTITUTED).findings]
    assert answers == ["went on", "substitute"]


def test_a_hang_that_was_too_short_to_be_noticed_passes() -> None:
    found = judged([deed(20, "0s hang for=1s", 50, 1, undone=21)], SUBSTITUTED[:1])
    assert found.passed
    assert [one.answer for one in found.findings] == ["went on"]


def test_a_relaunch_is_survival_but_no_recovery() -> None:
    events = [
        *SUBSTITUTED,
        runs.failure(40, 150, 0, 0, 2),
        runs.event("relaunch", 40.3, 150, 0, 1, 2, 3, reason="all ranks failed", hosts=["n0"]),
        runs.start(44, 3, 1),
        runs.event("restore", 44.5, 100, path="ck/100"),
    ]
    deeds = [deed(20, "0s kill", 50, 2), deed(40, "20s node", 150, 0, 1, 3)]
    assert [one.answer for one in judged(deeds, events).findings] == ["substitute", "relaunch"]
    assert judged(deeds, events, "survive").passed
    assert not judged(deeds, events, "recover").passed
    assert "had to be started again" in judged(deeds, events).reasons[0]
    # No step since.
    assert not judged(deeds, events, "survive", step=150).passed


def test_a_run_that_has_failed_fails_and_one_that_has_finished_does_not() -> None:
    deeds = [deed(20, "0s kill rank=2", 50, 2)]
    assert not judged(deeds, SUBSTITUTED, "survive", "failed").passed
    assert not judged(deeds, SUBSTITUTED, "survive", "killed").passed
    assert judged(deeds, SUBSTITUTED, "recover", "ok", 50).passed


def test_a_damaged_checkpoint_fails_and_so_does_what_could_not_be_undone() -> None:
    deeds = [deed(20, "0s kill rank=2", 50, 2)]
    assert "ck/1 is damaged" in judged(deeds, SUBSTITUTED, bad=True).reasons[0]
    deeds[0].left = True
    assert "--undo" in judged(deeds, SUBSTITUTED).reasons[0]


def test_where_nothing_was_done_nothing_is_proven() -> None:
    refused = Deed(schedule.plain(0, "cut"), refused="the run is on one host")
    found = judged([refused], SUBSTITUTED)
    assert (found.passed, found.reasons) == (False, ("No fault was done.",))
    assert judged([refused, deed(20, "0s kill", 50, 2)], SUBSTITUTED).passed


def test_trouble_with_a_checkpoint_is_what_the_run_has_said() -> None:
    events = [*SUBSTITUTED, runs.event("save failed", 31, 70, why="the disk is full")]
    (one,) = judged([deed(30, "0s full for=2s", 60, undone=32)], events).findings
    assert (one.answer, one.detail) == ("said", "save failed: the disk is full")


def test_a_lost_spare_is_told() -> None:
    events = [runs.start(9, 3, 1), runs.failure(20, 50, None, 3, 0)]
    found = judged([deed(20, "0s kill spare", 50, 3)], events)
    assert found.passed
    assert found.findings[0].answer == "spare lost"


# -- the command line ----------------------------------------------------------------------------


@pytest.fixture
def ended(tmp_path: Path) -> str:
    events = [runs.start(0, 2), runs.event("finish", 9, 60, params_sha256="0")]
    return str(runs.leave(tmp_path / "run", events))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rate", "6/h", "--for", "9h"], "does not train: it is ok"),
        (["--rate", "often", "--for", "10m"], "--rate 'often' is no rate"),
        (["--rate", "6/h"], "give --for"),
        (["--rate", "6/h", "--for", "10m", "--faults", "kill,boo"], "there is no fault 'boo'"),
        (["--rate", "1/h", "--for", "1s"], "none comes within 1s"),
        (["--rate", "60/m", "--for", "10m", "--faults", "clock"], "say --yes"),
        (["--schedule", "none.txt"], "none.txt cannot be read"),
        (["--rate", "6/h", "--for", "9h", "--settle", "x"], "--settle 'x' is no time"),
    ],
)
def test_wrong_use_is_said(
    ended: str, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert main(["chaos", ended, *options]) == 2
    assert said in capsys.readouterr().err


def test_a_schedule_is_shown(ended: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rate", "60/m", "--for", "10s", "--seed", "3", "--dry-run"]
    assert main(["chaos", ended, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [asdict(order) for order in schedule.parse("\n".join(lines), "shown")]
    assert main(["chaos", ended, *options]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_undo_without_anything_left(ended: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos", "--undo", ended]) == 0
    assert "nothing is left" in capsys.readouterr().err


def test_undo_continues_who_was_left_stopped(ended: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        os.kill(other.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, other.pid, os.WSTOPPED | os.WNOWAIT)
        since = int(Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19])
        how = {"pid": other.pid, "born": since}
        notes.write(Path(ended), Note("hang", socket.gethostname(), how))
        assert main(["chaos", "--undo", ended]) == 0
        assert list(notes.left(Path(ended))) == []
        # It goes on, and ends by itself.
        other.communicate(b"\n")
    assert other.returncode == 0
