// What every file of fastkd._C shares: element types, layouts, and the sizes of a tensor seen as [n, c, hw].
// No torch header anywhere: Python owns allocation and validation, C++ gets addresses and int64 sizes.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FASTKD_BOTH __host__ __device__  // on the host and on a GPU
#else
#define FASTKD_BOTH
#endif

namespace fastkd {

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kUInt8 = 4 };
enum Layout : int { kNCHW = 0, kNHWC = 1 };
enum Act : int { kNone = 0, kRelu = 1, kRelu6 = 2, kLeakyRelu = 3 };

// The sums of a [n, c, hw] tensor are taken over `groups` fixed pieces (a function of the shape, set by Python):
// NCHW: `per` images a piece; NHWC: `per` rows of the [n*hw, c] matrix a piece.
struct Sizes {
  int64_t n, c, hw;
  int64_t groups, per;
  int dtype, layout;
};

}  // namespace fastkd
