#define DECOCT_LEVEL avx2
#include "level.h"

const decoct::Level decoct::avx2_level = {
    decoct::avx2::multiply, decoct::avx2::unpack, decoct::avx2::widen, decoct::avx2::narrow,
    nullptr, nullptr, nullptr, &decoct::avx2::steps, &decoct::avx2::prompts, &decoct::avx2::predictions, nullptr};
