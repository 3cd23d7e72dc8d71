#define DECOCT_LEVEL neon
#include "level.h"

const decoct::Level decoct::neon_level = {
    decoct::neon::multiply, decoct::neon::unpack, decoct::neon::widen, decoct::neon::narrow,
    nullptr, nullptr, nullptr, &decoct::neon::steps, &decoct::neon::prompts, &decoct::neon::predictions, nullptr};
