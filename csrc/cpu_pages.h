// Huge pages for large results on the CPU. A result of some megabytes comes fresh from the system each time, and its page faults cost as
// much as a kernel that only streams: huge pages make them five hundred times fewer. Where the system has none, nothing changes.
#pragma once
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastkd {
namespace {

constexpr int64_t kLarge = int64_t(4) << 20;  // smaller ones are mostly reused by the allocator, and hold no huge page for sure

inline void huge_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (!p || bytes < kLarge) return;
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t from = (uintptr_t(p) + kHuge - 1) / kHuge * kHuge, to = (uintptr_t(p) + uintptr_t(bytes)) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace
}  // namespace fastkd
