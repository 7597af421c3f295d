"""Hostile files are refused quickly and in one sentence, and nothing in them runs."""

import contextlib
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import zipfile

import dill
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_models import lightning_config

from analog_integrations.lightning import import_lightning
from analog_integrations.lightning.config import config_of_record
from analog_integrations.lightning.pickles import (
    DATACLASSES,
    ENUMS,
    Member,
    Record,
    parse_record,
    read_record,
)
from analog_integrations.lightning.schemes import scheme_of
from analog_plugin import AnalogError

ROOT = b"aihwkit_lightning.simulator.configs.configs"
CLASS = b"c" + ROOT + b"\nTorchInferenceRPUConfig\n"
ENUM = b"caihwkit_lightning.simulator.parameters.enums\nWeightClipType\n"
SENTINEL = "touch SENTINEL"


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return b"\x8c" + bytes([len(raw)]) + raw


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments, state=None):
        self.made = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.made


def within(place, value, protocol=4):
    """The honest configuration with ``value`` at one place."""
    config = lightning_config()
    *parts, name = place.split(".")
    holder = config
    for part in parts:
        holder = getattr(holder, part)
    setattr(holder, name, value)
    return pickle.dumps(config, protocol=protocol)


def honest(protocol=4):
    return pickle.dumps(lightning_config(), protocol=protocol)


class _Persistent(pickle.Pickler):
    def persistent_id(self, value):
        return "42" if isinstance(value, str) and value == "sigma" else None


def persistent(protocol):
    buffer = io.BytesIO()
    _Persistent(buffer, protocol=protocol).dump(lightning_config())
    return buffer.getvalue()


def memo_bomb(levels=60):
    """Each tuple holds the one before twice: 2**levels things for whoever walks them."""
    return b"\x80\x04)" + b"".join(
        b"q" + (n := bytes([100 + i])) + b"h" + n + b"\x86" for i in range(levels)
    )


OUT_OF_BAND = pickle.dumps(pickle.PickleBuffer(b"x"), protocol=5, buffer_callback=lambda b: None)

HOSTILE = {
    "a call of os.system": pickle.dumps(Call(os.system, SENTINEL)),
    "of os.system, protocol 0": pickle.dumps(Call(os.system, SENTINEL), protocol=0),
    "of os.system, protocol 1": pickle.dumps(Call(os.system, SENTINEL), protocol=1),
    "of os.system, protocol 2": pickle.dumps(Call(os.system, SENTINEL), protocol=2),
    "of os.system, protocol 5": pickle.dumps(Call(os.system, SENTINEL), protocol=5),
    "of posix.system by GLOBAL": b"cposix\nsystem\n(V" + SENTINEL.encode() + b"\ntR.",
    "of nt.system by GLOBAL": b"cnt\nsystem\n(V" + SENTINEL.encode() + b"\ntR.",
    "of subprocess": pickle.dumps(Call(subprocess.call, ["touch", "SENTINEL"])),
    "of eval": pickle.dumps(Call(eval, "open('SENTINEL', 'w')")),
    "of exec": pickle.dumps(Call(exec, "open('SENTINEL', 'w')")),
    "of getattr": pickle.dumps(Call(getattr, "x", "upper")),
    "of __import__": pickle.dumps(Call(__import__, "this")),
    "of open": pickle.dumps(Call(open, "SENTINEL", "w")),
    "of dill's loader": dill.dumps(lambda: os.system(SENTINEL), recurse=True),
    "of a class of __main__, by dill": b"cdill._dill\n_create_type\n(tR.",
    "within a record": within("forward.inp_res", Call(os.system, SENTINEL)),
    "deep within records": within("pre_post.input_range.decay", Call(os.system, SENTINEL)),
    "in an attribute of no version": within("clip.extra", Call(os.system, SENTINEL)),
    "within a list": within("clip.sigma", [Call(os.system, SENTINEL)]),
    "as a key": within("clip.sigma", {Call(os.system, SENTINEL).made[0]: 1}),
    "as a state": within("clip.sigma", Call(type(lightning_config()), state=Call(os.system, "x"))),
    "an instance by INST": b"(V" + SENTINEL.encode() + b"\nios\nsystem\n.",
    "an instance of a listed class by INST": b"(i" + ROOT + b"\nTorchInferenceRPUConfig\n.",
    "an instance by OBJ": b"(cos\nsystem\nV" + SENTINEL.encode() + b"\no.",
    "of a listed class by OBJ": b"(" + CLASS + b"o.",
    "by NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n((V" + SENTINEL.encode() + b"\nlt}\x92.",
    "of a listed class by NEWOBJ_EX": b"\x80\x04" + CLASS + b")}\x92.",
    "of a listed class with arguments": b"\x80\x04" + CLASS + b"K\x01\x85\x81.",
    "a call of a listed class": b"\x80\x04" + CLASS + b")R.",
    "a member that is no string": b"\x80\x04" + ENUM + b"K\x01\x85R.",
    "a member of a call": b"\x80\x04" + ENUM + b"cos\nsystem\n\x85R.",
    "a member made by NEWOBJ": b"\x80\x04" + ENUM + b")\x81.",
    "attributes of a member": b"\x80\x04" + ENUM + text("None") + b"\x85R}b.",
    "attributes of a class": b"\x80\x04" + CLASS + b"}b.",
    "attributes that are no dictionary": b"\x80\x04" + CLASS + b")\x81)b.",
    "attributes twice": b"\x80\x04" + CLASS + b")\x81}" + text("a") + b"Nsb}" + text("b") + b"Nsb.",
    "a slot state": b"\x80\x04" + CLASS + b")\x81N}\x86b.",
    "STACK_GLOBAL of a dotted name": b"\x80\x04" + text(ROOT) + text("sys.modules") + b"\x93.",
    "STACK_GLOBAL of a longer name": (
        b"\x80\x04" + text(ROOT) + text("TorchInferenceRPUConfig.__init__") + b"\x93."
    ),
    "STACK_GLOBAL of a longer module": (
        b"\x80\x04" + text(ROOT + b".x") + text("TorchInferenceRPUConfig") + b"\x93."
    ),
    "STACK_GLOBAL of another module": (
        b"\x80\x04" + text("configs") + text("TorchInferenceRPUConfig") + b"\x93."
    ),
    "STACK_GLOBAL of numbers": b"\x80\x04K\x01K\x02\x93.",
    "STACK_GLOBAL of a record": b"\x80\x04" + text(ROOT) + CLASS + b")\x81\x93.",
    "STACK_GLOBAL with a null": b"\x80\x04" + text(ROOT) + text("Torch\x00") + b"\x93.",
    "STACK_GLOBAL alone": b"\x80\x04\x93.",
    "a class, not an object": b"\x80\x04" + CLASS + b".",
    "a persistent id, protocol 0": persistent(0),
    "a persistent id, protocol 4": persistent(4),
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "out-of-band buffers": OUT_OF_BAND,
    "a read-only buffer": b"\x80\x05\x97\x98.",
    "a memo bomb": memo_bomb() + b".",
    "a memo bomb as an attribute": (
        b"\x80\x04" + CLASS + b")\x81}" + text("forward") + memo_bomb()[2:] + b"sb."
    ),
    "a memo bomb as a key": b"\x80\x04}" + memo_bomb()[2:] + b"Ns.",
    "a memo bomb as a name": b"\x80\x04" + text(ROOT) + memo_bomb()[2:] + b"\x93.",
    "a memo bomb within a record, as a name": (
        b"\x80\x04" + CLASS + b")\x81}" + text("x") + memo_bomb()[2:] + b"sb" + text("x") + b"\x93."
    ),
    "an attribute of a long name": (
        b"\x80\x04" + CLASS + b")\x81}" + text("x" * 200) + b"Nsb."
    ),
    "an attribute with a line in its name": (
        b"\x80\x04" + CLASS + b")\x81}" + text("a\n# b") + b"Nsb."
    ),
    "a list bomb": b"\x80\x04]\x94" + b"h\x00h\x00e" * 1000 + b".",
    "tuples within tuples": b"\x80\x04)" + b"\x85" * 60_000 + b".",
    "dictionaries within each other": (
        b"\x80\x04" + (b"}" + text("a")) * 15_000 + b"N" + b"s" * 15_000 + b"."
    ),
    "records within records": (
        b"\x80\x04" + CLASS + b"\x94" + (b"h\x00)\x81}" + text("forward")) * 4_000
        + b"N" + b"sb" * 4_000 + b"."
    ),
    "a number of 60,000 digits": b"L" + b"9" * 60_000 + b"L\n.",
    "a number of 255 bytes": b"\x80\x04\x8a\xff" + b"\x7f" * 255 + b".",
    "a number of 2 GB": b"\x80\x04\x8b\xff\xff\xff\x7f" + b"\x7f" * 100 + b".",
    "a string of 16 EB": b"\x80\x04\x8d" + struct.pack("<Q", 2**64 - 1) + b"x.",
    "a string of 2 GB": b"\x80\x04X" + struct.pack("<I", 2**31) + b"x.",
    "a memo of 4 billion": b"\x80\x04)r\xff\xff\xff\xffj\xfe\xff\xff\xff.",
    "opcodes without end": b"\x80\x04" + b"N0" * 30_000,
    "marks without end": b"\x80\x04" + b"(" * 60_000 + b".",
    "more than is read": b"\x80\x04" + b"N" * 70_000 + b".",
    "protocol 9": b"\x80\x09N.",
    "protocol 0": honest(0),
    "protocol 1": honest(1),
    "truncated": honest()[:-200],
    "without an end": honest()[:-1],
    "empty": b"",
    "an empty dictionary": pickle.dumps({}),
    "None": pickle.dumps(None),
    "a string": pickle.dumps("TorchInferenceRPUConfig"),
    "text": b"rpu_config: {forward: {inp_res: 254}}\n",
    "JSON": b'{"forward": {"inp_res": 254}}',
    "a zip": b"PK\x03\x04" + bytes(100),
    "an ELF": b"\x7fELF" + bytes(100),
    "zeros": bytes(1000),
    "a member where a record belongs": within("forward", lightning_config().clip.type),
    "a record of another class": within("forward", lightning_config().clip),
    "itself within itself": (
        b"\x80\x04" + CLASS + b")\x81\x94}" + text("forward") + b"h\x00sb."
    ),
    "a dictionary in place of a number": within("forward.inp_res", {"a": 1}),
    "a huge number": within("mapping.max_input_size", 2**62),
    "infinity": within("forward.inp_res", float("inf")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_configuration_is_refused_at_once_and_nothing_runs(data, tmp_path):
    path = tmp_path / "rpu_config"
    path.write_bytes(data)
    modules, begun = set(sys.modules), time.process_time()
    with pytest.raises(AnalogError) as caught:
        config, _ = config_of_record(read_record(path))
        scheme_of(config)
    assert time.process_time() - begun < 1
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 900
    assert not (tmp_path / "SENTINEL").exists()
    # Python's own codecs are loaded when they are first used.
    assert [m for m in set(sys.modules) - modules if not m.startswith("encodings")] == []


def test_pythons_own_reader_would_have_run_these(tmp_path):
    # Otherwise the test above would show nothing.
    ran = 0
    for name in ("a call of os.system", "of posix.system by GLOBAL", "within a record", "of eval"):
        pickle.loads(HOSTILE[name])
        ran += (tmp_path / "SENTINEL").exists()
        (tmp_path / "SENTINEL").unlink(missing_ok=True)
    assert ran == 4


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_honest_configuration_becomes_records(protocol):
    record = parse_record(honest(protocol))
    assert type(record) is Record and record.name == "TorchInferenceRPUConfig"
    assert record.fields["forward"].fields["inp_res"] == 254
    assert record.fields["clip"].fields["type"] == Member(
        "WeightClipType", "LayerGaussianPerChannel"
    )
    assert parse_record(dill.dumps(lightning_config())) == record


def test_the_lists_of_classes_are_those_of_the_installed_package():
    import importlib

    from aihwkit_lightning.simulator import configs

    for name, module in (DATACLASSES | ENUMS).items():
        found = getattr(importlib.import_module(module), name)
        assert found.__module__ == module and getattr(configs, name) is found
    exported = {n for n, v in vars(configs).items() if isinstance(v, type)}
    assert exported == set(DATACLASSES | ENUMS)


@settings(max_examples=150, deadline=1000)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused_or_read(data):
    with contextlib.suppress(AnalogError):
        scheme_of(config_of_record(parse_record(data))[0])


EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "put"]), st.floats(0, 1), st.binary(max_size=8)),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=200, deadline=1000)
@given(EDITS, st.sampled_from([2, 4]))
def test_any_mutation_is_refused_or_read(edits, protocol):
    data = bytearray(honest(protocol))
    for kind, where, piece in edits:
        place = int(where * len(data))
        end = place if kind == "put" else place + len(piece)
        data[place:end] = b"" if kind == "cut" else piece
    with contextlib.suppress(AnalogError):
        scheme_of(config_of_record(parse_record(bytes(data)))[0])


@settings(max_examples=150, deadline=1000)
@given(st.lists(st.sampled_from([bytes([i]) for i in range(256)] + [
    CLASS, ENUM, text("forward"), text("type"), text("None"), b"}", b")", b"\x81", b"\x93", b"b",
    b"s", b"R", b"\x85", b"\x94", b"h\x00", b"(", b"u", b"t",
]), max_size=60))  # fmt: skip
def test_any_sequence_of_opcodes_is_refused_or_read(pieces):
    with contextlib.suppress(AnalogError):
        scheme_of(config_of_record(parse_record(b"\x80\x04" + b"".join(pieces) + b"."))[0])


def test_attributes_of_no_version_are_quoted_briefly():
    bomb = memo_bomb()[2:]
    inner = b"caihwkit_lightning.simulator.parameters.io\nIOParameters\n)\x81}" + text("x")
    pairs = [text(f"a{i}") + inner + bomb + b"sb" + text(f"b{i}") + bomb for i in range(80)]
    begun = time.process_time()
    record = parse_record(b"\x80\x04" + CLASS + b")\x81}(" + b"".join(pairs) + b"ub.")
    (note,) = config_of_record(record)[1]
    assert time.process_time() - begun < 1
    assert len(note) < 3000 and "a0=Record(name='IOParameters'), b0=(" in note


def rewritten(path, compress=zipfile.ZIP_STORED, replace=None, extra=None):
    """The archive anew, with some of its records replaced."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for name, data in (replace or {}).items():
        (full,) = (n for n in records if n.endswith(name))
        records[full] = data
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, data in (records | (extra or {})).items():
            archive.writestr(name, data)


def zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50 << 20))


def overlapping(path):
    """Two entries of the directory that lead to the same bytes."""
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    count, size, start = struct.unpack("<HII", data[end + 10 : end + 20])
    directory = data[start : start + size]
    many = 1 + len(data) // 1000
    tail = b"PK\x05\x06" + struct.pack(
        "<HHHHIIH", 0, 0, count * many, count * many, size * many, start, 0
    )
    path.write_bytes(data[:start] + directory * many + tail)


def larger_than_the_file(path):
    """Matrices that claim to have more rows than the file holds."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        data = archive.read(name)
    told = b"K\x60K\x40\x86"  # 96 rows of 64
    assert told in data
    larger = b"J" + struct.pack("<i", 2**28) + b"K\x40\x86"
    rewritten(path, replace={"data.pkl": data.replace(told, larger)})


HUGE = b"\x80\x02}X\x01\0\0\0ac%b\n\x8a\x05\0\0\0\0\x10\x85Rs."
BINS = {
    "a call": lambda path: torch.save({"a": Call(os.system, SENTINEL)}, path),
    "a call, without an archive": lambda path: path.write_bytes(HOSTILE["a call of os.system"]),
    "a call in the old format": lambda path: torch.save(
        {"a": Call(os.system, SENTINEL)}, path, _use_new_zipfile_serialization=False
    ),
    "a call in place of the description": lambda path: rewritten(
        path, replace={"data.pkl": HOSTILE["a call of os.system"]}
    ),
    "a whole module": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    "a zip bomb": zip_bomb,
    "compressed": lambda path: rewritten(path, zipfile.ZIP_DEFLATED),
    "overlapping": overlapping,
    "a long description": lambda path: rewritten(
        path, replace={"data.pkl": b"\x80\x02" + b"N0" * (5 << 20) + b"N."}
    ),
    "larger than the file": larger_than_the_file,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-500]),
    "no archive": lambda path: path.write_bytes(b"nothing"),
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: torch.save([torch.ones(2)], path),
    "a memo bomb as a key": lambda path: rewritten(
        path, replace={"data.pkl": b"\x80\x02}" + memo_bomb()[2:] + b"Ns."}
    ),
    "64 GB of zeros": lambda path: rewritten(
        path, replace={"data.pkl": HUGE % b"builtins\nbytearray"}
    ),
    "a tensor of 256 GB": lambda path: rewritten(
        path, replace={"data.pkl": HUGE % b"torch\nFloatTensor"}
    ),
    "a dictionary without items": lambda path: rewritten(
        path, replace={"data.pkl": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsNsb."}
    ),
    "two descriptions": lambda path: rewritten(path, extra={"data.pkl": b"\x80\x02}."}),
    "big-endian": lambda path: rewritten(path, replace={"byteorder": b"big"}),
    "a shorter storage": lambda path: rewritten(path, replace={"data/0": b"\0"}),
    "names that are no strings": lambda path: torch.save({3: torch.ones(2)}, path),
    "a sparse tensor": lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path),
    "complex numbers": lambda path: torch.save({"a": torch.ones(2) * 1j}, path),
}  # fmt: skip


@pytest.mark.parametrize("spoil", BINS.values(), ids=BINS.keys())
def test_hostile_weights_are_refused_and_nothing_runs(spoil, altered, tmp_path):
    spoil(altered / "pytorch_model.bin")
    begun = time.process_time()
    with pytest.raises(AnalogError) as caught:
        import_lightning(altered, tmp_path / "ours")
    assert time.process_time() - begun < 1
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
    assert not (tmp_path / "SENTINEL").exists() and not (tmp_path / "ours").exists()


@settings(max_examples=40, deadline=5000)
@given(edits=EDITS)
def test_any_mutation_of_the_description_of_tensors_is_refused_or_read(
    published, edits, tmp_path_factory
):
    from analog_integrations.lightning.weights import read_tensors

    place = tmp_path_factory.mktemp("mutated")
    path = place / "pytorch_model.bin"
    shutil.copy(published / "pytorch_model.bin", path)
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        data = bytearray(archive.read(name))
    for kind, where, piece in edits:
        at = int(where * len(data))
        end = at if kind == "put" else at + len(piece)
        data[at:end] = b"" if kind == "cut" else piece
    rewritten(path, replace={"data.pkl": bytes(data)})
    with contextlib.suppress(AnalogError):
        for tensor in read_tensors(place).values():
            tensor.sum()
    shutil.rmtree(place)


def test_names_that_lead_out_of_the_directory_are_refused(altered, tmp_path):
    import json

    (altered / "pytorch_model.bin").rename(tmp_path / "outside.bin")
    for name in ("../outside.bin", str(tmp_path / "outside.bin")):
        text = json.dumps({"weight_map": {"a": name}})
        (altered / "pytorch_model.bin.index.json").write_text(text)
        with pytest.raises(AnalogError, match="outside the directory"):
            import_lightning(altered, tmp_path / "ours")
