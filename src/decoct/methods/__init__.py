"""Every method there is, by the name recipes use. A new method is one file and one line here."""

from decoct.methods.base import LinearCorrection, LinearMethod
from decoct.methods.factorize.eora import EoRA
from decoct.methods.factorize.svd_llm import SVDLLM
from decoct.methods.prune.wanda import Wanda
from decoct.methods.quantize.gptq import GPTQ
from decoct.methods.quantize.rtn import RTN

METHODS: dict[str, type[LinearMethod] | type[LinearCorrection]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "wanda": Wanda,
    "svd_llm": SVDLLM,
    "eora": EoRA,
}

__all__ = ["METHODS", "LinearCorrection", "LinearMethod"]
