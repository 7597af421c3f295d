import os
import shutil

import pytest


@pytest.fixture(scope="module")
def copied(saved, tmp_path_factory):
    """``copied(name, file, content)``: a directory of links, in which one file is another.

    ``saved`` is each test module's own: a directory of valid directories by their names.
    """
    root = tmp_path_factory.mktemp("copies")

    def make(name, file, content):
        target = root / "copy"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(saved / name, target, copy_function=os.link)
        (path,) = target.rglob(file)
        path.unlink()
        path.write_bytes(content)
        return target

    return make
