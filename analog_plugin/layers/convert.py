"""Convert a model's linear layers to analog ones in place, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

from torch import nn

from analog_plugin.errors import AnalogError
from analog_plugin.layers.base import AnalogLayer
from analog_plugin.layers.state import ForwardState
from analog_plugin.scheme import AnalogScheme


def convert_to_analog(
    model: nn.Module,
    scheme: AnalogScheme,
    ignore: Sequence[str] = ("lm_head",),
    targets: Sequence[str] = ("Linear", "Conv1D"),
) -> nn.Module:
    """Replace linear layers by analog ones, in place.

    Parameters are shared, not copied: dtype, device, hooks and tied weights stay as they are.

    Args:
        model: Any model with linear layers.
        scheme: The analog scheme of all converted layers.
        ignore: Modules that stay digital: full names, last parts of names (``"lm_head"``) or
            patterns (``"*.down_proj"``).
        targets: Class names, or names and patterns as in ``ignore``, of the modules to convert.

    Returns:
        The same model.

    Raises:
        AnalogError: A name in ``ignore`` or ``targets`` matches nothing, no layer is left, the
            model was already converted, or a layer to convert is tied to an embedding.
    """
    if any(isinstance(module, AnalogLayer) for module in model.modules()):
        raise AnalogError("The model is analog already; call to_digital(model) to start again.")
    candidates = list(_candidates(model))
    if not candidates:
        raise AnalogError(
            f"{type(model).__name__} has no linear layer that can be made analog; give a model "
            "with nn.Linear or Conv1D layers."
        )
    _check_patterns(ignore, [name for name, _ in model.named_modules()], "ignore")
    chosen = []
    for name, layer_type in candidates:
        module = model.get_submodule(name)
        classes = {base.__name__ for base in type(module).__mro__}
        wanted = any(t in classes or matches(name, t) for t in targets)
        if wanted and not any(matches(name, pattern) for pattern in ignore):
            chosen.append((name, layer_type))
    if not chosen:
        raise AnalogError(
            f"No layer is left to convert: targets {list(targets)}, ignore {list(ignore)}; the "
            f"model has for instance {candidates[0][0]!r}."
        )
    _refuse_tied_embeddings(model, [name for name, _ in chosen])
    state = ForwardState()
    for name, layer_type in chosen:
        digital = model.get_submodule(name)
        with _accelerate_hook(digital) as transfer:
            analog = layer_type.convert(digital, scheme)
            analog.name, analog.state = name, state
            analog.train(digital.training)
            model.set_submodule(name, analog)
            transfer(analog)
    _tie_ranges(model, scheme)
    model.register_forward_pre_hook(state.watch, with_kwargs=True)
    return model


def to_digital(model: nn.Module) -> nn.Module:
    """Replace analog layers by plain ones that share their weights, in place.

    Raises:
        AnalogError: The model has no analog layer.
    """
    layers = dict(analog_layers(model))
    if not layers:
        raise AnalogError("The model has no analog layer; there is nothing to convert back.")
    for name, layer in layers.items():
        model.set_submodule(name, layer.to_linear())
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), ForwardState):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def analog_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of the analog layers in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, AnalogLayer):
            yield name, module


@contextlib.contextmanager
def digital_layers(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within this context analog layers have neither converters nor training noise."""
    layers = [layer for _, layer in analog_layers(model)]
    try:
        for layer in layers:
            layer.digital = active
        yield
    finally:
        for layer in layers:
            layer.digital = False


def matches(name: str, pattern: str) -> bool:
    """Whether a module's name is, ends in, or fits ``pattern``.

    Example:
        >>> matches("model.layers.0.mlp.down_proj", "down_proj")
        True
    """
    return name == pattern or name.endswith("." + pattern) or fnmatch(name, pattern)


def _candidates(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from analog_plugin.plugins import layer_types

    known = layer_types()
    for name, module in model.named_modules():
        # The class itself, not a subclass: a subclass's forward may do more than multiply.
        if name and type(module) in known:
            yield name, known[type(module)]


def _check_patterns(patterns: Sequence[str], names: Sequence[str], argument: str) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            last = sorted({name.rsplit(".", 1)[-1] for name in names if name})
            shown = ", ".join(part for part in last if not part.isdigit())
            raise AnalogError(
                f"{argument} names {pattern!r}, which matches no module of the model; its modules "
                f"are called {shown}."
            )


def _refuse_tied_embeddings(model: nn.Module, names: Sequence[str]) -> None:
    embeddings = {
        id(module.weight): name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    for name in names:
        tied = embeddings.get(id(model.get_submodule(name).weight))
        if tied is not None:
            raise AnalogError(
                f"{name!r} shares its weight with the embedding {tied!r}, which would get its "
                f"noise and clipping too; untie them first or write ignore: [{name}]."
            )


def _tie_ranges(model: nn.Module, scheme: AnalogScheme) -> None:
    """Let the members of each group share one ``input_range`` Parameter."""
    for group in scheme.tie_ranges:
        owners: dict[str, Any] = {}
        for name, layer in analog_layers(model):
            parent, _, last = name.rpartition(".")
            if last not in group:
                continue
            owner = owners.setdefault(parent, layer)
            if owner is not layer and owner.tiles == layer.tiles:
                layer.input_range = owner.input_range
                layer.owns_range = False


class _accelerate_hook:
    """Carry an Accelerate hook (which replaces ``forward``) from a module to its successor."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.hook = module, getattr(module, "_hf_hook", None)

    def __enter__(self) -> Any:
        if self.hook is not None:
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(self.module)
        return self.transfer

    def transfer(self, successor: nn.Module) -> None:
        if self.hook is not None:
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(successor, self.hook)

    def __exit__(self, *error: object) -> None:
        return None
