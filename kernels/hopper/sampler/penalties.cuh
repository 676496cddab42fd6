// Whether a row has penalties, and its token counts are kept.
#pragma once

// The padding slot's repetition penalty is 0.
__device__ __forceinline__ bool has_penalties(float repetition, float frequency, float presence) {
    return (repetition > 0.0f && repetition != 1.0f) || frequency != 0.0f || presence != 0.0f;
}
