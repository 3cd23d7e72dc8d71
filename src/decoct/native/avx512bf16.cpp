#define DECOCT_LEVEL avx512bf16
#include "level.h"
#include "pairs.h"
#include "rounded.h"

const decoct::Level decoct::avx512bf16_level = {
    decoct::avx512bf16::multiply, decoct::avx512bf16::unpack, decoct::avx512bf16::widen, decoct::avx512bf16::narrow,
    decoct::avx512bf16::multiply_pairs, decoct::avx512bf16::pairs_fit, decoct::avx512bf16::pair_inputs,
    &decoct::avx512bf16::steps, &decoct::avx512bf16::prompts, &decoct::avx512bf16::predictions, &decoct::avx512bf16::rounded_product};
