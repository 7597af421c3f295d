"""Convert a model's linear layers to analog ones in place, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from analog_plugin.errors import AnalogError
from analog_plugin.layers.base import AnalogLayer
from analog_plugin.layers.state import ForwardState, forward_state, model_scheme
from analog_plugin.patterns import matches
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
        scheme: The analog scheme of all converted layers, but for its ``overrides``.
        ignore: Modules that stay digital: full names, last parts of names (``"lm_head"``) or
            patterns (``"*.down_proj"``).
        targets: Class names, or names and patterns as in ``ignore``, of the modules to convert.

    Returns:
        The same model.

    Raises:
        AnalogError: A name in ``ignore``, ``targets`` or the scheme's ``overrides`` matches
            nothing, no layer is left, the model was already converted, or a layer to convert is
            tied to an embedding.
    """
    from analog_plugin.plugins import layer_types

    if any(isinstance(module, AnalogLayer) for module in model.modules()):
        raise AnalogError("The model is analog already; call to_digital(model) to start again.")
    names = _names(model)
    known = layer_types()
    # The class itself, not a subclass: a subclass's forward may do more than multiply.
    candidates = {module: known[type(module)] for module in names if type(module) in known}
    if not candidates:
        raise AnalogError(
            f"{type(model).__name__} has no linear layer that can be made analog; give a model "
            "with nn.Linear or Conv1D layers."
        )
    _check_patterns(ignore, [name for given in names.values() for name in given], "ignore")
    chosen = {
        module: own
        for module in candidates
        if any(_is_target(module, names[module], target) for target in targets)
        and not any(matches(name, pattern) for name in names[module] for pattern in ignore)
        and (own := scheme.for_layer(names[module][0])) is not None
    }
    if not chosen:
        raise AnalogError(
            f"No layer is left to convert: targets {list(targets)}, ignore {list(ignore)}; the "
            f"model has for instance {names[next(iter(candidates))][0]!r}."
        )
    classes = {base.__name__ for digital in known for base in digital.__mro__}
    convertible = [name for module in candidates for name in names[module]]
    _check_patterns([target for target in targets if target not in classes], convertible, "targets")
    _check_patterns([pattern for pattern, _ in scheme.overrides], convertible, "overrides")
    _refuse_tied_embeddings(list(chosen), names)
    state = ForwardState(scheme=scheme)
    for digital, own in chosen.items():
        analog = _replace(model, digital, names[digital], candidates[digital].convert, own)
        analog.name, analog.state = names[digital][0], state
    _tie_ranges(model, scheme)
    # DDP would overwrite each process's own counts by the first one's before every forward.
    counts: Any = [f"{name}.clip_counts" for digital in chosen for name in names[digital]]
    model._ddp_params_and_buffers_to_ignore = counts
    model.register_forward_pre_hook(state.watch, with_kwargs=True)
    return model


def to_digital(model: nn.Module) -> nn.Module:
    """Replace analog layers by plain ones that share their weights, in place.

    Raises:
        AnalogError: The model has no analog layer.
    """
    layers = [layer for _, layer in analog_layers(model)]
    if not layers:
        raise AnalogError("The model has no analog layer; there is nothing to convert back.")
    _back(model, layers)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), ForwardState):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def keep_digital(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Replace the analog layers called ``names`` by plain ones, and note it in the model's scheme.

    Raises:
        AnalogError: A name is no analog layer's, or no analog layer would be left.
    """
    layers = dict(analog_layers(model))
    for name in names:
        if name not in layers:
            raise AnalogError(f"{name!r} is no analog layer of the model.")
    if len(set(names)) == len(layers):
        raise AnalogError("No analog layer would be left; keep fewer layers digital.")
    scheme = model_scheme(model)
    overrides = (*scheme.overrides, *((name, "digital") for name in names))
    forward_state(model).scheme = scheme.replace(overrides=overrides)
    _back(model, [layers[name] for name in names])
    left = [layer for _, layer in analog_layers(model)]
    owned = {id(layer.input_range) for layer in left if layer.owns_range}
    for layer in left:  # whose owner went: the first of each group takes over
        if id(layer.input_range) not in owned:
            layer.owns_range = True
            owned.add(id(layer.input_range))
    return model


def analog_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of the analog layers in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, AnalogLayer):
            yield name, module


@contextlib.contextmanager
def digital_layers(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within this context analog layers have neither converters nor training noise."""
    before = [(layer, layer.digital) for _, layer in analog_layers(model)]
    try:
        for layer, _ in before:
            layer.digital = active
        yield
    finally:
        for layer, digital in before:
            layer.digital = digital


@contextlib.contextmanager
def scheme_changed(model: nn.Module, changes: Mapping[str, Any]) -> Iterator[None]:
    """Within this context ``changes`` hold for the scheme of the model and of every layer."""
    state, scheme = forward_state(model), model_scheme(model)
    before = [
        (layer, layer.scheme, layer.input_range.requires_grad) for _, layer in analog_layers(model)
    ]
    try:
        state.scheme = scheme.replace(**changes)
        for layer, own, _ in before:
            layer.scheme = own.replace(**changes)
            layer.input_range.requires_grad_(layer.scheme.input_range == "learned")
        yield
    finally:
        state.scheme = scheme
        for layer, own, learned in before:
            layer.scheme = own
            layer.input_range.requires_grad_(learned)


def _back(model: nn.Module, layers: Sequence[Any]) -> None:
    names = _names(model)
    for layer in layers:
        _replace(model, layer, names[layer], type(layer).to_linear)


def _names(model: nn.Module) -> dict[Any, list[str]]:
    """All names of each module below ``model``: one that is used twice has two."""
    names: dict[Any, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            names.setdefault(module, []).append(name)
    return names


def _replace(
    model: nn.Module, module: Any, names: Sequence[str], make: Callable[..., Any], *args: Any
) -> Any:
    """Put ``make(module, *args)`` in the module's place, under all its names and in its mode.

    An Accelerate hook, which replaces ``forward``, is carried over to the successor.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(module)
    successor = make(module, *args).train(module.training)
    for name in names:
        model.set_submodule(name, successor)
    if hook is not None:
        add_hook_to_module(successor, hook)
    return successor


def _is_target(module: nn.Module, names: Sequence[str], target: str) -> bool:
    classes = {base.__name__ for base in type(module).__mro__}
    return target in classes or any(matches(name, target) for name in names)


def _check_patterns(patterns: Sequence[str], names: Sequence[str], argument: str) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            last = sorted({name.rsplit(".", 1)[-1] for name in names})
            shown = ", ".join(part for part in last if not part.isdigit()) or names[0]
            kind = "module" if argument == "ignore" else "linear layer"
            raise AnalogError(
                f"{argument} names {pattern!r}, which matches no {kind} of the model; its {kind}s "
                f"are called {shown}."
            )


def _refuse_tied_embeddings(chosen: Sequence[Any], names: dict[Any, list[str]]) -> None:
    embeddings = {
        id(module.weight): known[0]
        for module, known in names.items()
        if isinstance(module, nn.Embedding)
    }
    for module in chosen:
        name, tied = names[module][0], embeddings.get(id(module.weight))
        if tied is not None:
            raise AnalogError(
                f"{name!r} shares its weight with the embedding {tied!r}, which would get its "
                f"noise and clipping too; untie them first or write ignore: [{name}]."
            )


def _tie_ranges(model: nn.Module, scheme: AnalogScheme) -> None:
    """Let the members of each group share one ``input_range`` Parameter, where DACs are alike."""
    for group in scheme.tie_ranges:
        owners: dict[tuple[Any, ...], Any] = {}
        for name, layer in analog_layers(model):
            parent, _, last = name.rpartition(".")
            if last not in group:
                continue
            dac = layer.scheme.input_bits, layer.scheme.input_range
            owner = owners.setdefault((parent, *dac, *layer.tiles), layer)
            if owner is not layer:
                layer.share_range(owner)
