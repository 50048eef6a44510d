// What Hopper has for tiles: the copy engine, barriers in shared memory that count bytes, and products of four warps whose right
// factor, and left one if wanted, is read from shared memory (PTX ISA 8, "Asynchronous warpgroup level matrix instructions").
//
// A tile lies in slabs of 64 features: a row of a slab is 128 bytes, in which the packs of 16 bytes are exchanged by an exclusive or
// with the row's number modulo 8 (the 128-byte swizzle), so that eight rows of one pack lie in different banks. The copy engine
// writes tiles so, and descriptors tell the products.
#pragma once

#include <cuda.h>

#include "cuda/mma.h"

#if defined(TRILITH_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TRILITH_HOPPER 1
#endif

namespace trilith::cuda {

constexpr int kSlab = 64, kSlabRowBytes = 128, kSwizzleBytes = 1024;

__device__ __forceinline__ uint32_t shared_address(const void* at) {
#if defined(TRILITH_EMULATED)
    return ::trilith::emulated::shared_address(at);
#elif defined(__CUDA_ARCH__)
    return static_cast<uint32_t>(__cvta_generic_to_shared(at));
#else
    return 0;
#endif
}

// --- barriers that count arrivals and bytes ------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
#if defined(TRILITH_EMULATED)
    ::trilith::emulated::barrier_init(barrier, arrivals);
#elif defined(TRILITH_HOPPER)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
#endif
}
// Makes initialised barriers known to the copy engine; the other threads see them after __syncthreads.
__device__ __forceinline__ void barriers_publish() {
#if !defined(TRILITH_EMULATED) && defined(TRILITH_HOPPER)
    asm volatile("fence.mbarrier_init.release.cluster;" ::);
    asm volatile("fence.proxy.async.shared::cta;" ::);
#endif
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
#if defined(TRILITH_EMULATED)
    ::trilith::emulated::barrier_arrive(barrier, 0);
#elif defined(TRILITH_HOPPER)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
// Arrives, and has the barrier wait for so many bytes, too.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
#if defined(TRILITH_EMULATED)
    ::trilith::emulated::barrier_arrive(barrier, bytes);
#elif defined(TRILITH_HOPPER)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}
// Waits for the end of the phase of this parity: 0 for the first, and 1 for the one before it, which is over at the start.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
#if defined(TRILITH_EMULATED)
    ::trilith::emulated::barrier_wait(barrier, parity);
#elif defined(TRILITH_HOPPER)
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#endif
}

// --- the copy engine ------------------------------------------------------------------------------------------------------

// Begins to copy a box of a tensor (feature, head, place, sample) into shared memory; the barrier counts its bytes. What lies outside
// of the tensor is zero.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& tensor, uint64_t* barrier, int feature, int head, int place,
                                         int sample) {
#if defined(TRILITH_EMULATED)
    ::trilith::emulated::copy_box(to, tensor, barrier, feature, head, place, sample);
#elif defined(TRILITH_HOPPER)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
            shared_address(to)),
        "l"(reinterpret_cast<uint64_t>(&tensor)), "r"(shared_address(barrier)), "r"(feature), "r"(head), "r"(place), "r"(sample)
        : "memory");
#endif
}

// --- products of a warpgroup ----------------------------------------------------------------------------------------------

// A matrix in swizzled slabs at `address`. Rows along the depth (`leading` unused): eight rows after the other `stride` bytes apart.
// Depth along the rows: `leading` bytes from slab to slab, `stride` bytes from eight rows of the depth to the next.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int leading, int stride) {
    constexpr uint64_t kSwizzled128 = 1;
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | kSwizzled128 << 62;
}

// Products read registers that were written before this.
__device__ __forceinline__ void products_open() {
#if !defined(TRILITH_EMULATED) && defined(TRILITH_HOPPER)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void products_close() {
#if defined(TRILITH_EMULATED)
    ::trilith::emulated::products_close();
#elif defined(TRILITH_HOPPER)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Waits until all but the last `left` groups of products are done.
template <int left>
__device__ __forceinline__ void products_wait() {
#if defined(TRILITH_EMULATED)
    ::trilith::emulated::products_wait(left);
#elif defined(TRILITH_HOPPER)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
#endif
}
// Nothing that computes with x may be moved across this.
template <int groups>
__device__ __forceinline__ void pin(float (&x)[groups][4]) {
#if !defined(TRILITH_EMULATED) && defined(TRILITH_HOPPER)
#pragma unroll
    for (int j = 0; j < groups; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(x[j][i])::"memory");
#endif
}

// Operands: accumulators that are read and written ("+f"), or written only ("=f").
#define TRILITH_D4(how, d, j) how(d[j][0]), how(d[j][1]), how(d[j][2]), how(d[j][3])
#define TRILITH_D16(how, d, j) \
    TRILITH_D4(how, d, j), TRILITH_D4(how, d, j + 1), TRILITH_D4(how, d, j + 2), TRILITH_D4(how, d, j + 3)
#define TRILITH_D32(how, d, j) TRILITH_D16(how, d, j), TRILITH_D16(how, d, j + 4)
#define TRILITH_D64(how, d, j) TRILITH_D32(how, d, j), TRILITH_D32(how, d, j + 8)
#define TRILITH_D128(how, d, j) TRILITH_D64(how, d, j), TRILITH_D64(how, d, j + 16)
#define TRILITH_N32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define TRILITH_N64                                                                                                              \
    TRILITH_N32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
                "%59,%60,%61,%62,%63"
#define TRILITH_N128                                                                                                              \
    TRILITH_N64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90," \
                "%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,"    \
                "%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// D (64 x 8 groups) = A B, or += where it `adds`, with both factors in shared memory, their rows along the depth.
template <bool adds, class T, int groups>
__device__ __forceinline__ void multiply_shared(float (&d)[groups][4], uint64_t a, uint64_t b) {
    static_assert(groups == 8 || groups == 16, "64 or 128 columns");
#if defined(TRILITH_EMULATED)
    ::trilith::emulated::multiply_shared(&d[0][0], groups, a, b, adds, std::is_same<T, __half>::value);
#elif defined(TRILITH_HOPPER)
#define TRILITH_SHARED(n, type, names, left, right, flag, outputs)                                                       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
                 " {" names "}, " left ", " right ", p, 1, 1, 0, 0;\n}\n"                                                \
                 : outputs                                                                                               \
                 : "l"(a), "l"(b), "r"(int(adds)))
#define TRILITH_OF_TYPE(type)                                                                                             \
    if constexpr (groups == 8 && adds)                                                                                    \
        TRILITH_SHARED("64", type, TRILITH_N32, "%32", "%33", "%34", TRILITH_OUT(TRILITH_D32("+f", d, 0)));               \
    else if constexpr (groups == 8)                                                                                       \
        TRILITH_SHARED("64", type, TRILITH_N32, "%32", "%33", "%34", TRILITH_OUT(TRILITH_D32("=f", d, 0)));               \
    else if constexpr (adds)                                                                                              \
        TRILITH_SHARED("128", type, TRILITH_N64, "%64", "%65", "%66", TRILITH_OUT(TRILITH_D64("+f", d, 0)));              \
    else                                                                                                                  \
        TRILITH_SHARED("128", type, TRILITH_N64, "%64", "%65", "%66", TRILITH_OUT(TRILITH_D64("=f", d, 0)))
#define TRILITH_OUT(...) __VA_ARGS__
    if constexpr (std::is_same<T, __half>::value) {
        TRILITH_OF_TYPE("f16");
    } else {
        TRILITH_OF_TYPE("bf16");
    }
#undef TRILITH_OUT
#undef TRILITH_OF_TYPE
#undef TRILITH_SHARED
#endif
}

// D (64 x 8 groups) += A B with A in registers, as `multiply` has it, and the depth of B along the rows of its slabs.
template <class T, int groups>
__device__ __forceinline__ void multiply_held(float (&d)[groups][4], const uint32_t (&a)[4], uint64_t b) {
    static_assert(groups == 8 || groups == 16 || groups == 32, "64, 128 or 256 columns");
#if defined(TRILITH_EMULATED)
    ::trilith::emulated::multiply_held(&d[0][0], groups, a, b, std::is_same<T, __half>::value);
#elif defined(TRILITH_HOPPER)
#define TRILITH_HELD(n, type, names, left, right, flag, outputs)                                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
                 " {" names "}, {" left "}, " right ", p, 1, 1, 1;\n}\n"                                                 \
                 : outputs                                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
#define TRILITH_OF_TYPE(type)                                                                                               \
    if constexpr (groups == 8)                                                                                              \
        TRILITH_HELD("64", type, TRILITH_N32, "%32,%33,%34,%35", "%36", "%37", TRILITH_OUT(TRILITH_D32("+f", d, 0)));       \
    else if constexpr (groups == 16)                                                                                        \
        TRILITH_HELD("128", type, TRILITH_N64, "%64,%65,%66,%67", "%68", "%69", TRILITH_OUT(TRILITH_D64("+f", d, 0)));      \
    else                                                                                                                    \
        TRILITH_HELD("256", type, TRILITH_N128, "%128,%129,%130,%131", "%132", "%133", TRILITH_OUT(TRILITH_D128("+f", d, 0)))
#define TRILITH_OUT(...) __VA_ARGS__
    if constexpr (std::is_same<T, __half>::value) {
        TRILITH_OF_TYPE("f16");
    } else {
        TRILITH_OF_TYPE("bf16");
    }
#undef TRILITH_OUT
#undef TRILITH_OF_TYPE
#undef TRILITH_HELD
#endif
}

// Registers that a warpgroup has from here on; all of its threads call it.
template <int count>
__device__ __forceinline__ void registers_take() {
#if !defined(TRILITH_EMULATED) && defined(TRILITH_HOPPER)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}
template <int count>
__device__ __forceinline__ void registers_give() {
#if !defined(TRILITH_EMULATED) && defined(TRILITH_HOPPER)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

}  // namespace trilith::cuda
