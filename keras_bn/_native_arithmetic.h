// The arithmetic of batch normalization on tensors in memory, whose layout is examples of channels of values.
//
// One thread does the work, several where large tensors are inferred. Half types are computed in float, sums of more than eight values in double.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "_native_threads.h"

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

// So many values of a channel are summed in float before they go into a double.
constexpr int64_t kBlock = 8;
constexpr int64_t kLanes = 16;
// So many values stay in the nearest cache while they are worked on.
constexpr int64_t kChunk = 1024;
// Shorter rows cost more than their values do.
constexpr int64_t kRow = 256;
// So many are worth a thread, which takes up to 100 microseconds to wake.
constexpr int64_t kPart = 1 << 17;
// Outputs of so many bytes are out of the caches before anybody reads them (measured: 25 MB yes, 13 MB no).
constexpr int64_t kStreamed = 16 << 20;

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
  uint16_t bits;

  INLINE float to_float() const { return as_float(uint32_t(bits) << 16); }

  INLINE static bfloat16 of(float value) {
    const uint32_t wide = as_bits(value);
    const uint32_t nearest = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    return {uint16_t(value != value ? 0x7fc0 : nearest)};
  }
};

struct half {
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

// Writes what `value` gives for each place of a piece, which may read that place of `y` and no other.
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

// Copies past the caches, which a large tensor that is written once would only flush.
#if defined(__x86_64__)
__attribute__((target("avx"))) void stream(const float* from, int64_t size, float* to) {
  int64_t i = 0;
  if (reinterpret_cast<uintptr_t>(to) % sizeof(__m256) == 0)
    for (; i + 8 <= size; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
  for (; i < size; ++i) to[i] = from[i];
}
void end_of_stream() { _mm_sfence(); }
#else
void stream(const float* from, int64_t size, float* to) { memcpy(to, from, size_t(size) * sizeof(float)); }
void end_of_stream() {}
#endif

INLINE void streamed(const float* buffer, Piece piece, float* y) { stream(buffer, piece.size(), y + piece.begin); }

template <class T>
INLINE void streamed(const float* buffer, Piece piece, T* y) { stored(buffer, piece, y); }

// y = (x - mean) * factor + beta for the values from `begin` to `end`. The vectors go with rows of `width` values; where
// a row is one channel's, each has one value for a row.
template <class T>
struct NormalizeRows {
  const T* x;
  const float *mean, *factor, *beta;
  T* y;
  Shape shape;
  int64_t width, begin, end;
  bool streams;

  INLINE void run() const {
    float buffer[kChunk];
    for (int64_t row = begin / width; row * width < end; ++row) {
      const int64_t row_end = (row + 1) * width < end ? (row + 1) * width : end;
      for (int64_t i = row * width; i < row_end; i += kChunk) {
        const Piece piece{i, 1, row_end - i < kChunk ? row_end - i : kChunk, row % shape.channels};
        const float* values = loaded(x, piece, buffer);
        float* out = streams ? buffer : target(y, piece, buffer);
        if (shape.values == 1) {
          const int64_t first = i - row * width;
          const float *m = mean + first, *f = factor + first, *b = beta + first;
          for (int64_t k = 0; k < piece.row; ++k) out[k] = (values[k] - m[k]) * f[k] + b[k];
        } else {
          const float m = mean[piece.channel], f = factor[piece.channel], b = beta[piece.channel];
          for (int64_t k = 0; k < piece.row; ++k) out[k] = (values[k] - m) * f + b;
        }
        if (streams) streamed(out, piece, y);
        else stored(out, piece, y);
      }
    }
    if (streams) end_of_stream();
  }
};

template <class T>
struct Normalize {
  const T* x;
  const float *mean, *variance, *gamma, *beta;
  T* y;
  Shape shape;
  float epsilon;

  void run() const {
    const int64_t channels = shape.channels, size = shape.examples * channels * shape.values;
    if (size == 0) return;
    // Of short rows of a large tensor several are taken at a time, and of the vectors as many copies.
    const int64_t copies =
        shape.values > 1 || channels >= kRow || size < kRow * kRow ? 1 : (kRow + channels - 1) / channels;
    const int64_t length = copies * channels;
    float* vectors = static_cast<float*>(malloc(size_t(length) * 3 * sizeof(float)));
    float *means = vectors, *factors = means + length, *betas = factors + length;
    for (int64_t c = 0; c < channels; ++c) factors[c] = gamma[c] / std::sqrt(variance[c] + epsilon);
    memcpy(means, mean, size_t(channels) * sizeof(float));
    memcpy(betas, beta, size_t(channels) * sizeof(float));
    for (float* vector : {means, factors, betas})
      for (int64_t i = channels; i < length; ++i) vector[i] = vector[i - channels];
    const int64_t width = shape.values > 1 ? shape.values : length;
    const int64_t part = (kPart + width - 1) / width * width;
    // Past the caches goes only what fills whole lines of them.
    const bool streams = static_cast<const void*>(x) != y && size * int64_t(sizeof(T)) >= kStreamed && is_wide() &&
                         width % kLanes == 0;
    Threads::all().share((size + part - 1) / part, [=](int64_t i) {
      const int64_t begin = i * part, end = size - begin < part ? size : begin + part;
      ::run(NormalizeRows<T>{x, means, factors, betas, y, shape, width, begin, end, streams});
    });
    free(vectors);
  }
};

}  // namespace
