"""What a training step costs, found out on tensors without values (the meta device): FLOPs and bytes.

Every operation of a step, forward and backward, is seen when it is dispatched; nothing is computed. Attention
counts, and keeps, what a fused kernel does. Autocast to bfloat16, which the meta device lacks, is acted out.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import conv_flop_count, flop_registry

# torch's lists for CUDA: what autocast does in half precision, and what it does in float32.
# https://pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float16
_IN_HALF = frozenset({
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "matmul", "__matmul__", "mm", "mv", "bmm", "addmm", "addbmm", "baddbmm", "einsum",
    "scaled_dot_product_attention",
})  # fmt: skip
_IN_FLOAT = frozenset({
    "group_norm", "layer_norm", "softmax", "log_softmax", "cross_entropy", "nll_loss", "mse_loss", "l1_loss",
    "smooth_l1_loss", "binary_cross_entropy_with_logits", "cosine_similarity", "exp", "expm1", "log", "log1p",
    "pow", "__pow__", "__rpow__", "rsqrt", "reciprocal", "softplus", "sum", "prod", "cumsum", "norm",
    "normalize",
})  # fmt: skip


def _convolution_backward(
    grad, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask
) -> int:
    """As much as forward for the input's gradient and for the weight's, where they are asked for.

    torch's own formula counts the weights of grouped convolutions as if there were no groups.
    """
    return (mask[0] + mask[1]) * conv_flop_count(x.shape, weight.shape, grad.shape, transposed)


@dataclass
class Layer:
    """One row of the forward pass: a module, called once or more often.

    saved: bytes kept for the backward pass. shape: of the last output, None where that is no tensor.
    """

    name: str
    parameters: int = 0
    flops: int = 0
    saved: int = 0
    shape: tuple[int, ...] | None = None


@dataclass
class Cost:
    """What one step cost.

    flops: of everything. layers: rows of the network's forward pass in the order of the first call; the last
    one, named "", is what lies between them. live: bytes beside the parameters after every operation.
    """

    flops: int = 0
    layers: list[Layer] = field(default_factory=list)
    live: list[int] = field(default_factory=list)

    @property
    def forward(self) -> int:
        return sum(layer.flops for layer in self.layers)

    @property
    def saved(self) -> int:
        return sum(layer.saved for layer in self.layers)

    @property
    def peak(self) -> int:
        return max(self.live, default=0)


class Meter:
    """Measures the step that runs inside `running()`.

    Args:
        network: what the rows are made of.
        resident: modules whose parameters are in memory all the time and not counted as alive.
        depth: how deep the rows go below the network; lists of modules do not count as a level.
        half: act out autocast to bfloat16.
    """

    def __init__(
        self, network: nn.Module, resident: Iterable[nn.Module], depth: int = 1, half: bool = False
    ) -> None:
        self.network, self.depth, self.half = network, depth, half
        self.cost = Cost()
        self._static = {_key(t) for module in resident for t in (*module.parameters(), *module.buffers())}
        self._between = Layer("")
        self._rows: dict[str, Layer] = {}
        self._stack: list[Layer | None] = [None]
        self._alive: dict[int, tuple[weakref.ref, int]] = {}
        self._bytes = 0
        self._saved: set[int] = set()
        # Autocast keeps the casts of weights until the step is over.
        self._halves: dict[int, Tensor] = {}
        self._half_keys: set[int] = set()
        self._backward = False

    @contextmanager
    def running(self) -> Iterator["Meter"]:
        with ExitStack() as stack:
            self._watch(stack, self.network, "", 0)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor))
            stack.enter_context(_Operations(self))
            stack.enter_context(_Functions(self))
            yield self
        self.cost.layers = [*self._rows.values(), self._between]
        self._halves.clear()

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`; what runs in it belongs to no row."""
        self._backward = True
        try:
            # What `loss.backward()` calls; that itself would hide the functions of recomputed blocks.
            engine = torch.autograd.Variable._execution_engine
            ones, options = torch.ones_like(loss), {"allow_unreachable": True, "accumulate_grad": True}
            engine.run_backward((loss,), (ones,), False, False, (), **options)
        finally:
            self._backward = False

    def _watch(self, stack: ExitStack, module: nn.Module, name: str, level: int) -> None:
        """Rows for the modules `depth` levels below a network, and for those on the way that are whole."""
        children = [] if level == self.depth else list(_called(module))
        if not children:
            self._add_row(stack, module, name)
            return
        _hook(stack, module, lambda *_: self._enter(self._between), self._leave)
        for child_name, child in children:
            self._watch(stack, child, f"{name}.{child_name}".strip("."), level + 1)

    def _add_row(self, stack: ExitStack, module: nn.Module, name: str) -> None:
        def enter(called: nn.Module, inputs: object) -> None:
            if not self._backward and name not in self._rows:
                self._rows[name] = Layer(name, sum(p.numel() for p in module.parameters()))
            self._enter(self._rows.get(name))

        def leave(called: nn.Module, inputs: object, output: object) -> None:
            row = self._stack[-1]
            self._leave()
            if row is not None and called is module and isinstance(output, Tensor):
                row.shape = tuple(output.shape)

        # Some networks call the parts of a module themselves.
        for part in module.modules():
            _hook(stack, part, enter, leave)

    def _enter(self, row: Layer | None) -> None:
        self._stack.append(None if self._backward else row)

    def _leave(self, *_: object) -> None:
        self._stack.pop()

    def add_flops(self, flops: int) -> None:
        self.cost.flops += flops
        if self._stack[-1] is not None:
            self._stack[-1].flops += flops

    def saw(self, out: object) -> None:
        """Note what an operation returned as alive, until it is freed."""
        tree_map_only(Tensor, self._hold, out)
        self.cost.live.append(self._bytes)

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._static:
            return
        size = storage.nbytes()
        self._alive[key] = weakref.ref(storage, lambda _: self._free(key)), size
        self._bytes += size

    def _free(self, key: int) -> None:
        _, size = self._alive.pop(key)
        self._bytes -= size
        self._saved.discard(key)

    def _keep(self, tensor: Tensor) -> Tensor:
        """Called with every tensor that is kept for the backward pass."""
        key = _key(tensor)
        row = self._stack[-1]
        if row is not None and key not in self._saved and key not in self._static:
            self._saved.add(key)
            if key not in self._half_keys:
                row.saved += tensor.untyped_storage().nbytes()
        return tensor

    def to_half(self, tensor: Tensor) -> Tensor:
        if tensor.dtype is not torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self._halves:
            self._halves[id(tensor)] = half = tensor.to(torch.bfloat16)
            self._half_keys.add(_key(half))
        return self._halves[id(tensor)]


def _hook(stack: ExitStack, module: nn.Module, enter: Callable, leave: Callable) -> None:
    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave, always_call=True).remove)


def _called(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The children that can be called, with those inside lists and dicts of modules."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _key(tensor: Tensor) -> int:
    """Identity of a tensor's memory, which views share."""
    return tensor.untyped_storage()._cdata


class _Operations(TorchDispatchMode):
    """Sees every operation, those of the backward pass too."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        if operation is torch.ops.aten.convolution_backward:
            self.meter.add_flops(_convolution_backward(*args))
        elif operation in flop_registry:
            self.meter.add_flops(flop_registry[operation](*args, **(kwargs or {}), out_val=out))
        self.meter.saw(out)
        return out


class _Functions(TorchFunctionMode):
    """Puts `_FusedAttention` in the place of attention, and autocast's casts before what it casts for."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.meter.half:
            name = getattr(func, "__name__", "")
            if name in _IN_HALF:
                args, kwargs = tree_map_only(Tensor, self.meter.to_half, (args, kwargs))
            elif name in _IN_FLOAT:
                args, kwargs = tree_map_only(Tensor, _to_float, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        return _FusedAttention.apply(self.meter, query, key, value)


def _to_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class _FusedAttention(torch.autograd.Function):
    """Shapes, FLOPs and memory of a fused attention kernel, which computes the weights again in the backward
    pass: FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithms 1 and 4).
    """

    @staticmethod
    def forward(ctx, meter: Meter, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        *batch, rows, width = query.shape
        meter.add_flops(2 * math.prod(batch) * rows * key.shape[-2] * (width + value.shape[-1]))
        # Kernels lay the heads side by side.
        out = query.new_empty(*batch[:-1], rows, batch[-1], value.shape[-1]).transpose(-2, -3)
        sums = query.new_empty(*batch, rows, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.meter = meter
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, out, sums = ctx.saved_tensors
        *batch, rows, width = query.shape
        # As wide as the keys: the weights again, the gradients of queries and of keys; as wide as the values:
        # the gradients of values and of weights.
        one = 2 * math.prod(batch) * rows * key.shape[-2]
        ctx.meter.add_flops(one * (3 * width + 2 * value.shape[-1]))
        return None, *(torch.empty_like(tensor) for tensor in (query, key, value))
