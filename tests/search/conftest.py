"""Small models, and no timing of this machine."""

from pathlib import Path

import pytest

from tests.engine.running import make_base


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("engine.estimate", "search.plan"):
        monkeypatch.setattr(f"decoct.{module}.product_rate", lambda _: 1e11)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("search"))
