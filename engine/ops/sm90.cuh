// SPDX-License-Identifier: Apache-2.0
// The instructions of compute capability 9.0 that C++ has no words for: barriers in shared memory, bulk copies,
// warpgroup products, register budgets, clusters. The one place with PTX of the matrix kernels; nothing here knows a
// shape.
//
// A warpgroup product multiplies A [64, K] with B [kN, K], both with K contiguous: FP8 takes K = 32 an instruction,
// BF16 K = 16, so 32 bytes of a row either way. Operands in shared memory lie in tiles of 128-byte rows, swizzled over
// 1024 bytes as a tensor copy with CU_TENSOR_MAP_SWIZZLE_128B leaves them; a tile starts on 1024 bytes. Thread t of a
// warpgroup holds of the product, for i in [0, kN / 2): row 16 * (t / 32) + t % 32 / 4 + (i & 2 ? 8 : 0), column
// 8 * (i / 4) + 2 * (t % 4) + (i & 1).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace millrace::cuda::sm90 {

__device__ inline uint32_t SmemAddress(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Barriers. A phase ends when all arrivals and all announced bytes are there; a waiter names the parity it waits for.
using Barrier = uint64_t;

__device__ inline void BarrierInit(Barrier* b, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SmemAddress(b)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine and to the other CTAs of the cluster.
__device__ inline void BarrierInitFence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void BarrierArrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SmemAddress(b)) : "memory");
}
// Predicated rather than branched around: a divergent branch beside products in flight makes the compiler wait for
// each.
__device__ inline void BarrierArriveIf(bool arrive, Barrier* b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(SmemAddress(b)),
      "r"(static_cast<int>(arrive))
      : "memory");
}
__device__ inline void BarrierExpect(Barrier* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SmemAddress(b)), "r"(bytes) : "memory");
}
// The same barrier of CTA `rank` of the cluster. Without a cluster-wide release, which costs a microsecond: it orders
// what the tensor cores have read, not what threads have written.
__device__ inline void BarrierArriveRemote(Barrier* b, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(SmemAddress(b)),
      "r"(rank)
      : "memory");
}
__device__ inline void BarrierWait(Barrier* b, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(SmemAddress(b)),
      "r"(parity)
      : "memory");
}
// Cache policies of the copy engine: weights of a small batch are read once, activations many times.
constexpr uint64_t kEvictFirst = 0x12f0000000000000, kEvictNormal = 0x1000000000000000, kEvictLast = 0x14f0000000000000;

// `bytes` (a multiple of 16) from global memory; both ends on 16 bytes.
__device__ inline void BulkCopy(void* dst, const void* src, uint32_t bytes, Barrier* b, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(SmemAddress(dst)),
      "l"(src), "r"(bytes), "r"(SmemAddress(b)), "l"(policy)
      : "memory");
}
// A box of a two-dimensional tensor, starting at element `x` of row `y`; what lies outside the tensor arrives as zeros.
__device__ inline void TensorCopy(void* dst, const CUtensorMap* map, int32_t x, int32_t y, Barrier* b,
                                  uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3}], "
      "[%4], %5;" ::"r"(SmemAddress(dst)),
      "l"(map), "r"(x), "r"(y), "r"(SmemAddress(b)), "l"(policy)
      : "memory");
}
// The same to every CTA of `ctas` (a bit a rank), at the same offset and on the same barrier of each.
__device__ inline void TensorCopyMulticast(void* dst, const CUtensorMap* map, int32_t x, int32_t y, Barrier* b,
                                           uint16_t ctas, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(SmemAddress(dst)),
      "l"(map), "r"(x), "r"(y), "r"(SmemAddress(b)), "h"(ctas), "l"(policy)
      : "memory");
}
__device__ inline void PrefetchMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Sixteen or eight bytes a thread, without passing through registers.
__device__ inline void Copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(SmemAddress(to)), "l"(from) : "memory");
}
__device__ inline void Copy8(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(SmemAddress(to)), "l"(from) : "memory");
}
// Until this thread's copies are there.
__device__ inline void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ inline void PrefetchL2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at) : "memory"); }

// Clusters.
__device__ inline uint32_t ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline void ClusterArrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// Where nothing this CTA has written needs to be seen by the others.
__device__ inline void ClusterArriveRelaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ inline void ClusterWait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Where `p` lies in CTA `rank`, for StoreRemote.
__device__ inline uint32_t RemoteAddress(const void* p, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(SmemAddress(p)), "r"(rank));
  return remote;
}
__device__ inline void StoreRemote(uint32_t address, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ inline float LoadRemote(uint32_t address) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ inline float4 LoadRemote4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Some of a CTA's threads meet; `id` 1 to 15.
__device__ inline void NamedBarrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ inline void RaiseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void LowerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Stores of a dependency's results may be read after this; without programmatic launch it returns at once.
__device__ inline void WaitForPreviousKernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit values, one row address a lane, stored transposed: lane l holds of each matrix the two
// values of row l / 4, columns 2 * (l % 4) and the next; they land in rows of columns.
__device__ inline void StoreTransposed4(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(SmemAddress(row)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ inline void StoreTransposed1(void* row, uint32_t a) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(SmemAddress(row)), "r"(a) : "memory");
}

// Four 8 x 8 matrices of 16-bit values, one row address a lane: fragments of a warp's product. Transposed: of columns.
__device__ inline void LoadMatrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(SmemAddress(row)));
}
__device__ inline void LoadMatricesTransposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(SmemAddress(row)));
}
// A warp's product of 16 x 16 with 16 x 8 BF16, added to c: a lane holds rows lane / 4 and eight further, columns
// 2 * (lane % 4) and the next.
__device__ inline void MultiplyAdd(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Warpgroup products. Registers of an operand must not change between ProductFence and the ProductWait that covers
// them.
__device__ inline void ProductFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void ProductCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending of the committed groups are unfinished.
template <int kPending>
__device__ inline void ProductWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Descriptor of a swizzled tile; 32 bytes further along K is +2.
__device__ inline uint64_t TileDescriptor(const void* tile) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kStride1024 = 64ull << 32, kLeading = 1ull << 16;
  return kSwizzle128 | kStride1024 | kLeading | ((SmemAddress(tile) & 0x3ffff) >> 4);
}

// d (+)= a · bᵀ, starting from zero where `add` is 0.
template <int kN>
struct Product;

#define MILLRACE_PRODUCT(N, NAMES, P0, P1, P2, P3, P4, P5, ...)                                              \
  template <>                                                                                                \
  struct Product<N> {                                                                                        \
    static __device__ inline void Fp8(float* d, const uint32_t* a, uint64_t b, int add) {                    \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N       \
                   "k32.f32.e4m3.e4m3 {" NAMES "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1;\n}"    \
                   : __VA_ARGS__                                                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                          \
    }                                                                                                        \
    static __device__ inline void Bf16(float* d, uint64_t a, uint64_t b, int add) {                          \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N       \
                   "k16.f32.bf16.bf16 {" NAMES "}, " P0 ", " P1 ", p, 1, 1, 0, 0;\n}"                        \
                   : __VA_ARGS__                                                                             \
                   : "l"(a), "l"(b), "r"(add));                                                              \
    }                                                                                                        \
    static __device__ inline void Bf16(float* d, const uint32_t* a, uint64_t b, int add) {                   \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N       \
                   "k16.f32.bf16.bf16 {" NAMES "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, 0;\n}" \
                   : __VA_ARGS__                                                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                          \
    }                                                                                                        \
  }

// clang-format off
MILLRACE_PRODUCT(8,
  "%0, %1, %2, %3",
  "%4", "%5", "%6", "%7", "%8", "%9",
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]));
MILLRACE_PRODUCT(16,
  "%0, %1, %2, %3, %4, %5, %6, %7",
  "%8", "%9", "%10", "%11", "%12", "%13",
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]));
MILLRACE_PRODUCT(32,
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15",
  "%16", "%17", "%18", "%19", "%20", "%21",
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
  "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]));
MILLRACE_PRODUCT(64,
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
  "%32", "%33", "%34", "%35", "%36", "%37",
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
  "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
  "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
  "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]));
MILLRACE_PRODUCT(96,
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
  "%40, %41, %42, %43, %44, %45, %46, %47",
  "%48", "%49", "%50", "%51", "%52", "%53",
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
  "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
  "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
  "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
  "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
  "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]));
MILLRACE_PRODUCT(128,
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
  "%59, %60, %61, %62, %63",
  "%64", "%65", "%66", "%67", "%68", "%69",
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
  "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
  "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
  "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
  "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
  "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
  "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
  "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]));
MILLRACE_PRODUCT(48,
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
  "%21, %22, %23",
  "%24", "%25", "%26", "%27", "%28", "%29",
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
  "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
  "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]));
MILLRACE_PRODUCT(80,
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39",
  "%40", "%41", "%42", "%43", "%44", "%45",
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
  "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
  "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
  "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
  "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]));
MILLRACE_PRODUCT(112,
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55",
  "%56", "%57", "%58", "%59", "%60", "%61",
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
  "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
  "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
  "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
  "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
  "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
  "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]));
// clang-format on
#undef MILLRACE_PRODUCT

}  // namespace millrace::cuda::sm90
