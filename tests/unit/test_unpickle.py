"""The reader of pickles: what genuine files hold comes out as it was, and nothing else does anything at all."""

from __future__ import annotations

import io
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmtool.errors import CheckpointError
from cmtool.io import unpickle
from cmtool.io.unpickle import Record
from tests import pickles

START = b"\x80\x04"


def read(path, data):
    path.write_bytes(data)
    return unpickle.read(path)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "network.pkl"


def refused(file, data, match="damaged pickle"):
    """The one error that there is, soon."""
    began = time.perf_counter()
    with pytest.raises(CheckpointError, match=match) as caught:
        read(file, data)
    assert time.perf_counter() - began < 10
    return caught.value


# A few instructions, to write programs that no pickler writes.


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module, attribute):
    return text(module) + text(attribute) + b"\x93"


def call(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


def raw(data):
    return b"B" + struct.pack("<I", len(data)) + data


def number(value):
    return b"J" + struct.pack("<i", value)


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


# What genuine files hold.

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**500), 2**500)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
    | st.sets(st.text(max_size=4) | st.integers(), max_size=3).filter(lambda s: all(ord(c) < 2**15 for c in str(s))),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=5)
    ),
    max_leaves=20,
)


@settings(max_examples=100)
@given(value=PLAIN, protocol=st.sampled_from([3, 4, 5]))
def test_plain_values_come_back(value, protocol, tmp_path_factory):
    assert read(tmp_path_factory.getbasetemp() / "plain.pkl", pickle.dumps(value, protocol)) == value


def test_shared_and_recursive_values_come_back(file):
    inner = [1]
    around = {"one": inner, "two": inner}
    around["self"] = around
    found = read(file, pickle.dumps(around))
    assert found["one"] is found["two"]
    assert found["self"] is found


TENSORS = {
    "matrix": torch.arange(12.0).reshape(3, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "channels_last": torch.arange(36.0).reshape(1, 3, 3, 4).contiguous(memory_format=torch.channels_last),
    "window": torch.arange(20.0)[3:15:4],
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    **{
        str(dtype): torch.arange(5).to(dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool)
    },
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_tensors_and_parameters_come_back(protocol, file):
    content = {key: tensor.clone(memory_format=torch.preserve_format) for key, tensor in TENSORS.items()}
    content["window"] = TENSORS["window"]  # the whole storage is in the file, the tensor is a part of it
    content["parameter"] = torch.nn.Parameter(torch.ones(3))
    content["kinds"] = [torch.float16, torch.Size([2, 3]), torch.device("cpu")]
    found = read(file, pickle.dumps(content, protocol))
    for key, tensor in TENSORS.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    assert type(found["parameter"]) is torch.Tensor
    assert found["kinds"] == [torch.float16, (2, 3), "cpu"]


def test_two_windows_on_one_storage_share_it(file):
    """One storage is read once, though it is named twice."""
    base = torch.arange(6.0)
    data = raw(pickles.storage(base))
    program = START + b"("
    program += call(name("torch.storage", "_load_from_bytes"), data) + b"\x94"
    build = name("torch._utils", "_rebuild_tensor_v2")
    for offset in (0, 3):
        program += call(build, b"h\x00", number(offset), numbers([3]), numbers([1]), b"\x89", b"N")
    first, second = read(file, program + b"t.")[1:]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert first.tolist() + second.tolist() == base.tolist()


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"])
def test_numbers_of_numpy_come_back(kind, file):
    value = np.dtype(kind).type(1 if kind == "b1" else 107)
    assert read(file, pickle.dumps([value])) == [value.item()]


def test_numbers_of_numpy_before_its_second_version(file):
    data = pickle.dumps(np.sqrt(0.5)).replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    assert b"numpy.core.multiarray" in data
    data = START + data[11:]  # without the frame, whose length has changed
    assert read(file, data) == np.sqrt(0.5)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_objects_become_records(protocol, file, tmp_path):
    """Their names and attributes; the source that came along is not run, arrays and methods are read over."""
    marker = tmp_path / "ran"
    layer = pickles.Module("Conv2d", up=False)
    layer.source = f"open({str(marker)!r}, 'w').write('the source was run')"
    layer.weight = torch.nn.Parameter(torch.ones(2, 3))
    content = pickles.EasyDict(
        ema=torch.nn.ModuleDict({"conv": layer}), loss_fn=pickles.Loss(), encoder=pickles.Encoder(), nothing=None
    )
    found = read(file, pickles.dumps(content, protocol))
    assert type(found) is dict
    assert {key: value.name for key, value in found.items() if value} == {
        "ema": "ModuleDict",
        "loss_fn": "ECMLoss",
        "encoder": "StabilityVAEEncoder",
    }
    conv = found["ema"].state["_modules"]["conv"]
    assert isinstance(conv, Record)
    assert (conv.name, conv.state["up"], conv.state["_init_kwargs"]) == ("Conv2d", False, {"up": False})
    assert torch.equal(conv.state["_parameters"]["weight"], torch.ones(2, 3))
    assert found["loss_fn"].state["P_mean"] == -1.1
    assert not marker.exists()


# What hostile files ask for.

NAMES = [
    *(("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("builtins", "eval"), ("builtins", "exec")),
    *(("builtins", "compile"), ("builtins", "__import__"), ("builtins", "open"), ("builtins", "print")),
    *(("__builtin__", "eval"), ("importlib", "import_module"), ("operator", "attrgetter"), ("runpy", "run_path")),
    *(
        ("pickle", "loads"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.serialization", "load"),
        ("numpy", "load"),
    ),
    *(("torch.nn.modules", "os.system"), ("torch.nn.modules.module", "torch.os.system")),
    *(("torch.nn.modules.container", "ModuleDict.__init__"), ("torch.nn", "Module"), ("collections", "os.system")),
    *(("torch.nn.modules.../os", "system; true"), ("cmtool.io.unpickle", "read"), ("torch", "float32.__class__")),
    *(("torch._utils", "_rebuild_tensor_v2.__globals__"), ("torch", "ComplexFloatStorage"), ("torch", "FloatStorage")),
]
names = pytest.mark.parametrize(("module", "attribute"), NAMES, ids=[f"{m}.{a}" for m, a in NAMES])


@names
@pytest.mark.parametrize("how", ["stack_global", "global"])
def test_names_that_are_not_served(module, attribute, how, file, tmp_path):
    marker = tmp_path / "ran"
    asked = f"c{module}\n{attribute}\n".encode() if how == "global" else name(module, attribute)
    error = refused(file, START + call(asked, text(f"touch {marker}")) + b".", "asks for")
    assert f"{module}.{attribute}" in error.message
    assert "nothing of it was run" in error.message
    assert not marker.exists()


def test_a_name_that_would_write_on_the_terminal(file):
    error = refused(file, START + name("os\x1b[2J\n", "é" * 500) + b".", "asks for")
    assert error.message.isprintable()
    assert len(error.message) < 300 + len(str(file))


@pytest.mark.parametrize(
    ("title", "program"),
    {
        "getattr_of_a_function": call(name("builtins", "getattr"), name("builtins", "set"), text("__class__")),
        "getattr_of_a_dictionary": call(name("builtins", "getattr"), b"}", text("__class__")),
        "getattr_of_a_tensor_type": call(name("builtins", "getattr"), name("torch", "float32"), text("__class__")),
    }.items(),
)
def test_getattr_looks_nothing_up(title, program, file):
    refused(file, START + program + b".", "asks for builtins.getattr")


def test_the_method_of_a_record_can_do_nothing(file):
    layer = name("torch.nn.modules.container", "ModuleDict") + b")\x81"
    method = call(name("builtins", "getattr"), layer, text("__init__"))
    assert not isinstance(read(file, START + method + b"."), Record)
    refused(file, START + call(method, text("a")) + b".")


@pytest.mark.parametrize(
    ("title", "program"),
    {
        "INST": b"(ios\nsystem\n",
        "OBJ": b"(" + name("builtins", "set") + b"o",
        "NEWOBJ_EX": name("builtins", "set") + b")}\x92",
        "EXT1": b"\x82\x01",
        "PERSID": b"P12\n",
        "INT": b"I12\n",
        "STRING": b"S'a'\n",
        "PUT": b"Np0\n",
        "NEXT_BUFFER": b"\x97",
        "0xff": b"\xff",
    }.items(),
)
def test_instructions_that_are_not_known(title, program, file):
    refused(file, START + program + b".", f"uses the instruction {title} ")


def test_a_persistent_id_outside_of_a_storage(file):
    refused(file, START + text("12") + b"Q.", "points at something outside of itself")


LAYER = name("torch.nn.modules.linear", "Linear") + b")\x81"
DAMAGED = {
    "nothing_on_the_stack": b"",
    "two_values": b"NN",
    "a_mark_without_end": b"(NN",
    "no_mark": b"Nt",
    "append_to_a_number": b"K\x01K\x01a",
    "items_to_a_list": b"](K\x01K\x02u",
    "an_odd_item": b"}(K\x01K\x02K\x03u",
    "a_list_as_key": b"}]K\x01s",
    "a_list_in_a_set": b"\x8f(]\x90",
    "call_of_a_number": b"K\x01)R",
    "call_of_text": text("os.system") + b")R",
    "call_of_a_type": name("torch", "float32") + b")R",
    "call_without_a_tuple": name("builtins", "set") + b"NR",
    "call_with_too_much": call(name("builtins", "set"), b"]", b"]"),
    "set_of_text": call(name("builtins", "set"), text("abc")),
    "name_that_is_no_text": text("os") + b"K\x01\x93",
    "attributes_of_a_number": b"K\x01}b",
    "attributes_twice": LAYER + b"}" + text("a") + b"K\x01sb}b",
    "attributes_in_slots": LAYER + b"N}\x86b",
    "unknown_place_in_the_memo": b"h\x05",
    "protocol_9": b"\x80\x09N",
    "no_such_text": b"\x8c\x02\xff\xfe",
    "a_line_without_end": b"c" + b"a" * 10_000,
    "persistent_without_class": call(name("torch_utils.persistence", "_reconstruct_persistent_obj"), b"}"),
    "persistent_of_a_number": call(name("torch_utils.persistence", "_reconstruct_persistent_obj"), b"K\x01"),
    "numpy_type_of_objects": call(name("numpy", "dtype"), text("O8"), b"\x89", b"\x88"),
    "numpy_other_bytes": call(name("numpy", "dtype"), text("f8")) + b"(K\x03" + text(">") + b"tb",
    "numpy_too_short": call(
        name("numpy._core.multiarray", "scalar"), call(name("numpy", "dtype"), text("f8")), raw(b"1234")
    ),
    "numpy_too_long": call(
        name("numpy._core.multiarray", "scalar"), call(name("numpy", "dtype"), text("f8")), raw(b"1" * 5000)
    ),
}


@pytest.mark.parametrize("program", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_programs(program, file):
    refused(file, START + program + b".")


def test_empty_and_missing_files(file, tmp_path):
    refused(file, b"")
    refused(file, START)
    with pytest.raises(CheckpointError, match="cannot read"):
        unpickle.read(tmp_path / "missing.pkl")


# Bombs: little to read, endless to keep, hash, compare or show.


def laughs(levels):
    """A tuple of two of a tuple of two of ...: 2^levels leaves in 4 * levels bytes."""
    return b"N" + b"".join(b"r" + struct.pack("<I", k) + b"j" + struct.pack("<I", k) + b"\x86" for k in range(levels))


BOMBS = {
    "deep_key": b"}" + b")" + b"\x85" * 200_000 + b"K\x01s",
    "deep_in_a_set": b"\x8f()" + b"\x85" * 200_000 + b"\x90",
    "laughing_key": b"}" + laughs(100) + b"K\x01s",
    "laughing_class": call(
        name("torch_utils.persistence", "_reconstruct_persistent_obj"),
        *(b"}(" + text("class_name") + laughs(100) + text("type") + laughs(100) + text("state") + b"}u",),
    ),
    "laughing_size": call(
        name("torch._utils", "_rebuild_tensor_v2"),
        *(call(name("torch.storage", "_load_from_bytes"), raw(pickles.storage(torch.ones(2)))), b"K\x00"),
        *(laughs(100), laughs(100)),
    ),
    "long_bytes": b"\x8e" + struct.pack("<Q", 2**62),
    "long_bytearray": b"\x96" + struct.pack("<Q", 2**62),
    "long_text": b"\x8d" + struct.pack("<Q", 2**63),
    "long_number": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "long_negative_number": b"\x8b" + struct.pack("<i", -1),
    "real_long_number": b"\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6,
    "long_frame": b"\x95" + struct.pack("<Q", 2**60) + b"N",
}


@pytest.mark.parametrize("program", BOMBS.values(), ids=BOMBS.keys())
def test_bombs(program, file):
    refused(file, START + program + b".")


def test_far_too_many_instructions(file):
    refused(file, START + b"]" * 1_000_000 + b".", "far too long a pickle")


@pytest.mark.parametrize(
    "program",
    [b")" + b"\x85" * 200_000, b"]" * 200_000 + b"a" * 199_999, laughs(100_000), b"N\x94r\xff\xff\xff\xff"],
    ids=["deep_tuple", "deep_list", "laughs", "memo"],
)
def test_what_is_only_large_is_read_and_let_go(program, file):
    """Nested values do no harm as long as nobody walks through them; a place in the memo is a key, no length."""
    began = time.perf_counter()
    read(file, START + program + b".")
    assert time.perf_counter() - began < 10


def test_deep_objects_are_let_go(file):
    """The end of a record within a record within a record ... must not end the process."""
    one = b"c" + b"torch.nn.modules.linear\nLinear\n" + b"q\x00)\x81}" + text("a")
    more = b"h\x00)\x81}" + text("a")
    depth = 50_000
    read(file, START + one + more * depth + b"N" + b"sb" * (depth + 1) + b".")


# Tensors that are not what they say.


def window(offset=0, size=(2,), stride=(1,), storage=None, count=4):
    made = storage or call(name("torch.storage", "_load_from_bytes"), raw(pickles.storage(torch.ones(count))))
    return START + call(
        name("torch._utils", "_rebuild_tensor_v2"), made, number(offset), numbers(size), numbers(stride), b"\x89", b"N"
    )


def test_a_window(file):
    assert read(file, window(size=(2, 2), stride=(2, 1)) + b".").tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("title", "options"),
    {
        "negative_size": {"size": (-2,)},
        "negative_stride": {"size": (2,), "stride": (-1,), "offset": 3},
        "negative_offset": {"offset": -1},
        "offset": {"offset": 3},
        "too_large": {"size": (5,)},
        "stride": {"size": (2, 2), "stride": (3, 1)},
        "repeated": {"size": (2**20, 2**10), "stride": (0, 0)},
        "overflowing": {"size": (2**30, 2**30, 2**30), "stride": (1, 1, 1)},
        "no_strides": {"size": (2, 2), "stride": (1,)},
        "dimensions": {"size": (1,) * 30, "stride": (1,) * 30},
        "no_storage": {"storage": b"N"},
        "tensor_as_storage": {"storage": window(size=(2, 2), stride=(2, 1))[2:]},
    }.items(),
)
def test_tensors_beyond_their_storage(title, options, file):
    refused(file, window(**options) + b".")


def test_a_size_that_is_a_float(file):
    data = window() + b"."
    assert data.count(numbers([2])) == 1
    refused(file, data.replace(numbers([2]), b"(G" + struct.pack(">d", 2.0) + b"t"))


def stored(data):
    return START + call(name("torch.storage", "_load_from_bytes"), raw(data)) + b"."


GENUINE = pickles.storage(torch.arange(4.0))


def zipped():
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(0))
        archive.writestr("archive/data/0", bytes(2**24))
    return written.getvalue()


STORED = {
    "nothing": b"",
    "zip": zipped(),
    "cut": GENUINE[:-1],
    "longer": GENUINE + b"1234",
    "magic": GENUINE.replace(b"\x8a\nl\xfc", b"\x8a\nm\xfc"),
    "version": GENUINE.replace(b"M\xe9\x03", b"M\xe8\x03", 1),
    "endian": GENUINE.replace(b"\x88X", b"\x89X"),
    "count": GENUINE.replace(b"K\x04N", b"K\x05N"),
    "other_key": GENUINE.replace(b"]q\x00X", b"]q\x00aX", 1),
    "huge": GENUINE.replace(b"K\x04N", b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"N").replace(
        struct.pack("<q", 4), struct.pack("<q", 2**40)
    ),
    "type": GENUINE.replace(b"FloatStorage", b"DoubleStorage"),
    "view": GENUINE.replace(b"K\x04N", b"K\x04)"),
}


def test_the_genuine_storage(file):
    assert read(file, stored(GENUINE)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("data", STORED.values(), ids=STORED.keys())
def test_storages_that_are_not_torchs(data, file):
    assert data != GENUINE
    refused(file, stored(data), "damaged pickle|uses the instruction PERSID")


@names
def test_hostile_bytes_in_a_storage(module, attribute, file, tmp_path):
    """Where torch itself would call `torch.load` without any care."""
    if (module, attribute) == ("torch", "FloatStorage"):
        return  # this one belongs there
    marker = tmp_path / "ran"
    inner = b"\x80\x02" + call(f"c{module}\n{attribute}\n".encode(), text(f"touch {marker}")) + b"."
    head = GENUINE[: GENUINE.index(b"\x80\x02(X\x07\x00\x00\x00storage")]
    for data in (inner, head + inner, head + inner + GENUINE):
        refused(file, stored(data), "asks for")
    assert not marker.exists()


def test_a_class_in_a_storage(file):
    """torch's `module` ids compare source code, and write a file where it differs."""
    head = GENUINE[: GENUINE.index(b"\x80\x02(X\x07\x00\x00\x00storage")]
    refused(file, stored(head + b"\x80\x02(" + text("module") + b"NNNtQ."))


def test_a_storage_read_over_and_over(file):
    """A hundred names for the same bytes are not a hundred times the memory."""
    data = pickles.storage(torch.zeros(100_000))
    program = START + name("torch.storage", "_load_from_bytes") + b"\x94" + raw(data) + b"\x85\x94"
    program += b"h\x00h\x01R" * 100 + b"."
    refused(file, program, "claims to hold more numbers than it does")
