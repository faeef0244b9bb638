"""Uploading what a run leaves: to a directory, to a real S3 server, to places that fail."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from disks import Disk
from training import wait_for

from hpcft.cli.main import main
from hpcft.errors import UsageError
from hpcft.launch.upload import require_writable
from hpcft.telemetry.rundir import RunDirectory

FILES = {
    "summary.json": "{}",
    "events.jsonl": "",
    "ranks.json": "{}",
    "status.json": "{}",
    "laps/rank-0.jsonl": "laps",
    "tensorboard/events.000001.out.tfevents.1.n": "board",
    "logs/rank-0.log": "line\n" * 1000,
}


@pytest.fixture
def rundir(tmp_path: Path) -> RunDirectory:
    """With all there can be, and more."""
    rundir = RunDirectory(tmp_path / "run 7")
    more = {"door.json": "secret", ".status.json.12": "{", "data.bin": "mine"}
    more |= {"checkpoints/step-000000000010/state.h5": "much", "logs/.torn": "", "metrics.json": ""}
    for name, text in (FILES | more).items():
        file = rundir.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (rundir.path / "logs" / "link.log").symlink_to(rundir.path / "door.json")
    return rundir


def below(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_to_a_directory(
    rundir: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "archive" / "runs"
    assert main(["upload", str(rundir.path), str(place)]) == 0
    assert below(place) == {f"run 7/{name}": text for name, text in FILES.items()}
    assert f"uploaded 7 files, 4.9 KiB, to {place}/run 7 in" in capsys.readouterr().out
    # Again, as the run has come further.
    rundir.summary_file.write_text("more")
    assert main(["upload", str(rundir.path), f"file://{place}/", "--json"]) == 0
    assert below(place)["run 7/summary.json"] == "more"
    told = json.loads(capsys.readouterr().out)
    assert told.pop("seconds") >= 0
    assert told == {
        "run": str(rundir.path),
        "url": f"file://{place}/run 7",
        "uploaded": True,
        "error": None,
        "files": 7,
        "bytes": sum(map(len, FILES.values())) + 2,
    }


def test_what_is_in_the_way_is_told(
    rundir: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    url = f"{tmp_path}/file"
    assert main(["upload", str(rundir.path), url, "--patience", "0", "--json"]) == 1
    told = capsys.readouterr()
    assert f"the run is kept in {rundir.path}; try again: hpcft upload" in told.err
    content = json.loads(told.out)
    assert not content["uploaded"]
    assert "Not a directory" in content["error"]


def test_no_such_protocol(rundir: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    # Without waiting for it to become one.
    assert main(["upload", str(rundir.path), "nonsense://place"]) == 1
    assert "Protocol not known: nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("patience", ["-1", "nan"])
def test_no_patience(rundir: RunDirectory, patience: str) -> None:
    assert main(["upload", str(rundir.path), "/tmp", "--patience", patience]) == 2


def test_a_full_disk(rundir: RunDirectory, disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    filler = disk.fill()
    rundir.log_file(1).write_bytes(bytes(1 << 20))
    assert main(["upload", str(rundir.path), str(disk.path / "runs"), "--patience", "0"]) == 1
    assert "No space left" in capsys.readouterr().err
    filler.unlink()
    assert main(["upload", str(rundir.path), str(disk.path / "runs")]) == 0
    assert (disk.path / "runs" / "run 7" / "logs" / "rank-1.log").stat().st_size == 1 << 20


def test_a_place_that_hangs(rundir: RunDirectory, disk: Disk) -> None:
    disk.freeze()
    command = [sys.executable, "-m", "hpcft.cli.main", "upload", str(rundir.path)]
    command += [str(disk.path / "runs"), "--patience", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # It cannot end before the kernel lets its thread go.
        assert any("nothing was done for 0 s: it does not" in line for line in process.stderr)
        disk.thaw()
        assert process.wait(60) == 1


class Server:
    """An S3 server that can be stopped, and started again at the same port."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for("the S3 server", self._answers)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/moto-api/", timeout=10):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def put_bucket(self) -> None:
        request = urllib.request.Request(f"{self.url}/bucket", method="PUT")
        with urllib.request.urlopen(request, timeout=60):
            pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    made = Server()
    made.start()
    made.put_bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    yield made
    made.stop()


def in_bucket() -> dict[str, str]:
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    return {path: filesystem.cat_file(path).decode() for path in filesystem.find("bucket")}


EXPECTED = {f"bucket/runs/run 7/{name}": text for name, text in FILES.items()}


def test_to_s3(rundir: RunDirectory, server: Server) -> None:
    require_writable("s3://bucket/runs")
    assert in_bucket() == {}
    assert main(["upload", str(rundir.path), "s3://bucket/runs"]) == 0
    assert in_bucket() == EXPECTED
    # A slip of the pen makes no bucket.
    with pytest.raises(UsageError, match="cannot be written to: The specified bucket does not"):
        require_writable("s3://bukket/runs")


def test_a_server_that_is_away_for_a_while(rundir: RunDirectory, server: Server) -> None:
    server.stop()
    command = [sys.executable, "-m", "hpcft.cli.main", "upload", str(rundir.path)]
    with subprocess.Popen(
        [*command, "s3://bucket/runs"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert any("the upload failed and is tried again" in line for line in process.stderr)
        server.start()
        server.put_bucket()
        assert process.wait(120) == 0
    assert in_bucket() == EXPECTED


def test_ctrl_c(rundir: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "hpcft.cli.main", "upload", str(rundir.path)]
    with subprocess.Popen(
        [*command, str(tmp_path / "file")], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read().splitlines()[-1] == "hpcft: interrupted"


def test_a_place_is_tried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(str(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Not a directory"):
        require_writable(str(tmp_path / "file" / "b"))
    with pytest.raises(UsageError) as raised:
        require_writable("nonsense://place")
    assert "Protocol not known: nonsense" in raised.value.message
    assert raised.value.remedy.startswith("give a directory, or a URL that begins with s3://")
    # Whether a package is installed is not up to this test.
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys\nsys.modules['s3fs'] = None\n")
    monkeypatch.setenv("PYTHONPATH", f"{hidden}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(UsageError) as raised:
        require_writable("s3://bucket")
    assert "Install s3fs to access S3" in raised.value.message
    assert raised.value.remedy == "pip install s3fs"
