// SPDX-License-Identifier: Apache-2.0
// One pass over memory, compiled once per instruction set.
#include "scale.h"

#include "simd.h"

namespace pyd::PYD_ISA {
namespace {

template <class V, class S>
void scale_all(S* data, int64_t n, double factor) {
  const V f = V::all(static_cast<typename V::scalar>(factor));
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) (V::load(data + i) * f).store(data + i);
  if (i < n) (V::load_part(data + i, n - i, 0) * f).store_part(data + i, n - i);
}

void scale_rows(Dtype dtype, void* data, int64_t n, double factor) {
  switch (dtype) {
    case Dtype::f32:
      return scale_all<Floats>(static_cast<float*>(data), n, factor);
    case Dtype::bf16:
      return scale_all<Floats>(static_cast<bf16*>(data), n, factor);
    case Dtype::f16:
      return scale_all<Floats>(static_cast<f16*>(data), n, factor);
    case Dtype::f64:
      return scale_all<Doubles>(static_cast<double*>(data), n, factor);
  }
}

}  // namespace

extern const ScaleKernel scale = scale_rows;

}  // namespace pyd::PYD_ISA
