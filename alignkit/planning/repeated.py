"""Runs one of many equal layers, and lets the others take as much memory without running them.

The first time that a layer is called with inputs of some shapes, it takes a forward and a backward pass apart from the
run, in which its memory is measured: what it needs for a moment, what its graph keeps, and which gradients it leaves.
From then on a layer with the same modules, weights and inputs returns a tensor of the right shape and counts as much.
Where there is a key-value cache, it appends tensors to it. So a step of a model with 32 layers takes about as long as
that of a model with one.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from alignkit.generation.cache import FixedLayer
from alignkit.models.torch_internals import has_forward_hooks, tree_leaves
from alignkit.models.transformers_internals import GradientCheckpointingLayer
from alignkit.planning.ledger import Ledger
from alignkit.planning.phantoms import set_value, value_of
from alignkit.planning.replaced import replaced

FEW = 8  # layers in a model; with fewer, all are run: little time is gained, and the measured one is counted as larger
SIMPLE = (bool, int, float, str, type(None))
# attributes that make no layer different; the last one is that of the call before, see cuda.share_inputs
OF_ANY = frozenset(nn.Module().__dict__) - {"training"} | {"layer_idx", "cast_input_dtype_enabled"}


@dataclass
class Measured:
    """The bytes that a call of a layer takes, beside its input."""

    layer: nn.Module  # in which they were measured
    shape: torch.Size  # of the output
    dtype: torch.dtype
    value: Any
    forward: int  # for a moment
    graph: int  # kept until the backward pass
    keeps_input: bool
    casts: tuple[int, int]  # weights that autocast has cast: those that the graph keeps too, and the others
    prepared: int  # kept by the forward of modules in the layer, as LoRA's
    has_graph: bool
    appended: tuple[tuple[Any, torch.dtype], ...]  # shape and dtype of the keys and values that go into a cache
    end: Tensor | None = None  # of the measured graph, until its backward pass is measured
    hidden: int = 0  # bytes of that graph, which do not count
    backward: int = 0  # for a moment, from the time that the gradient of the output is there
    trained: tuple[str, ...] = ()  # the weights that get a gradient


class RepeatedLayers:
    """The layers of Transformers' models, as they are called in :meth:`active`."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.measured: dict[Hashable, Measured | None] = {}  # None: the layer has to run
        self.casts: dict[Hashable, list[Tensor]] = {}  # what autocast has in its cache

    @contextlib.contextmanager
    def active(self, model: nn.Module) -> Iterator[None]:
        """Let layers be called through this object in this context, if the model has more than a few."""
        if sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules()) < FEW:
            yield
            return
        call, self.clear = GradientCheckpointingLayer.__call__, torch.clear_autocast_cache

        def called(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.call(lambda *inputs: call(layer, *inputs, **kwargs), layer, args, kwargs)

        def cleared() -> None:
            self.casts.clear()
            self.clear()

        layers = replaced(GradientCheckpointingLayer, __call__=called)
        try:
            with _quick_collections(), layers, replaced(torch, clear_autocast_cache=cleared):
                yield
        finally:
            self.measured.clear()

    def call(self, run: Callable[..., Any], layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """The output of a layer, or a tensor in its place."""
        if (key := _key(layer, args, kwargs)) is None:
            return run(*args)
        cache = _cache_of(layer, kwargs)
        if key not in self.measured:
            try:
                self.measured[key] = self._measure(_Undone(run, cache), layer, args)
            finally:
                gc.enable()
        if (measured := self.measured[key]) is None:
            return run(*args)
        prepared = _keep_prepared(layer, measured.prepared)
        cast = self._cast((id(layer), key[-1]), measured.casts)
        self.ledger.reach(measured.forward)
        if cache is not None and measured.appended:
            cache.update(*(torch.zeros(shape, dtype=dtype) for shape, dtype in measured.appended))
        if not measured.has_graph:
            return _tensor(measured.shape, measured.dtype, measured.value)
        x = args[0]
        kept = [*_bytes(measured.graph), *([x.detach()] if measured.keeps_input else [])]
        kept += cast[:1]
        kept += [] if getattr(layer, "gradient_checkpointing", False) else prepared
        anchor = x if x.requires_grad else next(p for p in layer.parameters() if p.requires_grad)
        return _Layer.apply(anchor, x.requires_grad, kept, self, measured, layer)  # type: ignore[no-untyped-call]

    def _cast(self, weights: Hashable, sizes: tuple[int, int]) -> list[Tensor]:
        """What autocast keeps of the weights of a layer, once for all inputs: what graphs keep too, and the rest."""
        if weights not in self.casts or self.casts[weights][0].nbytes < sizes[0]:
            self.casts[weights] = [torch.empty(max(0, size), dtype=torch.uint8) for size in sizes]
        return self.casts[weights]

    def _measure(self, run: _Undone, layer: nn.Module, args: Any) -> Measured | None:
        """The memory of a call. None: the layer cannot be replaced."""
        ledger, given = self.ledger, args[0]
        with ledger.apart():
            gc.collect()  # what other calls have left; and none meanwhile
            gc.disable()
            before = ledger.now
            self.clear()
            self.casts.setdefault(None, []).extend(_bytes(before - ledger.now))
            start = ledger.now
            with ledger.apart():
                output = run(*args)
                forward = ledger.most - start
            if not isinstance(output, Tensor):
                return None
            shape, dtype, value, has_graph = output.shape, output.dtype, value_of(output), output.requires_grad
            del output
            gc.collect()
            if ledger.now == start and not has_graph:  # it keeps nothing
                return Measured(layer, shape, dtype, value, forward, 0, False, (0, 0), 0, False, run.appended)
            warm = ledger.now
            self.clear()
            fresh, casts = ledger.now - start, warm - ledger.now  # fresh: what modules in the layer keep from now on
            if casts:
                run(*args)  # the cache of autocast is full again
                gc.collect()

            start = ledger.now
            seed = torch.zeros((), requires_grad=given.requires_grad)
            x = _Begin.apply(seed, given.detach())  # type: ignore[no-untyped-call]
            with ledger.apart():
                output = run(x, *args[1:])
                forward = ledger.most - start - x.nbytes
            end = _End.apply(output, ledger) if has_graph else None  # type: ignore[no-untyped-call]
            del output
            with_input = ledger.now
            del x
            keeps_input = ledger.now == with_input
            graph = ledger.now - start - (given.nbytes if keeps_input else 0)
            cached = ledger.now
            self.clear()
            others = cached - ledger.now
            hidden = ledger.now - before - fresh
            prepared = max(fresh, sum(tensor.nbytes for tensor in _casts_of(layer)))
            ledger.now -= hidden
        sizes = forward, graph, keeps_input, (casts - others, others), prepared
        return Measured(layer, shape, dtype, value, *sizes, has_graph, run.appended, end, hidden)

    def measure_backward(self, measured: Measured) -> None:
        """Run the backward pass of the measured graph, when that of a layer in its place is due."""
        ledger, end, parameters = self.ledger, measured.end, dict(measured.layer.named_parameters())
        assert end is not None
        without = [name for name, parameter in parameters.items() if parameter.grad is None]
        with ledger.apart():
            ledger.now += measured.hidden
            end.backward()  # type: ignore[no-untyped-call]
            measured.backward = ledger.most - ledger.marked
            measured.trained = tuple(name for name in without if parameters[name].grad is not None)
            for name in measured.trained:
                parameters[name].grad = None
            measured.end = end = None


class _Undone:
    """A call of a layer that leaves its cache as it was."""

    def __init__(self, call: Callable[..., Any], cache: DynamicLayer | None) -> None:
        self.call, self.cache = call, cache
        self.appended: tuple[tuple[Any, torch.dtype], ...] = ()

    def __call__(self, *args: Any) -> Any:
        if self.cache is None:
            return self.call(*args)
        before, length = dict(vars(self.cache)), self.cache.get_seq_length()
        output = self.call(*args)
        if new := self.cache.get_seq_length() - length:
            states = self.cache.keys, self.cache.values  # [B, heads, positions, d]
            self.appended = tuple(((*each.shape[:2], new, each.shape[3]), each.dtype) for each in states)
        vars(self.cache).clear()
        vars(self.cache).update(before)
        return output


class _Layer(Function):
    """A tensor in place of a layer's output, with a graph that keeps tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        is_input: bool,
        kept: list[Tensor],
        layers: RepeatedLayers,
        measured: Measured,
        layer: nn.Module,
    ) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.layers, ctx.measured, ctx.layer = layers, measured, layer
        ctx.input = (anchor.shape, anchor.dtype) if is_input else None
        return _tensor(measured.shape, measured.dtype, measured.value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ledger, measured = ctx.layers.ledger, ctx.measured
        if measured.end is not None:
            ctx.layers.measure_backward(measured)
        ledger.reach(measured.backward)
        with ledger.apart():  # while what the graph keeps is there
            parameters = dict(ctx.layer.named_parameters())
            for name in measured.trained:
                if parameters[name].grad is None:
                    parameters[name].grad = torch.zeros_like(parameters[name])
            of_input = _tensor(*ctx.input) if ctx.input else None
        return of_input, None, None, None, None, None


class _Begin(Function):
    """An input of its own for a layer that is measured."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, given: Tensor) -> Tensor:
        return given.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.new_zeros(()).float(), None


class _End(Function):
    """The end of a layer that is measured: the gradient of its output belongs to the backward pass alone."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, ledger: Ledger) -> Tensor:
        ctx.output, ctx.ledger = (output.shape, output.dtype), ledger
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        of_output = _tensor(*ctx.output)
        ctx.ledger.marked = ctx.ledger.most = ctx.ledger.now
        return of_output, None


def _tensor(shape: torch.Size, dtype: torch.dtype, value: Any = 1) -> Tensor:
    tensor = torch.full(shape, value, dtype=dtype)
    set_value(tensor, value)
    return tensor


def _bytes(number: int) -> list[Tensor]:
    """A tensor of so many bytes, if there are any."""
    return [torch.empty(number, dtype=torch.uint8)] if number > 0 else []


@contextlib.contextmanager
def _quick_collections() -> Iterator[None]:
    """Keep collections of garbage from walking through all that is there before."""
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _keep_prepared(layer: nn.Module, number: int) -> list[Tensor]:
    """What the forwards of modules in the layer keep: weights that they have cast, or so many bytes in their place."""
    if not number:
        return []
    if casts := _casts_of(layer):
        return casts
    if (forwards := _forwards_of(layer)) and not hasattr(forwards[0], "planned"):
        forwards[0].planned = _bytes(number)
    return list(forwards[0].planned) if forwards else []


def _forwards_of(layer: nn.Module) -> list[Any]:
    """The forwards that replace those of modules in the layer."""
    return [module.__dict__["forward"] for module in layer.modules() if "forward" in module.__dict__]


def _casts_of(layer: nn.Module) -> list[Tensor]:
    """The weights that they have cast; none if the layer has not been run."""
    return [tensor for forward in _forwards_of(layer) for tensor in getattr(forward, "cast", None) or ()]


def _key(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Hashable, ...] | None:
    """The inputs of the memory of a call; None if it may depend on more, such as a cache of another kind."""
    if not args or not isinstance(args[0], Tensor) or has_forward_hooks(layer):
        return None
    inputs = list[Any]()
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and (leaf is args[0] or not leaf.requires_grad):
            inputs.append((leaf.shape, leaf.dtype, leaf.requires_grad and torch.is_grad_enabled()))
        elif isinstance(leaf, SIMPLE):
            inputs.append(leaf)
        elif (cache := _cache_of(layer, kwargs)) is not None and leaf is kwargs["past_key_values"]:
            filled = (cache.keys.shape, cache.keys.dtype, cache.values.shape) if cache.is_initialized else ()
            inputs.append((type(cache), getattr(cache, "length", None), filled))
        else:
            return None
    modules = tuple(part for module in layer.modules() for part in _parts(module))
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
    return torch.is_grad_enabled(), autocast, tuple(kwargs), tuple(inputs), modules


def _parts(module: nn.Module) -> Iterator[Hashable]:
    """The class of a module, its settings, and the shapes of its tensors."""
    yield type(module).__qualname__
    for name, value in module.__dict__.items():
        if name in OF_ANY:
            continue
        if isinstance(value, SIMPLE):
            yield name, value
        elif name in ("forward", "_active_adapter"):
            yield name, type(value) if name == "forward" else tuple(value)
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield name, tensor.shape, tensor.dtype, tensor.requires_grad, tensor.grad is None


def _cache_of(layer: nn.Module, kwargs: Any) -> DynamicLayer | None:
    """The key-value cache of a layer, if it has one of a kind that is known, and there are no gradients."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, DynamicCache) or torch.is_grad_enabled():
        return None
    number: Any = next((m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")), len(cache.layers))
    found = cache.layers[number] if number < len(cache.layers) else None
    return found if type(found) in (DynamicLayer, FixedLayer) else None
