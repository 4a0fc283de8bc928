"""What all tests share: one thread, so that several tests beside each other do not slow each other down."""

import os
import tempfile
from functools import partial
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from lightning_custom.launch import make_deterministic

torch.set_num_threads(1)


# What Fabric's own launch leaves, by which a program takes itself for one of several processes.
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items):
    """Long tests that share a fixture of their module stay on one worker, so that it is made once."""
    for item in items:
        if any(item.iter_markers("slow")) or any(item.iter_markers("distributed")):
            shared = shared_fixture(item)
            if shared is not None and item.get_closest_marker("xdist_group") is None:
                item.add_marker(pytest.mark.xdist_group(f"{item.module.__name__}.{shared}"))
    yield
    # pytest-xdist 3.8 has written the groups where pytest 9.2 no longer reads them.
    for item in items:
        with_group = getattr(item, "_nodeid", item.nodeid)
        if with_group != item.nodeid:
            item._id = type(item._id).parse(with_group)


def shared_fixture(item):
    """The first fixture of the item's module that is made once for all of the module."""
    for name in item.fixturenames:
        fixtures = item._fixtureinfo.name2fixturedefs.get(name, ())
        if any(fixture.scope == "module" and fixture.func.__module__ == item.module.__name__ for fixture in fixtures):
            return name
    return None


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    """No test leaves determinism, a default dtype, or the variables of a launch behind."""
    before = {name: os.environ[name] for name in LAUNCHED if name in os.environ}
    yield
    for name in LAUNCHED:
        os.environ.pop(name, None)
    os.environ.update(before)
    make_deterministic(False)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """The feature extractor is cached for the session, never in the user's home."""
    os.environ["LIGHTNING_CUSTOM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _replays(tmp_path_factory):
    """A step that is done again is done in pytest's own folders, and leaves nothing in the temporary directory."""
    with pytest.MonkeyPatch.context() as patch:
        here = partial(tempfile.mkdtemp, dir=tmp_path_factory.mktemp("replays"))
        patch.setattr("lightning_custom.replay.tempfile", SimpleNamespace(mkdtemp=here))
        yield
