"""aihwkit's device models as noise models, against aihwkit itself."""

import itertools
import sys

import pytest
import torch
from aihwkit.inference import (
    GlobalDriftCompensation,
    PCMLikeNoiseModel,
    ReRamCMONoiseModel,
    ReRamWan2022NoiseModel,
)
from aihwkit.inference.noise.hermes import HermesNoiseModel
from aihwkit.nn import AnalogLinear as AihwkitLinear
from aihwkit.simulator.configs import SingleRPUConfig, TorchInferenceRPUConfig
from aihwkit.simulator.configs.devices import ConstantStepDevice
from aihwkit.simulator.tiles import AnalogTile as AihwkitTile
from scipy.stats import ks_2samp
from torch import nn

from analog_plugin import AnalogError, AnalogLinear, AnalogScheme
from analog_plugin.noise import noise_label, program_tiles, resolve_noise

THEIRS = {
    "pcm_like": PCMLikeNoiseModel,
    "hermes": HermesNoiseModel,
    "hermes, one device": lambda: HermesNoiseModel(num_devices=1),
    "reram_wan2022": lambda: ReRamWan2022NoiseModel(g_max=40.0),
    "reram_cmo": ReRamCMONoiseModel,
}
OURS = {name: {"name": name.partition(",")[0]} for name in THEIRS}
OURS["hermes, one device"]["devices"] = 1
each_model = pytest.mark.parametrize("name", THEIRS)
DAY = 86_400.0
ROWS, COLUMNS = 256, 400  # 102,400 devices


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(columns=COLUMNS, rows=ROWS, seed=1):
    return torch.randn(columns, rows, generator=generator(seed)) * 0.05


def ours(name, weight, seed=0, **options):
    """Programmed weights [columns, rows] and the factor behind the ADC."""
    noise = resolve_noise(OURS[name] | options)
    (tile,) = program_tiles(noise, weight, [weight.shape[1]], generator(seed))
    return tile


def theirs(name, weight, time=None, compensation=False):
    """The same from a layer of aihwkit, on its torch tile."""
    config = TorchInferenceRPUConfig()
    config.noise_model = THEIRS[name]()
    config.drift_compensation = GlobalDriftCompensation() if compensation else None
    config.mapping.weight_scaling_omega = 1.0
    config.mapping.weight_scaling_columnwise = True
    config.mapping.max_input_size = config.mapping.max_output_size = 0
    config.forward.is_perfect = True
    layer = AihwkitLinear(weight.shape[1], weight.shape[0], bias=False, rpu_config=config).eval()
    layer.set_weights(weight, None)
    torch.manual_seed(11)
    layer.program_analog_weights()
    if time is not None:
        layer.drift_analog_weights(time)
    (tile,) = layer.analog_tiles()
    return layer.get_weights()[0], float(tile.alpha)


def errors(made, weight):
    return ((made - weight) / weight.abs().amax(1, keepdim=True)).flatten().double().numpy()


@each_model
@pytest.mark.parametrize("time", [None, DAY], ids=["programmed", "a day later"])
def test_errors_are_distributed_as_aihwkit_s_own(name, time):
    weight = weights()
    options = {"compensation": False} | ({} if time is None else {"time": time})
    made = ours(name, weight, **options).weight
    reference, _ = theirs(name, weight, time)
    first, second = errors(made, weight), errors(reference, weight)
    assert ks_2samp(first, second).pvalue > 1e-3
    assert first.std() == pytest.approx(second.std(), rel=0.02)
    assert not torch.equal(made, reference)


@pytest.mark.parametrize("name", ["pcm_like", "hermes", "hermes, one device"])
def test_the_drift_compensation_is_aihwkit_s(name):
    weight = weights()
    _, alpha = theirs(name, weight, DAY, compensation=True)
    tile = ours(name, weight, time="1d")
    assert tile.output_scale == pytest.approx(alpha, rel=2e-3) and alpha > 1.1
    assert ours(name, weight, time="1d", compensation=False).output_scale == 1.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pcm_like", {0.3: 2.99, 0.5: 3.81, 0.7: 4.26}),
        ("hermes", {0.3: 4.56, 0.5: 4.79, 0.7: 4.45}),
    ],
)
def test_programming_noise_in_percent_of_the_full_conductance(name, expected):
    """Measured once with aihwkit 1.1.0."""
    for target, sigma in expected.items():
        weight = torch.full((1, 100_001), target)
        weight[0, 0] = 1.0  # the column's maximum
        made = ours(name, weight).weight[0, 1:]
        assert 100 * float(made.std()) == pytest.approx(sigma, rel=0.02)


def test_one_seed_is_one_chip_at_every_time():
    weight = weights(40).abs()
    # Neither programming nor read noise: what is left is the drift of each device.
    states = [ours("pcm_like", weight, scale=0.0, compensation=False)] + [
        ours("pcm_like", weight, scale=0.0, compensation=False, time=time)
        for time in ("1h", "1d", "1y")
    ]
    for before, after in itertools.pairwise(states):
        assert (after.weight <= before.weight).all()
    assert torch.equal(ours("hermes", weight).weight, ours("hermes", weight).weight)
    assert not torch.equal(ours("hermes", weight, seed=1).weight, ours("hermes", weight).weight)


def test_errors_grow_with_time_and_compensation_helps():
    weight = weights()
    spread = {}
    for time in ("1s", "1h", "1d", "30d", "1y"):
        tile = ours("hermes", weight, time=time)
        spread[time] = float(((tile.weight * tile.output_scale) - weight).std())
        alone = ours("hermes", weight, time=time, compensation=False).weight
        assert time == "1s" or spread[time] < float((alone - weight).std())
    assert list(spread.values()) == sorted(spread.values())


def test_the_compensation_acts_behind_the_adc():
    torch.manual_seed(0)
    scheme = AnalogScheme(tile_rows=32, out_bound=1.0)  # so narrow that outputs saturate
    layer = AnalogLinear.from_linear(nn.Linear(64, 24, bias=False), scheme).eval()
    layer.set_input_range(2.0)
    x = torch.randn(50, 64)

    def outputs(**options):
        layer.program(resolve_noise({"name": "pcm_like", "time": "1y"} | options), 3)
        return layer(x).detach()

    one = torch.zeros_like(x)
    one[:, :32] = x[:, :32]  # the first tile alone
    x = one
    made, plain = outputs(), outputs(compensation=False)
    saturated = plain.abs() >= 0.999 * plain.abs().amax(0)
    assert saturated.float().mean() > 0.05
    ratio = made[plain != 0] / plain[plain != 0]
    assert float(ratio.min()) > 1.05
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)


@each_model
def test_nothing_else_is_touched(name):
    weight = weights(6)
    weight[2] = 0
    before, state = weight.clone(), torch.get_rng_state()
    tile = ours(name, weight, **({} if name == "reram_wan2022" else {"time": 0}))
    assert torch.equal(weight, before) and torch.equal(torch.get_rng_state(), state)
    assert tile.weight.isfinite().all() and torch.equal(tile.weight[2], torch.zeros(ROWS))
    assert torch.equal(ours(name, torch.zeros(3, 8)).weight, torch.zeros(3, 8))
    assert tile.weight.dtype == ours(name, weight.bfloat16()).weight.dtype == torch.float32


@each_model
def test_noise_is_relative_to_the_weights(name):
    weight = weights(20)
    torch.testing.assert_close(ours(name, weight * 64).weight, ours(name, weight).weight * 64)


def test_names_carry_level_and_time():
    noise = resolve_noise("hermes:1.5@1h")
    assert noise.time == 3600.0 and noise.model.prog_noise_scale == 1.5
    assert noise_label("hermes:1.5@1h") == "hermes:1.5@1h"
    assert resolve_noise({"name": "pcm_like", "time": 25}).time == 25.0
    assert resolve_noise("pcm_like").time is None
    assert resolve_noise("reram_cmo@2min").time == 120.0


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ("hermes@soon", r"time is 'soon'.*write time: 1h"),
        ("hermes@-1s", r"from 0 to 1000 years"),
        ({"name": "hermes", "time": True}, r"from 0 to 1000 years"),
        ("hermes@2000y", r"from 0 to 1000 years"),
        ("hermes@nan", r"from 0 to 1000 years"),
        ("pcm@1d", r"'pcm' has no argument 'time'; it takes scale"),
        ("reram_wan2022@1h", r"measured 1s, 1d and 2d.*write time: 1d"),
        ("reram_cmo@1e-9s", r"0 or at least 1 ms"),
        ("pcm_like:-1", r"scale is -1.0.*from 0 to below 100; write pcm_like:1.5"),
        ({"name": "hermes", "devices": 3}, r"devices is 3, but must be 1 or 2"),
        ({"name": "hermes", "compensation": "no"}, r"compensation is 'no'.*true or false"),
        ({"name": "reram_cmo", "acceptance": 1}, r"acceptance is 1, but must be 0.2 or 2"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(noise, message):
    with pytest.raises(AnalogError, match=message):
        resolve_noise(noise)


def test_without_aihwkit_one_line_says_how_to_install_it(monkeypatch):
    for module in [m for m in sys.modules if m.partition(".")[0] == "aihwkit"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "aihwkit", None)
    with pytest.raises(AnalogError, match=r"pip install --no-deps aihwkit==1\.1\.0"):
        resolve_noise("hermes")


def test_stuck_weights_are_distributed_as_aihwkit_s_corrupt_devices():
    device = ConstantStepDevice(
        corrupt_devices_prob=0.3, corrupt_devices_range=1.0, w_min=-1, w_max=1, w_min_dtod=0,
        w_max_dtod=0,
    )  # fmt: skip
    tile = AihwkitTile(COLUMNS, ROWS, SingleRPUConfig(device=device))
    bounds = tile.get_hidden_parameters()
    corrupt = bounds["min_bound"] == bounds["max_bound"]
    weight = weights()
    (made,) = program_tiles(resolve_noise("stuck:0.3"), weight, [ROWS], generator())
    stuck = made.weight != weight
    assert float(stuck.float().mean()) == pytest.approx(float(corrupt.float().mean()), abs=0.01)
    unit = (made.weight / weight.abs().amax(1, keepdim=True))[stuck]
    assert ks_2samp(unit.numpy(), bounds["min_bound"][corrupt].numpy()).pvalue > 1e-3


def test_stuck_devices_of_a_drifting_chip_stay_stuck():
    weight = weights(40)
    (now,), (later,), (alone,) = (
        program_tiles(resolve_noise(name), weight, [ROWS], generator())
        for name in ("hermes+stuck:0.2@1s", "hermes+stuck:0.2@1y", "hermes@1y")
    )
    stuck = later.weight != alone.weight
    assert float(stuck.float().mean()) == pytest.approx(0.2, abs=0.02)
    assert torch.equal(now.weight[stuck], later.weight[stuck])
    assert later.output_scale == alone.output_scale
