"""Several processes at one training: the same training as one process, to rounding."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from cmtool.errors import DependencyError, TrainingError
from cmtool.processes import Processes
from cmtool.times import Times
from cmtool.training.distributed import checksum, shard
from cmtool.training.objectives import Drawn
from cmtool.training.trajectory import Batch
from tests import team
from tests.team import Case
from tests.unit.test_trainer import NETWORK, QUICK_RECIPE, trainer

BATCH = {"batch": 17}  # shared by two or four, some have one more
CONVOLUTIONS = BATCH | {"network": NETWORK}
STEPS = 3
SPREAD, PIECES = {"sharded": True}, {"micro_batch": 2}
CASES = {
    2: [
        Case("CD_RECIPE", {}, BATCH, STEPS),
        Case("CT_RECIPE", SPREAD | PIECES, BATCH, STEPS),
        Case("SCD_RECIPE", SPREAD, CONVOLUTIONS, STEPS),  # a derivative of a network that is spread
        Case("PD_RECIPE", PIECES, BATCH),
        Case("PD_RECIPE", SPREAD, BATCH),
        Case("TCM_RECIPE", PIECES, BATCH, STEPS),
        Case("MEANFLOW_RECIPE", SPREAD | PIECES, BATCH, STEPS),
        Case("REFLOW_RECIPE", {}, BATCH, STEPS),
        Case("AUGMENTED_RECIPE", {}, BATCH, STEPS),
        Case("EDM_RECIPE", SPREAD | {"compute_dtype": torch.bfloat16}, BATCH, STEPS),
        Case("EDM_RECIPE", {"checkpoint_activations": True}, BATCH, STEPS),
        Case(
            "QUICK_RECIPE", {}, BATCH | {"network": replace(QUICK_RECIPE.network, augment_dim=9)}, STEPS
        ),  # leaves weights
    ],
    4: [
        Case("SCD_RECIPE", PIECES, BATCH, STEPS),
        Case("TCM_RECIPE", SPREAD, BATCH, STEPS),
    ],
}


@pytest.fixture(scope="module", params=CASES)
def done(request, tmp_path_factory):
    count = request.param
    return count, team.trained(count, CASES[count], tmp_path_factory.mktemp("team"))


def test_any_number_of_processes_is_the_same_training(done):
    count, results = done
    for case, found in zip(CASES[count], results, strict=True):
        options = {name: value for name, value in case.options.items() if name != "sharded"}
        alone = team.results(replace(case, options=options))
        # bfloat16 rounds what rounding has moved once more.
        close = {"rtol": 2e-2, "atol": 2e-4} if "compute_dtype" in options else {"rtol": 2e-5, "atol": 2e-7}
        for name in ("losses", "norms", "weights", "learned"):
            torch.testing.assert_close(
                found[name], alone[name], **close, msg=lambda text, c=case, n=name: f"{c}, {n}: {text}"
            )
        assert 0 < len(found["seen"][0]) <= len(alone["seen"][0]) // count + 2, case
        assert set(found["seen"][0]) <= set(alone["seen"][0]), case


def test_spread_weights_take_a_part_of_the_memory(done):
    count, results = done
    for case, found in zip(CASES[count], results, strict=True):
        size = sum(value.numel() for value in found["weights"]["model"].values())
        held = found["held"]
        assert held == size or case.options.get("sharded"), case
        assert held < 1.2 * size / count or not case.options.get("sharded"), case


def drawn(total: int) -> Drawn:
    numbers = torch.arange(total, dtype=torch.float32)
    batch = Batch(numbers[:, None, None, None], None, numbers[:, None, None, None])
    return Drawn(torch.nn.Identity(), 0.5, batch, Times(numbers, numbers, numbers), numbers.long())  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["2.7.0", "2.8.1+cpu"])
def test_an_old_torch_would_spread_wrong(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    with pytest.raises(DependencyError, match=f"2.9 or newer, found {re.escape(version)}"):
        shard(torch.nn.Linear(2, 2), torch.device("cpu"))


@pytest.mark.parametrize(("total", "count", "size"), [(17, 4, None), (17, 4, 1), (5, 2, 1), (4, 4, 3), (9, 2, 4)])
def test_all_processes_have_equally_many_pieces_of_what_adds_up_to_the_batch(total, count, size):
    pieces = []
    for rank in range(count):
        one = Processes()
        one.rank, one.count = rank, count
        pieces.append(list(drawn(total).pieces(size, one)))
    assert len({len(own) for own in pieces}) == 1
    counted = [piece for own in pieces for piece in own if piece.weight]
    assert torch.cat([piece.times.t for piece in counted]).tolist() == list(range(total))
    assert sum(piece.weight for piece in counted) == pytest.approx(0.5)
    for piece in counted:
        assert len(piece.batch.x0) <= (size or total)
        assert piece.weight == pytest.approx(0.5 * len(piece.batch.x0) / total)
    for piece in (piece for own in pieces for piece in own):
        assert len(piece.batch.x0) == len(piece.seeds) >= 1


def test_checksums_see_a_single_bit():
    one, other = trainer(QUICK_RECIPE).model.network, trainer(QUICK_RECIPE).model.network
    assert checksum(one) == checksum(other)
    weight = next(other.parameters()).data.view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    assert checksum(one) != checksum(other)


def test_checksums_see_what_has_changed_places():
    other = trainer(QUICK_RECIPE).model.network
    with torch.no_grad():
        same = [parameter for parameter in other.parameters() if parameter.ndim == 1][:2]
        same[0][0], same[1][0] = 1.0, 2.0
        before = checksum(other)
        same[0][0], same[1][0] = 2.0, 1.0
    assert checksum(other) != before


class Disagreeing(Processes):
    """Two processes, of which the other holds other weights."""

    count = 2

    def smallest(self, values):
        return values - 1


def test_weights_that_drift_apart_end_the_training():
    made = trainer(QUICK_RECIPE)
    made.processes = Disagreeing()
    with pytest.raises(TrainingError, match="do not begin with the same weights"):
        made._compare([made.model])
    made.step = 100
    with pytest.raises(TrainingError, match="at step 100 the processes no longer hold the same weights"):
        made._compare([made.model])
