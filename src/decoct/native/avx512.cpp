#define DECOCT_LEVEL avx512
#include "level.h"

const decoct::Level decoct::avx512_level = {
    decoct::avx512::multiply, decoct::avx512::unpack, decoct::avx512::widen, decoct::avx512::narrow,
    nullptr, nullptr, nullptr, &decoct::avx512::steps, &decoct::avx512::prompts, &decoct::avx512::predictions, nullptr};
