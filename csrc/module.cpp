// The only pybind11 file: addresses and int64 sizes in, nothing out. fastkd/ops/_native.py is its only caller and validates;
// here only null and alignment are checked again. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_kernels.h"
#ifdef FASTKD_X86
#include <cpuid.h>
#endif

namespace py = pybind11;
using namespace fastkd;

namespace {

const CpuKernels kGeneric = FASTKD_TABLE(generic);
#ifdef FASTKD_X86
const CpuKernels kAvx2 = FASTKD_TABLE(avx2);
const CpuKernels kAvx512 = FASTKD_TABLE(avx512);
#endif

#ifdef FASTKD_X86
bool has_f16c() {  // older compilers' __builtin_cpu_supports does not know the name
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1u);
}
#endif

std::vector<const CpuKernels*> available() {
  std::vector<const CpuKernels*> found{&kGeneric};
#ifdef FASTKD_X86
  __builtin_cpu_init();
  const bool half = has_f16c();
  if (half && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2);
  if (half && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found.push_back(&kAvx512);
#endif
  return found;
}

const CpuKernels* chosen = available().back();

size_t width(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : dtype == kUInt8 ? 1 : 2; }

// An address that must be there (or may be null) and a multiple of its element size.
void* at(const char* name, uintptr_t address, size_t align, bool needed = true) {
  if (!address && needed) throw std::invalid_argument(std::string(name) + " is a null pointer");
  if (address % align) throw std::invalid_argument(std::string(name) + " is not aligned to its elements");
  return reinterpret_cast<void*>(address);
}

void no_cuda() { throw std::runtime_error("fastkd._C was built without CUDA"); }
void cpu_only(bool cuda) {
  if (cuda) throw std::runtime_error("this kernel of fastkd._C runs on the CPU alone");
}

void bn_fwd(uintptr_t x, uintptr_t residual, uintptr_t scale, uintptr_t bias, uintptr_t shift, uintptr_t y, uintptr_t partial,
            uintptr_t sums, const Sizes& s, int act, double slope, int threads, bool cuda, uintptr_t stream) {
  const size_t e = width(s.dtype), a = s.dtype == kFloat64 ? 8 : 4;
  const bool frozen = y != 0, data = s.n * s.c * s.hw > 0;
  const BnParams p{s, at("x", x, e, data), at("residual", residual, e, false), at("scale", scale, a, frozen && s.c),
                   at("bias", bias, a, frozen && s.c), at("shift", shift, a, s.c), at("y", y, e, false),
                   at("partial", partial, 8, s.groups * s.c), at("sums", sums, a, s.c), act, slope};
  if (!cuda) return chosen->bn_fwd(p, threads);
#ifdef FASTKD_WITH_CUDA
  bn_fwd_cuda(p, reinterpret_cast<void*>(stream));
#else
  (void)stream, no_cuda();
#endif
}

void bn_bwd(uintptr_t gy, uintptr_t gsums, uintptr_t x, uintptr_t residual, uintptr_t scale, uintptr_t bias, uintptr_t shift,
            uintptr_t dx, uintptr_t dresidual, const Sizes& s, int act, double slope, int threads, bool cuda, uintptr_t stream) {
  if (s.n * s.c * s.hw == 0) return;
  const size_t e = width(s.dtype), a = s.dtype == kFloat64 ? 8 : 4;
  const BnGradParams p{s, at("gy", gy, e, false), at("gsums", gsums, a, false), at("x", x, e), at("residual", residual, e, false),
                       at("scale", scale, a, gy != 0), at("bias", bias, a, gy != 0), at("shift", shift, a), at("dx", dx, e),
                       at("dresidual", dresidual, e, false), act, slope};
  if (!cuda) return chosen->bn_bwd(p, threads);
#ifdef FASTKD_WITH_CUDA
  bn_bwd_cuda(p, reinterpret_cast<void*>(stream));
#else
  (void)stream, no_cuda();
#endif
}

BnLossParams bn_loss(uintptr_t stats, uintptr_t target, uintptr_t average, uintptr_t calls, uintptr_t offsets, uintptr_t grad,
                     uintptr_t terms, uintptr_t out, int64_t c, int64_t layers, int dtype, int kind, double momentum, double first) {
  const size_t a = dtype == kFloat64 ? 8 : 4;
  return {c, layers, dtype, kind, momentum, first, at("stats", stats, a, c), at("target", target, a, c), at("average", average, a, false),
          static_cast<const int64_t*>(at("calls", calls, 8, false)), static_cast<const int64_t*>(at("offsets", offsets, 8)),
          at("grad", grad, a, false), static_cast<double*>(at("terms", terms, 8, false)), at("out", out, a, c)};
}

void bn_loss_fwd(uintptr_t stats, uintptr_t target, uintptr_t average, uintptr_t calls, uintptr_t offsets, uintptr_t terms,
                 uintptr_t out, int64_t c, int64_t layers, int dtype, int kind, double momentum, double first, int threads, bool cuda, uintptr_t) {
  cpu_only(cuda);
  chosen->bn_loss_fwd(bn_loss(stats, target, average, calls, offsets, 0, terms, out, c, layers, dtype, kind, momentum, first), threads);
}

void bn_loss_bwd(uintptr_t stats, uintptr_t target, uintptr_t average, uintptr_t calls, uintptr_t offsets, uintptr_t grad,
                 uintptr_t out, int64_t c, int64_t layers, int dtype, int kind, double momentum, double first, int threads, bool cuda, uintptr_t) {
  cpu_only(cuda);
  if (c * layers == 0) return;
  chosen->bn_loss_bwd(bn_loss(stats, target, average, calls, offsets, grad, 0, out, c, layers, dtype, kind, momentum, first), threads);
}

CamSizes cam_sizes(const std::vector<int64_t>& v, int dtype, int weight_dtype, int layout) {
  return {v.at(0), v.at(1), v.at(2), v.at(3), v.at(4), v.at(5), v.at(6), dtype, weight_dtype, layout};
}

void cam_fwd(uintptr_t features, uintptr_t weight, uintptr_t labels, uintptr_t out, uintptr_t slope, const std::vector<int64_t>& sizes,
             int dtype, int weight_dtype, int layout, bool relu, int norm, bool resize, bool renorm, int threads, bool cuda,
             uintptr_t stream) {
  const CamSizes s = cam_sizes(sizes, dtype, weight_dtype, layout);
  if (s.batch * s.h * s.w * s.height * s.width == 0) return;
  const size_t a = dtype == kFloat64 ? 8 : 4;
  const CamParams p{s, at("features", features, width(dtype), s.channels), at("weight", weight, width(weight_dtype), s.channels),
                    static_cast<const int64_t*>(at("labels", labels, 8)), at("out", out, a), at("slope", slope, a),
                    relu, norm, resize, renorm};
  if (!cuda) return chosen->cam_fwd(p, threads);
#ifdef FASTKD_WITH_CUDA
  cam_fwd_cuda(p, reinterpret_cast<void*>(stream));
#else
  (void)stream, no_cuda();
#endif
}

void cam_bwd(uintptr_t grad, uintptr_t weight, uintptr_t labels, uintptr_t slope, uintptr_t dfeatures, uintptr_t draw,
             const std::vector<int64_t>& sizes, int dtype, int weight_dtype, int layout, bool resize, int threads, bool cuda,
             uintptr_t stream) {
  const CamSizes s = cam_sizes(sizes, dtype, weight_dtype, layout);
  if (s.batch * s.h * s.w * s.height * s.width == 0) return;
  const size_t a = dtype == kFloat64 ? 8 : 4;
  const CamGradParams p{s, at("grad", grad, a), at("weight", weight, width(weight_dtype), s.channels),
                        static_cast<const int64_t*>(at("labels", labels, 8)), at("slope", slope, a),
                        at("dfeatures", dfeatures, width(dtype), false), at("draw", draw, a), resize};
  if (!cuda) return chosen->cam_bwd(p, threads);
#ifdef FASTKD_WITH_CUDA
  cam_bwd_cuda(p, reinterpret_cast<void*>(stream));
#else
  (void)stream, no_cuda();
#endif
}

void replay_gather(uintptr_t images, uintptr_t index, uintptr_t dy, uintptr_t dx, uintptr_t flip, uintptr_t lut, uintptr_t mean,
                   uintptr_t std_, uintptr_t y, uintptr_t x, uintptr_t wy, uintptr_t wx, uintptr_t out, const std::vector<int64_t>& sizes,
                   int in_dtype, int out_dtype, bool blended, bool last, int threads, bool cuda, uintptr_t stream) {
  const auto n = [&](size_t i) { return sizes.at(i); };  // batch, stored, height, width, channels, stride, out_height, out_width, pad
  if (n(0) * n(2) * n(3) * n(4) * n(6) * n(7) == 0) return;
  const size_t o = width(out_dtype), a = out_dtype == kFloat64 ? 8 : 4;
  const bool bytes = in_dtype == kUInt8, table = bytes && !blended, normal = !table && !cuda;
  const auto whole = [](const char* name, uintptr_t address, bool needed = false) {
    return static_cast<const int64_t*>(at(name, address, 8, needed));
  };
  const GatherParams p{n(0), n(1), n(2), n(3), n(4), n(5), n(6), n(7), n(8), in_dtype, out_dtype, blended, last,
                       at("images", images, width(in_dtype)), whole("index", index, true), whole("dy", dy), whole("dx", dx),
                       static_cast<const uint8_t*>(at("flip", flip, 1, false)), at("lut", lut, table ? o : a, bytes && !cuda),
                       at("mean", mean, a, normal), at("std", std_, a, normal), whole("y", y, blended), whole("x", x, y != 0),
                       at("wy", wy, a, blended), at("wx", wx, a, blended), at("out", out, o)};
  if (!cuda) return chosen->replay_gather(p, threads);
#ifdef FASTKD_WITH_CUDA
  replay_gather_cuda(p, reinterpret_cast<void*>(stream));
#else
  (void)stream, no_cuda();
#endif
}

void philox_uniform(uintptr_t key, uintptr_t out, int64_t n, int threads, bool cuda, uintptr_t stream) {
  if (n == 0) return;
  const UniformParams p{n, static_cast<const int64_t*>(at("key", key, 8)), static_cast<double*>(at("out", out, 8))};
  if (!cuda) return chosen->philox_uniform(p, threads);
#ifdef FASTKD_WITH_CUDA
  philox_uniform_cuda(p, reinterpret_cast<void*>(stream));
#else
  (void)stream, no_cuda();
#endif
}

TreeParams tree(uintptr_t leaves, uintptr_t sums, int64_t n, int dtype) {
  return {n, dtype, at("leaves", leaves, width(dtype)), static_cast<double*>(at("sums", sums, 8))};
}

void replay_sums(uintptr_t leaves, uintptr_t sums, int64_t n, int dtype, int threads, bool cuda, uintptr_t stream) {
  const TreeParams p = tree(leaves, sums, n, dtype);
  if (!cuda) return chosen->replay_sums(p, threads);
#ifdef FASTKD_WITH_CUDA
  replay_sums_cuda(p, reinterpret_cast<void*>(stream));
#else
  (void)stream, no_cuda();
#endif
}

void replay_sample(uintptr_t leaves, uintptr_t sums, uintptr_t u, uintptr_t key, uintptr_t index, uintptr_t probability, uintptr_t least,
                   int64_t n, int64_t draws, int dtype, int threads, bool cuda, uintptr_t stream) {
  const size_t e = width(dtype);
  const TreeSampleParams p{tree(leaves, sums, n, dtype), draws, static_cast<const double*>(at("u", u, 8, draws && !key)),
                           static_cast<const int64_t*>(at("key", key, 8, draws && !u)), static_cast<int64_t*>(at("index", index, 8, draws)),
                           at("probability", probability, e, draws), at("least", least, e)};
  if (!cuda) return chosen->replay_sample(p, threads);
#ifdef FASTKD_WITH_CUDA
  replay_sample_cuda(p, reinterpret_cast<void*>(stream));
#else
  (void)stream, no_cuda();
#endif
}

void replay_update(uintptr_t leaves, uintptr_t sums, uintptr_t index, uintptr_t value, uintptr_t order, uintptr_t refused, int64_t n,
                   int64_t entries, int dtype, int duplicates, int threads, bool cuda, uintptr_t stream) {
  if (entries == 0) return;
  const TreeUpdateParams p{tree(leaves, sums, n, dtype), entries, static_cast<const int64_t*>(at("index", index, 8)),
                           at("value", value, width(dtype)), static_cast<const int64_t*>(at("order", order, 8, !cuda && duplicates != kLastWins)),
                           static_cast<int64_t*>(at("refused", refused, 8)), duplicates};
  if (!cuda) return chosen->replay_update(p, threads);
#ifdef FASTKD_WITH_CUDA
  replay_update_cuda(p, reinterpret_cast<void*>(stream));
#else
  (void)stream, no_cuda();
#endif
}

void bn_act_fwd(uintptr_t x, uintptr_t sums, uintptr_t shift, uintptr_t weight, uintptr_t bias, uintptr_t y, uintptr_t stats,
                const Sizes& s, int64_t count, double eps, int act, double slope, int threads, bool cuda, uintptr_t stream) {
  if (s.n * s.c * s.hw == 0) return;
  const size_t e = width(s.dtype), a = s.dtype == kFloat64 ? 8 : 4;
  const BnActParams p{s, at("x", x, e), at("sums", sums, a), at("shift", shift, a), at("weight", weight, a, false),
                      at("bias", bias, a, false), at("y", y, e), at("stats", stats, a), count, eps, act, slope};
  if (!cuda) return chosen->bn_act_fwd(p, threads);
#ifdef FASTKD_WITH_CUDA
  bn_act_fwd_cuda(p, reinterpret_cast<void*>(stream));
#else
  (void)stream, no_cuda();
#endif
}

// With `partial`: bn_act_bwd_sums; with `dx`: bn_act_bwd.
void bn_act_bwd(uintptr_t gy, uintptr_t x, uintptr_t stats, uintptr_t bias, uintptr_t partial, uintptr_t gsums, uintptr_t dx,
                const Sizes& s, int64_t count, int act, double slope, int threads, bool cuda, uintptr_t stream) {
  if (s.n * s.c * s.hw == 0) return;
  const size_t e = width(s.dtype), a = s.dtype == kFloat64 ? 8 : 4;
  const BnActGradParams p{s, at("gy", gy, e), at("x", x, e), at("stats", stats, a), at("bias", bias, a, false),
                          at("partial", partial, 8, !dx), at("gsums", gsums, a), at("dx", dx, e, !partial), count, act, slope};
  if (!cuda) return dx ? chosen->bn_act_bwd(p, threads) : chosen->bn_act_bwd_sums(p, threads);
#ifdef FASTKD_WITH_CUDA
  (dx ? bn_act_bwd_cuda : bn_act_bwd_sums_cuda)(p, reinterpret_cast<void*>(stream));
#else
  (void)stream, no_cuda();
#endif
}

void upsample_act_fwd(uintptr_t x, uintptr_t scale, uintptr_t bias, uintptr_t y, int64_t n, int64_t c, int64_t h, int64_t w, int dtype,
                      int layout, int act, int threads, bool cuda, uintptr_t) {
  cpu_only(cuda);
  if (n * c * h * w == 0) return;
  const size_t e = width(dtype), a = dtype == kFloat64 ? 8 : 4;
  chosen->upsample_act_fwd({n, c, h, w, dtype, layout, act, at("x", x, e), at("scale", scale, a, false), at("bias", bias, a, false),
                            at("y", y, e)}, threads);
}

void upsample_act_bwd(uintptr_t gy, uintptr_t y, uintptr_t scale, uintptr_t dx, int64_t n, int64_t c, int64_t h, int64_t w, int dtype,
                      int layout, int act, int threads, bool cuda, uintptr_t) {
  cpu_only(cuda);
  if (n * c * h * w == 0) return;
  const size_t e = width(dtype), a = dtype == kFloat64 ? 8 : 4;
  chosen->upsample_act_bwd({n, c, h, w, dtype, layout, act, at("gy", gy, e), at("y", y, e), at("scale", scale, a, false),
                            at("dx", dx, e)}, threads);
}

std::map<std::string, std::string> build_info() {
  return {{"compiler", FASTKD_COMPILER}, {"openmp", FASTKD_OPENMP}, {"isa", chosen->isa},
          {"cuda", FASTKD_CUDA_VERSION}, {"cuda_architectures", FASTKD_CUDA_ARCHITECTURES}, {"cuda_reason", FASTKD_CUDA_REASON}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastkd; called through fastkd.ops only.";
  py::class_<Sizes>(m, "Sizes").def(
      py::init([](int64_t n, int64_t c, int64_t hw, int64_t groups, int64_t per, int dtype, int layout) {
        return Sizes{n, c, hw, groups, per, dtype, layout};
      }));
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("bn_fwd", &bn_fwd, unlocked);
  m.def("bn_bwd", &bn_bwd, unlocked);
  m.def("bn_loss_fwd", &bn_loss_fwd, unlocked);
  m.def("bn_loss_bwd", &bn_loss_bwd, unlocked);
  m.def("cam_fwd", &cam_fwd, unlocked);
  m.def("cam_bwd", &cam_bwd, unlocked);
  m.def("replay_gather", &replay_gather, unlocked);
  m.def("philox_uniform", &philox_uniform, unlocked);
  m.def("replay_sums", &replay_sums, unlocked);
  m.def("replay_sample", &replay_sample, unlocked);
  m.def("replay_update", &replay_update, unlocked);
  m.def("bn_act_fwd", &bn_act_fwd, unlocked);
  m.def("bn_act_bwd", &bn_act_bwd, unlocked);
  m.def("upsample_act_fwd", &upsample_act_fwd, unlocked);
  m.def("upsample_act_bwd", &upsample_act_bwd, unlocked);
  m.def("build_info", &build_info, "What was built, with which compiler, and the instruction set in use.");
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const CpuKernels* k : available()) names.emplace_back(k->isa);
    return names;
  }, "Instruction sets of this processor that have kernels, best last.");
  m.def("set_isa", [](const std::string& name) {
    for (const CpuKernels* k : available())
      if (name == k->isa) { chosen = k; return; }
    throw std::invalid_argument("no kernels for instruction set " + name + " on this processor");
  }, "For tests: all instruction sets give the same bits.");
}
