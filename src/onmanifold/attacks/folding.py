"""A private, frozen copy of a model with batch norm folded into the layer before it, where that is exact.

The copy is traced once per model with torch.fx and afterwards only refreshed from the model's weights, so
that an attack in a training loop pays next to nothing for it. A model that cannot be traced, that bakes
Python state or constants into the trace, or that has hooks, is not folded.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import fusion

from onmanifold.attacks.input_convolution import InputConvolution

logger = logging.getLogger(__name__)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass
class Template:
    """A traced model and what to fold in it.

    Attributes:
        graph: The traced copy, its parameters to be refreshed.
        pairs: Name of a layer and of the batch norm folded into it.
        chains: Name of a linear layer and of the one right before it, whose product it holds.
        low: The copy in bfloat16; None: not made yet, or the model does not run in it.
        low_fails: Whether the model does not run in bfloat16, because it casts inside.
        deterministic: Whether nothing in the trace draws random numbers.
        compiled: The copies compiled, made once: compiling again at each attack would cost more than it saves.
    """

    graph: fx.GraphModule
    pairs: dict[str, str]
    chains: dict[str, str]
    deterministic: bool
    low: fx.GraphModule | None = None
    low_fails: bool = False
    compiled: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def network(self, compiled: bool) -> Callable[[Tensor], Tensor]:
        """The copy, as it was refreshed last."""
        return self._compiled("full", self.graph) if compiled else self.graph

    def half(self, image: Tensor, compiled: bool) -> Callable[[Tensor], Tensor] | None:
        """The copy in bfloat16, weights as refreshed last; None where the model does not run in it.

        Args:
            image: (1, C, H, W), tried out when the copy is made.
            compiled: Whether to compile it.
        """
        if self.low_fails:
            return None
        if self.low is None:
            low = copy.deepcopy(self.graph).to(torch.bfloat16)
            try:
                with torch.no_grad():
                    low(image.to(torch.bfloat16))
            except RuntimeError as error:
                logger.info("bfloat16 runs by autocast: %s", error)
                self.low_fails = True
                return None
            self.low = low
        else:
            with torch.no_grad():
                pairs = zip(
                    self.low.state_dict().items(), self.graph.state_dict().items(), strict=True
                )
                for (_, ours), (_, source) in pairs:
                    ours.copy_(source)
        return self._compiled("low", self.low) if compiled else self.low

    def _compiled(self, name: str, graph: fx.GraphModule) -> Callable[[Tensor], Tensor]:
        if name not in self.compiled:
            self.compiled[name] = torch.compile(graph, dynamic=True)
        return self.compiled[name]

    def refresh(self, model: nn.Module) -> fx.GraphModule:
        """Copy the model's present weights into the graph, folded, frozen and channels_last."""
        sources = dict(model.named_modules())
        folded: set[str] = set()
        with torch.no_grad():
            for layer, norm in self.pairs.items():
                weight, bias = _fuse(sources[layer], sources[norm])
                target = self.graph.get_submodule(layer)
                _place(target, "weight", weight)
                _place(target, "bias", bias)
                folded.update((f"{layer}.weight", f"{layer}.bias"))
            for layer, before in self.chains.items():
                last, first = sources[layer], sources[before]
                target = self.graph.get_submodule(layer)
                _place(target, "weight", last.weight @ first.weight)
                _place(target, "bias", _bias(last) + last.weight @ _bias(first))
                folded.update((f"{layer}.weight", f"{layer}.bias"))
            ours = dict(self.graph.named_modules())
            # Under every name: layers that share a tensor hold one each in the copy.
            parameters = model.named_parameters(remove_duplicate=False)
            for name, source in (*parameters, *model.named_buffers(remove_duplicate=False)):
                owner, _, leaf = name.rpartition(".")
                if name not in folded and owner in ours and hasattr(ours[owner], leaf):
                    _place(ours[owner], leaf, source.detach())
            for module in ours.values():
                if isinstance(module, InputConvolution):
                    module.refresh()
        return self.graph


# Parts of the names of functions and methods that draw random numbers.
_RANDOM = (
    "rand",
    "normal_",
    "uniform",
    "bernoulli",
    "dropout",
    "multinomial",
    "poisson",
    "exponential",
)

_Signature = tuple[Any, ...] | None

# What each model looked like when it was traced, and its template, or None where it cannot be folded.
_templates: weakref.WeakKeyDictionary[nn.Module, tuple[_Signature, Template | None]] = (
    weakref.WeakKeyDictionary()
)


def template_of(model: nn.Module) -> tuple[Template | None, bool]:
    """The model's template, or None where it cannot be folded; and whether it was traced just now."""
    signature = _signature(model)
    known = _templates.get(model)
    if known is not None and known[0] == signature:
        return known[1], False
    template = None if signature is None else _trace(model)
    _templates[model] = signature, template
    return template, True


def forget(model: nn.Module) -> None:
    """Drop the template: the model is attacked unfolded, until its structure or a setting changes."""
    _templates[model] = _signature(model), None


def _signature(model: nn.Module) -> _Signature:
    """The model's structure and plain settings; None where hooks or parametrisations forbid a copy."""
    parts: list[Any] = []
    for name, module in model.named_modules():
        if any(getattr(module, hooks, None) for hooks in _HOOKS) or hasattr(
            module, "parametrizations"
        ):
            return None
        # Numbers and switches are baked into a trace: a temperature, the eps of a batch norm.
        settings = [
            (key, value)
            for key, value in vars(module).items()
            if type(value) in (bool, int, float, str) and key != "training"
        ]
        parts.append((name, type(module), id(module), tuple(settings)))
    return tuple(parts)


def _trace(model: nn.Module) -> Template | None:
    try:
        graphs = _trace_twice(model)
    except Exception as error:  # a model may fail to trace in any way its author thought of
        logger.debug("%s is attacked unfolded: %s", type(model).__name__, error)
        return None
    if str(graphs[0].graph) != str(graphs[1].graph) or _has_constants(graphs[0]):
        logger.debug("%s is attacked unfolded: its trace holds constants", type(model).__name__)
        return None
    graph = graphs[0]
    pairs = _fold_norms(graph)
    chains = _chain_linears(graph, set(pairs))
    _relu_in_place(graph)
    _speed_up_input(graph)
    graph.graph.lint()
    graph.recompile()
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    return Template(graph, pairs, chains, not _draws(graph))


def _trace_twice(model: nn.Module) -> list[fx.GraphModule]:
    """Two traces of one copy: they differ where Python state, a counter or a random number, is baked in."""
    private = copy.deepcopy(model)
    for module in private.modules():
        module.training = False
    return [fx.symbolic_trace(private) for _ in range(2)]


def _draws(graph: fx.GraphModule) -> bool:
    """Whether a trace may draw random numbers; a dropout that is switched off counts too."""
    names = [
        str(getattr(node.target, "__name__", node.target))
        for node in graph.graph.nodes
        if node.op.startswith("call_")
    ]
    return any(word in name for name in names for word in _RANDOM)


def _has_constants(graph: fx.GraphModule) -> bool:
    return any(
        node.op == "get_attr" and "_tensor_constant" in str(node.target)
        for node in graph.graph.nodes
    )


def _fold_norms(graph: fx.GraphModule) -> dict[str, str]:
    """Take out each batch norm that follows a layer and is its only reader; return the pairs."""
    modules = dict(graph.named_modules())
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    uses: dict[str, int] = {}
    for node in calls:
        uses[str(node.target)] = uses.get(str(node.target), 0) + 1
    pairs: dict[str, str] = {}
    for node in calls:
        before = node.args[0] if node.args else None
        if not (
            isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1
        ):
            continue
        if str(before.target) in pairs:
            continue  # a second norm after the one that is folded
        layer, norm = modules[str(before.target)], modules[str(node.target)]
        if uses[str(before.target)] == uses[str(node.target)] == 1 and _foldable(layer, norm):
            pairs[str(before.target)] = str(node.target)
            if layer.bias is None:
                layer.register_parameter("bias", nn.Parameter(torch.empty(0), requires_grad=False))
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
            graph.delete_submodule(str(node.target))
    return pairs


def _chain_linears(graph: fx.GraphModule, folded: set[str]) -> dict[str, str]:
    """Take out each linear layer that only feeds another one, where their product is no larger than the two."""
    modules = dict(graph.named_modules())
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    names = [str(node.target) for node in calls]
    chains: dict[str, str] = {}
    for node in calls:
        before = node.args[0] if node.args else None
        if not (
            isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1
        ):
            continue
        last, first = str(node.target), str(before.target)
        if type(modules[last]) is not nn.Linear or type(modules[first]) is not nn.Linear:
            continue
        once = names.count(last) == names.count(first) == 1
        inputs, middle, outputs = (
            modules[first].in_features,
            modules[last].in_features,
            modules[last].out_features,
        )
        small = inputs * outputs <= middle * (inputs + outputs)
        if not once or not small or {first, last} & folded or first in chains:
            continue
        chains[last] = first
        if modules[last].bias is None:
            empty = nn.Parameter(torch.empty(0), requires_grad=False)
            modules[last].register_parameter("bias", empty)
        node.replace_input_with(before, before.args[0])
        graph.graph.erase_node(before)
        graph.delete_submodule(first)
    return chains


def _bias(layer: nn.Module) -> Tensor:
    """The bias of a linear layer, zeros where it has none."""
    assert isinstance(layer, nn.Linear)
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias


def _foldable(layer: nn.Module, norm: nn.Module) -> bool:
    if type(norm) not in _BATCH_NORMS or norm.running_mean is None:
        return False
    return type(layer) in _CONVOLUTIONS or (
        type(layer) is nn.Linear and type(norm) is nn.BatchNorm1d
    )


def _fuse(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    arguments: tuple[Any, ...] = (
        layer.weight,
        layer.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    if isinstance(layer, nn.Linear):
        return fusion.fuse_linear_bn_weights(*arguments)
    return fusion.fuse_conv_bn_weights(*arguments)


def _relu_in_place(graph: fx.GraphModule) -> None:
    """Let ReLU overwrite its input where that input is a layer's output which nobody else reads."""
    modules = dict(graph.named_modules())
    for node in graph.graph.nodes:
        if node.op != "call_module" or type(modules[str(node.target)]) is not nn.ReLU:
            continue
        before = node.args[0] if node.args else None
        if not (
            isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1
        ):
            continue
        if type(modules[str(before.target)]) in (*_CONVOLUTIONS, nn.Linear):
            # The same ReLU module may serve several places, so it is this call that changes.
            with graph.graph.inserting_before(node):
                inplace = graph.graph.call_function(torch.relu_, (before,))
            node.replace_all_uses_with(inplace)
            graph.graph.erase_node(node)


def _speed_up_input(graph: fx.GraphModule) -> None:
    """Give the convolutions of the image a faster gradient."""
    for name, module in list(graph.named_modules()):
        if InputConvolution.suits(module):
            owner, _, leaf = name.rpartition(".")
            setattr(graph.get_submodule(owner), leaf, InputConvolution(module))


def _place(owner: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer to a frozen tensor; convolution weights in channels_last."""
    value = value.detach()
    if value.ndim == 4:
        # Strides are set by hand because those of a tensor of one channel fit both layouts, and torch would
        # then run that convolution, and the gradient that comes back to it, in the slow one.
        value = value.contiguous(memory_format=torch.channels_last)
        _, channels, height, width = value.shape
        value = value.as_strided(
            value.shape, (channels * height * width, 1, width * channels, channels)
        )
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        setattr(owner, name, value)
