// Batch normalization of small tensors in one operation each way, where starting operations is what takes the time.
//
// One thread does the work. Half types are computed in float, sums of more than eight values in double. What is used of
// TensorFlow's C interface for kernels, the same in all its versions, is declared here: no header of it is needed.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

extern "C" {
struct TF_KernelBuilder;
struct TF_OpDefinitionBuilder;
struct TF_OpKernelConstruction;
struct TF_OpKernelContext;
struct TF_ShapeHandle;
struct TF_ShapeInferenceContext;
struct TF_Status;
struct TF_Tensor;
TF_Status* TF_NewStatus();
void TF_DeleteStatus(TF_Status*);
void TF_SetStatus(TF_Status*, int code, const char* message);
int TF_GetCode(const TF_Status*);
const char* TF_Message(const TF_Status*);
void TF_DeleteTensor(TF_Tensor*);
int TF_NumDims(const TF_Tensor*);
int64_t TF_Dim(const TF_Tensor*, int);
void* TF_TensorData(const TF_Tensor*);
int64_t TF_TensorElementCount(const TF_Tensor*);
void TF_GetInput(TF_OpKernelContext*, int, TF_Tensor**, TF_Status*);
TF_Tensor* TF_AllocateOutput(TF_OpKernelContext*, int, int type, const int64_t* sizes, int rank, size_t, TF_Status*);
void TF_OpKernelContext_Failure(TF_OpKernelContext*, TF_Status*);
void TF_OpKernelConstruction_Failure(TF_OpKernelConstruction*, TF_Status*);
void TF_OpKernelConstruction_GetAttrInt64(TF_OpKernelConstruction*, const char*, int64_t*, TF_Status*);
void TF_OpKernelConstruction_GetAttrFloat(TF_OpKernelConstruction*, const char*, float*, TF_Status*);
void TF_OpKernelConstruction_GetAttrBool(TF_OpKernelConstruction*, const char*, unsigned char*, TF_Status*);
void TF_OpKernelConstruction_GetAttrString(TF_OpKernelConstruction*, const char*, char*, size_t, TF_Status*);
TF_KernelBuilder* TF_NewKernelBuilder(const char* operation, const char* device, void* (*)(TF_OpKernelConstruction*),
                                      void (*)(void*, TF_OpKernelContext*), void (*)(void*));
void TF_KernelBuilder_TypeConstraint(TF_KernelBuilder*, const char*, int type, TF_Status*);
void TF_RegisterKernelBuilder(const char*, TF_KernelBuilder*, TF_Status*);
TF_OpDefinitionBuilder* TF_NewOpDefinitionBuilder(const char*);
void TF_OpDefinitionBuilderAddAttr(TF_OpDefinitionBuilder*, const char*);
void TF_OpDefinitionBuilderAddInput(TF_OpDefinitionBuilder*, const char*);
void TF_OpDefinitionBuilderAddOutput(TF_OpDefinitionBuilder*, const char*);
void TF_OpDefinitionBuilderSetShapeInferenceFunction(TF_OpDefinitionBuilder*,
                                                     void (*)(TF_ShapeInferenceContext*, TF_Status*));
void TF_RegisterOpDefinition(TF_OpDefinitionBuilder*, TF_Status*);
TF_ShapeHandle* TF_NewShapeHandle();
void TF_DeleteShapeHandle(TF_ShapeHandle*);
TF_ShapeHandle* TF_ShapeInferenceContextScalar(TF_ShapeInferenceContext*);
void TF_ShapeInferenceContextGetInput(TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*);
void TF_ShapeInferenceContextSetOutput(TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*);
}

#define INLINE inline __attribute__((always_inline))
// Compiled once for any processor and, on x86, once for those of 2013 and later.
#if defined(__x86_64__)
#define WIDE __attribute__((target("avx2,fma")))
static bool is_wide() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
#define WIDE
static bool is_wide() { return false; }
#endif

namespace {

constexpr int kFloat = 1, kBfloat16 = 14, kHalf = 19, kInvalidArgument = 3, kMaxRank = 254;
// So many values of a channel are summed in float before they go into a double.
constexpr int64_t kBlock = 8;
constexpr int64_t kLanes = 16;

float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct bfloat16 {
  static constexpr int type = kBfloat16;
  uint16_t bits;

  INLINE float to_float() const { return as_float(uint32_t(bits) << 16); }

  INLINE static bfloat16 of(float value) {
    const uint32_t wide = as_bits(value);
    const uint32_t nearest = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    return {uint16_t(value != value ? 0x7fc0 : nearest)};
  }
};

struct half {
  static constexpr int type = kHalf;
  uint16_t bits;

  INLINE float to_float() const {
    const uint32_t magnitude = bits & 0x7fff, sign = uint32_t(bits & 0x8000) << 16;
    // A subnormal half is a normal float. TensorFlow's threads flush subnormal floats, so none may come in between.
    const uint32_t subnormal = as_bits(float(int32_t(magnitude)) * 0x1p-24f);
    const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00 ? 112u << 23 : 224u << 23);
    return as_float((magnitude < 0x0400 ? subnormal : normal) | sign);
  }

  INLINE static half of(float value) {
    const uint32_t wide = as_bits(value), magnitude = wide & 0x7fffffff, sign = (wide >> 16) & 0x8000;
    // The sum's last digit is that of a subnormal half, so the addition rounds to it.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    const uint32_t normal = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13) - (112 << 10);
    const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return {uint16_t((magnitude >= 0x477ff000 ? large : finite) | sign)};
  }
};

// A tensor as examples of channels of neighbouring values; `values` is 1 where the channels come last.
struct Shape {
  int64_t examples, channels, values;
  double count() const { return double(examples) * double(values); }
};

// A stretch of memory: up to kBlock whole examples where the channels come last, else the values of one channel.
struct Piece {
  int64_t begin, rows, row, channel;
  int64_t size() const { return rows * row; }
};

template <class Body>
INLINE void for_each_piece(Shape shape, Body body) {
  if (shape.values == 1) {
    for (int64_t i = 0; i < shape.examples; i += kBlock) {
      const int64_t left = shape.examples - i;
      body(Piece{i * shape.channels, left < kBlock ? left : kBlock, shape.channels, -1});
    }
  } else {
    for (int64_t i = 0; i < shape.examples * shape.channels; ++i)
      body(Piece{i * shape.values, 1, shape.values, i % shape.channels});
  }
}

#if defined(__x86_64__)
// The processors that are wide have them too.
bool has_instructions_for_halves() {
  static const bool wide = is_wide();
  return wide;
}

__attribute__((target("avx,f16c"))) void convert(const half* from, int64_t size, float* to) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < size; ++i) to[i] = from[i].to_float();
}

__attribute__((target("avx,f16c"))) void convert(const float* from, int64_t size, half* to) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  for (; i < size; ++i) to[i] = half::of(from[i]);
}
#else
bool has_instructions_for_halves() { return false; }
void convert(const half*, int64_t, float*) {}
void convert(const float*, int64_t, half*) {}
#endif

// The values of a piece as floats: where they are, or converted into `buffer`.
INLINE const float* loaded(const float* x, Piece piece, float*) { return x + piece.begin; }

template <class T>
INLINE const float* loaded(const T* x, Piece piece, float* buffer) {
  for (int64_t i = 0; i < piece.size(); ++i) buffer[i] = x[piece.begin + i].to_float();
  return buffer;
}

INLINE const float* loaded(const half* x, Piece piece, float* buffer) {
  if (!has_instructions_for_halves()) return loaded<half>(x, piece, buffer);
  convert(x + piece.begin, piece.size(), buffer);
  return buffer;
}

INLINE float* target(float* y, Piece piece, float*) { return y + piece.begin; }

template <class T>
INLINE float* target(T*, Piece, float* buffer) { return buffer; }

INLINE void stored(const float*, Piece, float*) {}

template <class T>
INLINE void stored(const float* buffer, Piece piece, T* y) {
  for (int64_t i = 0; i < piece.size(); ++i) y[piece.begin + i] = T::of(buffer[i]);
}

INLINE void stored(const float* buffer, Piece piece, half* y) {
  if (!has_instructions_for_halves()) return stored<half>(buffer, piece, y);
  convert(buffer, piece.size(), y + piece.begin);
}

template <class T>
float* buffer_for(Shape shape, int buffers) {
  const int64_t size = shape.values == 1 ? kBlock * shape.channels : shape.values;
  return static_cast<float*>(malloc(size_t(size) * buffers * sizeof(float)));
}

template <>
float* buffer_for<float>(Shape, int) { return nullptr; }

template <int N>
struct Terms { float of[N]; };

template <int N, class Term>
INLINE void add_rows(int64_t rows, int64_t channels, double* sums, Term term) {
  for (int64_t c = 0; c < channels; ++c) {
    float part[N] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const Terms<N> terms = term(r * channels + c, c);
      for (int n = 0; n < N; ++n) part[n] += terms.of[n];
    }
    for (int n = 0; n < N; ++n) sums[n * channels + c] += part[n];
  }
}

// Adds what `term` gives for each value of a piece to N sums for each channel, one sum after the other in `sums`.
template <int N, class Term>
INLINE void add(Piece piece, int64_t channels, double* sums, Term term) {
  if (piece.channel < 0) {
    if (piece.rows == kBlock) add_rows<N>(kBlock, channels, sums, term);
    else add_rows<N>(piece.rows, channels, sums, term);
    return;
  }
  for (int64_t begin = 0; begin < piece.row; begin += kBlock * kLanes) {
    float lanes[N][kLanes] = {};
    const int64_t left = piece.row - begin, size = left < kBlock * kLanes ? left : kBlock * kLanes;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) {
        const Terms<N> terms = term(begin + i + lane, piece.channel);
        for (int n = 0; n < N; ++n) lanes[n][lane] += terms.of[n];
      }
    for (; i < size; ++i) {
      const Terms<N> terms = term(begin + i, piece.channel);
      for (int n = 0; n < N; ++n) lanes[n][0] += terms.of[n];
    }
    for (int n = 0; n < N; ++n)
      for (int lane = 0; lane < kLanes; ++lane) sums[n * channels + piece.channel] += lanes[n][lane];
  }
}

// Writes what `value` gives for each place of a piece.
template <class Value>
INLINE void fill(Piece piece, float* y, Value value) {
  if (piece.channel < 0) {
    for (int64_t r = 0; r < piece.rows; ++r)
      for (int64_t c = 0; c < piece.row; ++c) y[r * piece.row + c] = value(r * piece.row + c, c);
  } else {
    for (int64_t i = 0; i < piece.row; ++i) y[i] = value(i, piece.channel);
  }
}

INLINE double divisor(Shape shape) { return shape.count() > 1 ? shape.count() : 1; }

template <class T>
struct NormalizeBatch {
  const T* x;
  const float *gamma, *beta;
  T* y;
  float *mean, *m2;
  Shape shape;
  float epsilon;

  INLINE void run() const {
    const int64_t channels = shape.channels;
    float* buffer = buffer_for<T>(shape, 1);
    double* sums = static_cast<double*>(calloc(size_t(channels) * 4 + 1, sizeof(double)));
    double* deviations = sums + channels;
    // The mean is that of the first pass plus `rest`, what rounding took from it.
    float *rest = reinterpret_cast<float*>(sums + 3 * channels), *factor = rest + channels;
    const float *g = gamma, *b = beta;
    float* m = mean;
    for_each_piece(shape, [=](Piece piece) __attribute__((always_inline)) {
      const float* values = loaded(x, piece, buffer);
      add<1>(piece, channels, sums, [=](int64_t i, int64_t) __attribute__((always_inline)) {
        return Terms<1>{{values[i]}};
      });
    });
    for (int64_t c = 0; c < channels; ++c) m[c] = float(sums[c] / divisor(shape));
    for_each_piece(shape, [=](Piece piece) __attribute__((always_inline)) {
      const float* values = loaded(x, piece, buffer);
      add<2>(piece, channels, deviations, [=](int64_t i, int64_t c) __attribute__((always_inline)) {
        const float deviation = values[i] - m[c];
        return Terms<2>{{deviation, deviation * deviation}};
      });
    });
    for (int64_t c = 0; c < channels; ++c) {
      const double correction = deviations[c] / divisor(shape);
      const double squares = deviations[channels + c] - divisor(shape) * correction * correction;
      m2[c] = float(squares < 0 ? 0 : squares);
      rest[c] = float(correction);
      factor[c] = float(g[c] / std::sqrt(m2[c] / divisor(shape) + epsilon));
    }
    for_each_piece(shape, [=](Piece piece) __attribute__((always_inline)) {
      const float* values = loaded(x, piece, buffer);
      float* out = target(y, piece, buffer);
      fill(piece, out, [=](int64_t i, int64_t c) __attribute__((always_inline)) {
        return (values[i] - m[c] - rest[c]) * factor[c] + b[c];
      });
      stored(out, piece, y);
    });
    for (int64_t c = 0; c < channels; ++c) m[c] += rest[c];
    free(sums);
    free(buffer);
  }
};

template <class T>
struct NormalizeBatchGrad {
  const T *dy, *x;
  const float *gamma, *mean, *m2;
  T* dx;
  float *dgamma, *dbeta;
  Shape shape;
  float epsilon;

  INLINE void run() const {
    const int64_t channels = shape.channels;
    float* buffer = buffer_for<T>(shape, 2);
    float* second = buffer == nullptr ? nullptr : buffer + (shape.values == 1 ? kBlock * channels : shape.values);
    double* sums = static_cast<double*>(calloc(size_t(channels) * 5 + 1, sizeof(double)));
    float *slope = reinterpret_cast<float*>(sums + 3 * channels), *shift = slope + channels, *factor = shift + channels;
    const float* m = mean;
    for_each_piece(shape, [=](Piece piece) __attribute__((always_inline)) {
      const float *values = loaded(x, piece, buffer), *gradients = loaded(dy, piece, second);
      add<3>(piece, channels, sums, [=](int64_t i, int64_t c) __attribute__((always_inline)) {
        const float deviation = values[i] - m[c], gradient = gradients[i];
        return Terms<3>{{gradient, deviation, gradient * deviation}};
      });
    });
    for (int64_t c = 0; c < channels; ++c) {
      const double total = sums[c], products = sums[2 * channels + c];
      // What the rounded mean lacks: the sum of the deviations from the true one is zero.
      const double rest = sums[channels + c] / divisor(shape);
      const double inverse_std = 1 / std::sqrt(m2[c] / divisor(shape) + epsilon);
      const double product = (products - rest * total) * inverse_std;
      const double per_deviation = product * inverse_std / divisor(shape);
      dbeta[c] = float(total);
      dgamma[c] = float(product);
      slope[c] = float(per_deviation);
      shift[c] = float(total / divisor(shape) - rest * per_deviation);
      factor[c] = float(inverse_std * gamma[c]);
    }
    for_each_piece(shape, [=](Piece piece) __attribute__((always_inline)) {
      const float *values = loaded(x, piece, buffer), *gradients = loaded(dy, piece, second);
      float* out = target(dx, piece, buffer);
      fill(piece, out, [=](int64_t i, int64_t c) __attribute__((always_inline)) {
        return (gradients[i] - shift[c] - (values[i] - m[c]) * slope[c]) * factor[c];
      });
      stored(out, piece, dx);
    });
    free(sums);
    free(buffer);
  }
};

template <class T>
struct Normalize {
  const T* x;
  const float *mean, *variance, *gamma, *beta;
  T* y;
  Shape shape;
  float epsilon;

  INLINE void run() const {
    float* buffer = buffer_for<T>(shape, 1);
    float* factor = static_cast<float*>(malloc(size_t(shape.channels) * sizeof(float) + 1));
    for (int64_t c = 0; c < shape.channels; ++c) factor[c] = gamma[c] / std::sqrt(variance[c] + epsilon);
    const float *m = mean, *b = beta;
    for_each_piece(shape, [=](Piece piece) __attribute__((always_inline)) {
      const float* values = loaded(x, piece, buffer);
      float* out = target(y, piece, buffer);
      fill(piece, out, [=](int64_t i, int64_t c) __attribute__((always_inline)) {
        return (values[i] - m[c]) * factor[c] + b[c];
      });
      stored(out, piece, y);
    });
    free(factor);
    free(buffer);
  }
};

template <class Work>
WIDE void run_wide(const Work& work) { work.run(); }

template <class Work>
void run_anywhere(const Work& work) { work.run(); }

template <class Work>
void run(const Work& work) {
  static const bool wide = is_wide();
  if (wide) run_wide(work);
  else run_anywhere(work);
}

// What a node of a graph is told when it is made.
struct Attributes {
  int64_t first_axis, last_axis;
  float epsilon, rate;
  unsigned char unbiased, warned;
  char warning[1024];
};

template <bool is_move>
void* create(TF_OpKernelConstruction* construction) {
  auto* attributes = static_cast<Attributes*>(calloc(1, sizeof(Attributes)));
  TF_Status* status = TF_NewStatus();
  if (is_move) {
    TF_OpKernelConstruction_GetAttrFloat(construction, "rate", &attributes->rate, status);
    TF_OpKernelConstruction_GetAttrBool(construction, "unbiased", &attributes->unbiased, status);
  } else {
    TF_OpKernelConstruction_GetAttrInt64(construction, "first_axis", &attributes->first_axis, status);
    if (!TF_GetCode(status))
      TF_OpKernelConstruction_GetAttrInt64(construction, "last_axis", &attributes->last_axis, status);
    if (!TF_GetCode(status))
      TF_OpKernelConstruction_GetAttrFloat(construction, "epsilon", &attributes->epsilon, status);
    if (!TF_GetCode(status))
      TF_OpKernelConstruction_GetAttrString(construction, "warning", attributes->warning,
                                            sizeof attributes->warning - 1, status);
  }
  if (TF_GetCode(status)) TF_OpKernelConstruction_Failure(construction, status);
  TF_DeleteStatus(status);
  return attributes;
}

// The inputs and outputs of one call, given back at its end. After a failure `ok` is false and data must not be touched.
class Call {
 public:
  Call(TF_OpKernelContext* context, int inputs) : context_(context) {
    for (int i = 0; i < inputs && ok(); ++i) TF_GetInput(context_, i, &held_[count_++], status_);
    if (!ok()) TF_OpKernelContext_Failure(context_, status_);
  }

  ~Call() {
    for (int i = 0; i < count_; ++i)
      if (held_[i] != nullptr) TF_DeleteTensor(held_[i]);
    TF_DeleteStatus(status_);
  }

  bool ok() const { return TF_GetCode(status_) == 0; }

  TF_Tensor* input(int i) const { return held_[i]; }

  template <class T>
  const T* data(int i) const { return static_cast<const T*>(TF_TensorData(held_[i])); }

  // The sizes of an input as channels between `first` and `last`, which `vectors` others must have one value each of.
  Shape shape(int i, const Attributes& attributes, std::initializer_list<int> vectors) {
    Shape shape{1, 1, 1};
    for (int k = 0; k < TF_NumDims(held_[i]); ++k) {
      int64_t& part = k < attributes.first_axis    ? shape.examples
                      : k <= attributes.last_axis ? shape.channels
                                                  : shape.values;
      part *= TF_Dim(held_[i], k);
    }
    for (int vector : vectors)
      if (TF_TensorElementCount(held_[vector]) != shape.channels) fail("A vector must hold one value for each channel.");
    return shape;
  }

  void same_size(int a, int b) {
    if (TF_TensorElementCount(held_[a]) != TF_TensorElementCount(held_[b])) fail("The tensors must be of one size.");
  }

  void single(int i) {
    if (TF_TensorElementCount(held_[i]) != 1) fail("The count must be a single number.");
  }

  template <class T>
  T* output(int i, int type, int like) {
    if (!ok()) return nullptr;
    int64_t sizes[kMaxRank];
    const int rank = like < 0 ? 0 : TF_NumDims(held_[like]);
    int64_t count = 1;
    for (int k = 0; k < rank; ++k) count *= sizes[k] = TF_Dim(held_[like], k);
    TF_Tensor* made = TF_AllocateOutput(context_, i, type, sizes, rank, size_t(count) * sizeof(T), status_);
    if (!ok()) {
      TF_OpKernelContext_Failure(context_, status_);
      return nullptr;
    }
    held_[count_++] = made;
    return static_cast<T*>(TF_TensorData(made));
  }

 private:
  void fail(const char* message) {
    if (!ok()) return;
    TF_SetStatus(status_, kInvalidArgument, message);
    TF_OpKernelContext_Failure(context_, status_);
  }

  TF_OpKernelContext* context_;
  TF_Status* status_ = TF_NewStatus();
  TF_Tensor* held_[12] = {};
  int count_ = 0;
};

template <class T>
struct TypeOf { static constexpr int value = T::type; };
template <>
struct TypeOf<float> { static constexpr int value = kFloat; };

template <class T>
void normalize_batch(void* kernel, TF_OpKernelContext* context) {
  auto& attributes = *static_cast<Attributes*>(kernel);
  Call call(context, 3);
  if (!call.ok()) return;
  const Shape shape = call.shape(0, attributes, {1, 2});
  auto* y = call.output<T>(0, TypeOf<T>::value, 0);
  auto* mean = call.output<float>(1, kFloat, 1);
  auto* m2 = call.output<float>(2, kFloat, 1);
  auto* count = call.output<float>(3, kFloat, -1);
  if (!call.ok()) return;
  *count = float(shape.count());
  if (shape.count() == 1 && attributes.warning[0] && !__atomic_exchange_n(&attributes.warned, 1, __ATOMIC_RELAXED))
    fprintf(stderr, "%s\n", attributes.warning);
  run(NormalizeBatch<T>{call.data<T>(0), call.data<float>(1), call.data<float>(2), y, mean, m2, shape,
                        attributes.epsilon});
}

template <class T>
void normalize_batch_grad(void* kernel, TF_OpKernelContext* context) {
  auto& attributes = *static_cast<Attributes*>(kernel);
  Call call(context, 5);
  if (!call.ok()) return;
  const Shape shape = call.shape(1, attributes, {2, 3, 4});
  call.same_size(0, 1);
  auto* dx = call.output<T>(0, TypeOf<T>::value, 1);
  auto* dgamma = call.output<float>(1, kFloat, 2);
  auto* dbeta = call.output<float>(2, kFloat, 2);
  if (!call.ok()) return;
  run(NormalizeBatchGrad<T>{call.data<T>(0), call.data<T>(1), call.data<float>(2), call.data<float>(3),
                            call.data<float>(4), dx, dgamma, dbeta, shape, attributes.epsilon});
}

template <class T>
void normalize(void* kernel, TF_OpKernelContext* context) {
  auto& attributes = *static_cast<Attributes*>(kernel);
  Call call(context, 5);
  if (!call.ok()) return;
  const Shape shape = call.shape(0, attributes, {1, 2, 3, 4});
  auto* y = call.output<T>(0, TypeOf<T>::value, 0);
  if (!call.ok()) return;
  run(Normalize<T>{call.data<T>(0), call.data<float>(1), call.data<float>(2), call.data<float>(3), call.data<float>(4),
                   y, shape, attributes.epsilon});
}

void move(void* kernel, TF_OpKernelContext* context) {
  const auto& attributes = *static_cast<Attributes*>(kernel);
  Call call(context, 5);
  if (!call.ok()) return;
  for (int other : {1, 3, 4}) call.same_size(0, other);
  call.single(2);
  auto* moved_mean = call.output<float>(0, kFloat, 0);
  auto* moved_variance = call.output<float>(1, kFloat, 1);
  if (!call.ok()) return;
  const float *mean = call.data<float>(0), *variance = call.data<float>(1), *batch_mean = call.data<float>(3),
              *m2 = call.data<float>(4);
  const float count = *call.data<float>(2);
  for (int64_t c = 0; c < TF_TensorElementCount(call.input(0)); ++c) {
    const bool counts = count > 1 && std::isfinite(m2[c]);
    const float batch_variance = m2[c] / (attributes.unbiased ? count - 1 : count);
    moved_mean[c] = counts ? mean[c] + attributes.rate * (batch_mean[c] - mean[c]) : mean[c];
    moved_variance[c] = counts ? variance[c] + attributes.rate * (batch_variance - variance[c]) : variance[c];
  }
}

// Output number `i` has the shape of the input `like[i]`; where that is -1, it is a scalar.
template <int... like>
void shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  int i = 0;
  for (int input : {like...}) {
    TF_ShapeHandle* shape = input < 0 ? TF_ShapeInferenceContextScalar(context) : TF_NewShapeHandle();
    if (input >= 0) TF_ShapeInferenceContextGetInput(context, input, shape, status);
    if (!TF_GetCode(status)) TF_ShapeInferenceContextSetOutput(context, i++, shape, status);
    TF_DeleteShapeHandle(shape);
  }
}

class Registration {
 public:
  ~Registration() { TF_DeleteStatus(status_); }

  void operation(const char* name, std::initializer_list<const char*> attributes,
                 std::initializer_list<const char*> inputs, std::initializer_list<const char*> outputs,
                 void (*shapes)(TF_ShapeInferenceContext*, TF_Status*)) {
    TF_OpDefinitionBuilder* builder = TF_NewOpDefinitionBuilder(name);
    for (const char* attribute : attributes) TF_OpDefinitionBuilderAddAttr(builder, attribute);
    for (const char* input : inputs) TF_OpDefinitionBuilderAddInput(builder, input);
    for (const char* output : outputs) TF_OpDefinitionBuilderAddOutput(builder, output);
    TF_OpDefinitionBuilderSetShapeInferenceFunction(builder, shapes);
    TF_RegisterOpDefinition(builder, status_);
    check(name);
  }

  template <bool is_move>
  void kernel(const char* name, int type, void (*compute)(void*, TF_OpKernelContext*)) {
    TF_KernelBuilder* builder = TF_NewKernelBuilder(name, "CPU", create<is_move>, compute, free);
    if (type) TF_KernelBuilder_TypeConstraint(builder, "T", type, status_);
    check(name);
    TF_RegisterKernelBuilder(name, builder, status_);
    check(name);
  }

 private:
  void check(const char* name) {
    if (TF_GetCode(status_)) fprintf(stderr, "keras_bn: %s is not registered: %s\n", name, TF_Message(status_));
  }

  TF_Status* status_ = TF_NewStatus();
};

// TensorFlow collects what is registered while it loads a library of operations.
__attribute__((constructor)) void register_all() {
  Registration with;
  const char *type = "T: {float, bfloat16, half}", *first = "first_axis: int", *last = "last_axis: int",
             *epsilon = "epsilon: float", *warning = "warning: string = ''";
  const char* name = "KerasBn>NormalizeBatch";
  with.operation(name, {type, first, last, epsilon, warning}, {"x: T", "gamma: float", "beta: float"},
                 {"y: T", "mean: float", "m2: float", "count: float"}, shapes<0, 1, 1, -1>);
  with.kernel<false>(name, kFloat, normalize_batch<float>);
  with.kernel<false>(name, kBfloat16, normalize_batch<bfloat16>);
  with.kernel<false>(name, kHalf, normalize_batch<half>);
  name = "KerasBn>NormalizeBatchGrad";
  with.operation(name, {type, first, last, epsilon, warning},
                 {"dy: T", "x: T", "gamma: float", "mean: float", "m2: float"},
                 {"dx: T", "dgamma: float", "dbeta: float"}, shapes<1, 2, 2>);
  with.kernel<false>(name, kFloat, normalize_batch_grad<float>);
  with.kernel<false>(name, kBfloat16, normalize_batch_grad<bfloat16>);
  with.kernel<false>(name, kHalf, normalize_batch_grad<half>);
  name = "KerasBn>Normalize";
  with.operation(name, {type, first, last, epsilon, warning},
                 {"x: T", "mean: float", "variance: float", "gamma: float", "beta: float"}, {"y: T"}, shapes<0>);
  with.kernel<false>(name, kFloat, normalize<float>);
  with.kernel<false>(name, kBfloat16, normalize<bfloat16>);
  with.kernel<false>(name, kHalf, normalize<half>);
  name = "KerasBn>Move";
  with.operation(name, {"rate: float", "unbiased: bool"},
                 {"mean: float", "variance: float", "count: float", "batch_mean: float", "m2: float"},
                 {"moved_mean: float", "moved_variance: float"}, shapes<0, 1>);
  with.kernel<true>(name, 0, move);
}

}  // namespace
