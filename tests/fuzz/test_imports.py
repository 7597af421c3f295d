"""Published analog models: pickled configurations, archives of tensors, and what lies beside them.

What is drawn are bytes, whole opcodes of pickle, and programs of them that keep the stack in order,
so that cases get past the first check.
"""

import contextlib
import io
import itertools
import os
import pickle
import pickletools
import shutil
import struct
import zipfile
from pathlib import Path

import dill
import pytest
from fuzzing import anything, fuzzed, garbled, garbled_json, scalars, survived
from hypothesis import strategies as st
from lightning_models import lightning_config, lightning_model, publish
from safetensors.torch import save_file
from tiny_models import word_tokenizer
from transformers import GenerationConfig

from analog_integrations.lightning import import_lightning
from analog_integrations.lightning.config import config_of_record
from analog_integrations.lightning.pickles import DATACLASSES, ENUMS, read_record
from analog_integrations.lightning.schemes import scheme_of
from analog_integrations.lightning.weights import read_tensors

CANARY = Path("canary")
BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD = "pytorch_model-00002-of-00002.bin"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model that aihwkit-lightning wrote: in one file, in shards, and as safetensors."""
    root = tmp_path_factory.mktemp("saved")
    config = lightning_config(32)
    theirs = lightning_model("llama", config, num_hidden_layers=1)
    word_tokenizer().save_pretrained(publish(theirs, config, root / "one"))
    GenerationConfig(max_new_tokens=4, eos_token_id=2).save_pretrained(root / "one")
    publish(theirs, config, root / "shards", shards=2)
    shutil.copytree(root / "one", root / "safe", ignore=lambda *_: [BIN])
    save_file(dict(theirs.state_dict()), root / "safe" / "model.safetensors")
    return root


@pytest.fixture(scope="module", autouse=True)
def place(saved, tmp_path_factory):
    """The directory that everything runs in; libraries have been imported before."""
    place = tmp_path_factory.getbasetemp()
    before = Path.cwd()
    os.chdir(place)
    import_lightning(saved / "one", place / "before")
    yield place
    os.chdir(before)


@pytest.fixture
def configured(place):
    """``configured(content)``: what the readers make of an ``rpu_config``."""

    def read(content):
        path = place / "rpu_config"
        path.write_bytes(content)
        with survived(place, seconds=10):
            scheme_of(config_of_record(read_record(path))[0])
        assert not CANARY.exists()

    return read


def read_all(directory):
    """Reads every number of the directory's tensors."""
    with survived(directory, seconds=10):
        for tensor in read_tensors(directory).values():
            tensor.float().sum()
    assert not CANARY.exists()


def text(value):
    raw = value.encode("utf-8", errors="surrogatepass")[:60_000]
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(module, name):
    return st.sampled_from([
        f"c{module}\n{name}\n".encode(), text(module) + text(name) + b"\x93",
    ])  # fmt: skip


def bomb(levels=60):
    """Tuples, each of the one before twice."""
    kept = [bytes([i]) for i in range(100, 100 + levels)]
    return b")" + b"".join(b"q" + i + b"h" + i + b"\x86" for i in kept)


#: Each would leave a directory, were it run.
CALLS = [
    b"cos\nmkdir\n(Vcanary\ntR",
    b"cposix\nmkdir\n(Vcanary\ntR",
    b"(Vcanary\nios\nmkdir\n",
    b"(cos\nmkdir\nVcanary\no",
    b"cos\nmkdir\nVcanary\n\x85R",
    b"Vos\nVmkdir\n\x93Vcanary\n\x85R",
    b"cos\nsystem\nVmkdir canary\n\x85R",
    b"cbuiltins\nexec\nVimport os; os.mkdir('canary')\n\x85R",
    b"cbuiltins\neval\nV__import__('os').mkdir('canary')\n\x85R",
    b"csubprocess\ncall\n(Vmkdir\nVcanary\nl\x85R",
    b"cpathlib\nPath\nVcanary\n\x85R",
    b"csubprocess\nPopen\n((Vmkdir\nVcanary\nlt}\x92",
    b"csubprocess\nPopen\n((Vmkdir\nVcanary\nlt\x81",
    b"cbuiltins\nopen\n(Vcanary\nVw\ntR",
    b"cbuiltins\n__import__\nVthis\n\x85R",
    b"cbuiltins\ngetattr\n(cos\nmkdir\nV__call__\ntR",
    b"cdill._dill\n_import_module\nVthis\n\x85R",
]
MAKERS = [
    b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R",
    b"ctorch\nFloatTensor\n\x8a\x05\0\0\0\0\x10\x85R",
    b"ccollections\nOrderedDict\n)R",
    b"cbuiltins\nset\n" + bomb(40) + b"\x85R",
    b"c_codecs\nencode\n(Vx\nVpunycode\ntR",
    b"ctorch\nSize\n(K\x02K\x03t\x85R",
    b"ctorch.nn.parameter\nParameter\n)\x81",
]
#: Opcodes alone, with arguments that are too long, too many or none.
OPCODES = [bytes([i]) for i in range(256)] + [
    b"\x82\x01",
    b"\x83\x01\0",
    b"\x84\x01\0\0\0",
    b"P42\n",
    b"VQ\nQ",
    b"(VstorageQ\n",
    b"\x97",
    b"\x98",
    b"\x95" + b"\xff" * 8,
    b"\x95\0\0\0\0\0\0\0\x40",
    b"\x95" + bytes(8),
    b"X\xff\xff\xff\x7f",
    b"\x8d" + b"\xff" * 8,
    b"\x8d\0\0\0\0\0\0\0\x40",
    b"\x8e\0\0\0\0\0\0\0\x40",
    b"B\xff\xff\xff\xff",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\xff",
    b"\x8a\xff" + b"\x7f" * 255,
    b"L" + b"9" * 5000 + b"L\n",
    b"r\xff\xff\xff\xff",
    b"j\xff\xff\xff\xff",
    b"p99999999999\n",
    b"g99999999999\n",
    b"p-1\n",
    b"g-1\n",
    b"I00\n",
    b"I01\n",
    b"I1_0\n",
    b"Fnan\n",
    b"F1e400\n",
    b"G\x7f\xf0" + bytes(6),
    b"(" * 3000,
    b"}" * 3000,
    b"N0" * 3000,
    b"\x85" * 3000,
    b"V\\ud800\n",
    b"V\\U00110000\n",
    b"X\x02\0\0\0\xff\xfe",
    b"S'a\n",
    b"S'a'\n",
    b"U\x05a",
    b"\x80\x09",
    b"\x80\xff",
    b"\x94",
    b"0",
    b"2",
    b"1",
    b"]",
    b"\x8f",
    b"a",
    b"e",
    b"\x90",
    b"\x91",
    b".",
    b"c\n\n",
    b"cos\n",
    b"i\n\n",
    bomb(),
    b"q\0",
    b"h\0",
    b"q\x01",
    b"h\x01",
]
KEPT = st.integers(0, 99).map(lambda i: bytes([i]))
CLASSES = st.sampled_from(list((DATACLASSES | ENUMS).items())).flatmap(lambda c: named(c[1], c[0]))


def parts_of(config):
    """The configuration and all records in it."""
    ranges = config.pre_post.input_range
    parts = config.forward, config.clip, config.modifier, config.mapping, config.pre_post, ranges
    return (config, *parts)


FIELDS = sorted({name for part in parts_of(lightning_config()) for name in vars(part)})


def plain(value):
    """Something that JSON can hold, as a pickle without its begin and end."""
    try:
        return pickletools.optimize(pickle.dumps(value, 2))[2:-1]
    except UnicodeEncodeError:
        return b"N"


def programs(leaves):
    """Bytes that leave one more value on the stack, made of ``leaves`` and each other."""

    def larger(inner):
        many = st.lists(inner, max_size=3).map(b"".join)
        items = st.lists(
            st.tuples(st.sampled_from(FIELDS).map(text), inner).map(b"".join), max_size=4
        )
        mapping = items.map(lambda pairs: b"}(" + b"".join(pairs) + b"u")
        return st.one_of(
            many.map(lambda v: b"(" + v + b"t"),
            inner.map(lambda v: v + b"\x85"),
            mapping,
            items.map(lambda pairs: b"(" + b"".join(pairs) + b"d"),
            st.tuples(inner, inner).map(lambda kv: b"}" + kv[0] + kv[1] + b"s"),
            st.tuples(CLASSES, mapping).map(lambda c: c[0] + b")\x81" + c[1] + b"b"),
            st.tuples(CLASSES, inner).map(lambda c: c[0] + c[1] + b"\x85R"),
            st.tuples(inner, inner, st.sampled_from([b"R", b"\x81", b"b", b"\x93"])).map(b"".join),
            st.tuples(inner, KEPT).map(lambda v: v[0] + b"q" + v[1]),
            inner.map(lambda v: v + b"Q"),
            st.tuples(inner, inner, inner).map(lambda v: b"".join(v) + b"\x92"),
        )

    return st.recursive(leaves, larger, max_leaves=12)


@st.composite
def reassembled(draw, content):
    """A pickle with up to four runs of opcodes put in, removed, moved or repeated."""
    places = [place for _, _, place in pickletools.genops(content)]
    pieces = [content[a:b] for a, b in itertools.pairwise([*places, len(content)])]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(pieces)))
        till = draw(st.integers(at, min(at + 3, len(pieces))))
        kind = draw(st.sampled_from(["put", "put", "remove", "move", "double"]))
        if kind == "put":
            pieces[at:till] = [draw(st.sampled_from(OPCODES + CALLS + MAKERS) | leaves)]
        elif kind == "remove":
            del pieces[at:till]
        elif kind == "move":
            moved = pieces[at:till]
            del pieces[at:till]
            to = draw(st.integers(0, len(pieces)))
            pieces[to:to] = moved
        else:
            pieces[at:at] = pieces[at:till] * draw(st.sampled_from([1, 2, 500]))
    return b"".join(pieces)


leaves = st.one_of(
    anything.map(plain),
    CLASSES,
    st.sampled_from([b")", b"}", b"N", bomb(), *CALLS, *MAKERS]),
    KEPT.map(lambda i: b"h" + i),
    st.sampled_from(FIELDS).map(text),
)
HONEST = [pickle.dumps(lightning_config(32), protocol=p) for p in (0, 2, 4)]
HONEST.append(dill.dumps(lightning_config(32)))


def test_pythons_own_reader_would_have_run_the_calls(place):
    # Otherwise the tests below would show nothing.
    made = 0
    for call in CALLS:
        heard = pytest.raises(AssertionError, match=r"pickle\.find_class")
        faults = contextlib.suppress(AttributeError, TypeError, ValueError, pickle.UnpicklingError)
        with heard, survived(place), faults:
            pickle.loads(call + b".")
        made += CANARY.exists()
        if CANARY.is_dir():
            CANARY.rmdir()
        CANARY.unlink(missing_ok=True)
    assert made > len(CALLS) / 2


@fuzzed(st.sampled_from(HONEST).flatmap(garbled) | st.binary(max_size=200))
def test_configurations_of_other_bytes(configured, content):
    configured(content)


@fuzzed(st.sampled_from(HONEST).flatmap(reassembled))
def test_configurations_of_other_opcodes(configured, content):
    configured(content)


@fuzzed(
    st.tuples(
        st.sampled_from([b"", b"\x80\x02", b"\x80\x04", b"\x80\x05"]),
        programs(leaves) | st.lists(st.sampled_from(OPCODES) | leaves, max_size=30).map(b"".join),
        st.sampled_from([b".", b"", b"0.", b"N."]),
    ).map(b"".join)
)
def test_configurations_of_any_opcodes(configured, content):
    configured(content)


@fuzzed(st.data())
def test_configurations_of_other_values(configured, data):
    config = lightning_config(32)
    parts = parts_of(config)
    members = [part.type for part in (config.clip, config.modifier) if hasattr(part, "type")]
    for _ in range(data.draw(st.integers(1, 4))):
        part = data.draw(st.sampled_from(parts))
        name = data.draw(st.sampled_from(sorted(vars(part)) or ["none"]) | st.text(max_size=4))
        value = data.draw(scalars | anything | st.sampled_from([*parts, *members]))
        vars(part)[name] = value
    try:
        content = pickle.dumps(config, protocol=data.draw(st.sampled_from([2, 4])))
    except UnicodeEncodeError:
        content = b""
    configured(content)


def archived(saved, change):
    """The archive anew with its records changed: a list of names, contents and compressions."""
    with zipfile.ZipFile(saved / "one" / BIN) as archive:
        records = [[n, archive.read(n), zipfile.ZIP_STORED] for n in archive.namelist()]
    change(records)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content, compression in records:
            archive.writestr(name, content, compression)
    return made.getvalue()


@fuzzed(st.booleans(), st.data())
def test_archives_of_other_bytes(saved, copied, tail, data):
    content = (saved / "shards" / SHARD).read_bytes()
    if tail:  # where the directory of the archive is
        size = 200 + struct.unpack("<I", content[content.rindex(b"PK\5\6") + 12 :][:4])[0]
        made = content[:-size] + data.draw(garbled(content[-size:]))
    else:
        made = data.draw(garbled(content, within=4000) | garbled(content))
    read_all(copied("shards", SHARD, made))


@fuzzed(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=3))
def test_archives_of_other_directories(saved, copied, edits):
    content = bytearray((saved / "one" / BIN).read_bytes())
    (start,) = struct.unpack("<I", content[content.rindex(b"PK\5\6") + 16 :][:4])
    for place, value in edits:
        content[start + place % (len(content) - start)] = value
    read_all(copied("one", BIN, bytes(content)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@fuzzed(st.data())
def test_archives_of_other_records(saved, copied, data):
    def change(records):
        for _ in range(data.draw(st.integers(1, 3))):
            record = records[data.draw(st.integers(0, len(records) - 1))]
            kind = data.draw(st.sampled_from(["rename", "double", "remove", "compress", "fill"]))
            if kind == "rename":
                names = [
                    "data.pkl",
                    "archive/data.pkl",
                    "../x",
                    "/x",
                    "archive/data/0",
                    "byteorder",
                ]
                record[0] = data.draw(
                    st.sampled_from(names) | st.text("a./\\", min_size=1, max_size=6)
                )
            elif kind == "double":
                records.append(list(record))
            elif kind == "remove" and len(records) > 1:
                records.remove(record)
            elif kind == "compress":
                record[2] = zipfile.ZIP_DEFLATED
            else:
                record[1] = data.draw(st.binary(max_size=64) | garbled(record[1]))

    read_all(copied("one", BIN, archived(saved, change)))


@fuzzed(st.data())
def test_archives_of_other_descriptions(saved, copied, data):
    def change(records):
        (record,) = (r for r in records if r[0].endswith("data.pkl"))
        made = programs(leaves).map(lambda v: b"\x80\x02}X\1\0\0\0a" + v + b"s.")
        record[1] = data.draw(reassembled(record[1]) | garbled(record[1]) | made)

    read_all(copied("one", BIN, archived(saved, change)))


@fuzzed(st.data())
def test_indices_of_archives(saved, copied, data):
    made = data.draw(garbled_json((saved / "shards" / INDEX).read_bytes()))
    read_all(copied("shards", INDEX, made))


@fuzzed(st.data())
def test_headers_of_safetensors(saved, copied, data):
    content = (saved / "safe" / "model.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    if data.draw(st.booleans()):
        made = data.draw(garbled(content, within=header))
    else:
        values = data.draw(garbled_json(content[8:header]))
        made = len(values).to_bytes(8, "little") + values + content[header:]
    read_all(copied("safe", "model.safetensors", made))


BESIDE = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@fuzzed(st.sampled_from(BESIDE), st.data())
def test_directories(saved, copied, place, file, data):
    made = data.draw(garbled_json((saved / "one" / file).read_bytes()))
    directory = copied("one", file, made)
    output = place / "output"
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    done = False
    with survived(place):
        import_lightning(directory, output)
        done = True
    assert done == (output / "config.json").is_file() and done == output.exists()
    assert before == {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert not CANARY.exists()
    shutil.rmtree(output, ignore_errors=True)
