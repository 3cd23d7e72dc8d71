"""What a student reads: texts with prompts, what the teacher or the student itself writes, and how these are mixed."""

from decoct.samples.lesson import Lesson, collate
from decoct.samples.mixing import Mixer, Mixing, Source
from decoct.samples.read import check_record, read_records
from decoct.samples.write import Writing, seeds_of_vocabulary, write, writer_of

__all__ = [
    "Lesson",
    "Mixer",
    "Mixing",
    "Source",
    "Writing",
    "check_record",
    "collate",
    "read_records",
    "seeds_of_vocabulary",
    "write",
    "writer_of",
]
