"""The optimizers by name, and the moving average's order and restore."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from mosaic.config.sections import OptimizerConfig
from mosaic.training import optimizers, train
from mosaic.training.optimizers import build_optimizer
from mosaic.weights import quantization
from tests import runs


def optional(name: str) -> pytest.param:
    package = optimizers.PACKAGES[name]
    marks = [pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}"), pytest.mark.filterwarnings("ignore")]
    return pytest.param(name, marks=marks)


def settings(name: str, **changes: object) -> OptimizerConfig:
    return OptimizerConfig(name=name, learning_rate=1.0 if name == "prodigy" else 1e-2, **changes)


def distances(name: str, steps: int = 200, learning_rates: tuple[float, ...] = ()) -> list[float]:
    """Distance to the minimum of a quadratic bowl after each step."""
    torch.manual_seed(0)
    parameter, aim = nn.Parameter(torch.zeros(128, 64)), torch.randn(128, 64)
    optimizer, found = build_optimizer(settings(name, weight_decay=0), [parameter]), []
    for step in range(steps):
        if learning_rates:
            optimizer.param_groups[0]["lr"] = learning_rates[step]
        parameter.grad = parameter.detach() - aim
        optimizer.step()
        found.append(float((parameter.detach() - aim).norm()))
    return found


@pytest.mark.parametrize("name", ["adamw", *map(optional, optimizers.PACKAGES)])
def test_every_optimizer_descends_and_repeats_itself(name: str) -> None:
    found = distances(name)
    assert found[-1] < 0.3 * found[0]
    assert distances(name) == found


@pytest.mark.parametrize("name", ["adamw", *map(optional, optimizers.PACKAGES)])
def test_the_settings_arrive_and_a_learning_rate_of_0_holds_still(name: str) -> None:
    config = settings(name, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.03)
    group = build_optimizer(config, [nn.Parameter(torch.ones(128, 64))]).param_groups[0]
    assert [group[key] for key in ("lr", "betas", "eps", "weight_decay")] == [config.learning_rate, (0.8, 0.95), 1e-6, 0.03]
    found = distances(name, 2, learning_rates=(0.0, 0.0))
    assert found[0] == found[1]


def test_adamw_on_a_cpu_is_the_plain_one() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(settings("adamw"), iter([parameter]))
    assert type(optimizer) is torch.optim.AdamW
    assert not optimizer.param_groups[0]["fused"]
    assert optimizer.param_groups[0]["params"] == [parameter]


@pytest.mark.parametrize(("name", "package"), optimizers.PACKAGES.items())
def test_a_missing_package_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch, world: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda _: None)
    options = {"optimizer__name": name, "optimizer__learning_rate": 1.0}
    with pytest.raises(
        ValueError, match=f'optimizer.name "{name}" needs the package {package}, which is not installed: pip install {package}'
    ):
        train(runs.make_config(world, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore")
def test_the_running_means_take_a_byte_each() -> None:
    parameter = nn.Parameter(torch.zeros(256, 256))
    optimizer = build_optimizer(settings("adamw_8bit"), [parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(value.numel() * value.element_size() for value in optimizer.state[parameter].values() if isinstance(value, Tensor))
    assert held == pytest.approx(2 * parameter.numel(), rel=0.06)  # and a scale for each 256 values, and two small tables


def test_the_average_of_all_tensors_at_once_is_that_of_each() -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2))]
    averages = [EMAModel(parameters, decay=0.9, foreach=foreach) for foreach in (True, False)]
    for _ in range(5):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter))
        for average in averages:
            average.step(parameters)
    for found, expected in zip(averages[0].shadow_params, averages[1].shadow_params, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    trained = [parameter.detach().clone() for parameter in parameters]
    averages[0].store(parameters)
    averages[0].copy_to(parameters)
    for parameter, average, value in zip(parameters, averages[0].shadow_params, trained, strict=True):
        assert torch.equal(parameter, average)
        assert not torch.equal(parameter, value)
        assert parameter.data_ptr() != average.data_ptr()
    averages[0].restore(parameters)
    for parameter, value in zip(parameters, trained, strict=True):
        assert torch.equal(parameter, value)
