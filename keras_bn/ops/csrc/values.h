// Values of tensors in memory, read and written as floats, and the processor that computes with them.

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
// So many values are worth a thread, which takes up to 100 microseconds to wake, and stay in its cache.
constexpr int64_t kPart = 1 << 16;
// Each block of fewer rows would have as many sums as values.
constexpr int64_t kFewestRows = 32;
// With fewer blocks than this some threads would wait for others.
constexpr int64_t kFewBlocks = 8;
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

// Memory for a while: on the stack where it is little, since asking for it takes as long as a small tensor does.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(count <= kLittle ? little_ : static_cast<T*>(malloc(size_t(count) * sizeof(T)))) {}
  ~Scratch() {
    if (data_ != little_) free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() { return data_; }

 private:
  static constexpr int64_t kLittle = 4096 / sizeof(T);

  T* data_;
  alignas(64) T little_[kLittle];
};

int64_t buffer_size(Shape shape) { return shape.values == 1 ? kBlock * shape.channels : shape.values; }

template <class T>
float* buffer_for(Shape shape, int buffers) {
  return static_cast<float*>(malloc(size_t(buffer_size(shape)) * buffers * sizeof(float)));
}

template <>
float* buffer_for<float>(Shape, int) { return nullptr; }

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

template <class Body>
struct Wide {
  Body body;
  INLINE void run() const { body(); }
};

// Runs what is vectorized for the processor there is; `body` must be inlined.
template <class Body>
void widely(const Body& body) { run(Wide<Body>{body}); }

}  // namespace
