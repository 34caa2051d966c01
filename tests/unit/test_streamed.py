"""Tables read as they arrive: every row once an epoch, the same order for any number of processes, an exact resume."""

from __future__ import annotations

import threading
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.errors import DataError, UsageError
from cmtool.io import streamed
from cmtool.io.shards import encode
from cmtool.io.streamed import Mark, open_stream
from cmtool.io.tables import Row

datasets = pytest.importorskip("datasets")


def picture(number: int, side: int = 4) -> bytes:
    """An image whose every value is its number."""
    return encode(np.full((3, side, side), number, np.uint8))


def write(folder, cells, parts=1, names=("even", "odd")):
    """Parquet files, one a part."""
    folder.mkdir(exist_ok=True)
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    rows = {
        "image": [{"bytes": cell, "path": None} for cell in cells],
        "label": [number % 2 for number in range(len(cells))],
    }
    table = datasets.Dataset.from_dict(rows, features)
    for part in range(parts):
        table.shard(parts, part, contiguous=True).to_parquet(folder / f"{part}.parquet")
    return str(folder)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Seventeen pictures in three parts; blocks of five."""
    monkeypatch.setattr(streamed, "ROWS", 5)
    return write(tmp_path / "t", [picture(number) for number in range(17)], parts=3)


def numbers(data, first, count, size=3):
    """Which pictures come, in batches."""
    batches = torch.arange(first, first + count).split(size)
    made = list(data.stream(iter(batches)))
    for images, labels in made:
        assert images.dtype == torch.uint8
        assert labels.tolist() == (images[:, 0, 0, 0] % 2).tolist()
    assert [len(images) for images, _ in made] == [len(batch) for batch in batches]
    return torch.cat([images[:, 0, 0, 0] for images, _ in made]).tolist()


def test_every_row_comes_once_an_epoch(table):
    data = open_stream(table, seed=1)
    assert (data.class_names, data.highest_label, data.report.resolution) == (("even", "odd"), 1, 4)
    found = numbers(data, 0, 3 * 17)
    epochs = [found[k : k + 17] for k in (0, 17, 34)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


def test_parts_change_places(table):
    first = {numbers(open_stream(table, seed=seed), 0, 5)[0] // 6 for seed in range(12)}
    assert first == {0, 1, 2}


def test_the_order_is_that_of_the_seed(table):
    assert numbers(open_stream(table, seed=1), 0, 40) == numbers(open_stream(table, seed=1), 0, 40, size=7)
    assert numbers(open_stream(table, seed=1), 0, 40) != numbers(open_stream(table, seed=2), 0, 40)


def test_a_share_of_each_batch(table):
    """What another process computes with is passed over, not lost."""
    whole = numbers(open_stream(table), 0, 40)
    own = list(open_stream(table).stream(torch.arange(k + 1, k + 3) for k in range(0, 40, 4)))
    found = torch.cat([images[:, 0, 0, 0] for images, _ in own]).tolist()
    assert found == [whole[k] for k in range(40) if k % 4 in (1, 2)]
    (images, labels), *_ = open_stream(table).stream([torch.empty(0, dtype=torch.int64)])
    assert (images.shape, labels.shape) == ((0, 3, 4, 4), (0,))


@pytest.mark.parametrize("position", [0, 1, 5, 12, 16, 17, 18, 33, 34, 41])
def test_it_goes_on_where_it_was(table, position):
    whole = numbers(open_stream(table, seed=3), 0, 60)
    data = open_stream(table, seed=3)
    stream = data.stream(torch.tensor([k]) for k in range(60))
    before = [int(images[0, 0, 0, 0]) for images, _ in islice(stream, position)]
    state = data.state_dict(position)
    stream.close()
    later = open_stream(table, seed=3)
    later.load_state_dict(state)
    assert before + numbers(later, position, 60 - position) == whole
    # No more than a block is read twice.
    assert position - 5 <= Mark(*state["mark"]).position <= position


def test_a_batch_by_its_positions(table):
    data = open_stream(table)
    whole = numbers(data, 0, 40)
    assert data.batch(torch.tensor([2, 30]))[0][:, 0, 0, 0].tolist() == [whole[2], whole[30]]
    data.load_state_dict({"mark": [17, 1, 0, 0]})
    assert data.batch(torch.tensor([2, 30]))[0][:, 0, 0, 0].tolist() == [whole[2], whole[30]]
    assert data.batch(torch.tensor([19]))[0][:, 0, 0, 0].tolist() == [whole[19]]
    head = data.head(3)
    assert head.images[:, 0, 0, 0].tolist() == whole[:3]
    assert len(data.head(100)) == 5  # a block
    assert head.batch(torch.tensor([1]))[1].tolist() == [whole[1] % 2]


def test_large_rows_make_small_blocks(table, monkeypatch):
    monkeypatch.setattr(streamed, "BYTES", 1)
    assert numbers(open_stream(table), 0, 40) == numbers(open_stream(table), 0, 40, size=5)
    assert len(open_stream(table).head(9)) == 1


def test_rows_that_are_no_images_leave_their_place_to_others(tmp_path):
    cells = [picture(k) if k % 4 else b"no picture" for k in range(12)]
    data = open_stream(write(tmp_path / "t", cells), seed=0)
    found = numbers(data, 0, 24)
    assert set(found) == {k for k in range(12) if k % 4}
    assert data.dropped.total() == 6  # three in each epoch
    assert data.first_bad.startswith("row ")


def test_they_become_what_is_asked_for(tmp_path):
    write(tmp_path / "t", [picture(9, side=8), picture(9, side=6)], names=())
    with pytest.raises(DataError, match="without saying how many"):
        open_stream(str(tmp_path / "t"))
    write(tmp_path / "t", [picture(9, side=8), picture(9, side=6)])
    data = open_stream(str(tmp_path / "t"), resolution=4, channels=1)
    assert data.batch(torch.arange(2))[0].shape == (2, 1, 4, 4)
    assert data.report.summary() == "images as they arrive, 4x4 grey; 2 classes"
    for asked, words in (({}, "another size for 8x8: 6x6"), ({"resolution": 8}, "too small for 8x8: 6x6")):
        with pytest.raises(DataError, match=words):
            open_stream(str(tmp_path / "t"), **asked).batch(torch.arange(2))
    with pytest.raises(UsageError, match="--crop"):
        open_stream(str(tmp_path / "t"), crop="middle")


def test_without_labels(tmp_path):
    kind = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": picture(1), "path": None}]}, kind)
    rows.to_parquet(tmp_path / "t.parquet")
    data = open_stream(str(tmp_path / "t.parquet"))
    assert (data.highest_label, data.batch(torch.arange(3))[1]) == (None, None)


def test_nothing_to_stream(tmp_path):
    with pytest.raises(DataError, match=r"no image in .* can be read, row"):
        open_stream(write(tmp_path / "bad", [b"nothing"] * 3))
    data = open_stream(write(tmp_path / "worse", [b"nothing"] * 3), resolution=4)
    with pytest.raises(DataError, match=r"no image of .* can be read: row"):
        data.batch(torch.arange(1))
    with pytest.raises(DataError, match="holds no rows"):
        open_stream(write(tmp_path / "none", []), resolution=4).batch(torch.arange(1))
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    with pytest.raises(DataError, match="only tables are streamed"):
        open_stream(str(tmp_path / "one.png"))


def test_a_connection_that_hangs_is_told(table, monkeypatch):
    monkeypatch.setattr(streamed, "PATIENCE", 0.5)
    data, over = open_stream(table), threading.Event()

    def hang(number, first=0):
        yield Row("row 0", picture(1), 1)
        over.wait(30)

    monkeypatch.setattr(data.table, "shard", hang)
    with pytest.raises(DataError, match="no row has come"):
        next(data.stream([torch.arange(1)]))
    over.set()


def test_a_pause_of_the_one_who_asks_is_no_hang(table, monkeypatch):
    monkeypatch.setattr(streamed, "PATIENCE", 1.2)
    data, slow = open_stream(table), threading.Event()
    stream = data.stream(torch.tensor([k]) for k in range(40))
    next(stream)
    slow.wait(1.5)
    assert len(list(stream)) == 39


def test_the_fingerprint_tells_tables_apart(tmp_path, table):
    before = open_stream(table).fingerprint
    assert open_stream(table).fingerprint == before
    write(tmp_path / "t", [picture(1)], names=("a", "b", "c"))
    assert open_stream(table).fingerprint != before
