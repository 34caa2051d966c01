"""The benchmark: both sides do the same work, its counts are right, and workers end with what they were made for."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch

from cmtool.benchmark import measure, ours, peer, profile, rows, shared, workers
from cmtool.benchmark.measure import Result, Timing
from cmtool.benchmark.rows import ROWS, Calls
from cmtool.benchmark.shared import NETWORK, Setup
from cmtool.errors import UsageError, UserError
from cmtool.flow import EDM, VE, BoundaryEDM
from cmtool.generate import generate
from cmtool.generate import noise_of as starting_noise
from cmtool.networks import native, winograd
from cmtool.networks.convolution import Conv2d
from cmtool.networks.norms import GroupNorm

pytest.importorskip("diffusers")

TINY = replace(NETWORK, resolution=8, channels=32, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(4,))
SETUP = Setup(TINY, batch=3)


# --- the same work ---------------------------------------------------------------------------------------------------


def test_the_networks_are_the_same_function():
    assert measure.compare(SETUP) < 1e-5


def test_the_models_are_the_same_function():
    x, sigma = torch.randn(3, 3, 8, 8), torch.tensor([0.01, 1.0, 40.0])
    x = x * sigma[:, None, None, None]
    net = peer.unet(SETUP)
    with torch.no_grad():
        teacher = ours.model(SETUP, "denoiser").denoised(x, sigma)
        torch.testing.assert_close(peer.edm_denoised(net, x, sigma), teacher, rtol=1e-4, atol=1e-5)
        student = ours.model(SETUP, "consistency").jump(x, sigma, torch.full((3,), VE().t_min))
        torch.testing.assert_close(peer.consistency(net, x, sigma), student, rtol=1e-4, atol=1e-5)


def test_solving_a_teacher_is_the_same():
    model = ours.model(SETUP, "denoiser")
    (made,) = generate(model, [0, 1], solver="heun", steps=rows.SOLVER_STEPS, clip=False)
    with torch.no_grad():
        found = peer.heun(peer.unet(SETUP), starting_noise([0, 1], model)(0))
    torch.testing.assert_close(found, made.images, rtol=1e-4, atol=1e-4)


def counted(job) -> tuple[int, object]:
    """Network calls of a job, and what it returned."""
    calls = []

    def note(module, args):
        if type(module).__name__ in ("ADM", "UNet2DModel"):
            calls.append(module)

    with torch.nn.modules.module.register_module_forward_pre_hook(note):
        made = job()
    return len(calls), made


@pytest.mark.parametrize("module", [ours, peer], ids=["ours", "peer"])
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.trains])
def test_a_round_of_training_asks_the_network_as_often_as_its_row_says(name, module):
    job = module.job(name, SETUP)
    assert [counted(job)[0] for _ in range(2)] == [ROWS[name].calls.total] * 2


@pytest.mark.parametrize("module", [ours, peer], ids=["ours", "peer"])
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.trains])
def test_a_round_of_sampling_makes_images_in_as_many_calls_as_its_row_says(name, module):
    calls, made = counted(module.job(name, SETUP))
    images = made[0].images if isinstance(made, list) else made
    assert images.shape == (3, 3, 8, 8)
    assert images.isfinite().all()
    assert calls == ROWS[name].calls.total


def test_the_recipes_are_the_peers_settings():
    recipe = ours.recipe("cd-heun", SETUP)
    assert recipe.batch == 3
    assert recipe.objective.decay(0.5) == rows.TARGET
    assert recipe.averages[0].decay(10**6, 3) == rows.AVERAGE
    assert recipe.optimizer.rate(0.0, 1) == recipe.optimizer.rate(1.0, 10**9) == rows.LEARNING_RATE
    assert isinstance(ours.model(SETUP, "denoiser").parameterization, EDM)
    assert isinstance(ours.model(SETUP, "consistency").parameterization, BoundaryEDM)
    assert ours.second_time() == pytest.approx(float(peer.karras_sigmas(rows.SAMPLING_GRID)[rows.SECOND]), rel=1e-5)


# --- counting --------------------------------------------------------------------------------------------------------


def test_calls_and_passes():
    assert (Calls(trained=1).total, Calls(trained=1).passes) == (1, 3)
    assert (Calls(trained=1, forward=3).total, Calls(trained=1, forward=3).passes) == (4, 6)
    assert Calls(trained=1, forward=1, derived=1).passes == 6
    assert ROWS["heun-18"].calls.total == 35


def test_flops_are_those_of_the_layers():
    """By hand, for a network without attention: two for each multiply-add of its convolutions and linear layers."""
    config = replace(TINY, attention_resolutions=())
    counted = 0

    def note(module, args, out):
        nonlocal counted
        if isinstance(module, torch.nn.Conv2d):
            counted += 2 * out.shape[1:].numel() * module.weight[0].numel()
        if isinstance(module, torch.nn.Linear):
            counted += 2 * module.weight.numel()

    network = shared.network(config)
    with torch.nn.modules.module.register_module_forward_hook(note), torch.no_grad():
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    without_attention = measure.count_flops(config)
    assert without_attention >= counted
    assert without_attention == pytest.approx(counted, rel=0.05)  # the middle has attention
    assert measure.count_parameters(config) == sum(p.numel() for p in network.parameters())


def test_timings():
    timing = Timing(8, (2.0, 4.0, 1.0), None)
    assert timing.rate == 4.0
    assert timing.spread == (8 - 2) / 4
    row = ROWS["cd-heun"]
    result = Result(row, 10, 480.0, timing, Timing(8, (8.0,), 100))
    assert result.ratio == 4.0
    assert result.share == 6 * 10 * 4.0 / 480
    assert result.memory_ratio is None
    assert replace(result, ours=replace(timing, memory=25)).memory_ratio == 0.25
    assert replace(result, peer=None).ratio is None


def test_the_ceiling_is_made_of_the_networks_convolutions():
    found = measure.find_ceiling(replace(SETUP, batch=2), True)
    assert len(found.convolutions) == 2
    rates = [*found.convolutions.values()]
    assert min(rates) <= found.rate <= max(rates)
    assert found.matmul > 1e6
    lucky = replace(found, convolutions={name: 2 * rate for name, rate in found.convolutions.items()}, matmul=1.0)
    best = found.or_better(lucky)
    assert (best.convolutions, best.matmul, best.rate) == (lucky.convolutions, found.matmul, found.rate)


# --- where the time goes ---------------------------------------------------------------------------------------------


def test_a_profile_names_what_takes_the_time():
    x, w = torch.randn(8, 32, 16, 16).contiguous(memory_format=torch.channels_last), torch.randn(32, 32, 3, 3)
    flat, mean, q = torch.randn(400, 400), torch.zeros(400, 400), torch.randn(2, 2, 256, 32)
    jobs = {
        "convolutions": lambda: torch.conv2d(x, w, padding=1),
        "norms": lambda: torch.nn.functional.group_norm(x, 8),
        "attention": lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q),
        "matrix products": lambda: flat @ flat,
        "optimizer and averages": lambda: torch._foreach_lerp_([mean], [flat], 0.5),
        "sums, copies, noise": lambda: flat + flat,
        profile.REST: lambda: time.sleep(1e-3),
    }
    for kind, job in jobs.items():
        found = profile.measure(lambda job=job: [job() for _ in range(30)])
        assert [*found] == [*jobs]
        assert sum(found.values()) == pytest.approx(1)
        assert min(found.values()) >= 0
        rest = found.pop(profile.REST) if kind != profile.REST else 0
        assert max(found, key=found.get) == kind
        assert rest < 0.9


@pytest.mark.skipif(winograd.library() is None, reason="no compiler on this machine")
def test_a_profile_knows_what_is_computed_by_c_of_ours():
    norm, conv = GroupNorm(32, eps=1e-5, group_channels=4), Conv2d(32, 32, 3)
    x = torch.randn(8, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    before = winograd.forward, native.forward
    with torch.no_grad():
        both = profile.measure(lambda: [norm(conv(x)) for _ in range(30)])
        one = profile.measure(lambda: [norm(x, silu=True) for _ in range(30)])
    assert min(both["convolutions"], both["norms"]) > 0.05
    assert one["norms"] > 0.3
    assert one["convolutions"] == 0
    assert before == (winograd.forward, native.forward)


def test_the_profile_of_a_row():
    found = profile.shares(ROWS["edm"], replace(SETUP, threads=1))
    assert sum(found.values()) == pytest.approx(1)
    assert found["convolutions"] > 0.05
    assert found["optimizer and averages"] > 0


def test_rows_are_named():
    assert [row.name for row in rows.parse("ect, edm,ect")] == ["ect", "edm"]
    with pytest.raises(UsageError, match="no row 'cdd'"):
        rows.parse("cdd")


# --- workers ---------------------------------------------------------------------------------------------------------


def sleeper():
    return lambda: (time.sleep(0.05), os.getpid())[1]


def grabber(size):
    def job():
        return torch.ones(size // 4).sum().item()

    return job


def failing(error):
    def job():
        raise error

    return job


def dying():
    return lambda: os.kill(os.getpid(), 9)


def refusing():
    raise UserError("not like this", "like that")


def test_a_worker_is_another_process_and_is_timed():
    worker = workers.Worker("sleep", sleeper, returns=True)
    try:
        one, two = worker.round(), worker.round()
        assert one.value == two.value != os.getpid()
        assert 0.05 <= one.seconds < 5
    finally:
        worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(one.value, 0)


def test_its_memory_is_its_own():
    worker = workers.Worker("grab", grabber, 64 * 2**20, threads=1)
    try:
        memory = worker.round().memory
    finally:
        worker.close()
    assert memory is None or 50 * 2**20 < memory < 200 * 2**20


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (failing, (ValueError("bad value"),), "ValueError: bad value"),
        (failing, (UserError("no such thing", "try another"),), "no such thing"),
        (dying, (), "killed by signal 9"),
    ],
)
def test_a_worker_that_fails_says_how(make, given, message):
    worker = workers.Worker("the job", make, *given)
    try:
        with pytest.raises(UserError, match=message) as caught:
            worker.round()
        assert caught.value.message.startswith("the job: ")
        assert caught.value.hint
    finally:
        worker.close()


def test_a_worker_that_cannot_begin():
    with pytest.raises(UserError, match="the job: not like this") as caught:
        workers.Worker("the job", refusing)
    assert caught.value.hint == "like that"
