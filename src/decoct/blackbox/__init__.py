"""A teacher that is only to be asked: a model behind an OpenAI-compatible URL writes a data set to train on."""

from decoct.blackbox.asking import Asker, LimitReached
from decoct.blackbox.client import Answer, Question, Server
from decoct.blackbox.limit import Limit
from decoct.blackbox.make import Asked, make_records
from decoct.blackbox.tasks import InContext, Instruct, StepByStep, read_examples, read_prompts

__all__ = [
    "Answer",
    "Asked",
    "Asker",
    "InContext",
    "Instruct",
    "Limit",
    "LimitReached",
    "Question",
    "Server",
    "StepByStep",
    "make_records",
    "read_examples",
    "read_prompts",
]
