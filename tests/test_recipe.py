"""Recipes: what is understood, and what is refused in one sentence."""

import re

import pytest

from analog_plugin import AnalogError
from analog_plugin.recipe import AnalogRecipe, split_training


def refused(values):
    """The message, which must be a single line."""
    with pytest.raises(AnalogError) as error:
        AnalogRecipe.parse(values)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_empty_recipe_is_the_default_one():
    recipe = AnalogRecipe.parse({})
    assert recipe == AnalogRecipe()
    assert recipe.scheme == "AFM"
    assert recipe.targets == ("Linear", "Conv1D") and recipe.ignore == ("lm_head",)
    assert recipe.data.source == "self" and recipe.data.ignore_eos
    assert (recipe.distillation.temperature, recipe.distillation.cross_entropy) == (1.0, 0.0)
    assert recipe.training == {} and recipe.deploy.profile == "analog-fp" and recipe.seed == 0
    assert recipe.evaluation.noise == ("pcm",) and recipe.evaluation.seeds == 10


def test_all_parts_are_read():
    recipe = AnalogRecipe.parse({
        "scheme": {"preset": "AFM", "tile_rows": 512}, "targets": ["Linear"], "ignore": ["*_proj"],
        "data": {"source": "text.txt", "tokens": 100, "sequence_length": 8, "top_k": 50},
        "distillation": {"temperature": 2.0, "cross_entropy": 0.5, "top_k": 16, "chunk": 4,
                         "teacher_dtype": "bfloat16", "teacher": "logits"},
        "training": {"max_steps": 3, "range_learning_rate": 0.01, "trainable": "analog"},
        "evaluation": {"noise": ["pcm", {"name": "gaussian", "sigma": 0.02}], "seeds": 2},
        "deploy": {"profile": "w8a8"}, "seed": 7,
    })  # fmt: skip
    assert recipe.scheme == {"preset": "AFM", "tile_rows": 512}
    assert recipe.targets == ("Linear",) and recipe.ignore == ("*_proj",)
    assert (recipe.data.tokens, recipe.data.top_k) == (100, 50)
    assert recipe.distillation.model_dump() == {
        "temperature": 2.0, "cross_entropy": 0.5, "top_k": 16, "chunk": 4,
        "teacher_dtype": "bfloat16", "teacher": "logits",
    }  # fmt: skip
    assert recipe.evaluation.noise == ("pcm", {"name": "gaussian", "sigma": 0.02})
    assert recipe.deploy.profile == "w8a8" and recipe.seed == 7


def test_a_recipe_does_not_change_its_source_nor_itself():
    values = {"data": {"tokens": 10}, "training": {"max_steps": 1}}
    recipe = AnalogRecipe.parse(values)
    assert values == {"data": {"tokens": 10}, "training": {"max_steps": 1}}
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        recipe.data.tokens = 3


def test_parts_that_were_already_read_are_taken():
    recipe = AnalogRecipe.parse({"data": {"tokens": 10}})
    again = AnalogRecipe.parse({name: getattr(recipe, name) for name in AnalogRecipe.model_fields})
    assert again == recipe


@pytest.mark.parametrize("part", ["data", "distillation", "deploy"])
def test_a_part_of_null_is_its_default(part):
    assert AnalogRecipe.parse({part: None}) == AnalogRecipe()


def test_training_and_evaluation_of_null_are_switched_off():
    recipe = AnalogRecipe.parse({"training": None, "evaluation": None})
    assert recipe.training is None and recipe.evaluation is None


@pytest.mark.parametrize(
    ("values", "where", "name", "suggestion"),
    [
        ({"shceme": "AFM"}, "The recipe", "shceme", "scheme"),
        ({"data": {"tokns": 1}}, "data", "tokns", "tokens"),
        ({"distillation": {"temprature": 1}}, "distillation", "temprature", "temperature"),
        ({"evaluation": {"seed": 1}}, "evaluation", "seed", "seeds"),
        ({"deploy": {"profil": "w8a8"}}, "deploy", "profil", "profile"),
        ({"training": {"learnin_rate": 1}}, "training", "learnin_rate", "learning_rate"),
        ({"training": {"trainble": "all"}}, "training", "trainble", "trainable"),
        ({"scheme": {"out_bond": 3}}, "The scheme", "out_bond", "out_bound"),
        ({"scheme": {"preset": "AFM", "tile_row": 3}}, "The scheme", "tile_row", "tile_rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_field_gets_a_suggestion(values, where, name, suggestion):
    assert refused(values) == f"{where} has no field {name!r}; did you mean {suggestion!r}?"


@pytest.mark.parametrize(
    ("values", "known"),
    [
        ({"qqqq": 1}, "data, deploy, distillation, evaluation, ignore, scheme, seed, targets"),
        ({"data": {"qqqq": 1}}, "batch_size, bos_token_id, ignore_eos"),
        ({"deploy": {"qqqq": 1}}, "average_bits, g_max, max_bytes, profile, weight_scale."),
    ],
)
def test_an_unknown_field_that_is_like_none_lists_all(values, known):
    message = refused(values)
    assert "has no field 'qqqq'; known fields: " in message and known in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheme": "AFN"}, "There is no preset 'AFN'; did you mean 'AFM'?"),
        ({"deploy": {"profile": "w8a9"}}, "no deploy profile 'w8a9'; did you mean 'w8a8'?"),
        ({"evaluation": {"noise": ["pmc"]}}, "no noise model 'pmc'; did you mean 'pcm'?"),
        ({"evaluation": {"noise": [{"name": "pcm", "size": 2}]}}, "no argument 'size'"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(values, message):
    assert message in refused(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"tokens": 0}}, "data: tokens is 0, but it should be greater than 0."),
        ({"data": {"tokens": "many"}}, "data: tokens is 'many', but it should be a valid integer"),
        ({"data": {"sequence_length": 1}}, "data: sequence_length is 1"),
        ({"data": {"temperature": 0}}, "data: temperature is 0"),
        ({"data": {"top_k": 0}}, "data: top_k is 0"),
        ({"data": {"ignore_eos": "perhaps"}}, "data: ignore_eos is 'perhaps'"),
        ({"data": "self"}, "data is 'self', but must be a mapping of fields to values."),
        ({"data": [1]}, "data is [1], but must be a mapping"),
        ({"distillation": {"cross_entropy": 1.5}}, "distillation: cross_entropy is 1.5"),
        ({"distillation": {"temperature": 0}}, "distillation: temperature is 0"),
        ({"distillation": {"chunk": 0}}, "distillation: chunk is 0"),
        ({"evaluation": {"seeds": 0}}, "evaluation: seeds is 0"),
        ({"evaluation": {"length": 1}}, "evaluation: length is 1"),
        ({"evaluation": {"noise": "pcm"}}, "evaluation: noise is 'pcm'"),
        ({"evaluation": False}, "evaluation is False, but must be a mapping"),
        ({"deploy": {"profile": 8}}, "deploy: profile is 8"),
        ({"deploy": "w8a8"}, "deploy is 'w8a8', but must be a mapping"),
        ({"training": [1]}, "training is [1]"),
        ({"training": {"range_learning_rate": 1}}, "training: range_learning_rate is 1"),
        ({"training": {"trainable": "some"}}, "training: trainable is 'some'"),
        ({"scheme": 3}, "scheme"),
        ({"scheme": {"weight_noise": 2}}, "weight_noise is 2"),
        ({"targets": "Linear"}, "targets is 'Linear'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296, but it should be less than 4294967296"),
        ({"data": {"temperature": float("inf")}}, "data: temperature is inf"),
        ({"training": {"learning_rate": "fast"}}, "training: learning_rate is 'fast'"),
        ({"training": {"max_steps": 1.5}}, "training: max_steps is 1.5"),
        ({"training": {"bf16": "maybe"}}, "training: bf16 is 'maybe'"),
        ({"training": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size is 0"),
    ],
)
def test_a_wrong_value_names_its_field_and_what_was_given(values, message):
    assert message in refused(values)


@pytest.mark.parametrize("values", [None, "AFM", ["scheme"], 3])
def test_a_recipe_that_is_not_a_mapping_is_refused(values):
    assert "mapping" in refused(values)


@pytest.mark.parametrize("values", [{1: 2}, {"data": {1: 2}}, {"training": {1: 2}}])
def test_a_field_that_is_not_text_is_refused(values):
    assert re.search(r"\b1\b", refused(values))


def test_the_output_directory_is_not_the_recipes_to_choose():
    assert "training has no field 'output_dir'" in refused({"training": {"output_dir": "x"}})


def test_own_training_fields_are_separated_from_the_trainers():
    own, rest = split_training({"trainable": "analog", "max_steps": 2, "learning_rate": 1e-4})
    assert own.trainable == "analog" and own.range_learning_rate == 3e-3
    assert rest == {"max_steps": 2, "learning_rate": 1e-4}
    own, rest = split_training(None)
    assert own.trainable == "all" and rest == {}


@pytest.mark.parametrize("bf16", [True, False, "auto"])
def test_bf16_may_be_left_to_the_processor(bf16):
    assert split_training({"bf16": bf16})[1] == {"bf16": bf16}


def test_numbers_that_yaml_reads_as_text_are_numbers():
    recipe = AnalogRecipe.parse({"training": {"learning_rate": "5e-5", "max_steps": "3"}})
    assert recipe.training == {"learning_rate": 5e-5, "max_steps": 3}


def test_a_recipe_is_validated_however_it_was_made():
    with pytest.raises(AnalogError, match="no preset 'AFN'"):
        AnalogRecipe.parse(AnalogRecipe(scheme="AFN"))
    recipe = AnalogRecipe.parse({"evaluation": None, "seed": 3})
    assert AnalogRecipe.parse(recipe) == recipe
