// The weight of a product from the arguments of a custom call of XLA.

#ifndef LLM_JAX_KERNELS_CPU_OPERANDS_H_
#define LLM_JAX_KERNELS_CPU_OPERANDS_H_

#include <string>

#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace llm_jax {

namespace ffi = xla::ffi;

inline ffi::Error Refused(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("quantized product: ") + what + " is wrong");
}

struct Weight {
  ffi::AnyBuffer codes, scale, inner, mean, offset;
  int64_t bits, group, by_output;
  ffi::Span<const float> values, scale_values;
};

inline bool ToScales(const Weight& w, Scales* s) {
  const auto shape = w.scale.dimensions(), inner_shape = w.inner.dimensions();
  if (shape.size() != 2 || inner_shape.size() != 2 || w.inner.element_type() != ffi::DataType::F32) return false;
  *s = Scales{w.scale.untyped_data(), kNone, shape[0], shape[1], nullptr, nullptr, 0, 0, 0.0f};
  if (w.scale.element_type() == ffi::DataType::F32) s->kind = kFloat32;
  if (w.scale.element_type() == ffi::DataType::F16) s->kind = kFloat16;
  if (w.scale.element_type() == ffi::DataType::U8) s->kind = kExponent;
  if (w.inner.element_count() && s->kind == kExponent) {
    if (w.scale_values.size() != 256 || w.mean.element_count() != 1) return false;
    if (w.mean.element_type() != ffi::DataType::F32) return false;
    s->kind = kNested;
    s->table = w.scale_values.begin();
    s->inner = w.inner.typed_data<float>();
    s->inner_rows = inner_shape[0];
    s->inner_columns = inner_shape[1];
    s->mean = *w.mean.typed_data<float>();
  }
  return s->kind != kNone;
}

// Everything of a product but x and y. Returns what is wrong, or null.
inline const char* ToProduct(const Weight& w, Product* p) {
  const auto shape = w.codes.dimensions();
  if (shape.size() != 2) return "the rank of an operand";
  if (w.bits != 8 && w.bits != 4 && w.bits != 2) return "the bits of a code";
  p->codes = static_cast<const uint8_t*>(w.codes.untyped_data());
  p->outputs = shape[w.by_output ? 0 : 1];
  p->inputs = shape[w.by_output ? 1 : 0] * (8 / w.bits);
  p->bits = w.bits;
  p->group = w.group;
  p->by_output = w.by_output;
  p->table = w.values.begin();
  const bool is_signed = w.codes.element_type() == ffi::DataType::S8;
  if (!is_signed && w.codes.element_type() != ffi::DataType::U8) return "the type of the codes";
  p->kind = w.bits < 8 ? kTable : is_signed ? kInt8 : kUint8;
  if (w.bits != 8 && w.values.size() != size_t{1} << w.bits) return "the table of values";
  if (!ToScales(w, &p->scale)) return "the type of the scales";
  if (!w.offset.element_count()) return nullptr;
  const auto offset_shape = w.offset.dimensions();
  if (offset_shape.size() != 2) return "the rank of the offsets";
  p->offset = Scales{w.offset.untyped_data(), kNone, offset_shape[0], offset_shape[1], nullptr, nullptr, 0, 0, 0.0f};
  if (w.offset.element_type() == ffi::DataType::F32) p->offset.kind = kFloat32;
  if (w.offset.element_type() == ffi::DataType::F16) p->offset.kind = kFloat16;
  return p->offset.kind == kNone ? "the type of the offsets" : nullptr;
}

}  // namespace llm_jax

#endif  // LLM_JAX_KERNELS_CPU_OPERANDS_H_
