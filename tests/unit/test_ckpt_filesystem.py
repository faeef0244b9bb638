"""Which file system a directory lies on, asked of real mounts; and which layout suits it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcft.ckpt import filesystem
from hpcft.ckpt.filesystem import FileSystem

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "with blank"
    place.mkdir()
    yield place
    while os.path.ismount(place):
        subprocess.run(["umount", "--lazy", place], check=True)


def mount(kind: str, place: Path) -> None:
    if kind == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
        return
    if not shutil.which(f"mkfs.{kind}") or not Path("/dev/loop-control").exists():
        pytest.skip(f"needs mkfs.{kind} and loop devices")
    image = place.parent / f"{kind}.image"
    with image.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)


@needs_root
@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "xfs"])
def test_a_mount_is_told(place: Path, kind: str) -> None:
    mount(kind, place)
    inside = place / "deeper" / "still"
    inside.mkdir(parents=True)
    assert filesystem.at(inside) == FileSystem(kind)
    link = place.parent / "link"
    link.symlink_to(inside)
    assert filesystem.at(link).kind == kind
    assert filesystem.at(link).layout()[0] == "shared"


@needs_root
def test_a_mount_that_is_hidden_does_not_count(place: Path) -> None:
    mount("tmpfs", place)
    inside = place / "inside"
    inside.mkdir()
    mount("ext4", inside)
    mount("tmpfs", place)
    inside.mkdir()
    assert filesystem.at(inside).kind == "tmpfs"


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        filesystem.at(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("system", "layout", "why"),
    [
        (FileSystem("nfs4"), "per-rank", "get in each other's way"),
        (FileSystem("lustre", 1), "per-rank", "one server"),
        (FileSystem("lustre", 0), "per-rank", "who knows"),
        (FileSystem("lustre", 8), "shared", "all ranks"),
        (FileSystem("fuse.glusterfs"), "shared", "all ranks"),
    ],
)
def test_the_layout_has_a_reason(system: FileSystem, layout: str, why: str) -> None:
    found, reason = system.layout()
    assert found == layout
    assert why in reason


def test_what_is_asked_for_comes_before_what_suits(tmp_path: Path) -> None:
    for asked in ("shared", "per-rank"):
        assert filesystem.choose(asked, tmp_path) == (asked, "as it was asked for")
    assert filesystem.choose("auto", tmp_path) == filesystem.at(tmp_path).layout()
    with pytest.raises(FileNotFoundError):
        filesystem.choose("auto", tmp_path / "nowhere")
