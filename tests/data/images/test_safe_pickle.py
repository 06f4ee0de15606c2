"""Object arrays are read as NumPy wrote them; anything else in a file is refused, never run."""

import functools
import io
import operator
import os
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vixml_jax.data.images import safe_pickle
from vixml_jax.errors import InputError

# [[0, 2], -1, [np.int64(1)], np.array([3, 4]), [-1], np.array([5], object)], by numpy 1.26.4.
NUMPY_1 = (
    b"\x80\x03cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85q\x02C\x01b"
    b"q\x03\x87q\x04Rq\x05(K\x01K\x06\x85q\x06cnumpy\ndtype\nq\x07X\x02\x00\x00\x00O8q\x08\x89\x88"
    b"\x87q\tRq\n(K\x03X\x01\x00\x00\x00|q\x0bNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tq\x0cb\x89]q"
    b"\r(]q\x0e(K\x00K\x02eJ\xff\xff\xff\xff]q\x0fcnumpy.core.multiarray\nscalar\nq\x10h\x07X\x02"
    b"\x00\x00\x00i8q\x11\x89\x88\x87q\x12Rq\x13(K\x03X\x01\x00\x00\x00<q\x14NNNJ\xff\xff\xff\xffJ"
    b"\xff\xff\xff\xffK\x00tq\x15bC\x08\x01\x00\x00\x00\x00\x00\x00\x00q\x16\x86q\x17Rq\x18ah\x00h"
    b"\x01K\x00\x85q\x19h\x03\x87q\x1aRq\x1b(K\x01K\x02\x85q\x1ch\x13\x89C\x10\x03\x00\x00\x00\x00"
    b"\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00q\x1dtq\x1eb]q\x1fJ\xff\xff\xff\xffah\x00h\x01K"
    b'\x00\x85q h\x03\x87q!Rq"(K\x01K\x01\x85q#h\n\x89]q$K\x05atq%betq&b.'
)
PLAIN = [[0, 2], -1, [1], [3, 4], [-1], [5]]


def objects(values):
    """An array of Python objects of any kind."""
    array = np.empty(len(values), object)
    for n, value in enumerate(values):
        array[n] = value
    return array


def with_header(content, shape="(6,)", descr="'|O'"):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


def saved(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def plain(array):
    """The array as lists and integers of Python, for comparisons."""
    assert array.ndim == 1 and array.dtype == object
    for value in array:
        if isinstance(value, np.ndarray):
            assert value.ndim == 1 and value.dtype.kind in "iu"
        elif isinstance(value, list):
            assert all(type(element) is int for element in value)
        else:
            assert type(value) is int
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in array]


def refused(path, content=None):
    """The message of the error that reading the file raises, without its path."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        safe_pickle.load_object_array(str(path))
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 600
    return message.removeprefix(str(path))


def test_file_of_numpy_1(tmp_path):
    path = tmp_path / "map.npy"
    path.write_bytes(with_header(NUMPY_1))
    assert str(np.load(path, allow_pickle=True).tolist()) == (
        "[[0, 2], -1, [np.int64(1)], array([3, 4]), [-1], array([5], dtype=object)]"
    )
    assert plain(safe_pickle.load_object_array(str(path))) == PLAIN


INTEGERS = st.integers(-(2**31), 2**31 - 1)
ELEMENTS = st.one_of(
    INTEGERS,
    INTEGERS.map(np.int64),
    st.lists(INTEGERS, max_size=4),
    st.lists(INTEGERS.map(np.int32), max_size=3),
    st.builds(
        np.array,
        st.lists(st.integers(0, 127), max_size=4),
        st.sampled_from(["i1", "<i4", ">i8", "u2", "i8", "O"]),
    ),
)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(ELEMENTS, max_size=6))
def test_files_of_numpy(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "map.npy"
    array = objects(values)
    path.write_bytes(saved(array))
    expected = [
        value.tolist() if isinstance(value, (np.ndarray, np.generic)) else list(map(int, value))
        if isinstance(value, list) else value
        for value in np.load(path, allow_pickle=True)
    ]  # fmt: skip
    loaded = safe_pickle.load_object_array(str(path))
    assert plain(loaded) == expected
    for element, value in zip(loaded, array, strict=True):
        if isinstance(value, np.ndarray) and value.dtype != object:
            assert element.dtype == value.dtype


class Call:
    """Pickled as a call of a function, which unpickling runs."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


EVERYWHERE = {
    "alone": lambda call: pickle.dumps(call),
    "element": lambda call: pickle.dumps(objects([1, call])),
    "in a list": lambda call: pickle.dumps(objects([1, [2, call]])),
    "in an array": lambda call: pickle.dumps(objects([1, objects([call])])),
    "protocol 0": lambda call: pickle.dumps(objects([1, call]), protocol=0),
    "protocol 5": lambda call: pickle.dumps(objects([1, call]), protocol=5),
    "metadata": lambda call: pickle.dumps(
        np.empty(2, np.dtype(object, metadata={"a": call})), protocol=4
    ),
}


@pytest.mark.filterwarnings("ignore:metadata on a dtype")
@pytest.mark.parametrize("where", EVERYWHERE)
def test_malicious_file_is_not_run(tmp_path, where):
    marker, path = tmp_path / "marker", tmp_path / "trn_imgs_384_3_map.npy"
    content = with_header(EVERYWHERE[where](Call(os.system, f"touch {marker}")), "(2,)")
    message = refused(path, content)
    assert not marker.exists()
    assert "; expected only integers, lists and" in message or "not a complete" in message
    if where in ("alone", "element", "in a list", "in an array"):
        assert f"found the name '{os.system.__module__}.system'" in message
    program = f"import numpy; numpy.load({str(path)!r}, allow_pickle=True)"
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert marker.exists()  # NumPy runs the command.


@pytest.mark.parametrize(
    "call,name",
    [
        (Call(eval, "1"), "builtins.eval"),
        (Call(exec, "1"), "builtins.exec"),
        (Call(getattr, [], "append"), "builtins.getattr"),
        (Call(np.load, "x"), "numpy.load"),
        (Call(np.memmap, "x"), "memmap"),
        (Call(np.fromfile, "x"), "numpy.fromfile"),
        (Call(functools.partial, print), "functools.partial"),
        (Call(operator.attrgetter, "a"), "operator.attrgetter"),
        (Call(np.testing.assert_equal, 1, 1), "numpy.testing"),
        (Call(bytearray, 10), "builtins.bytearray"),
        (np.ma.masked_array([1]), "numpy.ma"),
        (np.dtype("M8[s]"), "the dtype 'M8'"),
        (np.dtype("V2000000000"), "the dtype 'V2000000000'"),
        (np.dtype("U200000000"), "the dtype 'U200000000'"),
        (np.dtype([("a", "i4"), ("b", object)]), "the dtype 'V12'"),
        (np.float64(1), "the dtype 'f8'"),
        (np.zeros(2, np.float32), "the dtype 'f4'"),
        (np.zeros(2, bool), "the dtype 'b1'"),
        (np.zeros((2, 2), int), "an array of 2 dimensions"),
        (np.array(5), "an array of 0 dimensions"),
        (np.zeros(3, int).view(np.recarray), "recarray"),
        ({}, r"the opcode b'}'"),
        (1.5, r"the opcode b'G'"),
        (2**40, r"the opcode b'\x8a'"),
        ({1}, r"the opcode b'\x8f'"),
        (bytearray(3), "the name 'builtins.bytearray'"),
    ],
)
def test_refused_contents_are_named(tmp_path, call, name):
    message = refused(tmp_path / "map.npy", saved(objects([1, call])))
    assert message.startswith(": found ") and name in message


@pytest.mark.parametrize(
    "value,kind",
    [
        (None, "NoneType"),
        ("ab", "str"),
        (b"ab", "bytes"),
        (True, "bool"),
        ((1, 2), "tuple"),
        ([1, None], "list of NoneType, int"),
        ([1, [2]], "list of int, list"),
        ([np.array([1])], "list of Array"),
        (np.array([1, "a"], object), "list of int, str"),
    ],
)
def test_elements_must_be_integers(tmp_path, value, kind):
    message = refused(tmp_path / "map.npy", saved(objects([[1], value])))
    assert message == (
        f", item 1 (from 0): found {kind}, expected an integer, or a list or an array of integers"
    )


def test_recursive_and_deep_lists_are_refused(tmp_path):
    value = [1]
    value.append(value)
    assert ", item 0 (from 0): found list of int, list" in refused(
        tmp_path / "map.npy", saved(objects([value]))
    )
    deep = []
    for _ in range(100_000):
        deep = [deep]
    content = b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b"."
    assert "expected one array of" in refused(tmp_path / "map.npy", with_header(content, "(1,)"))


def hand_made(
    kind="cnumpy\nndarray\n",
    base="K\x00\x85",
    code="C\x01b",
    shape="K\x02\x85",
    dtype="X\x02\x00\x00\x00O8",
    order="X\x01\x00\x00\x00|",
    parts="NNN",
    content="](K\x01K\x02e",
    end="",
):
    """The pickle of the array [1, 2], or of one with other parts."""
    return (
        f"\x80\x03cnumpy.core.multiarray\n_reconstruct\n{kind}{base}{code}\x87R(K\x01{shape}"
        f"cnumpy\ndtype\n{dtype}\x89\x88\x87R(K\x03{order}{parts}J\xff\xff\xff\xffJ\xff\xff\xff\xff"
        f"K?tb\x89{content}tb{end}."
    ).encode("latin-1")


HUGE = "J\xff\xff\xff\x7f"
BROKEN = {
    "another class": ({"kind": "cnumpy\nmatrix\n"}, "the name 'numpy.matrix'"),
    "a dotted name": ({"kind": "cnumpy\nndarray.tofile\n"}, "the name 'numpy.ndarray.tofile'"),
    "no class": ({"kind": "K\x01"}, "an array that is not created as NumPy does"),
    "dtype for class": ({"kind": "cnumpy\ndtype\n"}, "an array that is not created as NumPy does"),
    "large at once": ({"base": f"{HUGE}\x85"}, "an array that is not created as NumPy does"),
    "another code": ({"code": "C\x01O"}, "an array that is not created as NumPy does"),
    "larger than its content": ({"shape": f"{HUGE}\x85"}, "does not have its length, 2147483647"),
    "smaller than its content": ({"shape": "K\x01\x85"}, "does not have its length, 1"),
    "negative": ({"shape": "J\xff\xff\xff\xff\x85"}, "does not have its length, -1"),
    "two dimensions": ({"shape": "K\x01K\x02\x86"}, "an array of 2 dimensions"),
    "a bad order": ({"order": "X\x01\x00\x00\x00x"}, "a structured dtype"),
    "names": ({"parts": "NX\x01\x00\x00\x00aN"}, "a structured dtype"),
    "a subarray": ({"parts": "K\x01NN"}, "a structured dtype"),
    "long strings": ({"dtype": "X\x0b\x00\x00\x00S2147483647"}, "the dtype 'S2147483647'"),
    "a list for the code": ({"dtype": "]"}, "the dtype []"),
    "a tuple for content": ({"content": "K\x01K\x02\x86"}, "does not have its length, 2"),
    "integers of a list": ({"dtype": "X\x02\x00\x00\x00i8"}, "does not have its length, 2"),
    "bytes of objects": ({"content": "C\x02ab"}, "does not have its length, 2"),
    "an extra value": ({"end": "K\x01"}, "expected one array"),
    "bytes at the end": ({"end": "."}, "expected one array of 2 objects"),
    "a far memo": ({"end": "h\x77"}, "not a complete .npy file"),
    "a function with a state": ({"end": "cnumpy\ndtype\nNb"}, "not a complete .npy file"),
    "ndarray called": ({"kind": "cnumpy\nndarray\n(K\x01tR"}, "not a complete .npy file"),
}  # fmt: skip


def test_hand_made_array_is_read(tmp_path):
    (tmp_path / "map.npy").write_bytes(with_header(hand_made(), "(2,)"))
    assert plain(safe_pickle.load_object_array(str(tmp_path / "map.npy"))) == [1, 2]
    np.testing.assert_array_equal(np.load(tmp_path / "map.npy", allow_pickle=True), [1, 2])


@pytest.mark.parametrize("name", BROKEN)
def test_arrays_must_be_created_as_numpy_does(tmp_path, name):
    changed, fault = BROKEN[name]
    assert fault in refused(tmp_path / "map.npy", with_header(hand_made(**changed), "(2,)"))


def test_list_that_grows_after_it_became_an_array(tmp_path):
    # The list is stored as memo 0, becomes the content, and then gets a third element.
    content = hand_made(content="]q\x00(K\x01K\x02e")[:-1]
    content += b"\x85h\x00K\x03a\x86."
    assert "expected one array of" in refused(tmp_path / "map.npy", with_header(content, "(2,)"))
    nested = hand_made(content="]q\x00(K\x01K\x02e", end="\x85q\x01h\x00K\x03a")
    assert "expected one array of" in refused(tmp_path / "map.npy", with_header(nested, "(2,)"))


@pytest.mark.parametrize(
    "content,fault",
    [
        (b"", "not a complete .npy file"),
        (b"\x93NUMPY", "not a complete .npy file"),
        (b"PK\x03\x04 a zip", "not a complete .npy file"),
        (pickle.dumps([1]), "not a complete .npy file"),
        (saved(np.zeros(3)), "found float64 (3,), expected objects in one dimension"),
        (saved(np.array([[1, 2]], object)), "object (1, 2), expected objects in one dimension"),
        (saved(objects([1, 2]))[:-1], "not a complete .npy file"),
        (saved(objects([1, 2]))[:130], "not a complete .npy file"),
        (saved(objects([1, 2]))[:128], "not a complete .npy file"),
        (saved(objects([1, 2])) + b"x", "expected one array of 2 objects"),
        (with_header(NUMPY_1, "(5,)"), "expected one array of 5 objects"),
        (with_header(NUMPY_1, "(7,)"), "expected one array of 7 objects"),
        (with_header(NUMPY_1, "(1 << 60,)"), "not a complete .npy file"),
        (with_header(NUMPY_1, "(0x" + "f" * 9000 + ",)"), "not a complete .npy file"),
        (with_header(NUMPY_1, "(-6,)"), "expected one array of -6 objects"),
        (with_header(NUMPY_1, descr="[('a', 'O')]"), "expected objects in one dimension"),
        (with_header(NUMPY_1, "(" * 4000), "not a complete .npy file"),
        (with_header(NUMPY_1, "-" * 9000 + "6"), "not a complete .npy file"),
        (with_header(NUMPY_1).replace(b"NUMPY\x01", b"NUMPY\x03"), "version (3, 0)"),
        (with_header(NUMPY_1).replace(b"\x80\x03", b"\x80\x77"), "unsupported pickle protocol"),
        (with_header(pickle.dumps([1, 2])), "expected one array of 6 objects"),
        (with_header(b"\x80\x04N."), "expected one array of 6 objects"),
        (with_header(b"\x80\x04\x82\x01."), r"the opcode b'\x82'"),  # An extension code.
        (with_header(b"Px\n."), "the opcode b'P'"),  # A persistent id.
        (with_header(b"\x80\x04K\x01Q."), "the opcode b'Q'"),
        (with_header(b"(ios\nsystem\n."), "the opcode b'i'"),
        (with_header(b"cos\nsystem\n."), "the name 'os.system'"),
        (with_header(b"\x80\x04X\x03\x00\x00\x00o\ns\x8c\x01\x1b\x93."), r"the name 'o\ns.\x1b'"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_invalid_files_are_refused(tmp_path, content, fault):
    assert fault in refused(tmp_path / "map.npy", content)


def test_files_that_cannot_be_opened(tmp_path):
    assert "No such file" in refused(tmp_path / "none.npy")
    assert "not a regular file" in refused(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04K\x01r\xff\xff\xff\x0f.",  # The memo of 2^28 values.
        b"\x80\x04B\xff\xff\xff\x7fabc.",  # Bytes of 2 GiB.
        b"\x80\x04X\xff\xff\xff\x7fabc.",  # A text.
        b"\x80\x04\x95\xff\xff\xff\xff\x03\x00\x00\x00K\x01.",  # A frame of 16 GiB.
        b"\x80\x05\x96\xff\xff\xff\x7f\x00\x00\x00\x00abc.",  # A bytearray.
        hand_made(shape=f"{HUGE}\x85", content="C\x01a", dtype="X\x02\x00\x00\x00i8"),
        hand_made(base=f"{HUGE}\x85"),
        hand_made(dtype="X\x0b\x00\x00\x00V2147483647", content="C\x01a"),
    ],
)
def test_small_files_use_little_memory(tmp_path, content):
    tracemalloc.start()
    try:
        refused(tmp_path / "map.npy", with_header(content))
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


# Audit events of Python while a file is read.
EVENTS = set()
ALLOWED = {"open", "mmap.__new__", "compile", "import"}  # NumPy parses headers with `ast`.
_watching = False


def _watch(event, _):
    if _watching:
        EVENTS.add(event)


@pytest.fixture(scope="module", autouse=True)
def audit():
    sys.addaudithook(_watch)  # It cannot be removed; without `_watching` it does nothing.


def load_watched(path):
    """The contents, or None if they are refused; checks that nothing is run."""
    global _watching
    EVENTS.clear()
    _watching = True
    try:
        return plain(safe_pickle.load_object_array(str(path)))
    except InputError as error:
        assert str(error).startswith(str(path)) and str(error).isprintable()
        return None
    finally:
        _watching = False
        assert EVENTS <= ALLOWED, EVENTS


VALID = [
    with_header(NUMPY_1),
    saved(objects([[1, 2], np.int64(3), np.array([4, 5]), -1])),
    with_header(pickle.dumps(objects([[1], Call(os.getpid)])), "(2,)"),
]
WORDS = (
    *(b"cos\ngetpid\n", b"cbuiltins\neval\n", b"\x8c\x02os\x8c\x06getpid\x93", b"C\x03os."),
    *(b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"(tR", b"b", b"R", b".", b"h\x00", b"h\x05"),
    b"r\x00\x00\x00\x7f",
)
CHUNKS = st.binary(min_size=1, max_size=6) | st.sampled_from(WORDS)


def test_audit_hook_sees_code_that_runs(tmp_path):
    path = tmp_path / "map.npy"
    path.write_bytes(with_header(pickle.dumps(objects([[1], Call(os.listdir, ".")])), "(2,)"))
    global _watching
    EVENTS.clear()
    _watching = True
    np.load(path, allow_pickle=True)
    _watching = False
    assert {"os.listdir", "pickle.find_class"} <= EVENTS - ALLOWED


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=700, deadline=None)
@given(
    base=st.sampled_from(VALID),
    changes=st.lists(st.tuples(st.integers(0, 520), st.integers(0, 12), CHUNKS), max_size=4),
    cut=st.none() | st.integers(0, 520),
)
def test_mutated_files_are_read_or_refused(tmp_path_factory, base, changes, cut):
    path = tmp_path_factory.getbasetemp() / "mutated.npy"
    content = base
    for at, removed, new in changes:
        content = content[:at] + new + content[at + removed :]
    path.write_bytes(content[:cut])
    loaded = load_watched(path)
    if content[:cut] == base:
        assert (loaded is None) == (base is VALID[2])


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=60) | st.lists(CHUNKS, max_size=20).map(b"".join))
def test_random_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random.npy"
    path.write_bytes(with_header(content))
    load_watched(path)
    path.write_bytes(content)
    assert load_watched(path) is None
