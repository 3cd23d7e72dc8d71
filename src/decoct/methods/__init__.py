"""Every method there is, by the name recipes use. A new method is one file and one line here."""

from decoct.methods.base import (
    BlockMethod,
    BlockWeights,
    EdgeScaling,
    LinearCorrection,
    LinearMethod,
    ModelMethod,
    Passage,
    Rotation,
)
from decoct.methods.factorize.eora import EoRA
from decoct.methods.factorize.svd_llm import SVDLLM
from decoct.methods.prune.wanda import Wanda
from decoct.methods.quantize.autoround import AutoRound
from decoct.methods.quantize.awq import AWQ
from decoct.methods.quantize.awq_clip import AWQClip
from decoct.methods.quantize.billm import BiLLM
from decoct.methods.quantize.e2e_qp import E2EQP
from decoct.methods.quantize.gptaq import GPTAQ
from decoct.methods.quantize.gptq import GPTQ
from decoct.methods.quantize.hqq import HQQ
from decoct.methods.quantize.mxfp import MXFP
from decoct.methods.quantize.onebit import OneBit
from decoct.methods.quantize.owq import OWQ
from decoct.methods.quantize.pb_llm import PBLLM
from decoct.methods.quantize.qtip import QTIP
from decoct.methods.quantize.rtn import RTN
from decoct.methods.quantize.smoothquant import SmoothQuant
from decoct.methods.quantize.spqr import SpQR
from decoct.methods.quantize.squeezellm import SqueezeLLM
from decoct.methods.quantize.ternary import Ternary
from decoct.methods.rotate.quarot import QuaRot
from decoct.methods.rotate.spinquant import SpinQuant

AnyMethod = LinearMethod | LinearCorrection | EdgeScaling | Rotation | BlockMethod | ModelMethod

METHODS: dict[str, type[AnyMethod]] = {
    "quarot": QuaRot,
    "spinquant": SpinQuant,
    "rtn": RTN,
    "hqq": HQQ,
    "mxfp": MXFP,
    "gptq": GPTQ,
    "gptaq": GPTAQ,
    "awq": AWQ,
    "awq_clip": AWQClip,
    "smoothquant": SmoothQuant,
    "squeezellm": SqueezeLLM,
    "spqr": SpQR,
    "owq": OWQ,
    "qtip": QTIP,
    "autoround": AutoRound,
    "e2e_qp": E2EQP,
    "billm": BiLLM,
    "ternary": Ternary,
    "pb_llm": PBLLM,
    "onebit": OneBit,
    "wanda": Wanda,
    "svd_llm": SVDLLM,
    "eora": EoRA,
}

__all__ = [
    "METHODS",
    "AnyMethod",
    "BlockMethod",
    "BlockWeights",
    "EdgeScaling",
    "LinearCorrection",
    "LinearMethod",
    "ModelMethod",
    "Passage",
    "Rotation",
]
