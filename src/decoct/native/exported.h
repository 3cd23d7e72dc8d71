// How a function that Python calls is declared.
#pragma once

#if defined(_WIN32)
#define DECOCT_EXPORT extern "C" __declspec(dllexport)
#else
#define DECOCT_EXPORT extern "C" __attribute__((visibility("default")))
#endif
