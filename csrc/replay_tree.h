// Prioritised sampling: leaves, and sums over them in three levels of `size` columns (replay_tree/reference.py):
// 16 pieces of 64 leaves a block, the block of 1024 leaves, and the end of the block (all blocks up to and with it).
// Row 0 holds sums, row 1 minima over positive leaves.
#pragma once
#include "common.h"

namespace fastkd {

namespace {  // not one copy for all instruction sets: see cpu_vec.h

constexpr int kPieceLeaves = 64, kPieces = 16, kBlockLeaves = kPieceLeaves * kPieces;

// The sums of a set of leaves by their parts.
struct Levels {
  int64_t blocks;
  double *piece, *block, *end;              // sums
  double *piece_low, *block_low, *end_low;  // smallest positive leaves, infinity where there are none
};

FASTKD_BOTH inline Levels levels(double* sums, int64_t leaves) {
  const int64_t b = (leaves + kBlockLeaves - 1) / kBlockLeaves, size = b * (kPieces + 2);
  double* low = sums + size;
  return {b, sums, sums + b * kPieces, sums + b * (kPieces + 1), low, low + b * kPieces, low + b * (kPieces + 1)};
}

}  // namespace

enum Duplicates : int { kLastWins = 0, kMaxWins = 1, kMeanOfAll = 2 };

struct TreeParams {
  int64_t n;     // leaves
  int dtype;     // of leaves, values, probabilities and `least`: float or double
  void* leaves;  // [n]
  double* sums;  // [2, size]
};

struct TreeSampleParams {
  TreeParams t;
  int64_t draws;
  const double* u;     // [draws], or null: philox of `key`
  const int64_t* key;  // [2] seed, offset; or null
  int64_t* index;      // [draws]
  void* probability;   // [draws]
  void* least;         // []
};

struct TreeUpdateParams {
  TreeParams t;
  int64_t entries;
  const int64_t* index;  // [entries]
  const void* value;     // [entries]
  const int64_t* order;  // CPU, max and mean: [entries], the entries with those of one row side by side; else null
  int64_t* refused;      // [], zeroed by the caller: entries that are left out; on the CPU one such entry leaves out all
  int duplicates;
};

struct UniformParams {
  int64_t n;
  const int64_t* key;
  double* out;
};

#ifdef FASTKD_WITH_CUDA
void philox_uniform_cuda(const UniformParams& p, void* stream);
void replay_sums_cuda(const TreeParams& p, void* stream);
void replay_sample_cuda(const TreeSampleParams& p, void* stream);
void replay_update_cuda(const TreeUpdateParams& p, void* stream);
#endif

}  // namespace fastkd
