"""What the command line means, and what it is told when it means nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.ckpt.near import Tier
from hpcft.ckpt.policy import Best, Policy, Retention
from hpcft.errors import UsageError
from hpcft.launch.options import RunOptions, Sizes, check_sizes, parse
from hpcft.telemetry.address import Address
from hpcft.world.mode import Mode

#: Any file will do as a script: it is not run.
SCRIPT = str(Path(__file__))


def test_without_options_one_rank_per_task_trains_and_nothing_is_parked() -> None:
    options = parse([SCRIPT])
    assert options == RunOptions(
        argv=(),
        target=(SCRIPT,),
        module=False,
        most_requeues=None,
        nproc=None,
        most=None,
        spares=0,
        min_ranks=1,
        on_failure=("substitute", "shrink"),
        mode=Mode(),
        spares_do=(),
        spares_memory="auto",
        replace_stragglers=False,
        balance=False,
        run_dir=options.run_dir,
        timeout_detect=0.8,
        timeout_progress=300.0,
        verbose=1,
        warm=True,
        preload=(),
        digest=True,
        checkpoints=None,
        max_relaunch=0,
        metrics=None,
        tensorboard=None,
        upload=None,
    )


def test_each_option_is_taken() -> None:
    options = parse(
        [
            *("--nproc", "4", "--spares=2", "--min-ranks", "3", "--on-failure", "shrink"),
            *("--run-dir", "/runs/a", "--timeout-detect", "0.1", "--timeout-progress", "0"),
            *("--preload", "json,os", "--preload=test_options"),
            *("--metrics-port", "9100", "--tensorboard", "--upload", "s3://bucket/runs"),
            *("--backup", "2", "--verbose", "3", "--no-warm", "--no-digest", SCRIPT),
        ]
    )
    assert options == RunOptions(
        argv=(),
        target=(SCRIPT,),
        module=False,
        most_requeues=None,
        nproc=4,
        most=None,
        spares=2,
        min_ranks=3,
        on_failure=("shrink",),
        mode=Mode("backup", 2),
        spares_do=(),
        spares_memory="auto",
        replace_stragglers=False,
        balance=False,
        run_dir=Path("/runs/a"),
        timeout_detect=0.1,
        timeout_progress=0.0,
        verbose=3,
        warm=False,
        preload=("json", "os", "test_options"),
        digest=False,
        checkpoints=None,
        max_relaunch=0,
        metrics=Address("0.0.0.0", 9100),
        tensorboard=Path("/runs/a/tensorboard"),
        upload="s3://bucket/runs",
    )


def test_places_are_the_same_wherever_they_are_read() -> None:
    options = parse(["--tensorboard-dir", "board", "--upload", "archive", SCRIPT])
    assert options.tensorboard == Path("board").absolute()
    assert options.upload == str(Path("archive").absolute())


def test_tensorboard_takes_no_script_for_its_directory() -> None:
    options = parse(["--run-dir", "/runs/a", "--tensorboard", SCRIPT, "--tensorboard-dir", "b"])
    assert options.tensorboard == Path("/runs/a/tensorboard")
    assert options.target == (SCRIPT, "--tensorboard-dir", "b")


def test_what_tensorboard_needs_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether it is installed is not up to this test.
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "tensorboardX" else real(name)
    )
    with pytest.raises(UsageError) as raised:
        parse(["--tensorboard", SCRIPT])
    assert raised.value.remedy == "pip install tensorboardX"


def test_checkpoints_are_taken() -> None:
    few = parse(["--ckpt-dir", "/ck", SCRIPT]).checkpoints
    assert few == Policy("/ck", 600.0, True, Retention(3), 1 << 30, 0, True, 120.0)
    many = [
        *("--ckpt-dir", "ck", "--ckpt-every", "100", "--ckpt-keep", "5", "--ckpt-memory", "1.5GiB"),
        *("--ckpt-bandwidth", "200M", "--no-ckpt-overlap", "--ckpt-timeout", "60", SCRIPT),
    ]
    directory = str(Path("ck").absolute())
    expected = Policy(directory, 100.0, False, Retention(5), 3 << 29, 200 << 20, False, 60.0)
    assert parse(many).checkpoints == expected
    for layout in ("auto", "shared", "per-rank"):
        policy = parse(["--ckpt-layout", layout, *many]).checkpoints
        assert policy == replace(expected, layout=layout)


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ("", Mode()),
        ("--backup 2", Mode("backup", 2)),
        ("--mode backup", Mode("backup", 1)),
        ("--mode local-sgd", Mode("local-sgd", sync_every=8, elastic=1.0)),
        ("--mode local-sgd --sync-every 3 --elastic 0.5", Mode("local-sgd", 0, 3, 0.5)),
        ("--mode async --staleness 2", Mode("async", staleness=2)),
    ],
)
def test_modes(words: str, mode: Mode) -> None:
    assert parse([*words.split(), SCRIPT]).mode == mode


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (
            "--staleness 3",
            "--staleness is not for --mode sync; leave it away, or give --mode async",
        ),
        ("--mode async --elastic 0.5", "--elastic is not for --mode async"),
        ("--mode async --staleness 0", "--staleness 0 makes no sense; give 1 or more"),
        ("--mode local-sgd --elastic 1.5", "--elastic 1.5 makes no sense; give a number above 0"),
        ("--mode local-sgd --elastic nan", "--elastic nan makes no sense"),
        ("--mode local-sgd --sync-every 0", "--sync-every 0 makes no sense"),
        ("--mode async --ckpt-dir c --ckpt-near 9", "--ckpt-near is not for --mode async"),
    ],
)
def test_what_is_no_mode_is_refused(words: str, why: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse([*words.split(), SCRIPT])
    assert raised.value.line.startswith(why)


def test_tiers_near_the_ranks() -> None:
    def near(*more: str) -> tuple[Tier, ...]:
        policy = parse(["--ckpt-dir", "/ck", *more, SCRIPT]).checkpoints
        assert policy is not None
        assert Policy.of(json.loads(json.dumps(asdict(policy)))) == policy
        return policy.near

    assert near() == ()
    memory, disk = near(
        "--ckpt-near", "5", "--ckpt-near", "30s:/local", "--ckpt-near-copies", "xor:4"
    )
    assert (memory.every, memory.timed, memory.copies, memory.set_size) == (5, False, "xor", 4)
    assert memory.path.startswith("/dev/shm/hpcft-near-")
    assert (disk.every, disk.timed) == (30, True)
    assert disk.path.startswith("/local/hpcft-near-")
    # Another directory of checkpoints is another training.
    [other] = near("--ckpt-near", "5", "--ckpt-dir", "/other")
    assert other.path != memory.path
    assert near("--ckpt-near", "5")[0].path == memory.path


@pytest.mark.parametrize(
    ("text", "best"),
    [
        ("loss", Best("loss", False, 1)),
        ("loss:min", Best("loss", False, 1)),
        ("val accuracy:max", Best("val accuracy", True, 1)),
        ("loss:3", Best("loss", False, 3)),
        ("acc:max:2", Best("acc", True, 2)),
    ],
)
def test_what_is_kept_besides_the_newest(text: str, best: Best) -> None:
    more = ["--ckpt-keep-nth", "50", "--ckpt-keep-best", text]
    policy = parse(["--ckpt-dir", "ck", *more, SCRIPT]).checkpoints
    assert policy is not None
    assert policy.retention == Retention(3, 50, best)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30.0), ("1.5m", 90.0), ("2h", 7200.0), ("0.1s", 0.1)]
)
def test_times_have_units(text: str, seconds: float) -> None:
    options = parse(["--ckpt-dir", "ck", "--ckpt-every", text, SCRIPT]).checkpoints
    assert options is not None
    assert (options.every, options.timed) == (seconds, True)


def test_ways_may_be_written_with_spaces() -> None:
    options = parse(["--on-failure", " substitute , shrink,", SCRIPT])
    assert options.on_failure == ("substitute", "shrink")


def test_a_module_is_found_by_name_and_gets_its_arguments() -> None:
    options = parse(["--spares", "1", "-m", "json.tool", "-m", "--compact"])
    assert options.module
    assert options.target == ("json.tool", "-m", "--compact")


@pytest.mark.parametrize(
    "args",
    [
        ["--spares", "3"],
        ["--nproc", "0", "--on-failure", "pray"],
        ["-m", "json", "--help"],
        ["-h"],
        ["data.csv", "--", "--verbose", "9"],
        ["--run-dir=elsewhere", "--no-warm"],
        ["--spare", "--unknown", "-x", "", " "],
        ["--timeout", "5"],
        ["--", "--verbose", "9"],
    ],
)
def test_what_follows_the_script_is_the_scripts(args: list[str]) -> None:
    options = parse(["--spares", "1", SCRIPT, *args])
    assert options.target == (SCRIPT, *args)
    assert replace(options, target=(SCRIPT,), run_dir=Path()) == replace(
        parse(["--spares", "1", SCRIPT]), run_dir=Path()
    )


#: Our options' names, and what a script's may look like.
words = st.sampled_from(
    ["--spares", "--nproc", "-m", "-h", "--no-warm", "--no", "--", "3", "a.py", "--lr=1", "-x"]
) | st.text(max_size=5)


@given(st.lists(words, max_size=8))
def test_whatever_follows_the_script_is_kept_as_it_is(args: list[str]) -> None:
    assert parse(["--min-ranks", "2", SCRIPT, *args]).target == (SCRIPT, *args)


@pytest.mark.parametrize(
    ("argv", "names", "remedy"),
    [
        (["--on-failure", "pray", SCRIPT], "--on-failure does not know 'pray'", "substitute"),
        (["--on-failure", "shrink,pray", SCRIPT], "'pray'", "shrink"),
        (["--nproc", "0", SCRIPT], "--nproc 0 ", "from 1 on"),
        (["--nproc", "-2", SCRIPT], "--nproc -2 ", "from 1 on"),
        (["--spares", "-1", SCRIPT], "--spares -1 ", "0 or more"),
        (["--min-ranks", "0", SCRIPT], "--min-ranks 0 ", "1 or more"),
        (["--timeout-detect", "0.05", SCRIPT], "--timeout-detect 0.05 ", "0.1 or more"),
        (["--timeout-detect", "-1", SCRIPT], "--timeout-detect -1.0 ", "0.1 or more"),
        (["--timeout-progress", "-1", SCRIPT], "--timeout-progress ", "give 0 "),
        (["no/such/train.py"], "no/such/train.py", "-m MODULE"),
        ([str(Path(__file__).parent)], "there is no script", "check the path"),
        (["-m", "no_such_module"], "no module no_such_module", "PYTHONPATH"),
        (["-m", "no_such_package.train"], "no module no_such_package.train", "PYTHONPATH"),
        (["-m", "json.no_such"], "no module json.no_such", "PYTHONPATH"),
        (["--timeout-detect", "nan", SCRIPT], "--timeout-detect nan ", "0.1 or more"),
        (["--timeout-progress", "nan", SCRIPT], "--timeout-progress ", "give 0 "),
        (["-m", "__main__"], "no module __main__", "PYTHONPATH"),
        (["--ckpt-dir", "d", "--ckpt-every", "0", SCRIPT], "--ckpt-every '0' ", "30s"),
        (["--ckpt-dir", "d", "--ckpt-every", "x", SCRIPT], "--ckpt-every 'x' ", "30s"),
        (["--ckpt-dir", "d", "--ckpt-every", "2.5", SCRIPT], "--ckpt-every '2.5' ", "30s"),
        (["--ckpt-dir", "d", "--ckpt-every", "nans", SCRIPT], "--ckpt-every 'nans' ", "30s"),
        (["--ckpt-dir", "d", "--ckpt-every", "", SCRIPT], "--ckpt-every '' ", "30s"),
        (["--ckpt-near", "5", SCRIPT], "--ckpt-near is for the time between", "--ckpt-dir as well"),
        (["--ckpt-dir", "d", "--ckpt-near", "x", SCRIPT], "--ckpt-near 'x' is neither", "30s"),
        (["--ckpt-dir", "d", "--ckpt-near", "5:x", SCRIPT], "the same on all nodes", "from / on"),
        (
            ["--ckpt-dir", "d", "--ckpt-near", "5", "--ckpt-near-copies", "xor:1", SCRIPT],
            "--ckpt-near-copies 'xor:1' is not known",
            "xor:4",
        ),
        (["--ckpt-dir", "d", "--ckpt-keep", "0", SCRIPT], "--ckpt-keep 0 ", "1 or more"),
        (["--ckpt-dir", "d", "--ckpt-keep-nth", "-1", SCRIPT], "--ckpt-keep-nth -1", "0 or more"),
        (["--ckpt-dir", "d", "--ckpt-keep-best", ":max", SCRIPT], "':max' names no", "accuracy"),
        (["--ckpt-dir", "d", "--ckpt-keep-best", "a:0", SCRIPT], "'a:0' names no", "accuracy"),
        (["--ckpt-dir", "d", "--ckpt-keep-best", "a:up", SCRIPT], "'a:up' names no", "accuracy"),
        (["--ckpt-dir", "d", "--ckpt-memory", "1M", SCRIPT], "--ckpt-memory 1M ", "16M or more"),
        (["--ckpt-dir", "d", "--ckpt-memory", "much", SCRIPT], "--ckpt-memory 'much' ", "512M"),
        (["--ckpt-dir", "d", "--ckpt-timeout", "300", SCRIPT], "--ckpt-timeout 300 ", "less than"),
        (["--ckpt-dir", "d", "--ckpt-timeout", "nan", SCRIPT], "--ckpt-timeout nan ", "more than"),
        (["--ckpt-dir", "d", "--ckpt-bandwidth", "-1", SCRIPT], "'-1' is no size", "512M"),
        (["--ckpt-dir", "d", "--ckpt-bandwidth", "inf", SCRIPT], "'inf' is no size", "512M"),
        (["--metrics-port", "http", SCRIPT], "--metrics-port 'http' is no port", "9100"),
        (["--metrics-port", "", SCRIPT], "--metrics-port '' is no port", "9100"),
        (["--upload", "", SCRIPT], "--upload '' is no URL", "s3://"),
    ],
)
def test_nonsense_is_named_and_remedied(argv: list[str], names: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(argv)
    assert names in caught.value.message
    assert remedy in caught.value.remedy
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], "SCRIPT"),
        (["--spares", "1"], "SCRIPT"),
        (["--verbose", "4", SCRIPT], "--verbose"),
        (["--timeout-detect", "soon", SCRIPT], "--timeout-detect"),
        (["--sapres", "1", SCRIPT], "--sapres"),
    ],
)
def test_what_cannot_be_read_is_wrong_usage(
    argv: list[str], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    assert ended.value.code == 2
    assert names in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("environ", "pattern"),
    [
        ({"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3"}, r"12\.3"),
        ({"PMIX_NAMESPACE": "prterun-a@1/x"}, "mpiexec-prterun-a-1-x"),
        ({}, r"\d{8}-\d{6}-\d+"),
    ],
    ids=["srun", "mpiexec", "alone"],
)
def test_the_run_directory_is_named_after_the_run(
    environ: dict[str, str], pattern: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    run_dir = parse([SCRIPT]).run_dir
    assert run_dir.parent == tmp_path / "hpcft-runs"
    assert not run_dir.parent.exists()
    assert re.fullmatch(pattern, run_dir.name)


def test_a_run_directory_given_relative_is_made_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(["--run-dir", "runs/a", SCRIPT]).run_dir == tmp_path / "runs" / "a"


def sized(nproc: int | None, spares: int, min_ranks: int) -> RunOptions:
    return replace(parse([SCRIPT]), nproc=nproc, spares=spares, min_ranks=min_ranks)


@pytest.mark.parametrize(
    ("nproc", "spares", "min_ranks", "names", "remedy"),
    [
        (None, 4, 1, ["--spares 4", "srun has started 4"], "park fewer"),
        (None, 9, 1, ["--spares 9", "srun has started 4"], "park fewer"),
        (4, 1, 1, ["--nproc 4", "--spares 1", "5 ranks", "srun has started 4"], "--nproc"),
        (2, 1, 1, ["--nproc 2", "--spares 1", "3 ranks", "srun has started 4"], "srun"),
        (None, 1, 4, ["--min-ranks 4", "3 ranks"], "--min-ranks"),
        (3, 1, 4, ["--min-ranks 4", "3 ranks"], "--min-ranks"),
    ],
)
def test_sizes_that_do_not_fit_are_named_and_remedied(
    nproc: int | None, spares: int, min_ranks: int, names: list[str], remedy: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check_sizes(sized(nproc, spares, min_ranks), 4, "srun")
    for name in names:
        assert name in caught.value.message
    assert remedy in caught.value.remedy


@given(st.integers(1, 9), st.none() | st.integers(1, 9), st.integers(0, 9), st.integers(1, 9))
def test_sizes_are_accepted_exactly_if_they_fit(
    tasks: int, nproc: int | None, spares: int, min_ranks: int
) -> None:
    fits = tasks - spares >= min_ranks and nproc in (None, tasks - spares)
    try:
        sizes = check_sizes(sized(nproc, spares, min_ranks), tasks, "mpiexec")
    except UsageError:
        assert not fits
    else:
        assert fits
        assert sizes == Sizes(tasks - spares, tasks - spares, spares)


def test_a_range_of_ranks_is_a_least_and_a_most() -> None:
    options = parse(["--nproc", "2:8", "--spares", "1", SCRIPT])
    assert (options.nproc, options.most, options.min_ranks) == (2, 8, 2)
    assert check_sizes(options, 5, "srun") == Sizes(4, 8, 1)
    for tasks in (2, 10):
        with pytest.raises(UsageError, match="2"):
            check_sizes(options, tasks, "srun")


@pytest.mark.parametrize("text", ["0", "x", "3:2", "3:", ":3", "1:2:3", "-1"])
def test_what_is_no_number_of_ranks_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="makes no sense"):
        parse([f"--nproc={text}", SCRIPT])


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9), st.integers(1, 30))
def test_ranks_train_before_there_are_spares_and_spares_are_kept_before_more_train(
    initial: int, more: int, spares: int, ranks: int
) -> None:
    sizes = Sizes(initial, initial + more, spares)
    active = sizes.share(ranks)
    parked = ranks - active
    assert 1 <= active <= sizes.most
    assert parked >= 0
    if active < initial:
        assert parked == 0
    if active > initial:
        assert parked >= spares
    if active < sizes.most:
        assert parked <= spares


def test_what_is_preloaded_is_looked_for_where_the_script_would_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home / "package", elsewhere):
        folder.mkdir(parents=True)
    # Looking for modules runs nothing of them.
    for file in ("script.py", "mine.py", "package/__init__.py", "package/part.py"):
        (home / file).write_text("raise SystemExit(1)\n")
    (elsewhere / "theirs.py").write_text("raise SystemExit(1)\n")
    script = str(home / "script.py")

    def preload(modules: str, *target: str) -> tuple[str, ...]:
        return parse(["--preload", modules, *target]).preload

    assert preload("mine,package.part", script) == ("mine", "package.part")
    for missing in ("theirs", "mine.py", "mine.part", "", "mine,theirs", "mine;package"):
        with pytest.raises(UsageError, match=re.escape(f"to --preload in {home}")):
            preload(missing, script)
    # The folder of a module that is run is the one where that is said.
    monkeypatch.setattr(sys, "path", ["first", *sys.path])
    monkeypatch.chdir(elsewhere)
    assert preload("theirs", "-m", "json.tool") == ("theirs",)
    with pytest.raises(UsageError, match=re.escape(f"'mine' to --preload in {elsewhere}")):
        preload("mine", "-m", "json.tool")
    monkeypatch.setattr(sys, "path", ["first", str(elsewhere)])
    assert preload("theirs", script) == ("theirs",)


@pytest.mark.parametrize(
    ("given", "cause", "remedy"),
    [
        (["--replace-stragglers"], "nobody to replace them with", "--spares"),
        (
            ["--replace-stragglers", "--spares", "1", "--on-failure", "shrink"],
            "may take a rank's place",
            "substitute",
        ),
        (["--replace-stragglers", "--spares", "1", "--backup", "1"], "--mode backup", "leave one"),
        (["--balance", "--mode", "backup"], "--mode backup", "leave one"),
    ],
)
def test_what_is_against_stragglers_needs_what_it_needs(
    given: list[str], cause: str, remedy: str
) -> None:
    with pytest.raises(UsageError) as caught:
        parse([*given, SCRIPT])
    assert cause in caught.value.message
    assert remedy in caught.value.remedy
    options = parse(["--replace-stragglers", "--spares", "1", "--balance", SCRIPT])
    assert (options.replace_stragglers, options.balance) == (True, True)
