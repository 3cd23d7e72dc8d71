"""Who teaches: a function from tokens to what is wanted of the student (`Teach`). These are made of other ones.

A single model is run by whatever runs models. Here several become one, one is kept on disk, or one with another
tokenizer is brought into step with the student.
"""

from decoct.teachers.base import Teach, identity
from decoct.teachers.cached import CachedTeacher, cache_bytes, write_cache
from decoct.teachers.other_tokenizer import OtherTokenizer, same_tokenizer
from decoct.teachers.several import Several

__all__ = [
    "CachedTeacher",
    "OtherTokenizer",
    "Several",
    "Teach",
    "cache_bytes",
    "identity",
    "same_tokenizer",
    "write_cache",
]
