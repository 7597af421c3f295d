"""The settings of one run, as a recipe holds them: frozen, and validated once."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model
from pydantic_core import PydanticCustomError

from analog_plugin.errors import AnalogError, one_line, shown
from analog_plugin.files import parse_yaml, read_yaml_text
from analog_plugin.settings import Settings

#: What numpy and torch both take.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class DataSettings(Settings):
    """Where training tokens come from.

    Args:
        source: ``"self"``: sampled from the model; otherwise a file, directory or hub id as
            :func:`~analog_plugin.data.load_tokens` reads, or a directory of
            :mod:`~analog_plugin.data.shards`.
        tokens: How many.
        sequence_length: Tokens of a sequence.
        bos_token_id, temperature, top_k, ignore_eos, batch_size, seed: Of the sampling, see
            :func:`~analog_plugin.data.generate_dataset`.
        text_column: Of a dataset.
    """

    source: str = "self"
    tokens: int = Field(41_000, gt=0)
    sequence_length: int = Field(128, gt=1)
    bos_token_id: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, gt=0)
    top_k: int | None = Field(None, gt=0)
    ignore_eos: bool = True
    batch_size: int = Field(32, gt=0)
    seed: Seed = 0
    text_column: str = "text"


class DistillationSettings(Settings):
    """The loss; see :func:`~analog_plugin.training.loss.distillation_loss`.

    Args:
        teacher_dtype: Type that the teacher is cast to for training; null: the model's.
        teacher: Directory of :func:`~analog_plugin.training.stored.store_teacher`, read instead of
            keeping a teacher in memory during training.
    """

    temperature: float = Field(1.0, gt=0)
    cross_entropy: float = Field(0.0, ge=0, le=1)
    top_k: int | None = Field(None, gt=0)
    chunk: int | None = Field(None, gt=0)
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    teacher: str | None = None


class CalibrationSettings(Settings):
    """What the start before training is prepared for.

    Args:
        noise: The programming noise model that rescaling and the choice of digital layers weigh;
            null: the converters only.
    """

    noise: str | dict[str, Any] | None = "pcm"


class EvaluationSettings(Settings):
    """What the table of results measures; see :func:`~analog_plugin.evaluation.evaluate_noise`.

    Args:
        noise: Noise models beside the noise-free measurement.
        seeds: Noise seeds.
        blocks, length: Evenly spaced blocks of the corpus, and their tokens.
        corpus: ``"pydoc_data.topics"`` (in every Python), or what ``load_tokens`` reads.
        batch_size: Blocks evaluated together.
    """

    noise: tuple[str | dict[str, Any], ...] = ("pcm",)
    seeds: int = Field(10, gt=0)
    blocks: int = Field(16, gt=0)
    length: int = Field(256, gt=1)
    corpus: str = "pydoc_data.topics"
    batch_size: int = Field(4, gt=0)


def _names(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value
    several = value if isinstance(value, (list, tuple)) else ()
    if not several or not all(isinstance(name, str) for name in several):
        raise PydanticCustomError("names", "it should be a name or a list of names")
    return tuple(dict.fromkeys(several))


class DeploySettings(Settings):
    """What is written.

    Args:
        profile: A name from the hook ``analog_exporters``, or several: then each is a directory of
            its name below the output.
        weight_scale: How weights are rounded: each row's largest magnitude is its largest code
            (``"max"``), or rows are clipped where their squared error is least (``"mse"``).
        average_bits, max_bytes: The budget of a mixed profile, in bits a weight of the quantized
            layers, or in bytes of their codes and scales.
        g_max: Of the profile ``conductances``: µS of each column's largest weight.
    """

    profile: Annotated[Any, BeforeValidator(_names)] = "analog-fp"
    weight_scale: Literal["max", "mse"] | None = None
    average_bits: float | None = Field(None, gt=0)
    max_bytes: int | None = Field(None, gt=0)
    g_max: float | None = Field(None, gt=0)

    @property
    def profiles(self) -> tuple[str, ...]:
        """All profiles by name."""
        return (self.profile,) if isinstance(self.profile, str) else self.profile

    def options(self, profile: str) -> dict[str, Any]:
        """The options given that ``profile`` takes."""
        from analog_plugin.plugins import exporters, lookup

        known = lookup(exporters(), profile, "deploy profile").options
        return {name: value for name, value in self._given().items() if name in known}

    def check(self) -> None:
        """Refuse unknown profiles, and options that none of them takes.

        Raises:
            AnalogError: One sentence on the first fault.
        """
        taken = {name for profile in self.profiles for name in self.options(profile)}
        for name in self._given():
            if name not in taken:
                raise AnalogError(
                    f"deploy: {name} is no option of the profile {', '.join(self.profiles)}."
                )

    def _given(self) -> dict[str, Any]:
        return {k: v for k, v in dict(self).items() if k != "profile" and v is not None}


class AnalogRecipe(Settings):
    """All settings of one run.

    Args:
        scheme: A preset's name, or a mapping (see :func:`~analog_plugin.presets.resolve_scheme`).
        targets, ignore: Modules to convert and to leave; see ``convert_to_analog``.
        assignment: A YAML or JSON file of the scheme's ``overrides``: which modules stay digital
            or have fields of their own. :meth:`parse` reads it into the scheme.
        data, calibration, distillation, evaluation, deploy: See there; ``evaluation: null``
            measures nothing.
        training: Any field of ``transformers.TrainingArguments``, and ``range_learning_rate``,
            ``trainable`` (``"all"`` or ``"analog"``: the analog layers' weights and ranges only),
            ``noise_per`` and ``keep_noise`` (see
            :class:`~analog_plugin.training.AnalogCallback`). ``null``: no training, calibration
            only.
        seed: Of sampling order and training noise.
    """

    scheme: str | dict[str, Any] = "AFM"
    targets: tuple[str, ...] = ("Linear", "Conv1D")
    ignore: tuple[str, ...] = ("lm_head",)
    assignment: str | None = None
    data: DataSettings = DataSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    distillation: DistillationSettings = DistillationSettings()
    training: dict[str, Any] | None = Field(default_factory=dict)
    evaluation: EvaluationSettings | None = EvaluationSettings()
    deploy: DeploySettings = DeploySettings()
    seed: Seed = 0

    @classmethod
    def parse(cls, values: Mapping[str, Any] | AnalogRecipe) -> AnalogRecipe:
        """Validate everything that can be known before a model is loaded.

        Raises:
            AnalogError: One sentence on the first fault.
        """
        from analog_plugin.noise import resolve_noise
        from analog_plugin.presets import resolve_scheme

        if not isinstance(values, (Mapping, cls)):
            raise AnalogError(
                f"The recipe is {shown(values)}, but must be a mapping of fields to values."
            )
        fields: dict[str, Any] = dict(values)
        parts: dict[str, Any] = {
            "data": DataSettings,
            "calibration": CalibrationSettings,
            "distillation": DistillationSettings,
            "evaluation": EvaluationSettings,
            "deploy": DeploySettings,
        }
        for name, part in parts.items():
            if fields.get(name) is not None:
                fields[name] = part.read(fields[name], name)
            elif name != "evaluation":
                fields.pop(name, None)
        if fields.get("training") is not None:
            own, arguments = split_training(fields["training"])
            fields["training"] = own.model_dump(exclude_unset=True) | arguments
        recipe = cls.read(fields, "The recipe")
        if recipe.assignment is not None:
            overrides = read_assignment(recipe.assignment)
            scheme = resolve_scheme(recipe.scheme)
            scheme = scheme.replace(overrides=(*scheme.overrides, *overrides.items()))
            recipe = recipe.model_copy(update={"scheme": scheme.to_dict(), "assignment": None})
        resolve_scheme(recipe.scheme)
        resolve_noise(recipe.calibration.noise)
        recipe.deploy.check()
        for noise in recipe.evaluation.noise if recipe.evaluation else ():
            resolve_noise(noise)
        return recipe


def read_assignment(path: str) -> Mapping[str, Any]:
    """Read a file of overrides: module names or patterns to ``digital`` or to fields.

    Raises:
        AnalogError: It is missing, cannot be read, or holds something else.
    """
    try:
        text = read_yaml_text(Path(path))
    except AnalogError as error:
        raise AnalogError(f"The assignment {error}") from None
    except (OSError, ValueError) as error:
        raise AnalogError(
            f"The assignment {shown(path)} cannot be read: {one_line(error)}."
        ) from None
    values = parse_yaml(text, f"The assignment {shown(path)}")
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise AnalogError(
            f"The assignment {shown(path)} holds {shown(values)}, but must map module names or "
            "patterns to digital or to fields; write for instance down_proj: digital."
        )
    return values


class OwnTraining(Settings):
    """The fields under ``training`` that are ours rather than ``TrainingArguments``'."""

    range_learning_rate: float = Field(3e-3, gt=0, lt=1)
    trainable: Literal["all", "analog"] = "all"
    noise_per: Literal["forward", "step"] = "forward"
    keep_noise: bool = True


def split_training(training: Mapping[str, Any] | None) -> tuple[OwnTraining, dict[str, Any]]:
    """Separate our fields from those of ``TrainingArguments``, all of the type declared there.

    ``bf16`` may be ``"auto"`` as well: bfloat16 where the processor computes with it. Numbers
    written as text become numbers: YAML reads ``5e-5``, without a point, as text.

    Raises:
        AnalogError: A name is neither's, or a value is not of its type.
    """
    given = {} if training is None else training
    read = _training_settings().read(given, "training")
    values = {name: getattr(read, name) for name in given}
    own = {name: values.pop(name) for name in OwnTraining.model_fields if name in values}
    return OwnTraining(**own), values


_BOUNDS: dict[str, Any] = {
    "per_device_train_batch_size": Field(gt=0),
    "gradient_accumulation_steps": Field(gt=0),
    "num_train_epochs": Field(gt=0),
    "learning_rate": Field(ge=0),
    "weight_decay": Field(ge=0),
    "seed": Field(ge=0, lt=2**32),
}


@cache
def _training_settings() -> type[OwnTraining]:
    """Our fields and those that ``TrainingArguments`` declares, as one validated record."""
    from transformers import TrainingArguments

    types = typing.get_type_hints(TrainingArguments)
    fields: dict[str, Any] = {
        field.name: (Annotated[types[field.name], _BOUNDS.get(field.name)], None)
        for field in dataclasses.fields(TrainingArguments)
        if field.init and field.name != "output_dir"
    }
    fields["bf16"] = (Literal[True, False, "auto"], None)
    return create_model("TrainingSettings", __base__=OwnTraining, **fields)
