"""What a directory holds, told without loading it; and everything that is wrong with it."""

import json
import os
import re
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, tiny, token_ids

from analog_plugin import (
    AnalogError,
    AnalogScheme,
    calibrate_ranges,
    convert_to_analog,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from analog_plugin.checkpoint.layout import write_manifest
from analog_plugin.checkpoint.save import plan_export
from analog_plugin.files import sha256_of
from analog_plugin.inspection.overview import overview
from analog_plugin.layers import analog_layers
from analog_plugin.layers.prefix import install_prefix
from analog_plugin.training.ranges import calibrate_plain_ranges
from analog_plugin.training.start import prepare_start

#: Every profile, options, and vLLM's answer to a model of a large enough head.
CASES = {
    "analog-fp": ({}, False), "w8a8": ({}, True), "w8a8o8": ({}, None), "w4-in-w8": ({}, True),
    "w4a8": ({}, False), "w4a8o8": ({}, True), "w3-in-w8": ({}, True), "w3a8": ({}, False),
    "w2-in-w8": ({"weight_scale": "mse"}, True), "w2a8": ({}, False),
    "mixed": ({"average_bits": 3.5}, False), "mixed-in-w8": ({"average_bits": 4.5}, True),
}  # fmt: skip
LAYER = "model.layers.0.mlp.down_proj"
WEIGHTS = "model.safetensors"
STATE = "analog/analog_state.safetensors"


@pytest.fixture(scope="module")
def analog():
    """A model with a head size of 32."""
    model = tiny("llama", num_attention_heads=2, num_key_value_heads=2)
    convert_to_analog(model, AnalogScheme(tile_rows=32))
    calibrate_ranges(model, [{"input_ids": token_ids()}])
    return model


@pytest.fixture(scope="module")
def saved(analog, tmp_path_factory):
    """Directories of every profile, and their plans."""
    root = tmp_path_factory.mktemp("profiles")
    batches = [{"input_ids": token_ids(seed=2)}]
    plans = {}
    for profile, (options, _) in CASES.items():
        plans[profile] = plan_export(analog, profile, batches=batches, **options)
        save_checkpoint(analog, root / profile, profile=profile, plan=plans[profile])
    return root, plans


@pytest.fixture
def copy_of(saved, tmp_path):
    def copy(profile):
        return shutil.copytree(saved[0] / profile, tmp_path / profile)

    return copy


def problems(directory, **options):
    found = inspect_checkpoint(directory, **options)
    text = overview(found)
    for problem in found.problems:
        assert "\n" not in problem and len(problem) < 1500
        assert problem in text or len(found.problems) > 20
    json.dumps(found.to_dict())
    return list(found.problems)


def change_config(directory, change):
    path = directory / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    if (directory / "analog").exists():
        write_manifest(directory)


def change_tensors(directory, change, file=WEIGHTS):
    state = load_file(directory / file)
    change(state)
    save_file(state, directory / file, metadata={"format": "pt"})
    if file == STATE:
        digest = sha256_of(directory / STATE)
        change_config(directory, lambda v: v["analog_config"]["state"].update(sha256=digest))
    write_manifest(directory)


@pytest.mark.parametrize("profile", CASES)
def test_a_profile_is_told_by_its_name_with_its_bits_and_ranges(profile, saved, analog):
    root, plans = saved
    found = inspect_checkpoint(root / profile)
    plan = plans[profile]
    assert not found.problems
    assert (found.kind, found.profile) == (
        "analog-fp" if profile == "analog-fp" else "digital",
        profile,
    )
    assert found.architecture == "LlamaForCausalLM" and found.dtypes == ("F32",)
    assert found.parameters == sum(p.numel() for n, p in analog.named_parameters()
                                   if not n.endswith("input_range"))  # fmt: skip
    assert set(found.quantized) == set(plan.layers) and found.ignored == ("lm_head",)
    widths = [layer.weight_bits for layer in plan.layers.values()]
    assert {group.bits: group.layers for group in found.groups} == {
        bits: widths.count(bits) for bits in set(widths)
    }
    inputs = sorted(127 * float(layer.input_scale) for layer in plan.layers.values())
    ranges = found.inputs.ranges
    assert (ranges.smallest, ranges.largest) == pytest.approx((inputs[0], inputs[-1]))
    assert inputs[0] < ranges.median < inputs[-1]
    assert (found.outputs is not None) == profile.endswith("o8")
    assert profile in overview(found)


@pytest.mark.parametrize("profile", CASES)
def test_loaders_take_what_they_can(profile, saved):
    takes = {row.name: row for row in inspect_checkpoint(saved[0] / profile).loaders}
    assert takes["AutoModelForCausalLM"].takes
    assert takes["AnalogModelForCausalLM"].takes == (profile == "analog-fp")
    assert takes["vLLM"].takes == CASES[profile][1]
    assert all(row.takes or row.reason for row in takes.values())


def test_sizes_are_those_of_the_files(saved):
    root, _ = saved
    for profile in CASES:
        sizes = inspect_checkpoint(root / profile).sizes
        tensors = load_file(root / profile / WEIGHTS)
        held = sizes.codes + sizes.layers + sizes.scales + sizes.embeddings + sizes.other
        assert held == sum(t.numel() * t.element_size() for t in tensors.values())
        assert held < sizes.weight_files == (root / profile / WEIGHTS).stat().st_size
    packed, bytewise = (inspect_checkpoint(root / p).sizes for p in ("w4a8", "w4-in-w8"))
    assert 4 < packed.bits_per_weight < 5 < 8 < bytewise.bits_per_weight < 9


def test_the_analog_model_is_summed_up(tmp_path):
    model = tiny("llama")
    install_prefix(model, [1])
    convert_to_analog(model, AnalogScheme(tile_rows=32, prefix=1, range_init="mse"))
    batches = [{"input_ids": token_ids()}]
    prepare_start(model, batches, token_ids(), None)
    calibrate_plain_ranges(model, batches)
    save_checkpoint(model, tmp_path / "out")
    (tmp_path / "out" / "analog" / "training.json").write_text(
        json.dumps({"steps": 7, "tokens": 900, "seed": 3})
    )
    write_manifest(tmp_path / "out")
    found = inspect_checkpoint(tmp_path / "out")
    assert not found.problems
    part = found.analog
    assert (part.layers, part.tiles, part.rows, part.prefix) == (14, 2 * (6 * 2 + 3), 32, 1)
    assert (part.steps, part.tokens, part.seed) == (7, 900, 3)
    layers = dict(analog_layers(model))
    ranges = torch.cat(
        [la.input_range.detach() for n, la in layers.items() if n.endswith("down_proj")]
    )
    assert part.input_ranges["down_proj"].largest == pytest.approx(float(ranges.max()))
    text = overview(found)
    assert "1 token\n" in text and "7 steps on 900 tokens, seed 3" in text


@pytest.mark.parametrize("name", [*ARCHITECTURES, "gpt2"])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_every_architecture_is_without_problems(name, tie, make_analog, tmp_path):
    model = make_analog(name, tie)
    save_checkpoint(model, tmp_path / "fp")
    assert problems(tmp_path / "fp") == []
    if name != "gpt2":
        save_checkpoint(model, tmp_path / "w8a8", profile="w8a8")
        assert problems(tmp_path / "w8a8") == []


def test_a_dynamic_scheme_has_no_static_ranges(make_analog, tmp_path):
    save_checkpoint(make_analog(input_range="dynamic"), tmp_path / "out")
    found = inspect_checkpoint(tmp_path / "out")
    assert not found.problems and len(found.quantized) == 14
    assert (found.inputs.static, found.inputs.ranges) == (False, None)


def test_a_plain_model_an_adapter_and_nothing_are_told_apart(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "plain")
    found = inspect_checkpoint(tmp_path / "plain")
    assert found.kind == "plain" and not found.problems
    assert [row.takes for row in found.loaders] == [True, False, False]
    (tmp_path / "plain" / "analog").mkdir()
    (problem,) = problems(tmp_path / "plain")
    assert "left over" in problem

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert inspect_checkpoint(tmp_path / "adapter").kind == "adapter"

    found = inspect_checkpoint(tmp_path)
    assert found.kind == "nothing" and "plain" in found.problems[0]
    with pytest.raises(AnalogError, match="no directory"):
        inspect_checkpoint(tmp_path / "absent")


def test_shards_are_read_one_by_one(analog, saved, tmp_path):
    whole = load_file(saved[0] / "w8a8" / WEIGHTS)
    out = shutil.copytree(saved[0] / "w8a8", tmp_path / "out")
    names = sorted(whole)
    files = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: whole[n] for n in names if files[n] == file}, out / file)
    (out / WEIGHTS).unlink()
    index = out / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    write_manifest(out)
    found = inspect_checkpoint(out)
    assert not found.problems and found.profile == "w8a8"
    files.pop(f"{LAYER}.weight")
    files["lm_head.weight"] = next(f for f in files.values() if f != files["lm_head.weight"])
    index.write_text(json.dumps({"weight_map": files}))
    write_manifest(out)
    first, second = problems(out)
    assert "lm_head.weight" in first and f"{LAYER}.weight" in second


def scales(value):
    return lambda s: s.update({f"{LAYER}.input_scale": value})


DAMAGE = {
    "no input scale": ("w8a8", lambda s: s.pop(f"{LAYER}.input_scale"), "lack"),
    "zero input scale": ("w8a8", scales(torch.zeros(1)), "must be positive"),
    "negative input scale": ("analog-fp", scales(-torch.ones(1)), "must be positive"),
    "nan input scale": ("w4a8", scales(torch.full((1,), torch.nan)), "must be positive"),
    "infinite output scale": (
        "w8a8o8",
        lambda s: s.update({f"{LAYER}.output_scale": torch.full((1,), torch.inf)}),
        "must be positive",
    ),
    "two input scales": ("w8a8", scales(torch.ones(2)), "must hold one"),
    "no weight scale": ("w8a8", lambda s: s.pop(f"{LAYER}.weight_scale"), "lack"),
    "weight scales of another shape": (
        "w8a8",
        lambda s: s.update({f"{LAYER}.weight_scale": torch.ones(1, 64)}),
        r"must have \[64, 1\]",
    ),
    "negative weight scales": (
        "w4a8",
        lambda s: s[f"{LAYER}.weight_scale"].mul_(-1),
        "scales that are not positive",
    ),
    "code of -128": ("w8a8", lambda s: s[f"{LAYER}.weight"][3, 3:4].fill_(-128), "from -128 to"),
    "packed code of -8": (
        "w4a8",
        lambda s: s[f"{LAYER}.weight_packed"][3, :1].bitwise_and_(~0xF),
        "from -8 to",
    ),
    "floats for codes": (
        "w8a8",
        lambda s: s.update({f"{LAYER}.weight": torch.ones(64, 96)}),
        "of type F32",
    ),
    "packed words of another shape": (
        "w4a8",
        lambda s: s.update({f"{LAYER}.weight_shape": torch.tensor([64, 960])}),
        "do not have",
    ),
    "huge packed shape": (
        "w4a8",
        lambda s: s.update({f"{LAYER}.weight_shape": torch.tensor([1 << 60, 1 << 60])}),
        "do not have",
    ),
    "no weight": ("mixed", lambda s: s.pop(f"{LAYER}.weight_packed"), "hold no weight"),
    "unequal scales": (
        "w8a8",
        lambda s: s["model.layers.1.self_attn.k_proj.input_scale"].mul_(2),
        "unequal input scales",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_tensors_that_do_not_fit_are_named(case, copy_of):
    profile, change, message = DAMAGE[case]
    directory = copy_of(profile)
    change_tensors(directory, change)
    found = problems(directory)
    assert any(re.search(message, problem) for problem in found)
    assert len(found) <= 3
    assert all("layers." in problem for problem in found)


def ranges(name, value):
    return lambda s: s.update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        ranges(f"{LAYER}.input_range", torch.zeros(3)),
        ranges(f"{LAYER}.input_range", torch.full((3,), torch.nan)),
        ranges(f"{LAYER}.input_range", torch.ones(2)),
        ranges(f"{LAYER}.input_range", torch.ones(3, dtype=torch.float64)),
        ranges("model.layers.9.mlp.down_proj.input_range", torch.ones(3)),
        ranges("prefix.tokens", torch.ones(1)),
        lambda s: s.pop(f"{LAYER}.input_range"),
    ],
    ids=["zero", "nan", "two of three", "float64", "of no layer", "no prefix", "absent"],
)
def test_states_that_loading_refuses_are_named(change, copy_of):
    directory = copy_of("analog-fp")
    change_tensors(directory, change, STATE)
    with pytest.raises(AnalogError):
        load_checkpoint(directory)
    assert len(problems(directory)) == 1
    assert not inspect_checkpoint(directory).loaders[1].takes


CONFIGS = {
    "version": lambda v: v["analog_config"].update(version=9),
    "scheme": lambda v: v["analog_config"]["scheme"].update(input_bits="eight"),
    "tiles": lambda v: v["analog_config"]["tiles"].update({LAYER: [96]}),
    "tiles of no layer": lambda v: v["analog_config"]["tiles"].update({"model.none": [32]}),
    "escaping state": lambda v: v["analog_config"]["state"].update(file="../../etc/passwd"),
    "model type": lambda v: v.update(model_type="nonsense"),
    "vocabulary": lambda v: v.update(vocab_size=9),
    "heads": lambda v: v.update(num_key_value_heads=1),
    "inner size": lambda v: v.update(intermediate_size=100),
    "too many blocks": lambda v: v.update(num_hidden_layers=3),
    "too few blocks": lambda v: v.update(num_hidden_layers=1),
    "no mapping": lambda v: v.update(analog_config=[1]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_loading_refuses_are_named(case, copy_of):
    directory = copy_of("analog-fp")
    change_config(directory, CONFIGS[case])
    with pytest.raises(AnalogError):
        load_checkpoint(directory)
    assert problems(directory)


def test_all_faults_are_listed_and_not_only_the_first(copy_of):
    directory = copy_of("analog-fp")
    change_tensors(directory, ranges(f"{LAYER}.input_range", torch.zeros(3)), STATE)
    (directory / "generation_config.json").unlink()
    with (directory / WEIGHTS).open("r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        handle.write(b"abcd")
    found = problems(directory)
    assert len(found) == 3
    for word in ("not positive", "lacks generation_config.json", "SHA-256"):
        assert any(word in problem for problem in found)
    assert len(problems(directory, verify=False)) == 1


def test_layers_that_the_configuration_does_not_know_are_named(copy_of):
    directory = copy_of("w8a8")
    change_config(directory, lambda v: v["quantization_config"]["ignore"].append(LAYER))
    assert any("quantizes no such layer" in problem for problem in problems(directory))


def test_a_slow_pattern_is_not_followed(copy_of):
    directory = copy_of("w8a8")
    change_config(
        directory,
        lambda v: v["quantization_config"]["ignore"].append(f"re:({'a' * 9}+)+{'.*' * 9}"),
    )
    assert any("take forever" in problem for problem in problems(directory))
    change_config(
        directory,
        lambda v: v["quantization_config"].update(ignore=["lm_head", r"re:.*layers\.1\."]),
    )
    assert any("quantizes no such layer" in problem for problem in problems(directory))


HOSTILE = {
    "empty": b"",
    "truncated header": b"\xff\x00\x00\x00\x00\x00\x00\x00{",
    "huge header": b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
    "nested header": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "garbage": b"\x80\x04\x95" * 100,
}


@pytest.mark.parametrize("file", [WEIGHTS, STATE])
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_files_that_are_no_safetensors_are_problems(content, file, copy_of):
    directory = copy_of("analog-fp")
    (directory / file).write_bytes(content)
    write_manifest(directory)
    assert problems(directory)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "[" * 100_000, '{"quantization_config": [1]}', '{"analog_config": null}',
     '{"quantization_config": {"quant_method": "compressed-tensors", "config_groups": 3}}',
     '{"hidden_size": 1' + "0" * 5000 + "}", '{"architectures": [[]], "head_dim": "x"}'],
)  # fmt: skip
@pytest.mark.parametrize("file", ["config.json", "analog/manifest.json"])
def test_broken_json_is_a_problem(content, file, copy_of):
    directory = copy_of("analog-fp")
    (directory / file).write_text(content)
    assert problems(directory)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_model_that_no_machine_holds_is_a_problem(name, tmp_path):
    tiny(name).save_pretrained(tmp_path / "out")
    change_config(tmp_path / "out", lambda v: v.update(num_hidden_layers=10**12))
    assert any("num_hidden_layers" in problem for problem in problems(tmp_path / "out"))


def test_a_width_that_no_machine_holds_is_a_problem(copy_of):
    directory = copy_of("w8a8")
    change_config(
        directory,
        lambda v: v["quantization_config"]["config_groups"]["group_0"]["weights"].update(
            num_bits=10**12
        ),
    )
    assert any("num_bits" in problem for problem in problems(directory))


def test_paths_out_of_the_directory_and_strange_files_are_problems(copy_of):
    directory = copy_of("w8a8")
    (directory / WEIGHTS).unlink()
    for name in ("../secret.safetensors", "/etc/passwd", "a\nb"):
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        assert any("outside the directory" in problem for problem in problems(directory))
    index.unlink()
    os.mkfifo(directory / WEIGHTS)
    assert problems(directory)
    os.unlink(directory / WEIGHTS)
    (directory / WEIGHTS).symlink_to(WEIGHTS)
    assert problems(directory)
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")
    assert inspect_checkpoint(directory).kind == "nothing"


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_change_of_the_configuration_is_more_than_problems(data, saved, tmp_path_factory):
    """One value anywhere in config.json, replaced."""
    profile = data.draw(st.sampled_from(["analog-fp", "w8a8", "mixed"]))
    directory = tmp_path_factory.mktemp("hostile") / "out"
    shutil.copytree(saved[0] / profile, directory)
    path = directory / "config.json"
    values = json.loads(path.read_text())
    place, key = values, None
    while isinstance(place, (dict, list)) and place and (key is None or data.draw(st.booleans())):
        holder = place
        key = data.draw(
            st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place))))
        )
        place = holder[key]
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    holder[key] = data.draw(scalars | st.lists(scalars, max_size=2))
    path.write_text(json.dumps(values))
    problems(directory, verify=False)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_change_of_a_header_is_more_than_problems(data, saved, tmp_path_factory):
    profile = data.draw(st.sampled_from(["analog-fp", "w8a8", "mixed"]))
    directory = tmp_path_factory.mktemp("hostile") / "out"
    shutil.copytree(saved[0] / profile, directory)
    path = directory / WEIGHTS
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, length + 7))] = data.draw(
            st.sampled_from(b'019"[]{}:,aIF')
        )
    path.write_bytes(content)
    problems(directory, verify=False)


def test_vllm_does_not_take_a_group_of_which_a_part_is_quantized(make_analog, tmp_path):
    directory = save_checkpoint(make_analog(), tmp_path / "out", profile="w8a8")
    state = load_file(directory / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    scale = state.pop(f"{name}.weight_scale")
    del state[f"{name}.input_scale"]
    state[f"{name}.weight"] = state[f"{name}.weight"].float() * scale
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    change_config(directory, lambda v: v["quantization_config"]["ignore"].append(name))
    (directory / "analog" / "manifest.json").unlink()
    (directory / "analog").rmdir()
    found = inspect_checkpoint(directory)
    row = next(row for row in found.loaders if row.name == "vLLM")
    assert found.problems == () and row.takes is False and "quantized alike" in row.reason
