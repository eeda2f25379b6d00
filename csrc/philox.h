// Philox-4x32-10 (Salmon et al., SC 2011), the same integers on the host and on a GPU: draw i of a key is a function of both alone.
#pragma once
#include "common.h"

namespace fastkd {
namespace {

// A number in [0, 1) with 53 bits: the first two words of counter (offset + i, 0) under `seed`.
FASTKD_BOTH inline double philox_uniform(int64_t seed, int64_t offset, int64_t i) {
  const uint64_t at = uint64_t(offset) + uint64_t(i), key = uint64_t(seed);
  uint32_t a = uint32_t(at), b = uint32_t(at >> 32), c = 0, d = 0, k = uint32_t(key), m = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t low = uint64_t(a) * 0xD2511F53u, high = uint64_t(c) * 0xCD9E8D57u;
    a = uint32_t(high >> 32) ^ b ^ k;
    b = uint32_t(high);
    c = uint32_t(low >> 32) ^ d ^ m;
    d = uint32_t(low);
    k += 0x9E3779B9u;
    m += 0xBB67AE85u;
  }
  return double(uint64_t(a) << 21 | b >> 11) * 0x1p-53;
}

}  // namespace
}  // namespace fastkd
