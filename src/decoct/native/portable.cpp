#define DECOCT_COMPACT
#define DECOCT_LEVEL portable
#include "level.h"

const decoct::Level decoct::portable_level = {
    decoct::portable::multiply, decoct::portable::unpack, decoct::portable::widen, decoct::portable::narrow,
    nullptr, nullptr, nullptr, &decoct::portable::steps, &decoct::portable::prompts, &decoct::portable::predictions, nullptr};
