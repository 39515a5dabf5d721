// Batch normalization of tensors in memory, seen as examples of channels of values. Half types are computed in float.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "threads.h"

#define INLINE inline __attribute__((always_inline))
// Compiled once for any processor and, on x86, once for those of 2013 and later.
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define WIDE __attribute__((target("avx2,fma")))
static bool is_wide() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
#define WIDE
static bool is_wide() { return false; }
#endif

namespace {

// Rows whose values are added up before they go into a sum.
constexpr int64_t kGroup = 8;
// Sums of the values of one channel, side by side.
constexpr int64_t kLanes = 16;
// Values that stay in the nearest cache while they are worked on.
constexpr int64_t kChunk = 1024;
// Shorter rows cost more than their values do. Those that are summed in groups had better be neighbours in memory.
constexpr int64_t kRow = 256, kSummedRow = 32;
// Values that are worth waking a thread for.
constexpr int64_t kPart = 1 << 16;
// Parts of a tensor that have sums of their own.
constexpr int64_t kParts = 64;

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

#if defined(__x86_64__)
bool has_f16c() {
  static const bool has = [] {
    unsigned a, b, c, d;
    return is_wide() && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  }();
  return has;
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
bool has_f16c() { return false; }
void convert(const half*, int64_t, float*) {}
void convert(const float*, int64_t, half*) {}
#endif

// Values as floats: where they are, or converted into `buffer`.
INLINE const float* load(const float* x, int64_t, float*) { return x; }

template <class T>
INLINE const float* load(const T* x, int64_t size, float* buffer) {
  for (int64_t i = 0; i < size; ++i) buffer[i] = x[i].to_float();
  return buffer;
}

INLINE const float* load(const half* x, int64_t size, float* buffer) {
  if (!has_f16c()) return load<half>(x, size, buffer);
  convert(x, size, buffer);
  return buffer;
}

// Where floats are written that `store` then brings to `y`.
INLINE float* target(float* y, float*) { return y; }

template <class T>
INLINE float* target(T*, float* buffer) { return buffer; }

INLINE void store(const float*, int64_t, float*) {}

template <class T>
INLINE void store(const float* buffer, int64_t size, T* y) {
  for (int64_t i = 0; i < size; ++i) y[i] = T::of(buffer[i]);
}

INLINE void store(const float* buffer, int64_t size, half* y) {
  if (!has_f16c()) return store<half>(buffer, size, y);
  convert(buffer, size, y);
}

// A tensor as examples of channels of neighbouring values; `values` is 1 where the channels come last. An empty one has
// no examples, of one value each.
struct Shape {
  int64_t examples, channels, values;

  int64_t count() const { return examples * values; }
  int64_t size() const { return count() * channels; }
};

// A tensor as rows of neighbouring values: of all channels, once or several times, and the last row may be shorter; or,
// where these are `planes`, of one channel of one example.
struct Rows {
  int64_t size, channels, width, count;
  bool planes;

  Rows(Shape shape, int64_t least) : size(shape.size()), channels(shape.channels), planes(shape.values > 1) {
    const bool once = channels == 0 || size < 4 * kChunk;
    width = planes ? shape.values : std::max<int64_t>(channels, 1) * (once ? 1 : (least + channels - 1) / channels);
    count = size ? (size + width - 1) / width : 0;
  }

  // The length of a vector that holds one value for each channel, as often as a row does.
  int64_t length() const { return planes ? channels : width; }

  template <class T>
  void repeat(T* vector) const {
    for (int64_t i = channels; i < length(); ++i) vector[i] = vector[i - channels];
  }
};

// Memory for a while, as processors load it best.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<T*>(::operator new(size_t(size) * sizeof(T), kAlignment))) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

template <class Body>
WIDE void run_wide(const Body& body) { body(); }

// Runs what is vectorized for the processor there is; `body` must be inlined.
template <class Body>
void run(const Body& body) {
  static const bool wide = is_wide();
  if (wide) run_wide(body);
  else body();
}

// Adds to two sums for each column of a few rows: of d and d * d, with d = x - center, or, for a gradient, of dy and
// dy * d.
template <bool gradient, int64_t rows, class T, class Float>
INLINE void sum_rows(const T* x, const T* dy, const Float* center, int64_t columns, double* first, double* second) {
  const int64_t tile = std::is_same<T, float>::value ? columns : kChunk / kGroup;
  float x_buffer[kChunk], dy_buffer[kChunk];
  const float *values[rows], *gradients[rows];
  for (int64_t begin = 0; begin < columns; begin += tile) {
    const int64_t width = std::min(columns - begin, tile);
    for (int64_t r = 0; r < rows; ++r) {
      values[r] = load(x + r * columns + begin, width, x_buffer + r * tile);
      if (gradient) gradients[r] = load(dy + r * columns + begin, width, dy_buffer + r * tile);
    }
#pragma GCC ivdep
    for (int64_t c = 0; c < width; ++c) {
      Float sum = 0, product = 0;
      for (int64_t r = 0; r < rows; ++r) {
        const Float d = Float(values[r][c]) - center[begin + c], term = gradient ? Float(gradients[r][c]) : d;
        sum += term;
        product += term * d;
      }
      first[begin + c] += sum;
      second[begin + c] += product;
    }
  }
}

// `sum_rows` of so many neighbouring values, in rows of so many columns; the last row may be shorter.
template <bool gradient, class T, class Float>
INLINE void sum_columns(const T* x, const T* dy, const Float* center, int64_t size, int64_t columns, double* first,
                        double* second) {
  const int64_t group = kGroup * columns;
  int64_t i = 0;
  for (; i + group <= size; i += group) sum_rows<gradient, kGroup>(x + i, dy + i, center, columns, first, second);
  for (; i < size; i += columns)
    sum_rows<gradient, 1>(x + i, dy + i, center, std::min(columns, size - i), first, second);
}

// The two sums of `sum_rows` for each channel, one vector after the other; the same bits whatever the threads.
template <bool gradient, class T, class Float>
void sum(const T* x, const T* dy, const Float* center, const Rows& rows, double* sums) {
  const int64_t length = rows.length(), most = std::min(kParts, rows.planes ? rows.count : rows.count / (4 * kGroup));
  const int64_t shares = std::max<int64_t>(1, std::min(most, rows.size / kPart));
  const int64_t part = std::max<int64_t>(1, (rows.count + shares - 1) / shares), parts = (rows.count + part - 1) / part;
  const Scratch<double> all(parts * length * 2);
  Threads::shared().parallel_for(parts, [=, &rows, sums = all.get()](int64_t i) {
    double *first = sums + i * length * 2, *second = first + length;
    std::fill(first, first + 2 * length, 0.0);
    run([=, &rows]() __attribute__((always_inline)) {
      const int64_t begin = i * part * rows.width, end = std::min(begin + part * rows.width, rows.size);
      if (!rows.planes)
        return sum_columns<gradient>(x + begin, dy + begin, center, end - begin, rows.width, first, second);
      for (int64_t at = begin; at < end; at += rows.width) {
        const int64_t c = at / rows.width % rows.channels;
        Float centers[kLanes];
        double lanes[2][kLanes] = {};
        std::fill(centers, centers + kLanes, center[c]);
        sum_columns<gradient>(x + at, dy + at, centers, rows.width, kLanes, lanes[0], lanes[1]);
        for (int64_t half = kLanes / 2; half > 0; half /= 2)
          for (auto& of : lanes)
            for (int64_t lane = 0; lane < half; ++lane) of[lane] += of[lane + half];
        first[c] += lanes[0][0];
        second[c] += lanes[1][0];
      }
    });
  });
  std::fill(sums, sums + 2 * rows.channels, 0.0);
  for (int64_t n = 0; n < 2 * parts; ++n)
    for (int64_t i = n * length; i < (n + 1) * length; i += rows.channels)
      for (int64_t c = 0; c < rows.channels; ++c) sums[n % 2 * rows.channels + c] += all[i + c];
}

// What the values of a channel have in common. `normalize_rows` computes (x - mean) * factor + shift or, for a
// gradient, (dy - shift - (x - mean) * slope) * factor.
enum Vector { kMean, kFactor, kShift, kSlope, kVectors };

template <bool gradient, int64_t step>
INLINE void normalize_values(const float* x, const float* dy, const float* vectors, int64_t length, int64_t size,
                             float* y) {
  const float *mean = vectors + kMean * length, *factor = vectors + kFactor * length,
              *shift = vectors + kShift * length, *slope = vectors + kSlope * length;
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) {
    const float d = x[i] - mean[i * step];
    if (gradient) y[i] = (dy[i] - shift[i * step] - d * slope[i * step]) * factor[i * step];
    else y[i] = d * factor[i * step] + shift[i * step];
  }
}

// Computes each value of `y`, which may be `x` or `dy`.
template <bool gradient, class T>
void normalize_rows(const T* x, const T* dy, float* vectors, const Rows& rows, T* y) {
  const int64_t length = rows.length();
  for (int v = 0; v < kVectors; ++v) rows.repeat(vectors + v * length);
  const int64_t part = (kPart + rows.width - 1) / rows.width * rows.width, parts = (rows.size + part - 1) / part;
  Threads::shared().parallel_for(parts, [=, &rows](int64_t i) {
    run([=, &rows]() __attribute__((always_inline)) {
      float x_buffer[kChunk], dy_buffer[kChunk];
      // From the end: what was read last before is in the cache still.
      const int64_t begin = (parts - 1 - i) * part, end = std::min(begin + part, rows.size);
      for (int64_t row = begin; row < end; row += rows.width) {
        const int64_t row_end = std::min(row + rows.width, end);
        for (int64_t at = row; at < row_end; at += kChunk) {
          const int64_t size = std::min(row_end - at, kChunk);
          const float* values = load(x + at, size, x_buffer);
          const float* gradients = gradient ? load(dy + at, size, dy_buffer) : nullptr;
          float* out = target(y + at, x_buffer);
          if (rows.planes)
            normalize_values<gradient, 0>(values, gradients, vectors + row / rows.width % rows.channels, length, size,
                                          out);
          else normalize_values<gradient, 1>(values, gradients, vectors + at - row, length, size, out);
          store(out, size, y + at);
        }
      }
    });
  });
}

// y = gamma * (x - mean) / sqrt(m2 / count + epsilon) + beta. What rounding takes from the mean is `rest`.
template <class T>
void normalize_batch(const T* x, const float* gamma, const float* beta, Shape shape, float epsilon, T* y, float* mean,
                     float* m2, float* rest) {
  const Rows rows(shape, kRow), summed(shape, kSummedRow);
  const int64_t channels = shape.channels, length = rows.length();
  const double count = double(std::max<int64_t>(shape.count(), 1));
  const Scratch<double> first(summed.length()), sums(2 * channels);
  const Scratch<float> vectors(kVectors * length);
  // Deviations from the first value are summed in double: since it is one of the channel's, m2 is off by less than
  // count * 2^-52 of itself, whatever the values are.
  for (int64_t c = 0; c < channels; ++c) {
    float buffer;
    first[c] = rows.size ? *load(x + c * shape.values, 1, &buffer) : 0;
  }
  summed.repeat(first.get());
  sum<false>(x, x, first.get(), summed, sums.get());
  for (int64_t c = 0; c < channels; ++c) {
    const double delta = sums[c] / count, exact = first[c] + delta, centred = sums[channels + c] - delta * sums[c];
    const double square = centred < 0 ? 0 : centred;
    mean[c] = float(exact);
    m2[c] = float(square);
    rest[c] = float(exact - mean[c]);
    vectors[kMean * length + c] = mean[c];
    vectors[kFactor * length + c] = float(gamma[c] / std::sqrt(square / count + epsilon));
    vectors[kShift * length + c] = beta[c] - rest[c] * vectors[kFactor * length + c];
  }
  normalize_rows<false>(x, x, vectors.get(), rows, y);
}

// The gradients of `normalize_batch`; `dx` may be `dy`.
template <class T>
void normalize_batch_grad(const T* dy, const T* x, const float* gamma, const float* mean, const float* m2,
                          const float* rest, Shape shape, float epsilon, T* dx, float* dgamma, float* dbeta) {
  const Rows rows(shape, kRow), summed(shape, kSummedRow);
  const int64_t channels = shape.channels, length = rows.length();
  const double share = 1 / double(std::max<int64_t>(shape.count(), 1));
  const Scratch<double> sums(2 * channels);
  const Scratch<float> means(summed.length()), vectors(kVectors * length);
  std::copy(mean, mean + channels, means.get());
  std::copy(mean, mean + channels, vectors.get());
  summed.repeat(means.get());
  sum<true>(x, dy, means.get(), summed, sums.get());
  for (int64_t c = 0; c < channels; ++c) {
    const double inverse_std = 1 / std::sqrt(m2[c] * share + epsilon);
    const double product = (sums[channels + c] - rest[c] * sums[c]) * inverse_std;
    const double slope = product * inverse_std * share;
    vectors[kFactor * length + c] = float(inverse_std * gamma[c]);
    vectors[kShift * length + c] = float(sums[c] * share - rest[c] * slope);
    vectors[kSlope * length + c] = float(slope);
    dbeta[c] = float(sums[c]);
    dgamma[c] = float(product);
  }
  normalize_rows<true>(x, dy, vectors.get(), rows, dx);
}

// y = gamma * (x - mean) / sqrt(variance + epsilon) + beta; `y` may be `x`.
template <class T>
void normalize(const T* x, const float* mean, const float* variance, const float* gamma, const float* beta, Shape shape,
               float epsilon, T* y) {
  const Rows rows(shape, kRow);
  const int64_t length = rows.length();
  const Scratch<float> vectors(kVectors * length);
  for (int64_t c = 0; c < shape.channels; ++c) {
    vectors[kMean * length + c] = mean[c];
    vectors[kFactor * length + c] = gamma[c] / std::sqrt(variance[c] + epsilon);
    vectors[kShift * length + c] = beta[c];
  }
  normalize_rows<false>(x, x, vectors.get(), rows, y);
}

}  // namespace
