"""Data that stays on disk: shards, ours and others', tables, and batches made ready ahead."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmtool.errors import DataError, UsageError
from cmtool.io import shards, sources, stored
from cmtool.io.data import inspect_data, open_data, pack
from cmtool.io.stored import StoredDataset
from cmtool.training.trainer import Order
from tests.unit import test_trainer
from tests.unit.test_data import as_folder, encode, entries, noise


def pictures(count, side=8):
    return noise(count, side, side)


def mixed(root):
    """Two classes, two sizes, a grey and a broken image."""
    files = {f"cat/{k}.png": encode(image) for k, image in enumerate(pictures(5))}
    files |= {f"dog/{k}.jpg": encode(image, "JPEG", quality=95) for k, image in enumerate(noise(4, 12, 20))}
    files["dog/7.png"] = encode(Image.fromarray(pictures(1)[0]).convert("L"))
    files["dog/9.png"] = b"hello"
    return as_folder(root / "mixed", files)


def tar(path, members):
    with tarfile.open(path, "w") as made:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return path


class TestPacked:
    @pytest.mark.parametrize("shard_images", [1, 3, 100])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_are_the_images_in_memory(self, tmp_path, shard_images, channels):
        source = mixed(tmp_path)
        options = {"resolution": 8, "resize": "bicubic", "channels": channels}
        report = pack(source, tmp_path / "packed", shard_images=shard_images, **options)
        memory = open_data(source, **options)
        found = open_data(tmp_path / "packed", channels=channels, workers=0)
        assert isinstance(found, StoredDataset)
        images, labels = found.batch(torch.arange(10))
        assert torch.equal(images, memory.images)
        assert torch.equal(labels, memory.labels)
        assert found.class_names == memory.class_names == ("cat", "dog")
        assert found.fingerprint == memory.fingerprint
        assert report == memory.report
        assert found.report.summary() == f"10 images, 8x8 {'grey' if channels == 1 else 'RGB'}; 2 classes"
        assert len(list((tmp_path / "packed").glob("*.tar"))) == -(-10 // shard_images)

    def test_other_tools_can_read_them(self, tmp_path):
        pack(mixed(tmp_path), tmp_path / "packed", resolution=8)
        with tarfile.open(tmp_path / "packed" / "00000.tar") as found:
            names = found.getnames()
            assert names[:2] == ["0000000000.png", "0000000000.cls"]
            assert len(names) == 20
            assert found.extractfile(names[1]).read() == b"0"
            assert Image.open(found.extractfile(names[0])).size == (8, 8)

    def test_are_shards_to_everybody(self, tmp_path):
        """Without its manifest a packed folder is a folder of tar files, with the same images."""
        pack(mixed(tmp_path), tmp_path / "packed", resolution=8, shard_images=4)
        ours = open_data(tmp_path / "packed")
        (tmp_path / "packed" / "manifest.json").unlink()
        theirs = open_data(tmp_path / "packed")
        assert torch.equal(ours.pictures, theirs.pictures)
        assert torch.equal(ours.labels, theirs.labels)
        assert theirs.class_names == ("0", "1")

    def test_can_be_made_smaller_on_the_way(self, tmp_path):
        np.save(tmp_path / "in.npy", pictures(6, 16))
        pack(tmp_path / "in.npy", tmp_path / "packed")
        assert torch.equal(
            open_data(tmp_path / "packed", resolution=4).pictures, open_data(tmp_path / "in.npy", resolution=4).images
        )
        with pytest.raises(DataError, match="images of at least 32x32"):
            open_data(tmp_path / "packed", resolution=32)
        small = open_data(tmp_path / "packed", resolution=4)
        assert small.report.resized == 6
        assert small.fingerprint != open_data(tmp_path / "packed").fingerprint

    def test_can_be_packed_again(self, tmp_path):
        np.save(tmp_path / "in.npy", pictures(6))
        pack(tmp_path / "in.npy", tmp_path / "packed")
        pack(tmp_path / "packed", tmp_path / "again", shard_images=2)
        assert open_data(tmp_path / "again").fingerprint == open_data(tmp_path / "packed").fingerprint

    def test_the_source_has_a_checksum_whatever_is_made_of_it(self, tmp_path):
        source = mixed(tmp_path)
        found = []
        for name, side in (("six", 6), ("four", 4), ("changed", 6)):
            if name == "changed":
                (source / "cat" / "0.png").write_bytes(encode(pictures(6)[5]))
            pack(source, tmp_path / name, resolution=side)
            found.append(json.loads((tmp_path / name / "manifest.json").read_text())["source_sha256"])
        assert found[0] == found[1] != found[2]
        assert len(found[0]) == 64

    def test_the_manifest_says_what_was_done(self, tmp_path):
        pack(mixed(tmp_path), tmp_path / "packed", resolution=6, crop="center", resize="lanczos")
        manifest = json.loads((tmp_path / "packed" / "manifest.json").read_text())
        assert (manifest["crop"], manifest["resize"], manifest["resolution"]) == ("center", "lanczos", 6)
        assert manifest["report"]["dropped"] == {"not an image in a known format": 1}
        assert manifest["source"].endswith("mixed")
        assert manifest["count"] == sum(shard["count"] for shard in manifest["shards"]) == 10

    def test_an_inspection_reads_them(self, tmp_path):
        np.save(tmp_path / "in.npy", pictures(6))
        pack(tmp_path / "in.npy", tmp_path / "packed")
        found = inspect_data(tmp_path / "packed")
        assert (found.kind, found.count, found.resolution, found.sizes) == ("shards", 6, 8, {"8x8": 6})

    @pytest.mark.parametrize(
        ("options", "words"),
        [({}, "images of one square size"), ({"resolution": 16}, "at least 16x16"), ({"crop": "none"}, "square")],
    )
    def test_nothing_is_left_of_what_does_not_fit(self, tmp_path, options, words):
        with pytest.raises(DataError, match=words):
            pack(mixed(tmp_path), tmp_path / "packed", **options)
        assert [entry.name for entry in tmp_path.iterdir()] == ["mixed"]

    def test_nothing_is_overwritten(self, tmp_path):
        (tmp_path / "packed").mkdir()
        (tmp_path / "packed" / "mine").touch()
        with pytest.raises(UsageError, match="is there already"):
            pack(mixed(tmp_path), tmp_path / "packed", resolution=8)
        assert [entry.name for entry in (tmp_path / "packed").iterdir()] == ["mine"]

    def test_pairs_stay_pairs(self, tmp_path):
        np.savez(tmp_path / "p.npz", **entries())
        with pytest.raises(DataError, match="holds pairs"):
            pack(tmp_path / "p.npz", tmp_path / "packed")


class TestDamage:
    @pytest.fixture
    def packed(self, tmp_path):
        np.save(tmp_path / "in.npy", pictures(6))
        pack(tmp_path / "in.npy", tmp_path / "packed", shard_images=4)
        return tmp_path / "packed"

    def test_a_changed_byte_is_noticed_when_it_is_read(self, packed):
        entry = np.load(packed / "index.npy")[5]
        file = packed / "00001.tar"
        data = bytearray(file.read_bytes())
        data[int(entry["offset"]) + int(entry["size"]) // 2] ^= 1
        file.write_bytes(data)
        found = open_data(packed)
        found.batch(torch.tensor([0, 4]))
        with pytest.raises(DataError, match=r"00001.tar, image 5 cannot be used any more: damaged"):
            found.batch(torch.tensor([0, 5]))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_it_is_told_from_wherever_it_is_read(self, packed, workers):
        found = open_data(packed, workers=workers)
        found.reader.source.open.__self__.index = np.array(found.reader.source.open.__self__.index)
        found.reader.source.open.__self__.index["crc"][3] += 1
        with pytest.raises(DataError, match="image 3 cannot be used any more: damaged"):
            list(found.stream([torch.tensor([0, 1]), torch.tensor([2, 3])]))

    @pytest.mark.parametrize("name", ["00000.tar", "index.npy", "manifest.json"])
    @pytest.mark.parametrize("how", ["cut", "gone", "empty"])
    def test_what_is_missing_is_noticed_at_once(self, packed, name, how):
        file = packed / name
        content = file.read_bytes()
        file.unlink()
        if how != "gone":
            file.write_bytes(content[: len(content) // 2 if how == "cut" else 0])
        if how == "gone" and name != "00000.tar":
            assert torch.equal(open_data(packed).pictures, open_data(packed.parent / "in.npy").images)  # others' shards
            return
        with pytest.raises(DataError, match=r"damaged|is missing|bytes instead of|do not fit together"):
            open_data(packed)

    def test_an_index_that_is_cut_off_meanwhile(self, packed):
        """Its entries are read when they are needed, so that a million of them take no memory."""
        found = open_data(packed)
        with (packed / "index.npy").open("r+b") as file:
            file.truncate((packed / "index.npy").stat().st_size - 1)
        found.batch(torch.tensor([4]))
        with pytest.raises(DataError, match="image 5 cannot be used any more: its index is cut off"):
            found.batch(torch.tensor([5]))

    def test_the_index_is_that_of_numpy(self, packed):
        index, expected = shards.Index(packed / "index.npy"), np.load(packed / "index.npy")
        assert len(index) == 6
        assert np.array_equal(np.concatenate(list(index.pieces())), expected)
        assert [index[number] for number in range(6)] == list(expected)
        for number in (-1, 6):
            with pytest.raises(IndexError):
                index[number]

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_any_manifest_is_an_error_or_right(self, data, tmp_path_factory):
        root = tmp_path_factory.mktemp("fuzz")
        np.save(root / "in.npy", pictures(3))
        pack(root / "in.npy", root / "packed")
        manifest = json.loads((root / "packed" / "manifest.json").read_text())
        key = data.draw(st.sampled_from(sorted(manifest)))
        manifest[key] = data.draw(
            st.one_of(st.none(), st.integers(-2, 9), st.text(max_size=3), st.lists(st.integers(0, 3), max_size=2))
        )
        (root / "packed" / "manifest.json").write_text(json.dumps(manifest))
        try:
            found = open_data(root / "packed", workers=0)
            found.batch(torch.arange(len(found)))
        except (DataError, UsageError):
            pass


class TestOthersShards:
    def test_labels_from_cls_and_json(self, tmp_path):
        images = pictures(4)
        one = {"a/1.png": encode(images[0]), "a/1.cls": b"2\n", "a/2.txt": b"x", "a/2.png": encode(images[1])}
        one["a/2.json"] = json.dumps({"label": 0, "caption": "a cat"}).encode()
        two = {"b.seg.png": encode(images[2]), "b.cls": b"1", "c.cls": b"1", "c.png": encode(images[3])}
        tar(tmp_path / "set-000.tar", one)
        tar(tmp_path / "set-001.tar", two)
        found = open_data(f"{tmp_path}/set-{{000..001}}.tar")
        assert torch.equal(found.pictures, torch.from_numpy(images).permute(0, 3, 1, 2))
        assert found.labels.tolist() == [2, 0, 1, 1]
        assert found.class_names == ("0", "1", "2")
        assert found.report.ignored == 1
        assert found.reader.source.names[2] == "set-001.tar, image 2"

    def test_images_of_many_sizes_are_fitted_when_they_are_read(self, tmp_path):
        files = {f"{k}.png": encode(image) for k, image in enumerate([*pictures(2), *noise(3, 12, 20)])}
        tar(tmp_path / "set.tar", files)
        as_folder(tmp_path / "folder", files)
        memory = open_data(tmp_path / "folder", resolution=8)
        found = open_data(tmp_path / "set.tar", resolution=8)
        assert torch.equal(found.pictures, memory.images)
        expected = dataclasses.asdict(memory.report) | {"source": str(tmp_path / "set.tar")}
        assert dataclasses.asdict(found.report) == expected

    def test_broken_ones_are_dropped_and_counted(self, tmp_path):
        image = pictures(1)[0]
        tar(tmp_path / "set.tar", {"1.png": encode(image), "2.png": b"hello", "3.png": b"", "4.png": encode(image)})
        found = open_data(tmp_path / "set.tar")
        assert len(found) == 2
        assert found.report.dropped == {"not an image in a known format": 1, "an empty file": 1}
        assert torch.equal(found.batch(torch.tensor([1]))[0], found.batch(torch.tensor([0]))[0])

    @pytest.mark.parametrize(
        ("members", "words"),
        [
            ({"1.txt": b"x"}, "expected images .* found 1 other files"),
            ({"1.png": b"P", "1.cls": b"0", "2.png": b"P"}, "1 of 2 images .* have a label"),
            ({"1.png": b"P", "1.cls": b"zero"}, "is no whole number"),
            ({"1.png": b"P", "1.cls": b"-1"}, "is -1"),
            ({"1.png": b"P", "1.json": b"[1]"}, "is no whole number"),
            ({"1.png": b"P", "1.cls": b"99999999"}, "labels from"),
        ],
    )
    def test_refused(self, tmp_path, members, words):
        members = {name: encode(pictures(1)[0]) if data == b"P" else data for name, data in members.items()}
        with pytest.raises(DataError, match=words):
            open_data(tar(tmp_path / "set.tar", members))

    @pytest.mark.parametrize("content", [b"", b"no tar at all", b"\0" * 5000])
    def test_what_is_no_tar(self, tmp_path, content):
        (tmp_path / "set.tar").write_bytes(content)
        with pytest.raises(DataError):
            open_data(tmp_path / "set.tar")

    def test_a_compressed_one(self, tmp_path):
        (tmp_path / "set.tar.gz").write_bytes(b"\x1f\x8b" + bytes(100))
        with pytest.raises(DataError) as caught:
            open_data(tmp_path / "set.tar.gz")
        assert "unpack it first" in caught.value.hint

    def test_one_that_is_missing(self, tmp_path):
        tar(tmp_path / "set-0.tar", {"1.png": encode(pictures(1)[0])})
        with pytest.raises(DataError, match=r"cannot read .*set-1.tar"):
            open_data(f"{tmp_path}/set-{{0..1}}.tar")

    def test_the_same_name_is_another_data_set_after_a_change(self, tmp_path):
        tar(tmp_path / "set.tar", {"1.png": encode(pictures(1)[0])})
        before = open_data(tmp_path / "set.tar").fingerprint
        tar(tmp_path / "set.tar", {"1.png": encode(noise(1, 8, 8, 7)[0]), "2.png": encode(pictures(1)[0])})
        assert open_data(tmp_path / "set.tar").fingerprint != before


class TestTables:
    datasets = pytest.importorskip("datasets")

    @pytest.fixture
    def rows(self):
        images = pictures(5)
        features = self.datasets.Features(
            {
                "image": self.datasets.Image(),
                "label": self.datasets.ClassLabel(names=["cat", "dog"]),
                "n": self.number(),
            }
        )
        cells = [{"bytes": encode(image), "path": None} for image in images]
        table = self.datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 1, 0, 1], "n": range(5)}, features)
        return images, table

    def number(self):
        return self.datasets.Value("int64")

    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(self.datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    @pytest.mark.parametrize("form", ["parquet", "folder", "saved"])
    def test_rows_are_images(self, tmp_path, rows, form):
        images, table = rows
        if form == "parquet":
            table.to_parquet(tmp_path / "t.parquet")
            place = tmp_path / "t.parquet"
        elif form == "folder":
            (tmp_path / "t").mkdir()
            for part in range(2):
                table.shard(2, part, contiguous=True).to_parquet(tmp_path / "t" / f"{part}.parquet")
            place = tmp_path / "t"
        else:
            table.save_to_disk(tmp_path / "t")
            place = tmp_path / "t"
        found = open_data(place, workers=1)
        assert isinstance(found, StoredDataset)
        assert torch.equal(found.pictures, torch.from_numpy(images).permute(0, 3, 1, 2))
        assert found.labels.tolist() == [0, 1, 1, 0, 1]
        assert found.class_names == ("cat", "dog")
        (streamed, labels), *_ = found.stream([torch.tensor([4, 0])])
        assert torch.equal(streamed, found.pictures[[4, 0]])
        assert labels.tolist() == [1, 0]

    def test_they_can_be_packed(self, tmp_path, rows):
        rows[1].to_parquet(tmp_path / "t.parquet")
        pack(tmp_path / "t.parquet", tmp_path / "packed")
        assert torch.equal(open_data(tmp_path / "packed").pictures, open_data(tmp_path / "t.parquet").pictures)

    @pytest.mark.parametrize("form", ["parquet", "saved"])
    def test_a_stream_is_packed_as_it_comes(self, tmp_path, rows, form, monkeypatch):
        monkeypatch.setattr(sources, "_STREAMED", 2)
        rows[1].to_parquet(tmp_path / "t.parquet")
        rows[1].save_to_disk(tmp_path / "t")
        place = {"parquet": tmp_path / "t.parquet", "saved": tmp_path / "t"}[form]
        report = pack(place, tmp_path / "packed", stream=True, shard_images=2)
        pack(tmp_path / "t.parquet", tmp_path / "other")
        found, other = open_data(tmp_path / "packed"), open_data(tmp_path / "other")
        assert torch.equal(found.pictures, other.pictures)
        assert torch.equal(found.labels, other.labels)
        assert found.class_names == other.class_names == ("cat", "dog")
        assert found.fingerprint == other.fingerprint
        assert (report.used, report.classes) == (5, {"cat": 2, "dog": 3})
        if form == "parquet":
            assert not list((tmp_path / "cache").rglob("*.arrow.incomplete"))

    def test_a_stream_stores_nothing_but_the_shards(self, tmp_path, rows):
        rows[1].to_parquet(tmp_path / "t.parquet")
        pack(tmp_path / "t.parquet", tmp_path / "packed", stream=True)
        assert not list((tmp_path / "cache").rglob("*.arrow"))
        pack(tmp_path / "t.parquet", tmp_path / "other")
        assert list((tmp_path / "cache").rglob("*.arrow"))

    def test_streams_with_gaps(self, tmp_path, rows):
        """Rows that are no images are dropped and counted; numbers are classes by themselves."""
        cells = [encode(image) for image in rows[0]]
        cells[1], cells[3] = b"", b"no picture"
        self.datasets.Dataset.from_dict({"image": cells, "label": [3, 3, 1, 1, 0]}).to_parquet(tmp_path / "t.parquet")
        report = pack(tmp_path / "t.parquet", tmp_path / "packed", stream=True)
        assert (report.used, sum(report.dropped.values())) == (3, 2)
        found = open_data(tmp_path / "packed")
        assert found.labels.tolist() == [3, 1, 0]
        assert found.class_names == ("0", "1", "2", "3")
        assert torch.equal(found.pictures, torch.from_numpy(rows[0][[0, 2, 4]]).permute(0, 3, 1, 2))

    def test_streams_that_are_none(self, tmp_path, rows):
        (tmp_path / "folder").mkdir()
        with pytest.raises(DataError, match="only tables are streamed"):
            pack(tmp_path / "folder", tmp_path / "packed", stream=True)
        self.datasets.Dataset.from_dict({"image": [encode(rows[0][0])], "label": [-1]}).to_parquet(
            tmp_path / "t.parquet"
        )
        with pytest.raises(DataError, match="without a label"):
            pack(tmp_path / "t.parquet", tmp_path / "packed", stream=True)
        (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
        with pytest.raises(DataError, match="cannot read"):
            pack(tmp_path / "broken.parquet", tmp_path / "packed", stream=True)
        self.datasets.Dataset.from_dict({"image": [b"x"] * 3}).to_parquet(tmp_path / "bad.parquet")
        with pytest.raises(DataError, match="can be read: not an image"):
            pack(tmp_path / "bad.parquet", tmp_path / "packed", stream=True)
        assert not (tmp_path / "packed").exists()

    @pytest.mark.parametrize("label", [7, 2**31, 2**32])
    def test_a_label_that_is_no_class(self, tmp_path, rows, label):
        """The column says that there are two classes, and parquet believes it."""
        from pyarrow import array, parquet

        rows[1].to_parquet(tmp_path / "t.parquet")
        table = parquet.read_table(tmp_path / "t.parquet")
        place = table.column_names.index("label")
        table = table.set_column(place, table.schema.field("label"), array([0, 1, 1, 0, label]))
        parquet.write_table(table, tmp_path / "bad.parquet")
        for use in (open_data, inspect_data, lambda place: pack(place, tmp_path / "packed", stream=True)):
            with pytest.raises(DataError, match=f"has label {label} and 2 classes"):
                use(tmp_path / "bad.parquet")
        assert not (tmp_path / "packed").exists()

    def test_a_stream_without_end_of_classes(self, tmp_path, rows):
        table = {"image": [encode(rows[0][0])], "label": [2**32]}
        self.datasets.Dataset.from_dict(table).to_parquet(tmp_path / "t.parquet")
        with pytest.raises(DataError, match="has labels from 4294967296 to 4294967296"):
            pack(tmp_path / "t.parquet", tmp_path / "packed", stream=True)

    def test_a_table_without_images(self, tmp_path, rows):
        rows[1].remove_columns("image").to_parquet(tmp_path / "t.parquet")
        with pytest.raises(DataError, match="no column of images, only label, n"):
            open_data(tmp_path / "t.parquet")

    def test_a_broken_file(self, tmp_path):
        (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing")
        with pytest.raises(DataError, match="cannot read"):
            open_data(tmp_path / "t.parquet")


class Slow:
    """A source whose image 3 does what it is told to, instead of coming."""

    def __init__(self, found, act):
        self.found, self.act = found, act

    def __call__(self, number):
        if number == 3:
            self.act()
        return self.found(number)


class TestStreams:
    @pytest.fixture
    def packed(self, tmp_path):
        np.save(tmp_path / "in.npy", pictures(20))
        pack(tmp_path / "in.npy", tmp_path / "packed", shard_images=6)
        return tmp_path / "packed"

    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_bring_what_was_asked_for_in_order(self, packed, workers):
        found = open_data(packed, workers=workers)
        batches = [Order(20, 3).indices(7 * step, 7) for step in range(9)]
        made = list(found.stream(iter(batches)))
        assert len(made) == 9
        for indices, (images, labels) in zip(batches, made, strict=True):
            assert torch.equal(images, found.pictures[indices])
            assert labels is None

    @pytest.mark.parametrize("workers", [0, 1])
    def test_that_are_stuck_are_reported(self, packed, workers, monkeypatch):
        monkeypatch.setattr(stored, "PATIENCE", 1.0)
        found = open_data(packed, workers=workers)
        object.__setattr__(found.reader.source, "open", Slow(found.reader.source.open, lambda: time.sleep(4)))
        with pytest.raises(DataError, match=r"no image has come out of .* for 1 seconds") as caught:
            list(found.stream([torch.tensor([k]) for k in range(6)]))
        assert "the disk or the network" in caught.value.hint

    def test_a_process_that_dies_is_reported(self, packed):
        found = open_data(packed, workers=1)
        object.__setattr__(found.reader.source, "open", Slow(found.reader.source.open, lambda: os._exit(9)))
        with pytest.raises(DataError, match="a process that decodes images has died"):
            list(found.stream([torch.tensor([k]) for k in range(6)]))

    def test_an_endless_stream_can_be_left(self, packed):
        found = open_data(packed, workers=1)
        stream = found.stream(torch.tensor([k % 20]) for k in iter(int, 1))
        next(stream)
        stream.close()

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_training_is_the_same_from_disk_and_goes_on_exactly(self, tmp_path, workers):
        recipe = test_trainer.QUICK_RECIPE
        np.savez(tmp_path / "in.npz", images=pictures(23, 4), labels=np.arange(23) % 3)
        pack(tmp_path / "in.npz", tmp_path / "packed", shard_images=5)
        memory = test_trainer.trainer(recipe, data=open_data(tmp_path / "in.npz"))
        disk = open_data(tmp_path / "packed", workers=workers)
        stopped, resumed = test_trainer.trainer(recipe, data=disk), test_trainer.trainer(recipe, data=disk, seed=9)
        test_trainer.run(memory)
        test_trainer.run(stopped, 4)
        resumed.load_state_dict(stopped.state_dict())
        test_trainer.run(resumed)
        for mine, other in zip(resumed.model.parameters(), memory.model.parameters(), strict=True):
            assert torch.equal(mine, other)


def test_brace_patterns():
    assert [path.name for path in shards.expand("a/b-{008..011}.tar")] == [f"b-{k:03}.tar" for k in range(8, 12)]
    assert [path.name for path in shards.expand("a/b.tar")] == ["b.tar"]
