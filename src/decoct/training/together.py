"""A recipe that trains, run by several processes: each has its batches, gradients are averaged, the first writes."""

from pathlib import Path
from tempfile import TemporaryDirectory

from decoct.engine.admission import is_result_of
from decoct.engine.compress import compress_job
from decoct.engine.job import Job, Watch
from decoct.engine.journal import Journal
from decoct.engine.stages import StageRun, plan_stages
from decoct.engine.summary import Result, read_result
from decoct.training.processes import process_number, said_by_first, wait_for_all
from decoct.training.stage import TrainStage


def compress_together(job: Job, watch: Watch) -> Result:
    """Run a job of one stage that trains; every process calls this.

    A step is what one process would do with as many times `accumulate` as there are processes. Folders are the same
    for all: they must see one file system.

    Raises:
        ValueError: the recipe has other stages, or anything that the user can mend.
    """
    stage = job.stages[0]
    if len(job.stages) != 1 or not isinstance(stage, TrainStage):
        raise ValueError(
            "several processes run a recipe of one stage that trains; run the other stages first, in one process"
        )
    (finished,) = said_by_first([not job.fresh and is_result_of(job.out, job)])
    if process_number() == 0:
        compress_job(job, watch)
    elif not finished:
        _help(job, stage, watch)
    wait_for_all()
    return read_result(job.out)


def _help(job: Job, stage: TrainStage, watch: Watch) -> None:
    """The part of a process that is not the first."""
    (plan,) = plan_stages(job.model, job.stages, job.data, job.budget, None).stages
    with TemporaryDirectory() as place:
        folder = Path(place)
        journal = Journal(folder, {}, folder)
        stage.help(StageRun(plan, job.model, job.model, job.data, None, folder, journal, watch.event, watch.message))
