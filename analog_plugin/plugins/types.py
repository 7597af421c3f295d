"""Records that hooks yield."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NoiseModel:
    """A model of what programming does to weights.

    Args:
        name: Name in recipes and commands.
        factory: Called with the recipe's arguments; returns an object with
            ``program(weight, generator)`` for one tile's weights [columns, rows], which gives them
            as a tensor, or with a factor behind the tile's ADC as a
            :class:`~analog_plugin.noise.Programmed`. Where it has ``for_layer(weight)``, that gives
            the model of one layer's tiles. Where it can be read some time after programming, its
            factory takes ``time``, and it has that as an attribute (None: as programmed). A fault
            that can stand behind another model has ``follow(made, weight, generator)``; see
            :class:`~analog_plugin.noise.NoiseChain`. A model that draws nothing has ``random``
            false: it is measured under the first seed alone.
        summary: One line for help texts.
    """

    name: str
    factory: Callable[..., Any]
    summary: str = ""


@dataclass(frozen=True)
class Preset:
    """A named scheme.

    Args:
        name: Name in recipes.
        scheme: Called without arguments; returns an :class:`~analog_plugin.AnalogScheme`.
        summary: One line for help texts.
    """

    name: str
    scheme: Callable[[], Any]
    summary: str = ""


@dataclass(frozen=True)
class LayerType:
    """How modules of one class become analog.

    Args:
        digital: The module class; its subclasses are not meant.
        convert: From (module, scheme) to the analog module.
        summary: One line for help texts.
    """

    digital: type
    convert: Callable[[Any, Any], Any]
    summary: str = ""


@dataclass(frozen=True)
class Exporter:
    """A writer of one deploy profile.

    Args:
        name: The profile's name in recipes and commands.
        write: Called as ``write(model, directory)`` with an analog model and an existing empty
            directory; writes ``config.json`` and the weights, and returns the metadata that belongs
            into ``analog_config`` (None: the profile is purely digital). With ``prepare`` it is
            called as ``write(model, directory, plan)``.
        summary: One line for help texts.
        check: Called as ``check(model, **options)`` with the analog model before it is trained, and
            again before it is written; raises ``AnalogError`` where the profile cannot hold it.
        prepare: Called as ``prepare(model, batches=batches, **options)`` with keyword arguments of
            the model's forward to calibrate on, or None; gives a plan, whatever ``write`` and
            ``reading`` are to have. Where it has ``notes``, these sentences go into the model card,
            and where it has ``usage``, these lines instead of how transformers loads it.
        reading: Called as ``reading(model, plan)``; gives a context within which the model computes
            what loaders without this package make of the profile, to be measured. None: not
            measured.
        options: Names of the options that ``check`` and ``prepare`` take; recipes and commands know
            those of this package's profiles.
    """

    name: str
    write: Callable[..., Mapping[str, Any] | None]
    summary: str = ""
    check: Callable[..., None] = lambda model, **options: None
    prepare: Callable[..., Any] | None = None
    reading: Callable[[Any, Any], AbstractContextManager[None]] | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModifierType:
    """A modifier class that a host's recipes may name.

    Args:
        name: The name in recipes.
        path: ``"package.module:Class"``, imported only when a recipe is read.
    """

    name: str
    path: str


@dataclass(frozen=True)
class Evaluator:
    """A group of metrics of a model on tokens.

    Args:
        name: Name for ``evaluate_noise(..., evaluators=[...])``.
        evaluate: Called as ``evaluate(model, tokens, reference, batch_size)`` with tokens [N, S]
            and a :class:`~analog_plugin.evaluation.Reference` or None; returns metrics by name.
        summary: One line for help texts.
        metrics: The names of the metrics that it returns.
    """

    name: str
    evaluate: Callable[..., Mapping[str, float]]
    summary: str = ""
    metrics: tuple[str, ...] = ()
