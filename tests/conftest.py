"""Shared fixtures."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several workers: one thread for each, and for all that it starts. They inherit what their parent set below.
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported, whoever does that first
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cached in the user's home."""
    monkeypatch.setenv("DECOCT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """A test that changes how many threads torch uses changes it for itself alone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real full-precision Llama of 260k parameters."""
    folder = SHARED / "models" / "stories260k"
    if not folder.exists():
        pytest.skip("the stories260k model is not at hand")
    return folder


@pytest.fixture(scope="session")
def story_text() -> Path:
    """Text for it."""
    path = SHARED / "data" / "tinystories" / "valid_sample.txt"
    if not path.exists():
        pytest.skip("the TinyStories sample is not at hand")
    return path
