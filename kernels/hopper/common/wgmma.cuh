// wgmma (PTX ISA, "asynchronous warpgroup level matrix instructions"): bf16, A from registers, B from shared memory.
#pragma once

#include "common/ptx.cuh"

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most LEFT of the committed groups are under way. Follow it by `hold` of their registers.
template <int LEFT>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Until here these registers belong to a product under way: the compiler must not move a use of them above.
template <int COUNT>
__device__ __forceinline__ void hold(unsigned (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

template <int COUNT>
__device__ __forceinline__ void hold(float (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// wgmma<ACCUMULATE, TRANSPOSED>(d, a, b): d [64, N] = or += a [64, 16] b [16, N] for the N below. A warp holds
// 16 rows, of which a lane has what mma.m16n8k16 gives it: a as there; d[4 j ... 4 j + 3] are row g of columns 8 j + t
// and the next, then row g + 8 of both. b is a matrix descriptor; TRANSPOSED: MN-major.
#define WGMMA_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_16(i) WGMMA_4(i), WGMMA_4(i + 4), WGMMA_4(i + 8), WGMMA_4(i + 12)
#define WGMMA_D0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_D16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_D32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_D48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_D64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_D80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_D96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_D112 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_8(i) WGMMA_4(i), WGMMA_4(i + 4)
#define WGMMA_LIST(...) __VA_ARGS__
#define WGMMA(N, SUMS, OPERANDS, A, B, ADD, TRANS)                                                                     \
    template <bool ACCUMULATE = true, bool TRANSPOSED = false>                                                         \
    __device__ __forceinline__ void wgmma(float (&d)[N / 2], const unsigned* a, unsigned long long b) {                \
        asm volatile("{\n .reg .pred add;\n setp.ne.b32 add, " ADD                                                     \
                     ", 0;\n"                                                                                          \
                     " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" SUMS "}, {" A "}, " B               \
                     ", add, 1, 1, " TRANS ";\n}"                                                                      \
                     : OPERANDS                                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(ACCUMULATE)),                       \
                       "n"(int(TRANSPOSED)));                                                                          \
    }
WGMMA(16, "%0, %1, %2, %3, %4, %5, %6, %7", WGMMA_LIST(WGMMA_8(0)), "%8, %9, %10, %11", "%12", "%13", "%14")
WGMMA(32, WGMMA_D0, WGMMA_16(0), "%16, %17, %18, %19", "%20", "%21", "%22")
WGMMA(48, WGMMA_D0 ", %16, %17, %18, %19, %20, %21, %22, %23", WGMMA_LIST(WGMMA_16(0), WGMMA_8(16)),
      "%24, %25, %26, %27", "%28", "%29", "%30")
WGMMA(64, WGMMA_D0 ", " WGMMA_D16, WGMMA_LIST(WGMMA_16(0), WGMMA_16(16)), "%32, %33, %34, %35", "%36", "%37", "%38")
WGMMA(96, WGMMA_D0 ", " WGMMA_D16 ", " WGMMA_D32, WGMMA_LIST(WGMMA_16(0), WGMMA_16(16), WGMMA_16(32)),
      "%48, %49, %50, %51", "%52", "%53", "%54")
WGMMA(112, WGMMA_D0 ", " WGMMA_D16 ", " WGMMA_D32 ", %48, %49, %50, %51, %52, %53, %54, %55",
      WGMMA_LIST(WGMMA_16(0), WGMMA_16(16), WGMMA_16(32), WGMMA_8(48)), "%56, %57, %58, %59", "%60", "%61", "%62")
WGMMA(128, WGMMA_D0 ", " WGMMA_D16 ", " WGMMA_D32 ", " WGMMA_D48,
      WGMMA_LIST(WGMMA_16(0), WGMMA_16(16), WGMMA_16(32), WGMMA_16(48)), "%64, %65, %66, %67", "%68", "%69", "%70")
WGMMA(144, WGMMA_D0 ", " WGMMA_D16 ", " WGMMA_D32 ", " WGMMA_D48 ", %64, %65, %66, %67, %68, %69, %70, %71",
      WGMMA_LIST(WGMMA_16(0), WGMMA_16(16), WGMMA_16(32), WGMMA_16(48), WGMMA_8(64)), "%72, %73, %74, %75", "%76",
      "%77", "%78")
WGMMA(160, WGMMA_D0 ", " WGMMA_D16 ", " WGMMA_D32 ", " WGMMA_D48 ", " WGMMA_D64,
      WGMMA_LIST(WGMMA_16(0), WGMMA_16(16), WGMMA_16(32), WGMMA_16(48), WGMMA_16(64)), "%80, %81, %82, %83", "%84",
      "%85", "%86")
WGMMA(192, WGMMA_D0 ", " WGMMA_D16 ", " WGMMA_D32 ", " WGMMA_D48 ", " WGMMA_D64 ", " WGMMA_D80,
      WGMMA_LIST(WGMMA_16(0), WGMMA_16(16), WGMMA_16(32), WGMMA_16(48), WGMMA_16(64), WGMMA_16(80)),
      "%96, %97, %98, %99", "%100", "%101", "%102")
WGMMA(224, WGMMA_D0 ", " WGMMA_D16 ", " WGMMA_D32 ", " WGMMA_D48 ", " WGMMA_D64 ", " WGMMA_D80 ", " WGMMA_D96,
      WGMMA_LIST(WGMMA_16(0), WGMMA_16(16), WGMMA_16(32), WGMMA_16(48), WGMMA_16(64), WGMMA_16(80), WGMMA_16(96)),
      "%112, %113, %114, %115", "%116", "%117", "%118")
WGMMA(256,
      WGMMA_D0 ", " WGMMA_D16 ", " WGMMA_D32 ", " WGMMA_D48 ", " WGMMA_D64 ", " WGMMA_D80 ", " WGMMA_D96
               ", " WGMMA_D112,
      WGMMA_LIST(WGMMA_16(0), WGMMA_16(16), WGMMA_16(32), WGMMA_16(48), WGMMA_16(64), WGMMA_16(80), WGMMA_16(96),
                 WGMMA_16(112)),
      "%128, %129, %130, %131", "%132", "%133", "%134")
#undef WGMMA
#undef WGMMA_LIST
#undef WGMMA_8
#undef WGMMA_4
#undef WGMMA_16
#undef WGMMA_D0
#undef WGMMA_D16
#undef WGMMA_D32
#undef WGMMA_D48
#undef WGMMA_D64
#undef WGMMA_D80
#undef WGMMA_D96
#undef WGMMA_D112

// Tokens in shared memory as the B operand: rows of 128 bytes (a token's 64 columns), 16-byte chunk c of row r at
// c ^ (r % 8), eight rows every 1024 bytes. In units of 16 bytes: start in bits 0-13, the stride of eight rows in 32-45,
// and 1 << 62 for this swizzle. A step of 16 columns is 32 bytes on.
__device__ __forceinline__ unsigned long long stage_operand(unsigned at) {
    return (unsigned long long)(at >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

constexpr int STAGE_ALIGNMENT = 1024;  // the swizzle's pattern repeats so
