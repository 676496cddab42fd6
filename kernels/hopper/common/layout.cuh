// Qualifies index functions, so that tests/kernels compiles the headers that hold them for the host and replays them.
#pragma once

#ifdef __CUDACC__
#define LAYOUT __host__ __device__ __forceinline__
#else
#include <algorithm>
#include <cstddef>
using std::max;
using std::min;
#define LAYOUT inline
#endif
