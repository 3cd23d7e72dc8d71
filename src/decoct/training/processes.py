"""Several processes that train one model together (torchrun, or what accelerate starts): who is who, and agreeing."""

import os
from typing import Any


def num_processes() -> int:
    """How many there are, as whatever started them says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """This one's number, from 0; the first writes what there is to write."""
    return int(os.environ.get("RANK", "0"))


def said_by_first(value: list[Any]) -> list[Any]:
    """What the first process has to say, in all of them; each waits here for the others."""
    if num_processes() == 1:
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=True)
    found: list[Any] = broadcast_object_list(list(value), from_process=0)
    return found


def wait_for_all() -> None:
    """Go on when every process has come here."""
    said_by_first([None])
