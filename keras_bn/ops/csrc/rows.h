// What is done to each value by itself, in one pass over a tensor that threads share.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "threads.h"
#include "values.h"

namespace {

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

// What is done to each value of a channel: (x - mean) * factor + shift, or (dy - shift - (x - mean) * slope) * factor.
// One vector after the other, each of `length` values.
enum Vector { kMean, kFactor, kShift, kSlope, kVectors };

template <class T>
struct RowsPart {
  const T *x, *dy;
  const float* vectors;
  T* y;
  int64_t channels, length, width, begin, end;
  bool planes, streams;

  INLINE void run() const {
    if (dy == nullptr) rows([](float x, float, const float* v, int64_t stride) __attribute__((always_inline)) {
      return (x - v[kMean * stride]) * v[kFactor * stride] + v[kShift * stride];
    });
    else rows([](float x, float dy, const float* v, int64_t stride) __attribute__((always_inline)) {
      return (dy - v[kShift * stride] - (x - v[kMean * stride]) * v[kSlope * stride]) * v[kFactor * stride];
    });
  }

  template <class Value>
  INLINE void rows(Value value) const {
    float buffer[kChunk], second[kChunk];
    for (int64_t row = begin / width; row * width < end; ++row) {
      const int64_t row_end = (row + 1) * width < end ? (row + 1) * width : end;
      for (int64_t i = row * width; i < row_end; i += kChunk) {
        const Piece piece{i, 1, row_end - i < kChunk ? row_end - i : kChunk, row % channels};
        const float* values = loaded(x, piece, buffer);
        const float* gradients = dy == nullptr ? values : loaded(dy, piece, second);
        float* out = streams ? buffer : target(y, piece, buffer);
        if (planes) {
          float of[kVectors];
          for (int v = 0; v < kVectors; ++v) of[v] = vectors[v * length + piece.channel];
#pragma GCC ivdep
          for (int64_t k = 0; k < piece.row; ++k) out[k] = value(values[k], gradients[k], of, 1);
        } else {
          const float* of = vectors + (i - row * width);
#pragma GCC ivdep
          for (int64_t k = 0; k < piece.row; ++k) out[k] = value(values[k], gradients[k], of + k, length);
        }
        if (streams) streamed(out, piece, y);
        else stored(out, piece, y);
      }
    }
    if (streams) end_of_stream();
  }
};

// Computes each value of an output from that of the inputs, which it may replace, and from its channel's vectors.
template <class T>
class Rows {
 public:
  Rows(const T* x, T* y, Shape shape, const T* dy = nullptr)
      : x_(x), dy_(dy), y_(y), shape_(shape), length_(length()), scratch_(length_ * kVectors) {}

  INLINE void of(int64_t c, float mean, float factor, float shift) { of(c, mean, 0, shift, factor); }

  INLINE void of(int64_t c, float mean, float slope, float shift, float factor) {
    vectors_[kMean * length_ + c] = mean;
    vectors_[kFactor * length_ + c] = factor;
    vectors_[kShift * length_ + c] = shift;
    vectors_[kSlope * length_ + c] = slope;
  }

  void run() const {
    if (size() == 0) return;
    for (int v = 0; v < kVectors; ++v)
      for (int64_t i = shape_.channels; i < length_; ++i)
        vectors_[v * length_ + i] = vectors_[v * length_ + i - shape_.channels];
    const int64_t width = planes() ? shape_.values : length_, part = (kPart + width - 1) / width * width;
    // Past the caches goes only what fills whole lines of them.
    const bool streams = !in_place() && size() * int64_t(sizeof(T)) >= kStreamed && is_wide() && width % kLanes == 0;
    const RowsPart<T> whole{x_, dy_, vectors_, y_, shape_.channels, length_, width, 0, size(), planes(), streams};
    const int64_t parts = (size() + part - 1) / part;
    Threads::all().share(parts, [=](int64_t i) {
      RowsPart<T> one = whole;
      // From the end: what was read last before is in the cache still.
      one.begin = (parts - 1 - i) * part;
      if (one.end - one.begin > part) one.end = one.begin + part;
      ::run(one);
    });
  }

 private:
  // Of short rows several are taken at a time where it is worth it, and of the vectors as many copies.
  int64_t length() const {
    const bool alone = planes() || shape_.channels >= kRow || size() < 4 * kRow;
    return alone ? shape_.channels : (kRow + shape_.channels - 1) / shape_.channels * shape_.channels;
  }

  int64_t size() const { return shape_.examples * shape_.channels * shape_.values; }
  bool planes() const { return shape_.values > 1; }
  bool in_place() const { return y_ == x_ || y_ == dy_; }

  const T *x_, *dy_;
  T* y_;
  Shape shape_;
  int64_t length_;
  Scratch<float> scratch_;
  float* vectors_ = scratch_.data();
};

}  // namespace
