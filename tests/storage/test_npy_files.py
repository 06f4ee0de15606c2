"""Arrays of any origin: what numpy has saved is read as it is, and headers take no memory."""

import numpy as np
import pytest

from vixml_jax.errors import InputError
from vixml_jax.storage import npy_files


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (4, 2, 3), (0, 5), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<i8", "|u1"])
def test_arrays_are_read_as_they_were_saved(tmp_path, version, shape, order, dtype):
    values = np.random.default_rng().integers(0, 100, shape).astype(dtype)
    saved = np.asarray(values, order=order)
    path = str(tmp_path / "x.npy")
    with open(path, "wb") as file:
        np.lib.format.write_array(file, saved, version)
    found = npy_files.open_mapped(path, "write it again", any_order=True)
    assert found.dtype == saved.dtype
    np.testing.assert_array_equal(found, values)
    if saved.flags.c_contiguous:
        np.testing.assert_array_equal(npy_files.open_mapped(path, "write it again"), values)
    else:
        with pytest.raises(InputError, match=r"x\.npy: damaged .*transposed\); write it again"):
            npy_files.open_mapped(path, "write it again")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 8)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False}",
        "(" * 9000,
        "",
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header):
    path = tmp_path / "x.npy"
    text = header.encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16))
    with pytest.raises(InputError, match=r"^.*x\.npy: .*; write it again$"):
        npy_files.open_mapped(str(path), "write it again", any_order=True)
