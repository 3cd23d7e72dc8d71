"""Methods that learn a block's codes, in a whole run: stopped and gone on with, and planned."""

from pathlib import Path

import pytest

from decoct.engine.job import Watch
from decoct.engine.stages import plan_stages
from decoct.engine.stream import Event
from decoct.methods import METHODS
from decoct.methods.block_learning import BlockLearning
from tests.engine.running import GPTQ, Crash, Settings, digests, make_base, make_job, run, whole

NAMES = [name for name, cls in METHODS.items() if issubclass(cls, BlockLearning)]


def step(name: str) -> Settings:
    return {name: {"num_steps": 5, "batch_size": 2}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_with_the_same_bits(base: Path, tmp_path: Path, name: str) -> None:
    def event(found: Event) -> None:
        if found.done == 3:
            raise Crash

    with pytest.raises(Crash):
        run(base, tmp_path / "out", GPTQ, step(name), watch=Watch(event=event))
    assert digests(run(base, tmp_path / "out", GPTQ, step(name)).folder) == whole(base, GPTQ, step(name))


@pytest.mark.parametrize("name", NAMES)
def test_plan_knows_the_size(base: Path, tmp_path: Path, name: str) -> None:
    rounding = {name: {"bits": 3, "group_size": 8, "symmetric": False, "num_steps": 2}}
    job = make_job(base, tmp_path / "out", rounding)
    plan = plan_stages(job.model, job.stages, job.data, job.budget, job.out)
    assert plan.output_bytes == pytest.approx(run(base, tmp_path / "out", rounding).nbytes, rel=0.01)
