"""Pickles with weights, NVlabs' (EDM, EDM2 and what builds on them) and torch's, without running anything in them.

A pickle is a program for a small stack machine, and Python's own machine imports and calls whatever it is told to. This
one is a machine without those instructions: a name is looked up in a table that is written down below, and what is not
in it ends the reading. The classes in such files carry their own source code (`torch_utils.persistence`), which NVlabs'
loader executes; here it is bytes that are stepped over.

It is a machine of its own, not a subclass of `pickle.Unpickler`, because that one can be brought down by data alone: a
deep tuple as the key of a dictionary ends the process, one that shares its parts keeps it busy for ever, and a place in
the memo that no file has costs gigabytes. Here a file of n bytes takes about n bytes of memory: the numbers of a tensor
go from the file to where they stay, and everything else is small.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import struct
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cmtool.errors import CheckpointError

MAX_STEPS = 500_000  # instructions; the largest released network takes some hundred and twenty thousand
MAX_TEXT = 4096  # bytes of a name; longer text is source code, which nobody needs
MAX_NUMBER = 64  # bytes of a whole number
MAX_DIMENSIONS = 8

# How torch writes a storage that stands in a foreign pickle.
TORCH_MAGIC, TORCH_VERSION = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
NUMPY_NUMBERS = {
    **{"f2": "<e", "f4": "<f", "f8": "<d", "b1": "<?"},
    **{"i1": "<b", "i2": "<h", "i4": "<i", "i8": "<q", "u1": "<B", "u2": "<H", "u4": "<I", "u8": "<Q"},
}

# A damaged program takes from an empty stack, calls what is no function, and so on.
DAMAGE = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError),
    struct.error,
)


@dataclass(eq=False, repr=False)
class Record:
    """An object of some class: the class's name, and what the object's attributes were."""

    name: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bytes:
    """Where bytes, or a long text, lie in the file."""

    start: int
    length: int


@dataclass(frozen=True)
class Served:
    """A name that a file may ask for: a value, or what stands in for a function or a class."""

    value: Any = None
    call: Callable[..., Any] | None = None


def read(path: Path) -> Any:
    """What a pickle holds: dictionaries, lists, numbers, text, tensors, and a `Record` for each object.

    Raises:
        CheckpointError: a file that cannot be read, that is damaged, or that asks for what none of NVlabs' does.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return Machine(Source(str(path), file, data, len(data)), 0, len(data), SERVED).run()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}", "check the path and its permissions"
        ) from error
    except DAMAGE as error:
        raise CheckpointError(f"{path} is a damaged pickle", "it may be cut off: get it again") from error


@dataclass
class Source:
    """The file, and how much of it and of our patience has been used."""

    file: str
    handle: BinaryIO
    data: mmap.mmap
    size: int
    steps: int = 0
    taken: int = 0

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > MAX_STEPS:
            raise CheckpointError(f"{self.file} is far too long a pickle for a network", "get the file again")

    def numbers(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """A part of the file as a flat tensor; all of them together are no more than the file."""
        size = count * dtype.itemsize
        self.taken += size
        if self.taken > self.size:
            raise CheckpointError(f"{self.file} claims to hold more numbers than it does", "get the file again")
        memory = torch.empty(size, dtype=torch.uint8)
        self.handle.seek(start)
        if size and self.handle.readinto(memory.numpy().data) != size:  # type: ignore[attr-defined]
            raise ValueError("the file became shorter")
        return memory.view(dtype)

    def bytes(self, where: Bytes) -> bytes:
        if where.length > MAX_TEXT:
            raise ValueError("these bytes are too long for what they are")
        return self.data[where.start : where.start + where.length]


class Machine:
    """The stack machine between two places of the file. Its methods have the names of the instructions they do.

    Args:
        served: the names that the pickle may ask for.
        outside: what the pickle's names of storages outside of itself stand for; None refuses them.
    """

    def __init__(
        self,
        source: Source,
        start: int,
        end: int,
        served: dict[tuple[str, str], Served],
        outside: Callable[[Storage], Any] | None = None,
    ) -> None:
        self.source, self.at, self.end, self.served, self.outside = source, start, end, served, outside
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Do one pickle, which leaves `at` behind it."""
        self.stack, self.marks, self.memo = [], [], {}
        while True:
            self.source.step()
            code = self.take(1)[0]
            if code == STOP:
                (value,) = self.stack
                return value
            instruction = INSTRUCTIONS.get(code)
            if instruction is None:
                raise self.refusal(f"uses the instruction {NAMES.get(code, hex(code))} of pickles")
            instruction(self)

    def refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source.file} {what}, which no file of a network needs; nothing of it was run",
            "do not open it with anything that trusts it; get it from its publisher",
        )

    # What follows an instruction.

    def take(self, count: int) -> bytes:
        return self.source.data[self.skip(count) : self.at]

    def skip(self, count: int) -> int:
        """Step over bytes; where they start."""
        if count > self.end - self.at:
            raise ValueError("the pickle ends too early")
        self.at += count
        return self.at - count

    def whole(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        end = self.source.data.find(b"\n", self.at, min(self.end, self.at + MAX_TEXT))
        if end < 0:
            raise ValueError("a line has no end")
        return self.take(end + 1 - self.at)[:-1].decode("ascii")

    def text(self, size: int) -> None:
        length = self.whole(size)
        if length > MAX_TEXT:
            self.bytes(length)
        else:
            self.stack.append(self.take(length).decode("utf-8"))

    def bytes(self, length: int) -> None:
        self.stack.append(Bytes(self.skip(length), length))

    def number(self, length: int) -> None:
        if length > MAX_NUMBER:
            raise ValueError("no number is that long")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def top(self) -> list[Any]:
        """All that was pushed since the last mark, off the stack."""
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def last(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"this is no {kind.__name__}")
        return self.stack[-1]

    # Instructions: structure and stack.

    def do_proto(self) -> None:
        if not 2 <= self.whole(1) <= 5:
            raise ValueError("there is no such protocol")

    def do_frame(self) -> None:
        if self.whole(8) > self.end - self.at:
            raise ValueError("the pickle ends too early")

    def do_mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def do_pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.top()

    def do_pop_mark(self) -> None:
        self.top()

    def do_memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_binput(self) -> None:
        self.memo[self.whole(1)] = self.stack[-1]

    def do_long_binput(self) -> None:
        self.memo[self.whole(4)] = self.stack[-1]

    def do_binget(self) -> None:
        self.stack.append(self.memo[self.whole(1)])

    def do_long_binget(self) -> None:
        self.stack.append(self.memo[self.whole(4)])

    # Instructions: plain values.

    def do_none(self) -> None:
        self.stack.append(None)

    def do_newtrue(self) -> None:
        self.stack.append(True)

    def do_newfalse(self) -> None:
        self.stack.append(False)

    def do_binint(self) -> None:
        self.number(4)

    def do_binint1(self) -> None:
        self.stack.append(self.whole(1))

    def do_binint2(self) -> None:
        self.stack.append(self.whole(2))

    def do_long1(self) -> None:
        self.number(self.whole(1))

    def do_long4(self) -> None:
        self.number(self.whole(4))

    def do_binfloat(self) -> None:
        self.stack.append(struct.unpack(">d", self.take(8))[0])

    def do_short_binunicode(self) -> None:
        self.text(1)

    def do_binunicode(self) -> None:
        self.text(4)

    def do_binunicode8(self) -> None:
        self.text(8)

    def do_short_binbytes(self) -> None:
        self.bytes(self.whole(1))

    def do_binbytes(self) -> None:
        self.bytes(self.whole(4))

    def do_binbytes8(self) -> None:
        self.bytes(self.whole(8))

    def do_bytearray8(self) -> None:
        self.bytes(self.whole(8))

    # Instructions: containers.

    def do_empty_tuple(self) -> None:
        self.stack.append(())

    def do_tuple1(self) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def do_tuple2(self) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def do_tuple3(self) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def do_tuple(self) -> None:
        items = self.top()
        self.stack.append(tuple(items))

    def do_empty_list(self) -> None:
        self.stack.append([])

    def do_append(self) -> None:
        item = self.stack.pop()
        self.last(list).append(item)

    def do_appends(self) -> None:
        items = self.top()
        self.last(list).extend(items)

    def do_empty_dict(self) -> None:
        self.stack.append({})

    def do_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.last(dict)[_key(key)] = value

    def do_setitems(self) -> None:
        items = self.top()
        self.last(dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def do_empty_set(self) -> None:
        self.stack.append(set())

    def do_additems(self) -> None:
        items = self.top()
        self.last(set).update(map(_key, items))

    def do_frozenset(self) -> None:
        items = self.top()
        self.stack.append(frozenset(map(_key, items)))

    # Instructions: names and what is made of them.

    def find(self, module: str, name: str) -> None:
        """Push what stands for a name: of the table, or any layer of torch as a class without behaviour."""
        served = self.served.get((module, name))
        if served is None and module.startswith("torch.nn.modules.") and name.isidentifier():
            served = Served(call=lambda machine: Record(name))
        if served is None:
            raise self.refusal(f"asks for {ascii(f'{module}.{name}')[1:-1][:120]}")
        self.stack.append(served if served.call is not None else served.value)

    def do_global(self) -> None:
        module = self.line()
        self.find(module, self.line())

    def do_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a name is text")
        self.find(module, name)

    def do_reduce(self) -> None:
        arguments = self.stack.pop()
        served = self.stack.pop()
        if not isinstance(served, Served) or served.call is None or not isinstance(arguments, tuple):
            raise TypeError("this is no function")
        self.stack.append(served.call(self, *arguments))

    def do_newobj(self) -> None:
        self.do_reduce()  # the one calls a function and the other a class: here both are stand-ins

    def do_build(self) -> None:
        """Give the object made last its attributes."""
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Record) and isinstance(state, dict) and not made.state:
            made.state = state
        elif isinstance(made, _Number):
            made.order(state)
        elif isinstance(made, Array):
            made.fill(self.source, state)
        elif not isinstance(made, (dict, _Inert)):
            raise TypeError("this has no attributes")

    def do_binpersid(self) -> None:
        """A name for something outside the pickle: in a storage of torch's, the numbers that follow."""
        if self.outside is None:
            raise self.refusal("points at something outside of itself")
        kind, dtype, key, _, count, *view = self.stack.pop()
        if (
            kind != "storage"
            or not isinstance(dtype, torch.dtype)
            or not isinstance(key, str)
            or view not in ([], [None])
        ):
            raise ValueError("this is no storage")
        self.stack.append(self.outside(Storage(dtype, key, _size(count))))


@dataclass(frozen=True)
class Storage:
    """What torch says of the numbers that follow."""

    dtype: torch.dtype
    key: str
    count: int


class _Inert:
    """Something that is read over: a method, an array in an old form."""


class Array:
    """An array of numpy's; `values` are its numbers where they are floating point, float32 or float64."""

    values: Tensor | None = None

    def fill(self, source: Source, state: Any) -> None:
        """Take in what numpy wrote of the array: version, shape, type, order, bytes."""
        _, shape, kind, by_columns, data = state
        types = {"<f": torch.float32, "<d": torch.float64}
        if not isinstance(kind, _Number) or kind.format not in types or not isinstance(data, Bytes):
            return
        dtype = types[kind.format]
        sizes = [_size(side) for side in shape]
        if len(sizes) > MAX_DIMENSIONS or math.prod(sizes) * dtype.itemsize != data.length:
            raise ValueError("the array has another size than its numbers")
        flat = source.numbers(data.start, math.prod(sizes), dtype)
        self.values = flat.reshape(sizes[::-1]).permute(*range(len(sizes))[::-1]) if by_columns else flat.reshape(sizes)


@dataclass(eq=False)
class _Number:
    """A type of numpy's numbers."""

    format: str

    def order(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|", "="):
            raise ValueError("the bytes are in the order of another machine")


def _key(key: Any) -> Hashable:
    """A key of a dictionary or a set. The hash of a tuple walks through all that is in it, which may be endless."""
    if not isinstance(key, (str, int)):
        raise TypeError("keys are text or numbers")
    return key


def _size(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**48:
        raise ValueError("this is no size")  # and is not shown: a value may be endless to write down
    return value


# What stands in for the functions and classes that such files name.


def _persistent(machine: Machine, meta: dict[str, Any]) -> Record:
    """An object of a class that came with its source code, which is left where it is."""
    name, state = meta["class_name"], meta["state"]
    if meta["type"] != "class" or not isinstance(name, str) or not isinstance(state, (dict, type(None))):
        raise ValueError("this is no persistent object")
    return Record(name, {} if state is None else state)


def _method(machine: Machine, owner: Record, name: str) -> _Inert:
    """A method that an object keeps as an attribute (ECT's loss does), which pickle writes as a call of getattr.

    Nothing is looked up, and what is returned can do nothing.
    """
    if not isinstance(owner, Record) or not isinstance(name, str):
        raise machine.refusal("asks for builtins.getattr of something that is no object of its own")
    return _Inert()


def _container(kind: type) -> Callable[..., Any]:
    def make(machine: Machine, items: Any = ()) -> Any:
        if not isinstance(items, (list, tuple)) or (kind is dict and items):
            raise TypeError("this is made of a list")
        machine.source.step(len(items))  # one list may be named again and again
        return kind(map(_key, items))

    return make


def _storage(machine: Machine, data: Bytes) -> Tensor:
    """The numbers of a storage, flat: a file of torch's old format, five pickles and then the numbers."""
    inner = Machine(machine.source, data.start, data.start + data.length, STORAGE_TYPES, lambda storage: storage)
    magic, version, system, storage, keys = (inner.run() for _ in range(5))
    if (magic, version) != (TORCH_MAGIC, TORCH_VERSION) or system["little_endian"] is not True:
        raise ValueError("these bytes are not torch's")
    if not isinstance(storage, Storage) or keys != [storage.key] or inner.whole(8) != storage.count:
        raise ValueError("this is no single storage")
    if storage.count * storage.dtype.itemsize != inner.end - inner.at:
        raise ValueError("the storage is not as long as it says")
    return machine.source.numbers(inner.at, storage.count, storage.dtype)


def _tensor(
    machine: Machine, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """A window on a storage, inside it and with no more entries than it has."""
    if not isinstance(storage, Tensor) or storage.ndim != 1 or len(size) > MAX_DIMENSIONS or len(size) != len(stride):
        raise ValueError("this is no tensor")
    size, stride = tuple(map(_size, size)), tuple(map(_size, stride))
    count = math.prod(size)
    reach = _size(offset) + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if count else 0
    if max(reach, count) > storage.numel():
        raise ValueError("a tensor reaches beyond its storage")
    return storage.as_strided(size, stride, offset) if count else storage.new_empty(size)


def _parameter(machine: Machine, tensor: Tensor, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError("this is no tensor")
    return tensor


def _number_type(machine: Machine, name: str, *_: Any) -> _Number:
    return _Number(NUMPY_NUMBERS[name])


def _scalar(machine: Machine, kind: _Number, data: Bytes) -> float:
    value: float = struct.unpack(kind.format, machine.source.bytes(data))[0]
    return value


def _inert(machine: Machine, *_: Any) -> _Inert:
    return _Inert()


def _array(machine: Machine, *_: Any) -> Array:
    return Array()


def _first(machine: Machine, value: Any, *_: Any) -> Any:
    return value


SERVED: dict[tuple[str, str], Served] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Served(call=_persistent),
    ("dnnlib.util", "EasyDict"): Served(call=_container(dict)),
    ("collections", "OrderedDict"): Served(call=_container(dict)),
    ("builtins", "set"): Served(call=_container(set)),
    ("builtins", "frozenset"): Served(call=_container(frozenset)),
    ("builtins", "getattr"): Served(call=_method),
    ("torch.storage", "_load_from_bytes"): Served(call=_storage),
    ("torch._utils", "_rebuild_tensor_v2"): Served(call=_tensor),
    ("torch._utils", "_rebuild_parameter"): Served(call=_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Served(call=_parameter),
    ("torch", "Size"): Served(call=_first),
    ("torch", "device"): Served(call=_first),
    **{("torch", str(dtype).removeprefix("torch.")): Served(value=dtype) for dtype in STORAGES.values()},
    ("numpy", "dtype"): Served(call=_number_type),
    ("numpy", "ndarray"): Served(call=_inert),
    **{
        (f"numpy.{core}.{module}", name): Served(call=call)
        for core in ("core", "_core")
        for module, name, call in (
            ("multiarray", "scalar", _scalar),
            ("multiarray", "_reconstruct", _array),
            ("numeric", "_frombuffer", _inert),
        )
    },
}
STORAGE_TYPES: dict[tuple[str, str], Served] = {
    ("torch", name): Served(value=dtype) for name, dtype in STORAGES.items()
}
PLAIN_TENSORS: dict[tuple[str, str], Served] = {
    **STORAGE_TYPES,
    **{
        name: SERVED[name]
        for name in (
            ("collections", "OrderedDict"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
            ("torch", "Size"),
        )
    },
}

NAMES = {ord(operation.code): operation.name for operation in pickletools.opcodes}
STOP = ord(".")
INSTRUCTIONS: dict[int, Callable[[Machine], None]] = {
    code: getattr(Machine, f"do_{name.lower()}")
    for code, name in NAMES.items()
    if hasattr(Machine, f"do_{name.lower()}")
}
