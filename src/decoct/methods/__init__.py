"""Every method there is, by the name recipes use. A new method is one file and one line here."""

from decoct.methods.base import BlockMethod, BlockWeights, LinearCorrection, LinearMethod, ModelMethod, Passage
from decoct.methods.factorize.eora import EoRA
from decoct.methods.factorize.svd_llm import SVDLLM
from decoct.methods.prune.wanda import Wanda
from decoct.methods.quantize.autoround import AutoRound
from decoct.methods.quantize.e2e_qp import E2EQP
from decoct.methods.quantize.gptq import GPTQ
from decoct.methods.quantize.hqq import HQQ
from decoct.methods.quantize.mxfp import MXFP
from decoct.methods.quantize.rtn import RTN

METHODS: dict[str, type[LinearMethod] | type[LinearCorrection] | type[BlockMethod] | type[ModelMethod]] = {
    "rtn": RTN,
    "hqq": HQQ,
    "mxfp": MXFP,
    "gptq": GPTQ,
    "autoround": AutoRound,
    "e2e_qp": E2EQP,
    "wanda": Wanda,
    "svd_llm": SVDLLM,
    "eora": EoRA,
}

__all__ = ["METHODS", "BlockMethod", "BlockWeights", "LinearCorrection", "LinearMethod", "ModelMethod", "Passage"]
