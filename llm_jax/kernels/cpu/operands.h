// The weight of a product from the arguments of a custom call of XLA.

#ifndef LLM_JAX_KERNELS_CPU_OPERANDS_H_
#define LLM_JAX_KERNELS_CPU_OPERANDS_H_

#include <string>
#include <vector>

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

// Sets data and shape from a matrix, or from (columns / 16, rows, 16).
inline bool SetShape(const ffi::AnyBuffer& scale, Scales* s) {
  const auto shape = scale.dimensions();
  const bool tiled = shape.size() == 3 && shape[2] == kTileOutputs;
  if (shape.size() != 2 && !tiled) return false;
  *s = Scales{scale.untyped_data(), kNone, shape[tiled ? 1 : 0], tiled ? shape[0] * kTileOutputs : shape[1],
              nullptr, nullptr, 0, 0, 0.0f, tiled};
  return true;
}

inline bool ToScales(const Weight& w, Scales* s) {
  const auto inner_shape = w.inner.dimensions();
  if (inner_shape.size() != 2 || w.inner.element_type() != ffi::DataType::F32) return false;
  if (!SetShape(w.scale, s)) return false;
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
  p->tiled = shape.size() == 4 && shape[2] == kTileOutputs && shape[3] == kTileRows;
  if (shape.size() != 2 && !p->tiled) return "the rank of an operand";
  if (w.bits != 8 && w.bits != 4 && w.bits != 2) return "the bits of a code";
  p->codes = static_cast<const uint8_t*>(w.codes.untyped_data());
  p->outputs = p->tiled ? shape[0] * kTileOutputs : shape[w.by_output ? 0 : 1];
  p->inputs = (p->tiled ? shape[1] * kTileRows : shape[w.by_output ? 1 : 0]) * (8 / w.bits);
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
  if (!SetShape(w.offset, &p->offset)) return "the rank of the offsets";
  if (w.offset.element_type() == ffi::DataType::F32) p->offset.kind = kFloat32;
  if (w.offset.element_type() == ffi::DataType::F16) p->offset.kind = kFloat16;
  return p->offset.kind == kNone ? "the type of the offsets" : nullptr;
}

constexpr size_t kOperands = 5;  // of a weight: codes, scale, inner scale, mean of the scales, offset

// The products of x with every weight. Returns what is wrong, or null.
inline const char* ToProducts(const ffi::Buffer<ffi::F32>& x, const ffi::RemainingArgs& weights,
                              const ffi::RemainingRets& results, int64_t bits, int64_t group, int64_t by_output,
                              ffi::Span<const float> values, ffi::Span<const float> scale_values,
                              std::vector<Product>* products) {
  const auto shape = x.dimensions();
  if (shape.size() != 2) return "the rank of an operand";
  if (results.size() < 1 || weights.size() != kOperands * results.size()) return "the number of weights";
  products->resize(results.size());
  for (size_t i = 0; i < results.size(); ++i) {
    const auto operand = [&](size_t j) { return weights.get<ffi::AnyBuffer>(kOperands * i + j).value(); };
    const Weight weight{operand(0), operand(1), operand(2), operand(3), operand(4), bits, group, by_output, values, scale_values};
    Product& p = (*products)[i];
    if (const char* reason = ToProduct(weight, &p)) return reason;
    auto y = results.get<ffi::AnyBuffer>(i);
    if (!y.has_value() || (*y)->element_type() != ffi::DataType::F32) return "the type of a result";
    const auto result = (*y)->dimensions();
    p.x = x.typed_data();
    p.y = (*y)->typed_data<float>();
    p.rows = shape[0];
    if (result.size() != 2 || shape[1] != p.inputs || result[0] != p.rows || result[1] != p.outputs) {
      return "the shape of the operands";
    }
  }
  return Check(products->data(), products->size());
}

}  // namespace llm_jax

#endif  // LLM_JAX_KERNELS_CPU_OPERANDS_H_
