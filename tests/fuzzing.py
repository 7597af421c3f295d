"""Cases for readers of files that others made, and what none of them may lead to.

A reader of a new format gets a test in ``tests/fuzz/``: a valid file, :func:`garbled` or
:func:`altered`, read within :func:`survived`.
"""

import contextlib
import copy
import json
import os
import resource
import signal
import sys
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analog_plugin import AnalogError

#: Cases of each test; `make fuzz` runs 10,000.
CASES = int(os.environ.get("ANALOG_FUZZ_CASES", "25"))
_BYTES = 1 << 30
_FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class",
    "socket.connect", "ctypes.dlopen",
}  # fmt: skip
#: What opens or changes files, and how many paths it is given.
_PATHS = {
    "open": 1, "os.mkdir": 1, "os.rmdir": 1, "os.remove": 1, "os.chmod": 1, "os.truncate": 1,
    "os.rename": 2, "os.link": 2, "os.symlink": 2, "shutil.rmtree": 1,
}  # fmt: skip
_ROOT = Path(__file__).parents[1]
_LIBRARIES = [Path(p).resolve() for p in (sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev")]

nasty = st.sampled_from([
    "", "..", "../../outside.json", "/etc/passwd", "a\0b", "a\nb", "x" * 3000, "nan", "1e400", "~",
    "\ud800", "٣", "__class__", "{0.__class__}", "%s", "*", "**", "[", "(a+)+$", "model", "NaN",
    "-0", "rows-000000.safetensors", "../rows-000000.safetensors",
    "!!python/object/apply:os.system [x]",
])  # fmt: skip
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), nasty,
    st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**400, -(10**400), 1e-320, 0.5, 1.0, 2.5]),
)  # fmt: skip
#: Any value that JSON can hold, and some that only Python writes.
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=6) | nasty, inner, max_size=3)
    ),
    max_leaves=6,
)


def fuzzed(*strategies):
    """Run the test on :data:`CASES` cases."""

    def wrap(test):
        run = settings(
            max_examples=CASES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        return run(given(*strategies)(test))

    return wrap


@st.composite
def altered(draw, document):
    """A document like JSON's with up to three values anywhere replaced, removed, added or moved."""
    made = {"": copy.deepcopy(document)}
    for _ in range(draw(st.integers(1, 3))):
        holder, key = made, ""
        while isinstance(holder[key], (dict, list)) and holder[key] and draw(st.integers(0, 4)):
            holder = holder[key]
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = draw(st.sampled_from(keys))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "rename", "nest"]))
        if kind == "remove" and holder is not made:
            del holder[key]
        elif kind == "add" and isinstance(holder[key], dict):
            holder[key][draw(st.text(max_size=6) | nasty)] = draw(anything)
        elif kind == "rename" and isinstance(holder, dict) and holder is not made:
            holder[draw(st.text(max_size=6) | nasty)] = holder.pop(key)
        elif kind == "nest":
            holder[key] = [holder[key]] if draw(st.booleans()) else {"a": holder[key]}
        else:
            holder[key] = draw(anything)
    return made[""]


_PIECES = [
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"9", b"-", b"\0", b"\xff", b"null", b"NaN", b"1e999",
    b"&a ", b"*a", b"!!python/name:os.system ", b"<<: ", b"../", b"F32", b"I64", b"[" * 3000,
    b"9" * 5000, b"\n", b"\t", b"- ", b"? ", b"|\n", b"%YAML 9\n", b"---\n", b"\xef\xbb\xbf",
]  # fmt: skip


@st.composite
def garbled(draw, content, same_length=False, within=None):
    """Bytes with up to four places overwritten or, unless they keep their length, cut or filled."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        end = min(len(made) if within is None else within, len(made))
        at = draw(st.integers(0, max(end - 1, 0)))
        piece = draw(st.sampled_from(_PIECES) | st.binary(min_size=1, max_size=4))
        kind = "over" if same_length else draw(st.sampled_from(["over", "in", "out", "cut"]))
        if kind == "over":
            made[at : at + len(piece)] = piece[: len(made) - at]
        elif kind == "in":
            made[at:at] = piece
        elif kind == "out":
            del made[at : at + draw(st.integers(1, 40))]
        else:
            del made[at:]
    return bytes(made)


def json_bytes(values):
    """As JSON, lone surrogates and all."""
    return json.dumps(values).encode("utf-8", errors="surrogatepass")


def garbled_json(content):
    """A file of JSON with other bytes, or with other values."""
    return garbled(content) | altered(json.loads(content)).map(json_bytes)


class Hang(BaseException):
    """A case took too long."""


class _Watch:
    """Hears of everything that Python opens and starts; an audit hook cannot be taken away."""

    def __init__(self):
        self.events = None
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        if self.events is not None and (event in _FORBIDDEN or event in _PATHS):
            self.events.append((event, arguments))


_watch = _Watch()


@contextlib.contextmanager
def survived(*allowed, reads=(), seconds=60):
    """Success or one clear AnalogError: no other error, no hang, no memory without end.

    Nothing is executed, no file is read but below ``allowed``, those of ``reads`` and Python's own,
    and none is changed but below ``allowed``.
    """

    def hang(*_):
        raise Hang

    named = {Path(read) for read in reads}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    _watch.events = events = []
    try:
        yield
    except AnalogError as error:
        assert 10 < len(str(error)) < 4000, str(error)[:4000]
        assert "Traceback" not in str(error)
    finally:
        _watch.events = None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, kept)
    for event, arguments in events:
        assert event in _PATHS, f"{event}: {arguments}"
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
            continue  # a name within a directory that shutil.rmtree was heard to be given
        for what in arguments[: _PATHS[event]]:
            if isinstance(what, (str, bytes, os.PathLike)):
                path = Path(os.path.realpath(os.fsdecode(what)))
                changes = _changes(event, arguments, path)
                if not changes and Path(os.fsdecode(what)) in named:
                    continue
                roots = (*allowed, "/dev") if changes else (*allowed, _ROOT, *_LIBRARIES)
                assert any(path.is_relative_to(Path(root).resolve()) for root in roots), (
                    f"{event}: {path}"
                )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < _BYTES, f"took {grown >> 20} MiB"


def _changes(event, arguments, path):
    """Whether it writes; what Python compiles as it imports is nobody's output."""
    reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
    return not reads and path.parent.name != "__pycache__"
