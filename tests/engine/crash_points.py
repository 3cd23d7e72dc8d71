"""A process of its own that ends runs at chosen system calls, as a power cut would: nothing is cleaned up.

python -m tests.engine.crash_points MODEL TEXT FOLDER EVERY RECIPE prints how many points it tried; it fails at the
first one after which the same command does not give the same bits.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - once, before forking

import decoct.engine.estimate
import decoct.engine.learn_basis
import decoct.engine.plan_basis
import decoct.engine.plan_guidance
import decoct.engine.plan_tuning
import decoct.engine.tune
from tests.engine.running import digests, run

CALLS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "link")
KILLED = 9


def child(work: Callable[[], None]) -> int:
    """Exit status of a forked process that does this; it has imported everything already."""
    process = os.fork()
    if process == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def count_calls(limit: int | None) -> Callable[[], int]:
    """From now on count calls that change the disk, and end this process instead of the call after `limit` of them."""
    done = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if done == limit:
                os._exit(KILLED)
            done += 1
            return original(*args, **kwargs)

        return stand_in

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    return lambda: done


def try_points(base: Path, text: Path, folder: Path, every: int, recipe: dict[str, Any]) -> int:
    """Crash at every so many-th point, go on, compare. Gives the number of points."""
    settings = {**recipe, "data": {**recipe.get("data", {}), "source": str(text)}}
    whole, out, number = folder / "whole", folder / "out", folder / "calls"

    def uninterrupted() -> None:
        count = count_calls(None)
        run(base, whole, **settings)
        number.write_text(str(count()))

    def crash(at: int) -> None:
        count_calls(at)
        run(base, out, **settings)

    def go_on() -> None:
        if (out / "decoct.json").exists() and not any((out / name).exists() for name in (".run", ".run-done")):
            return  # it was stopped after its last step
        run(base, out, **settings)

    assert child(uninterrupted) == 0
    expected = digests(whole)
    points = range(0, int(number.read_text()), every)
    for at in points:
        shutil.rmtree(out, ignore_errors=True)
        assert child(lambda at=at: crash(at)) == KILLED, f"no crash at {at}"  # type: ignore[misc]
        assert child(go_on) == 0, f"could not go on after a crash at {at}"
        found = digests(out)
        differing = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
        assert not differing, f"after a crash at {at}, {differing} differ"
    return len(points)


def main() -> None:
    """See the module's words."""
    torch.set_num_threads(1)
    engine = decoct.engine
    for module in (engine.estimate, engine.plan_tuning, engine.plan_basis, engine.plan_guidance):
        module.product_rate = lambda _: 1e11
    decoct.engine.tune._SAVE_SECONDS = decoct.engine.learn_basis._SAVE_SECONDS = 0.0
    base, text, folder = (Path(each) for each in sys.argv[1:4])
    print(try_points(base, text, folder, int(sys.argv[4]), json.loads(sys.argv[5])))


if __name__ == "__main__":
    main()
