"""The parts of training, each by itself: rates, clipping, guarded steps, averages, logs, settings."""

import dataclasses
import math
import re
import sys
import weakref

import pytest
import torch
import training_runs as T
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.nn.resblock import ResBlock
from ldm.sampling import Sampling
from ldm.training.ema import EMA
from ldm.training.loop import progress as progress_module
from ldm.training.loop.logs import CSVLogs, CSVTable, make_loggers
from ldm.training.loop.progress import Progress, image_progress
from ldm.training.loop.trainer import check_batch
from ldm.training.method import Diverged, Method, seed_generator
from ldm.training.methods.autoencoder import AutoencoderKeys
from ldm.training.methods.diffusion import DiffusionKeys
from ldm.training.networks import channels_last, compile_blocks
from ldm.training.optimization import base_lr, clip_gradients, guarded_step, lr_factor, make_optimizer
from ldm.training.run import Run
from ldm.training.run_config import RunConfig
from ldm.training.settings import LoggingSettings, OptimizerSettings, TrainingSettings

# The learning rate


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
def test_warmup_is_linear_and_ends_at_the_full_rate(decay):
    settings = OptimizerSettings(warmup=4, decay=decay)
    assert [lr_factor(settings, step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(settings, 4, 100) == 1.0  # the decay begins where the warm-up ends


def test_cosine_in_closed_form():
    settings = OptimizerSettings(warmup=10, decay="cosine", final_lr=0.1)
    for step in range(10, 110):
        expected = 0.1 + 0.9 * math.cos(math.pi / 2 * (step - 10) / 100) ** 2
        assert lr_factor(settings, step, 110) == pytest.approx(expected, abs=1e-12)
    assert lr_factor(settings, 60, 110) == pytest.approx(0.55)
    assert lr_factor(settings, 110, 110) == pytest.approx(0.1)
    assert lr_factor(settings, 109, 110) > 0.1


def test_linear_in_closed_form():
    settings = OptimizerSettings(decay="linear", final_lr=0.5)
    assert [lr_factor(settings, step, 4) for step in range(5)] == [1.0, 0.875, 0.75, 0.625, 0.5]


def test_constant_and_short_runs():
    assert {lr_factor(OptimizerSettings(), step, 10) for step in range(10)} == {1.0}
    # A trial of fewer steps than the warm-up, as in a quick look at a config.
    assert lr_factor(OptimizerSettings(warmup=50, decay="cosine"), 2, 3) == pytest.approx(3 / 50)
    assert lr_factor(OptimizerSettings(decay="cosine"), 0, 1) == 1.0


@given(
    st.integers(0, 50),
    st.integers(1, 200),
    st.sampled_from(["constant", "cosine", "linear"]),
    st.floats(0, 1),
    st.integers(0, 300),
)
def test_rate_stays_between_its_ends(warmup, steps, decay, final_lr, step):
    settings = OptimizerSettings(warmup=warmup, decay=decay, final_lr=final_lr)
    factor = lr_factor(settings, step, steps)
    assert 0 < factor <= 1 or (factor == 0 and step >= steps and final_lr == 0)
    if step >= max(warmup, 1):
        assert factor >= final_lr - 1e-12
        assert lr_factor(settings, step + 1, steps) <= factor + 1e-12


def test_rate_is_scaled_only_on_request():
    assert base_lr(OptimizerSettings(lr=4.5e-6), 48) == 4.5e-6
    assert base_lr(OptimizerSettings(lr=4.5e-6, scale_lr=True), 48) == pytest.approx(2.16e-4)


# Clipping and the guarded step


def parameters_with_gradients(scale: float, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,), ())]
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return parameters


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_clipping_is_that_of_torch(scale):
    ours, theirs = parameters_with_gradients(scale), parameters_with_gradients(scale)
    norm = clip_gradients([*ours, nn.Parameter(torch.zeros(2))], 1.0)  # one without a gradient
    expected = nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_no_clipping_leaves_gradients_alone():
    ours, before = parameters_with_gradients(100.0), parameters_with_gradients(100.0)
    assert clip_gradients(ours, None) > 100
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, before, strict=True))


def test_no_gradient_at_all_is_an_error():
    with pytest.raises(ValueError, match="does not depend on what is trained"):
        clip_gradients([nn.Parameter(torch.zeros(2))], 1.0)


def snapshot(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Parameters, moments and step counts."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = [value for p in parameters for value in optimizer.state.get(p, {}).values()]
    return [tensor.detach().clone() for tensor in (*parameters, *state)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_guarded_step_changes_nothing_at_a_gradient_that_is_not_finite(bad):
    parameters = parameters_with_gradients(1.0)
    optimizer = make_optimizer(parameters, OptimizerSettings(lr=0.1, weight_decay=0.1), 0.1)
    guarded_step(optimizer, clip_gradients(parameters, 1.0))
    before = snapshot(optimizer)
    assert len(before) == 3 * 4
    parameters[0].grad[1, 2] = bad
    guarded_step(optimizer, clip_gradients(parameters, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(optimizer), strict=True))


def test_guarded_step_is_adamw():
    """Two steps against the recursion of Loshchilov and Hutter (2019), algorithm 2."""
    settings = OptimizerSettings(betas=[0.8, 0.9], eps=1e-6, weight_decay=0.3)
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = make_optimizer([parameter], settings, 0.05)
    w, m, v = parameter.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    for step in (1, 2):
        gradient = torch.tensor([0.3, -0.7]).double() * step
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        w = w * (1 - 0.05 * 0.3)
        w = w - 0.05 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
        parameter.grad = gradient
        guarded_step(optimizer, torch.tensor(1.0))
    torch.testing.assert_close(parameter.detach(), w, rtol=1e-12, atol=0)


class Nothing:
    classes, size = None, 2

    def __len__(self):
        return 1

    def fingerprint(self):
        return ""


class Lopsided(Method):
    """Two optimizers; the loss of the first is not a number in the steps that it is told."""

    def __init__(self, bad_steps, max_bad_steps: int):
        settings = TrainingSettings(ema=None, max_bad_steps=max_bad_steps)
        keys = RunConfig(task="own", name="lopsided", data={}, training=settings)
        super().__init__(Run(None, keys, Nothing(), None, None), nn.Linear(2, 1))
        self.first, self.second, self.bad_steps = self.model, nn.Linear(2, 1), bad_steps

    def trained(self):
        return [list(self.first.parameters()), list(self.second.parameters())]

    def split(self, batch):
        return [batch]

    def losses(self):
        return [self.loss, lambda batch: (self.second(torch.ones(1, 2)).sum(), {})]

    def loss(self, batch):
        factor = float("nan") if self.step in self.bad_steps else 1.0
        return self.first(torch.ones(1, 2)).sum() * factor, {}


def test_bad_steps_in_a_row_end_the_run_whichever_optimizer_has_them():
    task = Lopsided(bad_steps={0, 1, 3, 4, 5}, max_bad_steps=3)
    trainer = T.attach(task)
    assert trainer
    before = [p.detach().clone() for p in task.first.parameters()]
    for step in range(5):
        task.training_step({}, step)
        if step < 2:
            assert all(torch.equal(a, b) for a, b in zip(before, task.first.parameters(), strict=True))
    with pytest.raises(Diverged, match="not finite in the last 3 steps .now at step 6.") as caught:
        task.training_step({}, 5)  # two in a row, then a good one, then three
    assert "training.max_bad_steps is 3" in str(caught.value)
    assert str(caught.value).endswith("Lower training.optimizer.lr")  # in float32 already
    trainer.precision = "bf16-mixed"
    with pytest.raises(Diverged, match="or set training.precision=32$"):
        task.check_finite()
    assert all(p.isfinite().all() for p in task.parameters())
    assert task.state()["bad_steps"] == 3


# Averages


def test_ema_is_the_recursion():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    ema = EMA(module, 0.6)
    weight = module.weight.detach().clone().double()
    for n in range(1, 12):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(n)))
        ema.update()
        decay = min(0.6, (1 + n) / (10 + n))
        weight = decay * weight + (1 - decay) * module.weight.detach().double()
    state = ema.state_dict()
    assert list(state) == ["weight"] and ema.updates == 11
    torch.testing.assert_close(state["weight"].double(), weight, rtol=1e-5, atol=1e-6)


def test_ema_of_half_precision_weights_is_float32():
    module = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    ema = EMA(module, 0.999)
    before = ema.state_dict()["weight"].clone()
    with torch.no_grad():
        module.weight.add_(1)
    ema.update()
    assert ema.state_dict()["weight"].dtype == torch.float32
    assert not torch.equal(ema.state_dict()["weight"], before)
    with ema.swapped_in():
        assert torch.equal(module.weight, ema.state_dict()["weight"].to(torch.bfloat16))


def test_swapped_in_gives_the_own_weights_back_after_an_exception():
    module = nn.Linear(3, 2)
    ema = EMA(module, 0.5)
    with torch.no_grad():
        module.weight.add_(1)
    own = module.weight.detach().clone()
    average = ema.state_dict()["weight"].clone()
    with pytest.raises(RuntimeError, match="in validation"), ema.swapped_in():
        assert torch.equal(module.weight, average)
        assert not torch.equal(module.weight, own)
        raise RuntimeError("in validation")
    assert torch.equal(module.weight, own)


def test_swapping_needs_one_tensor_at_a_time():
    module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(20)))
    ema = EMA(module, 0.5)
    own = [p.detach().clone() for p in module.parameters()]
    for average in ema.averages:
        average.mul_(2)

    class Largest(TorchDispatchMode):
        alive = most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.clone.default:
                self.alive += 1
                self.most = max(self.most, self.alive)
                weakref.finalize(out, self.freed)
            return out

        def freed(self):
            self.alive -= 1

    with Largest() as largest, ema.swapped_in():
        for parameter, weight, average in zip(module.parameters(), own, ema.averages, strict=True):
            assert torch.equal(parameter, 2 * weight) and torch.equal(average, weight)
    assert 1 <= largest.most <= 2
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), own, strict=True))
    assert all(torch.equal(a, 2 * w) for a, w in zip(ema.averages, own, strict=True))


@pytest.mark.parametrize("moved", [False, torch.tensor(False)])
def test_averages_stay_on_a_step_that_moved_nothing(moved):
    module = nn.Linear(3, 2)
    ema = EMA(module, 0.5)
    before = [average.clone() for average in ema.averages]
    with torch.no_grad():
        module.weight.add_(1)
    ema.update(moved)
    assert all(torch.equal(a, b) for a, b in zip(ema.averages, before, strict=True))
    ema.update(torch.tensor(True))
    assert not torch.equal(ema.averages[0], before[0])


def test_a_skipped_step_moves_no_average():
    task = Lopsided(bad_steps={1}, max_bad_steps=3)
    task.settings.ema = 0.5
    trainer = T.attach(task)
    assert trainer
    task.training_step({}, 0)
    before = [average.clone() for average in task.ema.averages]
    task.training_step({}, 1)
    assert all(torch.equal(a, b) for a, b in zip(task.ema.averages, before, strict=True))
    task.training_step({}, 2)
    assert not torch.equal(task.ema.averages[0], before[0])


def test_moments_are_restored_in_the_layout_of_their_weights():
    """The fused kernel walks weights and moments in step: others would belong to other weights."""

    class Convolution(Lopsided):
        def __init__(self):
            super().__init__(bad_steps=(), max_bad_steps=3)
            self.first = self.model = channels_last(nn.Conv2d(3, 4, 3))
            with torch.no_grad():
                self.first.weight.copy_(torch.arange(108.0).reshape(4, 3, 3, 3) / 100)
                self.first.bias.zero_()

        def loss(self, batch):
            image = torch.linspace(-1, 1, 75).reshape(1, 3, 5, 5)
            return self.first(image * (1 + self.step)).square().sum(), {}

    whole, first, resumed = Convolution(), Convolution(), Convolution()
    kept = [T.attach(whole), T.attach(first)]
    for step in range(4):
        whole.training_step({}, step)
    for step in range(2):
        first.training_step({}, step)
    state = first.state()
    for optimizer in state["optimizers"]:  # as a run without channels_last has written them
        for values in optimizer["state"].values():
            values["exp_avg"] = values["exp_avg"].contiguous()
            values["exp_avg_sq"] = values["exp_avg_sq"].contiguous()
    resumed.second.load_state_dict(first.second.state_dict())
    resumed.resume_from(state)
    kept.append(T.attach(resumed))
    for step in range(2, 4):
        resumed.training_step({}, step)
    assert torch.equal(resumed.first.weight, whole.first.weight)


def test_ema_of_another_module_is_refused():
    with pytest.raises(ValueError, match="do not fit: .'bias'. differ"):
        EMA(nn.Linear(2, 2), 0.5).load_state_dict({"weight": torch.zeros(2, 2)}, 3)


# Logs


def test_csv_after_a_kill_has_no_line_twice(tmp_path):
    path = tmp_path / "train.csv"
    table = CSVTable(path, 0)
    for step in range(1, 6):
        table.add(step, {"loss": step / 8, "images_per_second": 100})
    whole = path.read_text()
    assert whole.splitlines()[0] == "step,loss,images_per_second" and len(whole.splitlines()) == 6
    table = CSVTable(path, 3)
    assert path.read_text() == "\n".join(whole.splitlines()[:4]) + "\n"
    table.add(4, {"loss": 0.5, "images_per_second": 100})
    table.add(5, {"loss": 0.625, "images_per_second": 100})
    assert path.read_text() == whole


@pytest.mark.parametrize("torn", ["1", "12,0.", "12,0.5,10", '12,"0.5', "\0\0\0"])
def test_csv_drops_a_torn_last_line(tmp_path, torn):
    path = tmp_path / "train.csv"
    CSVTable(path, 0).add(10, {"loss": 0.25, "images_per_second": 100})
    whole = path.read_text()
    path.write_text(whole + torn)
    CSVTable(path, 20)
    assert path.read_text() == whole


def test_csv_with_columns_that_come_later(tmp_path):
    path = tmp_path / "train.csv"
    table = CSVTable(path, 0)
    table.add(1, {"loss": 1.0})
    table.add(2, {"loss": 0.5, "disc_loss": 2.0})
    table.add(3, {"loss": 0.25})
    assert path.read_text().splitlines() == ["step,loss,disc_loss", "1,1,", "2,0.5,2", "3,0.25,"]
    assert not list(tmp_path.glob("*.tmp"))


def test_csv_of_a_run_that_starts_over_forgets_its_columns(tmp_path):
    path = tmp_path / "train.csv"
    CSVTable(path, 0).add(1, {"quant_loss": 1.0})
    table = CSVTable(path, 0)
    table.add(1, {"kl_loss": 1.0})
    assert path.read_text().splitlines() == ["step,kl_loss", "1,1"]


def test_csv_holds_figures_that_are_not_finite(tmp_path):
    table = CSVTable(tmp_path / "train.csv", 0)
    table.add(1, {"loss": float("nan"), "grad_norm": float("inf")})
    assert (tmp_path / "train.csv").read_text().splitlines()[1] == "1,nan,inf"


def test_the_csv_is_a_lightning_logger(tmp_path):
    logs = CSVLogs(tmp_path)
    logs.log_metrics({"train/loss": 0.5, "epoch": 0}, 1)
    logs.log_metrics({"validation/loss": 0.25}, 1)
    logs.log_metrics({"train/loss": 0.5}, 1)  # again, by a run that is told to stop
    assert (tmp_path / "train.csv").read_text() == "step,loss\n1,0.5\n"
    assert (tmp_path / "validation.csv").read_text() == "step,loss\n1,0.25\n"
    CSVLogs(tmp_path, resume_step=0)
    assert not list(tmp_path.iterdir())


def test_tensorboard_beside_the_csv(tmp_path):
    pytest.importorskip("tensorboard")
    for logger in make_loggers(tmp_path / "logs", 0, tensorboard=True):
        logger.log_metrics({"train/loss": 0.5}, 1)
        logger.finalize("success")
    assert (tmp_path / "logs/train.csv").exists() and list((tmp_path / "logs").glob("events.*"))


def test_tensorboard_missing_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with caplog.at_level("INFO", "ldm"):
        (logger,) = make_loggers(tmp_path, 0, tensorboard=True)
    assert isinstance(logger, CSVLogs) and "TensorBoard is not installed" in caplog.text


# Compilation


def test_no_block_of_a_compiled_network_stays_eager():
    """More forms of one kind of block than torch compiles unless told so, in training and in evaluation."""
    widths = [8 * i for i in range(1, 13)]
    network = nn.Sequential(*(ResBlock(w, w, num_groups=4) for w in widths))
    calls = []

    def counting(graph, inputs):
        def run(*args):
            calls.append(1)
            return graph(*args)

        return run

    assert compile_blocks(network, backend=counting) == len(widths)
    for mode in (True, False):
        network.train(mode)
        with torch.set_grad_enabled(mode):
            for width, block in zip(widths, network, strict=True):
                calls.clear()
                block(torch.randn(1, width, 4, 4))
                assert calls, f"the block of {width} channels ran eagerly, training {mode}"


# Settings


@pytest.mark.parametrize(
    "kind, values, message",
    [
        (TrainingSettings, {"steps": 0}, "steps must be a finite number above 0, got 0"),
        (TrainingSettings, {"batch_size": -2}, "batch_size must be a finite number above 0"),
        (TrainingSettings, {"accumulate": 0}, "accumulate must be"),
        (TrainingSettings, {"keep": 0}, "keep must be"),
        (TrainingSettings, {"max_bad_steps": 0}, "max_bad_steps must be"),
        (TrainingSettings, {"devices": 0}, "devices must be"),
        (TrainingSettings, {"workers": -1}, "workers must be a finite number, not negative"),
        (TrainingSettings, {"checkpoint_every": 0}, "checkpoint_every .* from 1 on, or null for none"),
        (TrainingSettings, {"precision": "fp16"}, "precision must be one of auto, 32, bf16, got 'fp16'"),
        (TrainingSettings, {"accelerator": "tpu"}, "accelerator must be one of auto, gpu, cpu"),
        (TrainingSettings, {"ema": 1.0}, r"ema is a decay in \[0, 1\)"),
        (OptimizerSettings, {"lr": 0.0}, "lr must be"),
        (OptimizerSettings, {"lr": math.nan}, "lr must be"),
        (OptimizerSettings, {"eps": -1e-8}, "eps must be"),
        (OptimizerSettings, {"clip": 0.0}, "clip must be"),
        (OptimizerSettings, {"betas": [0.9]}, r"betas must be two numbers in \[0, 1\)"),
        (OptimizerSettings, {"betas": [0.9, 1.0]}, "betas must be"),
        (OptimizerSettings, {"warmup": -1}, "warmup must be"),
        (OptimizerSettings, {"weight_decay": -0.1}, "weight_decay must be"),
        (OptimizerSettings, {"decay": "step"}, "decay must be one of constant, cosine, linear, got 'step'"),
        (OptimizerSettings, {"final_lr": 1.5}, r"final_lr is a share of lr in \[0, 1\]"),
        (LoggingSettings, {"every": 0}, "every must be"),
        (LoggingSettings, {"images": 0}, "images must be"),
        (LoggingSettings, {"images_every": 0}, "images_every .* or null for none"),
        (LoggingSettings, {"validate_every": -1}, "validate_every .* or null for none"),
        (LoggingSettings, {"validation_batches": 0}, "validation_batches must be"),
        (Sampling, {"sampler": "eular"}, "sampler 'eular' is unknown; there are .*ddim.*euler"),
        (Sampling, {"steps": 0}, "steps must be"),
        (Sampling, {"sampler": "ddim", "eta": -1.0}, "eta must be"),
        (Sampling, {"sampler": "euler", "eta": 0.5}, "eta belongs to the ddim sampler"),
    ],
)
def test_settings_name_what_is_wrong_and_what_is_allowed(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_settings_defaults_and_none_where_it_is_allowed():
    for kind in (TrainingSettings, OptimizerSettings, LoggingSettings, Sampling):
        kind()
    TrainingSettings(ema=None, checkpoint_every=None)
    assert TrainingSettings(precision=32).precision == "32"
    OptimizerSettings(clip=None)
    LoggingSettings(images_every=None, validate_every=None, validation_batches=None)
    assert dataclasses.asdict(TrainingSettings())["optimizer"]["decay"] == "constant"


RUN = {"name": "x", "data": {}, "model": {}, "loss": {}}


@pytest.mark.parametrize("name", ["", "a/b", "..", "."])
def test_run_name_is_a_folder_name(name):
    with pytest.raises(ValueError, match="name must be a plain folder name"):
        AutoencoderKeys(task="autoencoder", **{**RUN, "name": name})


def test_run_values():
    with pytest.raises(ValueError, match="seed must be in"):
        AutoencoderKeys(task="autoencoder", **RUN, seed=-1)
    parts = {"data": {}, "network": {}, "denoiser": {}, "objective": {}, "first_stage": None}
    with pytest.raises(ValueError, match="latent_scale must be a number above 0, or auto, got 0"):
        DiffusionKeys(task="diffusion", name="x", **parts, latent_scale=0.0)


def test_batch_has_to_divide():
    check_batch(TrainingSettings(batch_size=12, accumulate=3), 2)
    problem = "batch_size 10 does not divide into 2 device(s) x 2 accumulation step(s); the nearest"
    with pytest.raises(ValueError, match=re.escape(problem)):
        check_batch(TrainingSettings(batch_size=10, accumulate=2), 2)


# Progress


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_progress_without_a_terminal_is_a_line_now_and_then(clock, caplog, capsys):
    with caplog.at_level("INFO", "ldm"):
        progress = Progress(100, "step", initial=40)
        for _ in range(20):
            clock.now += 1.0
            progress.show("loss 0.5")
            progress.advance()
        progress.close()
    assert [r.message for r in caplog.records] == [
        "step 55/100: loss 0.5, 00:45 left",
        "step 60/100: loss 0.5, 00:40 left",
    ]
    assert capsys.readouterr().err == ""  # no bar


def test_progress_of_something_short_says_nothing_without_a_terminal(clock, caplog):
    with caplog.at_level("INFO", "ldm"), image_progress("encoding", True) as report:
        report(10, 20)
        report(20, 20)
    assert not caplog.records
    with image_progress("encoding", False) as report:
        assert report is None


def test_progress_on_a_terminal_is_one_bar(clock, monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(10, "step", title="encoding")
    progress.show("loss 0.5")
    for _ in range(10):
        progress.advance()
    progress.say("step 10: validation loss 0.25")
    progress.close()
    text = terminal.getvalue()
    assert "encoding 10/10 steps" in text and "loss 0.5" in text
    assert "step 10: validation loss 0.25\n" in text and text.count("\n") == 2


# Small things


def test_seed_generator_is_manual_seed():
    torch.manual_seed(7)
    expected = torch.rand(3)
    seed_generator(torch.device("cpu"), 7)
    assert torch.equal(torch.rand(3), expected)


def test_channels_last_keeps_values_and_leaves_other_shapes_alone():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(2, 2, 3), nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    channels_last(network)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[1].weight.is_contiguous() and network[3].weight.is_contiguous()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
