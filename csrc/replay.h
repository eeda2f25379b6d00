// Gather from an image store: crop, flip, normalise, in one pass over the output.
#pragma once
#include "common.h"

namespace fastkd {

struct GatherParams {
  int64_t batch, stored, height, width, channels, pad;
  int in_dtype, out_dtype;
  const void* images;    // [stored, height, width, channels]
  const int64_t* index;  // [batch]
  const int64_t* dy;     // [batch] or null
  const int64_t* dx;     // [batch] or null
  const uint8_t* flip;   // [batch] or null
  const void* lut;       // uint8 stores: [channels, 256] in out_dtype, what each byte becomes; else null
  const void* mean;      // other stores: [channels] float (double for a double output)
  const void* std;
  void* out;             // [batch, height, width, channels]
};

#ifdef FASTKD_WITH_CUDA
void replay_gather_cuda(const GatherParams& p, void* stream);
#endif

}  // namespace fastkd
