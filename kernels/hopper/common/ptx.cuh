// PTX instructions under one name each, and the numbers that all kernels share. Every kernel includes this file.
//
// A function is one instruction (or one that is of no use alone) and is named after it. Two names for one instruction
// are two ways in which the compiler may treat it, and the comment between them says why both are needed.
#pragma once

using bf16 = unsigned short;  // its bits: NVRTC has no headers to offer

// Programmatic dependent launch ---------------------------------------------------------------------------------------
// A kernel may start while the kernel before it in the stream, its predecessor, still runs. The rules, and what each
// kernel reads before its wait, are in kernels/README.md.

// Every kernel's first statement. It is nothing, except in the build mode WAIT_FIRST: there each kernel begins with its
// wait, so that everything before it in the stream has ended, and the order is right whatever the rest of the kernel
// does. Tests compare the bytes of the two modes.
__device__ __forceinline__ void griddep_wait_first() {
#if WAIT_FIRST
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Until the predecessor has ended and all that it wrote is visible. Whatever came before the predecessor has ended only
// if the predecessor, too, has waited: it ends after its own wait.
__device__ __forceinline__ void griddep_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel may start once every block of this one has executed this or has ended.
__device__ __forceinline__ void griddep_launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Loads and stores of global memory -----------------------------------------------------------------------------------

// Weights that are read once a launch, and push nothing out of L1. Not .nc, though weights never change: ptxas moves
// loads with .nc below griddepcontrol.wait, volatile or not, and these are to be under way before it. Volatile keeps
// them where they are written, far ahead of their use.
__device__ __forceinline__ uint4 ld_weight(const void* at) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}

__device__ __forceinline__ unsigned ld_weight_u32(const void* at) {
    unsigned v;
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}

// The same for kernels that load weights after their wait only, where .nc may not move anything too far.
__device__ __forceinline__ uint4 ld_weight_nc(const void* at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}

// Weights that other blocks on the same multiprocessor read, too: they may stay in L1.
__device__ __forceinline__ uint4 ld_reused_weight(const void* at) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

// Activations, from L2: while this kernel waits, an earlier one may bring what this place held before into this
// multiprocessor's L1.
__device__ __forceinline__ uint4 ld_relaxed_gpu(const uint4* at) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at)
                 : "memory");
    return v;
}

__device__ __forceinline__ int ld_relaxed_gpu(const int* at) {
    int v;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

// Memory that another GPU writes or reads. One instruction is seen whole or not at all for each 4-byte (8-byte) word.
__device__ __forceinline__ uint4 ld_relaxed_sys(const uint4* at) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at)
                 : "memory");
    return v;
}

__device__ __forceinline__ unsigned long long ld_relaxed_sys(const unsigned long long* at) {
    unsigned long long v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(at) : "memory");
    return v;
}

__device__ __forceinline__ void st_relaxed_sys(uint4* at, uint4 v) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void st_relaxed_sys(unsigned long long* at, unsigned long long v) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"(v) : "memory");
}

__device__ __forceinline__ void st_relaxed_sys(unsigned* at, unsigned v) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}

// Add to a counter -> what it was. The block's writes before its last barrier come before the sum for whoever adds later:
// release and acquire are cumulative over barriers.
__device__ __forceinline__ unsigned atom_add_acq_rel_gpu(unsigned* counter, unsigned more) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(more) : "memory");
    return before;
}

// Shared memory -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ unsigned shared_address(const void* at) { return unsigned(__cvta_generic_to_shared(at)); }

__device__ __forceinline__ uint4 ld_shared(unsigned at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}

__device__ __forceinline__ unsigned ld_shared_u32(unsigned at) {
    unsigned v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}

__device__ __forceinline__ void st_shared(unsigned at, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// 16 bytes from global to shared memory, asynchronously; zeros where !present: then nothing is read.
__device__ __forceinline__ void cp_async(unsigned to, const void* from, bool present = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present ? 16 : 0)
                 : "memory");
}

// The same of what is read once a step: it leaves the L2 first, before what is written there and read again.
__device__ __forceinline__ void cp_async_once(unsigned to, const void* from, bool present = true) {
    constexpr unsigned long long EVICT_FIRST =
        0x12f0000000000000;  // as createpolicy.fractional.L2::evict_first makes it
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
                 "r"(present ? 16 : 0), "l"(EVICT_FIRST)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most LEFT of this thread's groups of copies, the last committed, are under way.
template <int LEFT>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Until all of this thread's copies have arrived, committed or not.
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// An arrival at an mbarrier, once this thread's copies so far have come; it is one of those that the phase waits for.
__device__ __forceinline__ void cp_async_mbarrier_arrive_noinc(unsigned barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Bytes, a multiple of 16, by the copy engine; `barrier`, an mbarrier, counts them as they arrive.
__device__ __forceinline__ void cp_async_bulk(unsigned to, const void* from, int bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// The same, from this block's shared memory to that of a block of the cluster; `to` and `barrier` are addresses by mapa.
__device__ __forceinline__ void cp_async_bulk_cluster(unsigned to, unsigned from, int bytes, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
        "r"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

// cp_async_bulk to the same place in every block of the cluster that `blocks` has a bit for, counted by each one's own
// mbarrier in the place of `barrier`.
__device__ __forceinline__ void cp_async_bulk_multicast(unsigned to, const void* from, int bytes, unsigned barrier,
                                                        unsigned short blocks) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "h"(blocks)
        : "memory");
}

// A matrix in global memory and how a box of it lies in shared memory, as the driver encodes it: TensorMap of
// kernels/build.py, passed as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
    unsigned long long words[16];
};

// The box whose first element is in that row and column.
__device__ __forceinline__ void cp_async_bulk_tensor(unsigned to, const TensorMap* matrix, int column, int row,
                                                     unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(to),
        "l"(matrix), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// The box whose first element is in that row and column, to the same place in every block of `blocks`.
__device__ __forceinline__ void cp_async_bulk_tensor_multicast(unsigned to, const TensorMap* matrix, int column,
                                                               int row, unsigned barrier, unsigned short blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(matrix), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
        : "memory");
}

// Four 8 x 8 matrices of 16 bits. Lane 8 i + r holds the address of row r of matrix i; lane l gets of each matrix
// elements 2 (l % 4) and the next of row l / 4.
__device__ __forceinline__ uint4 ldmatrix(unsigned at) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}

// The same of the transposed matrices.
__device__ __forceinline__ uint4 ldmatrix_trans(unsigned at) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}

// The reverse of ldmatrix_trans, for two matrices (addresses by lanes 0 to 15) and for four.
__device__ __forceinline__ void stmatrix_trans(unsigned at, unsigned a, unsigned b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(a), "r"(b) : "memory");
}

__device__ __forceinline__ void stmatrix_trans(unsigned at, unsigned a, unsigned b, unsigned c, unsigned d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// Barriers ------------------------------------------------------------------------------------------------------------

// Of so many threads of a block; __syncthreads is barrier 0.
template <int BAR_THREADS>
__device__ __forceinline__ void bar_sync(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(BAR_THREADS) : "memory");
}

// An mbarrier in shared memory, by its address. A phase ends when `arrivals` threads have arrived and the bytes that
// they announced have come.
__device__ __forceinline__ void mbarrier_init(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes this thread's mbarrier_init visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// At one of any block of the cluster, by its address from mapa.
__device__ __forceinline__ void mbarrier_arrive_cluster(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Announces bytes without an arrival.
__device__ __forceinline__ void mbarrier_expect_tx(unsigned barrier, int bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of that parity has ended; the first phase's is 0.
__device__ __forceinline__ void mbarrier_wait(unsigned barrier, int parity) {
    asm volatile(
        "{\n .reg .pred done;\nagain:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        " @!done bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Copies of this thread into shared memory become visible to wgmma, which reads by the async proxy.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Clusters ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }

// Orders no memory, and so costs no fence: the fence of cluster_arrive waits for all loads under way, weights included.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// Where this address in shared memory lies in the memory of block `block` of the cluster.
__device__ __forceinline__ unsigned mapa(unsigned at, int block) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(block));
    return there;
}

template <int BLOCK>
__device__ __forceinline__ unsigned mapa(unsigned at) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "n"(BLOCK));
    return there;
}

template <typename T>
__device__ __forceinline__ T* mapa(T* at, int block) {
    T* there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(at), "r"(block));
    return there;
}

// To shared memory of a block of the cluster, counted by an mbarrier there; both are addresses by mapa.
__device__ __forceinline__ void st_async(unsigned at, float v, unsigned barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(at), "f"(v),
                 "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void st_async(unsigned at, const float (&v)[4], unsigned barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(at),
                 "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
                 : "memory");
}

// Registers -----------------------------------------------------------------------------------------------------------

// Registers of a thread from here on, for a whole warpgroup: the rest is given back, or waited for.
template <int COUNT>
__device__ __forceinline__ void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Products ------------------------------------------------------------------------------------------------------------

// d [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and t = 2 (lane % 4), each register a pair of neighbours: a0 row
// g, k t; a1 row g + 8, k t; a2 row g, k t + 8; a3 row g + 8, k t + 8; b0 k t, column g; b1 k t + 8, column g. d0 and
// d1 are row g, columns t and t + 1; d2 and d3 row g + 8.
__device__ __forceinline__ void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                    unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&d)[4], const unsigned* a, unsigned b0, unsigned b1) {
    mma(d, a[0], a[1], a[2], a[3], b0, b1);
}

// Numbers -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(bf16 bits) { return __uint_as_float(unsigned(bits) << 16); }

// Of a pair of bf16, the one in the low half: the lower address, the smaller index.
__device__ __forceinline__ float widen_low(unsigned pair) { return __uint_as_float(pair << 16); }

__device__ __forceinline__ float widen_high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

// Rounded to nearest, ties to even.
__device__ __forceinline__ bf16 round_bf16(float value) {
    bf16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ unsigned round_bf16x2(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Both halves of a times the low, or the high, half of b; keeps subnormals. The instruction itself picks the half.
__device__ __forceinline__ unsigned mul_bf16x2_low(unsigned a, unsigned b) {
    unsigned product;
    asm("{\n.reg .b16 low, high;\n.reg .b32 both;\nmov.b32 {low, high}, %2;\nmov.b32 both, {low, low};\n"
        "mul.rn.bf16x2 %0, %1, both;\n}"
        : "=r"(product)
        : "r"(a), "r"(b));
    return product;
}

__device__ __forceinline__ unsigned mul_bf16x2_high(unsigned a, unsigned b) {
    unsigned product;
    asm("{\n.reg .b16 low, high;\n.reg .b32 both;\nmov.b32 {low, high}, %2;\nmov.b32 both, {high, high};\n"
        "mul.rn.bf16x2 %0, %1, both;\n}"
        : "=r"(product)
        : "r"(a), "r"(b));
    return product;
}

// NaN wins, as in torch.clamp.
__device__ __forceinline__ float min_nan(float a, float b) {
    float v;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

__device__ __forceinline__ float max_nan(float a, float b) {
    float v;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

// 2^x, approximately.
__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The logarithm to base 2, approximately; of subnormals as of 0.
__device__ __forceinline__ float lg2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// What the compiler may know --------------------------------------------------------------------------------------------

// The same number, of which the compiler knows nothing: it neither computes it anew nor concludes anything from it.
template <typename Integer>
__device__ __forceinline__ Integer opaque(Integer value) {
    static_assert(sizeof(Integer) == 4, "one register");
    asm volatile("" : "+r"(value));
    return value;
}

// A copy in a register of its own, which ptxas keeps.
__device__ __forceinline__ unsigned mov(unsigned value) {
    unsigned copy;
    asm volatile("mov.b32 %0, %1;" : "=r"(copy) : "r"(value));
    return copy;
}

// threadIdx.x, read again: what follows from it is computed anew, not kept in registers through a loop.
__device__ __forceinline__ unsigned thread_again() {
    unsigned thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
