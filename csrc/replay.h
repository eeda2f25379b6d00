// Gather from an image store: crop, flip, resize, normalise, in one pass over the output.
#pragma once
#include "common.h"

namespace fastkd {

struct GatherParams {
  int64_t batch, stored, height, width, channels, stride, out_height, out_width, pad;
  int in_dtype, out_dtype;
  bool blended, last;    // bilinear; the output is [batch, out_height, out_width, channels], else [batch, channels, …]
  const void* images;    // [stored, height, width, channels], `stride` elements from image to image
  const int64_t* index;  // [batch]
  const int64_t* dy;     // [batch] or null
  const int64_t* dx;     // [batch] or null
  const uint8_t* flip;   // [batch] or null
  // Small values are float, double for a double output.
  const void* lut;       // CPU, bytes: [channels, 256] in out_dtype, what each becomes; blended: [256], its float; else null
  const void* mean;      // [channels]; GPU: or null, nothing is taken off. Not read where the lut has results
  const void* std;       // [channels]; GPU: or null, nothing is divided by
  const int64_t* y;      // [out_height] rows to sample, or null: nothing is resized
  const int64_t* x;      // [out_width]
  const void* wy;        // [out_height] weight of the next row (the last one is its own next)
  const void* wx;        // [out_width]
  void* out;
};

#ifdef FASTKD_WITH_CUDA
void replay_gather_cuda(const GatherParams& p, void* stream);
#endif

}  // namespace fastkd
