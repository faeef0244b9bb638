"""Running a script anew in one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hpcft.world import script

PROGRAM = """
import os, sys
from hpcft.world.script import ScriptInterrupted
import helper

mine = sys.modules["__main__"]
helper.seen.append((sys.argv[1:], list(sys.path), os.getcwd(), hasattr(mine, "mark"), __name__))
mine.mark = True
sys.argv.append("more")
sys.path.insert(0, "/elsewhere")
os.chdir("/")
if len(helper.seen) < 3:
    try:
        raise ScriptInterrupted
    except Exception:
        helper.seen.clear()
    finally:
        helper.unwound += 1
"""


@pytest.mark.parametrize("module", [False, True])
def test_each_time_it_finds_what_it_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: bool
) -> None:
    (tmp_path / "helper.py").write_text("seen = []\nunwound = 0\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(sys, "argv", ["before"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    main = sys.modules["__main__"]
    resets: list[int] = []

    def reset() -> None:
        resets.append(len(resets))
        if len(resets) < 2:
            script.on_interruption(reset)

    script.on_interruption(reset)
    arguments = [*(["-m", "program"] if module else ["program.py"]), "-x", "1"]
    script.prepare(arguments)
    script.run(arguments)
    helper = sys.modules.pop("helper")
    assert len(helper.seen) == 3
    assert helper.seen[0] == helper.seen[1] == helper.seen[2]
    rest, path, folder, marked, name = helper.seen[0]
    assert rest == ["-x", "1"]
    assert (path[0], folder) == (str(tmp_path), str(tmp_path))
    assert not marked
    assert name == "__main__"
    # Modules stay imported.
    assert helper.unwound == 2
    assert resets == [0, 1]
    assert sys.modules["__main__"] is main
    os.chdir(tmp_path)


def test_what_ends_the_run_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.py").write_text(
        "from hpcft.world.script import ScriptInterrupted\nraise ScriptInterrupted\n"
    )
    monkeypatch.setattr(sys, "argv", ["before"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])

    def reset() -> None:
        raise RuntimeError("too few ranks")

    script.on_interruption(reset)
    with pytest.raises(RuntimeError, match="too few ranks"):
        script.run([str(tmp_path / "program.py")])
