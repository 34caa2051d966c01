"""Commands in several processes, as torchrun starts them: one result, one voice, and nobody waits for the dead."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cmtool.io.pairs import read_pairs
from cmtool.io.shards import encode
from tests import team
from tests.models import Pictures

TRAIN = [
    *("train", "--data", "digits:test", "--preset", "ect", "--network", "tiny", "--batch", "10", "--seed", "3"),
    *("--iterations", "4", "--log-every", "1", "--save-every", "2", "--precision", "fp32"),
]


def steps(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def good(ended: list[team.Ended], code: int = 0) -> None:
    assert [one.code for one in ended] == [code] * len(ended), ended
    assert not any(one.out or one.err for one in ended[1:]), ended


def equal(run: Path, reference: Path) -> None:
    assert [line["step"] for line in steps(run)] == [line["step"] for line in steps(reference)]
    for mine, other in zip(steps(run), steps(reference), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(folder):
    good([team.alone(*TRAIN, "--sample-every", "0", "--out", folder / "alone")])
    return folder / "alone"


@pytest.fixture(scope="module")
def spread(folder):
    """A run of two processes with a part of the weights each, stopped at its third step."""
    ended = team.cmtool(2, *TRAIN, "--sample-every", "2", "--shard", "--stop-after", 3, "--out", folder / "spread")
    good(ended, 75)
    assert "in 2 processes, each with a part of the weights" in ended[0].err
    assert "stopped at step 3 of 4" in ended[0].err
    return folder / "spread"


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / run.name))


def test_a_run_in_parts_goes_on_whole_in_one_process(alone, spread, tmp_path):
    assert sorted(file.name for file in (spread / "checkpoints").iterdir()) == ["step_0000002.dcp", "step_0000003.dcp"]
    assert (spread / "samples" / "0000002.png").is_file()
    run = copied(spread, tmp_path)
    good([team.alone("train", "--resume", run)])
    equal(run, alone)
    assert sorted(file.name for file in (run / "checkpoints").iterdir()) == ["step_0000003.dcp", "step_0000004.pt"]


def test_a_damaged_part_is_noticed(alone, spread, tmp_path):
    run = copied(spread, tmp_path)
    part = next((run / "checkpoints" / "step_0000003.dcp").glob("__1_*.distcp"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    ended = [team.alone("train", "--resume", run)]
    good(ended)
    assert "step_0000003.dcp is damaged and put aside: continuing from step 2" in ended[0].err
    assert (run / "checkpoints" / "step_0000003.damaged").is_dir()
    equal(run, alone)


@pytest.fixture(scope="module")
def begun(folder):
    """A run of one process, stopped at its first step."""
    good([team.alone(*TRAIN, "--sample-every", "0", "--stop-after", 1, "--out", folder / "begun")], 75)
    return folder / "begun"


def test_a_run_of_one_process_goes_on_in_two(alone, begun, tmp_path):
    run = copied(begun, tmp_path)
    good(team.cmtool(2, "train", "--resume", run, "--shard"))
    equal(run, alone)


def test_a_stream_has_one_order_for_any_number_of_processes(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [image.numpy() for image in Pictures(classes=0).images]
    kinds = datasets.Features({"image": datasets.Image()})
    rows = {"image": [{"bytes": encode(image), "path": None} for image in images]}
    datasets.Dataset.from_dict(rows, kinds).to_parquet(tmp_path / "t.parquet")
    ask = [*TRAIN[:2], tmp_path / "t.parquet", *TRAIN[3:], "--stream", "--sample-every", "0"]
    good([team.alone(*ask, "--out", tmp_path / "alone")])
    good(team.cmtool(2, *ask, "--shard", "--stop-after", 3, "--out", tmp_path / "two"), 75)  # in the second epoch
    good([team.alone("train", "--resume", tmp_path / "two")])
    equal(tmp_path / "two", tmp_path / "alone")


def test_samples_are_those_of_one_process(alone, tmp_path):
    args = ["sample", "--model", alone, "--seeds", "0-4"]
    one = [team.alone(*args, "--out", tmp_path / "one", "--grid", tmp_path / "one.png")]
    two = team.cmtool(2, *args, "--out", tmp_path / "two", "--grid", tmp_path / "two.png")
    good(one)
    good(two)
    assert two[0].out == one[0].out.replace("/one", "/two")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(files) == 5
    assert files == sorted(file.name for file in (tmp_path / "two").iterdir())
    for name in ("one.png", *(f"one/{name}" for name in files)):
        # The pictures are equal where no pixel lies between two values; one more image in a batch may round otherwise.
        assert close(tmp_path / name, tmp_path / name.replace("one", "two"))


def test_pairs_are_those_of_one_process(alone, tmp_path):
    """Here in rounds of three images a process: 3, 3, then 1 and 0."""
    args = ["pairs", "--model", alone, "--seeds", "3-9", "--labels", "2,0"]
    program = "import sys; from cmtool.cli import app, pairs; pairs._TOLD = 3 * 3 * 16 * 16; sys.exit(app.main())"
    good([team.alone(*args, "--out", tmp_path / "one.npz")])
    good(team.finish(team.start(2, ["-c", program, *map(str, args), "--out", str(tmp_path / "two.npz")])))
    one, two = (read_pairs(str(tmp_path / f"{name}.npz")) for name in ("one", "two"))
    assert two.seeds.tolist() == one.seeds.tolist() == list(range(3, 10))
    assert two.labels.tolist() == one.labels.tolist()
    assert two.about == one.about
    np.testing.assert_allclose(two.images.astype(float), one.images.astype(float), atol=2e-3)


def close(one: Path, other: Path) -> bool:
    from PIL import Image

    first, second = (np.asarray(Image.open(file)).astype(int) for file in (one, other))
    return first.shape == second.shape and np.abs(first - second).max() <= 1


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([*TRAIN, "--data", "nowhere", "--out", "run"], 1, "expected image data in 'nowhere'"),
        ([*TRAIN, "--batch", "1", "--out", "run"], 2, "a batch of 1 does not share out to 2 processes"),
        (["inpaint", "x.png"], 2, "cmtool inpaint works in one process"),
    ],
)
def test_what_is_wrong_is_said_once(tmp_path, args, code, message):
    ended = team.cmtool(2, *args, cwd=tmp_path)
    assert [one.code for one in ended] == [code, code]
    said = "".join(one.err for one in ended)
    assert said.count(message) == 1, said
    assert [line[:6] for line in said.splitlines() if not line.startswith("data:")] == ["error:", "hint: "], said
    assert not list(tmp_path.iterdir())


def test_a_process_that_dies_ends_the_others(tmp_path):
    started = team.start(2, ["-m", "cmtool", *TRAIN, "--iterations", "9999", "--out", str(tmp_path / "run")])
    wait_for(tmp_path / "run" / "checkpoints", started)
    started[1].send_signal(signal.SIGKILL)
    ended = team.finish(started)
    assert [one.code for one in ended] == [1, -signal.SIGKILL]
    assert "error: another process of this command has ended" in ended[0].err
    assert "internal error" not in ended[0].err
    good([team.alone("train", "--resume", tmp_path / "run", "--stop-after", 1)], 75)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_stands_still_ends_the_others(stopped, tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_PATIENCE", "6")
    started = team.start(2, ["-m", "cmtool", *TRAIN, "--iterations", "9999", "--out", str(tmp_path / "run")])
    wait_for(tmp_path / "run" / "checkpoints", started)
    started[stopped].send_signal(signal.SIGSTOP)
    other = started[1 - stopped]
    err = other.communicate(timeout=60)[1]
    started[stopped].kill()
    team.finish(started)
    assert other.returncode == 1
    assert f"error: process {stopped} of 2 has given no sign of life for 6 s\nhint: " in err


def test_a_patience_that_is_no_number_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_PATIENCE", "soon")
    ended = team.cmtool(2, *TRAIN, "--out", tmp_path / "run")
    assert [one.code for one in ended] == [2, 2]
    assert [one.err.count("error: CMTOOL_PATIENCE is 'soon': expected a number of seconds") for one in ended] == [1, 0]
    command = [sys.executable, "-m", "cmtool", *TRAIN, "--out", str(tmp_path / "run")]  # before anybody is waited for
    first = subprocess.run(command, env=team.environment(0, 2, team.free_port()), timeout=60, check=False)
    assert first.returncode == 2


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    started = team.start(2, ["-m", "cmtool", *TRAIN, "--iterations", "9999", "--out", str(tmp_path / "run")])
    wait_for(tmp_path / "run" / "metrics.jsonl", started)
    started[1].send_signal(signal.SIGUSR1)
    ended = team.finish(started)
    good(ended, 75)
    step = steps(tmp_path / "run")[-1]["step"]
    assert f"stopped at step {step:,} of 9,999" in ended[0].err
    assert (tmp_path / "run" / "checkpoints" / f"step_{step:07d}.pt").is_file()


def test_processes_that_do_not_do_the_same_are_told(tmp_path):
    port = team.free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "cmtool", *TRAIN, "--lr", rate, "--out", str(tmp_path / "run")],
            env=team.environment(rank, 2, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, rate in enumerate(("1e-3", "1e-4"))
    ]
    ended = team.finish(started)
    assert [one.code for one in ended] == [2, 2]
    said = "".join(one.err for one in ended)
    assert said.count("the processes were started with different options, versions or data") == 1
    assert not (tmp_path / "run").exists()


def wait_for(file: Path, started: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + 90
    while not (file.is_file() or (file.is_dir() and any(file.glob("step_*")))):
        if time.monotonic() > end or any(one.poll() is not None for one in started):
            pytest.fail(str(team.finish(started, timeout=1)))
        time.sleep(0.1)


# Two hosts: each in a network of its own, with one cable between them.


def namespaces() -> bool:
    if sys.platform != "linux" or os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        return False
    return subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode == 0


@pytest.fixture
def hosts():
    """Two processes that hold a network each; `nsenter` puts others beside them."""
    holders = [subprocess.Popen(["unshare", "-n", "sleep", "300"]) for _ in range(2)]
    time.sleep(0.5)
    try:
        first, second = (str(one.pid) for one in holders)
        cable = ["ip", "link", "add", "left", "netns", first, "type", "veth", "peer", "name", "right", "netns", second]
        subprocess.run(cable, check=True, capture_output=True)
        for pid, name, number in ((first, "left", 1), (second, "right", 2)):
            setup = f"ip addr add 10.77.0.{number}/24 dev {name}; ip link set {name} up; ip link set lo up"
            subprocess.run(["nsenter", "-t", pid, "-n", "sh", "-c", setup], check=True, capture_output=True)
        yield holders
    finally:
        for one in holders:
            one.kill()
            one.wait()


@pytest.fixture
def two_hosts(hosts, tmp_path):
    """A training on both, at work; patient for six seconds."""
    started = [
        subprocess.Popen(
            [
                *("nsenter", "-t", str(host.pid), "-n", sys.executable, "-m", "cmtool"),
                *(*TRAIN, "--iterations", "9999", "--out", str(tmp_path / "run")),
            ],
            env=team.environment(
                *(rank, 2, 29511),
                **{"MASTER_ADDR": "10.77.0.1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "CMTOOL_PATIENCE": "6"},
                GLOO_SOCKET_IFNAME=name,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (host, name) in enumerate(zip(hosts, ("left", "right"), strict=True))
    ]
    wait_for(tmp_path / "run" / "checkpoints", started)
    return started


@pytest.mark.skipif(not namespaces(), reason="networks of one's own need root on Linux")
def test_a_host_that_dies_ends_the_other(two_hosts, tmp_path):
    two_hosts[1].kill()
    ended = team.finish(two_hosts)
    assert ended[0].code == 1
    assert "error: another process of this command has ended" in ended[0].err
    assert "--resume continues from the last checkpoint" in ended[0].err
    good([team.alone("train", "--resume", tmp_path / "run", "--stop-after", 1)], 75)


@pytest.mark.skipif(not namespaces(), reason="networks of one's own need root on Linux")
def test_a_cable_that_is_cut_ends_both(hosts, two_hosts, tmp_path):
    cut = ["nsenter", "-t", str(hosts[0].pid), "-n", "ip", "link", "set", "left", "down"]
    subprocess.run(cut, check=True, capture_output=True)
    ended = team.finish(two_hosts, timeout=30)
    for one, other in zip(ended, (1, 0), strict=True):
        assert one.code == 1
        assert f"error: process {other} of 2 has given no sign of life for 6 s\n" in one.err
        assert "the network between may be down; --resume continues from the last checkpoint" in one.err
        assert "Traceback" not in one.err
    good([team.alone("train", "--resume", tmp_path / "run", "--stop-after", 1)], 75)
