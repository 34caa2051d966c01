"""Reference statistics in the forms of others."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from cmtool.errors import DataError
from cmtool.io.extractors import is_statistics, read_statistics, write_statistics

MU, SIGMA = np.arange(3.0), np.arange(9.0).reshape(3, 3)


def write(path, form):
    if form == "edm":
        np.savez(path / "edm.npz", mu=MU, sigma=SIGMA)
    elif form == "adm":  # with images beside, and a second kind of features
        more = {"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
        np.savez(path / "adm.npz", mu=MU.astype(np.float32), sigma=SIGMA, **more)
    elif form == "ours":
        mu, sigma = torch.from_numpy(MU), torch.from_numpy(SIGMA)
        write_statistics(path / "ours.npz", mu, sigma, {"features": "inception", "images": 7}, torch.ones(7, 3))
    else:
        sigma = np.asarray(SIGMA, order=form[-1])
        both = {"fid": {"mu": MU, "sigma": sigma}, "fd_dinov2": {"mu": MU[:2], "sigma": np.eye(2)}}
        (path / f"{form}.pkl").write_bytes(pickle.dumps(both))


@pytest.mark.parametrize("form", ["edm", "adm", "ours", "edm2-C", "edm2-F"])
def test_statistics_of_others(tmp_path, form):
    write(tmp_path, form)
    (file,) = tmp_path.iterdir()
    assert is_statistics(str(file))
    found = read_statistics(str(file))
    assert np.array_equal(found["inception"]["mu"], MU)
    assert np.array_equal(found["inception"]["sigma"], SIGMA)
    assert found["inception"]["sigma"].dtype == np.float64
    assert ("dinov2" in found) == form.startswith("edm2")
    if form == "ours":
        assert (found["inception"]["images"], found["inception"]["vectors"].shape) == (7, (7, 3))


def test_what_is_none(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    assert not is_statistics(str(tmp_path / "images.npz"))
    assert not is_statistics(str(tmp_path))
    assert not is_statistics("digits")
    bad = tmp_path / "bad.npz"
    for mu, sigma in ((MU, SIGMA[:2]), (MU[None], SIGMA), (MU * np.nan, SIGMA)):
        np.savez(bad, mu=mu, sigma=sigma)
        with pytest.raises(DataError, match="no statistics of inception"):
            read_statistics(str(bad))
    np.savez(bad, mu=np.array([object()]), sigma=SIGMA)
    with pytest.raises(DataError, match="cannot be read"):
        read_statistics(str(bad))
    for held in ({"other": 1}, {"fid": {"mu": [1.0], "sigma": "none"}}, [1]):
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(held))
        with pytest.raises(DataError, match="no statistics"):
            read_statistics(str(tmp_path / "bad.pkl"))
    (tmp_path / "bad.pkl").write_bytes(b"no pickle")
    with pytest.raises(DataError, match="cannot be read"):
        read_statistics(str(tmp_path / "bad.pkl"))
