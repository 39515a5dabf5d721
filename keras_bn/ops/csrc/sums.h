// Sums over the values of each channel, block by block, of more than eight of them in double.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "values.h"

namespace {

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

// Sums for each channel, or for each of kLanes where they are those of one channel: one sum after the other.
struct Sums {
  double* of;
  int64_t columns;
  bool planes;

  INLINE double total(int n, int64_t channel) const {
    if (!planes) return of[n * columns + channel];
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += of[n * columns + lane];
    return total;
  }
};

// Adds what `term` gives for each value of a piece to N sums.
template <int N, class Term>
INLINE void add(Piece piece, Sums sums, Term term) {
  if (!sums.planes) {
    if (piece.rows == kBlock) add_rows<N>(kBlock, sums.columns, sums.of, term);
    else add_rows<N>(piece.rows, sums.columns, sums.of, term);
    return;
  }
  const int64_t channel = piece.channel, lines = piece.row / kLanes;
  for (int64_t line = 0; line < lines; line += kBlock) {
    const auto term_of_lane = [=](int64_t i, int64_t) __attribute__((always_inline)) {
      return term(line * kLanes + i, channel);
    };
    if (lines - line >= kBlock) add_rows<N>(kBlock, kLanes, sums.of, term_of_lane);
    else add_rows<N>(lines - line, kLanes, sums.of, term_of_lane);
  }
  for (int64_t i = lines * kLanes; i < piece.row; ++i) {
    const Terms<N> terms = term(i, channel);
    for (int n = 0; n < N; ++n) sums.of[n * kLanes + i % kLanes] += terms.of[n];
  }
}

INLINE double divisor(double count) { return count > 1 ? count : 1; }

// A block of a tensor: examples from `first` to `last`, of which channels from `first_channel` to `last_channel`, which
// are all where the channels come last.
struct Block {
  int64_t first, last, first_channel, last_channel;
};

// A tensor as blocks of at least kPart values, if it has so many: blocks of examples, and of channels where the examples
// are too few. What comes of it does not depend on the threads.
class Blocks {
 public:
  explicit Blocks(Shape shape) : shape_(shape) {
    const int64_t size = shape.channels * shape.values;
    examples_ = size ? (kPart + size - 1) / size : 1;
    if (shape.values == 1 && examples_ < kFewestRows) examples_ = kFewestRows;
    along_examples_ = shape.examples ? (shape.examples + examples_ - 1) / examples_ : 1;
    channels_ = shape.channels;
    along_channels_ = 1;
    if (shape.values > 1 && along_examples_ < kFewBlocks && size >= kPart) {
      channels_ = (shape.channels + kFewBlocks - 1) / kFewBlocks;
      along_channels_ = (shape.channels + channels_ - 1) / channels_;
    }
  }

  int64_t count() const { return along_examples_ * along_channels_; }
  int64_t along_examples() const { return along_examples_; }
  // Its place along the examples.
  int64_t row(int64_t i) const { return i / along_channels_; }

  Block operator[](int64_t i) const {
    const int64_t first = row(i) * examples_, channel = i % along_channels_ * channels_;
    return {first, least(first + examples_, shape_.examples), channel, least(channel + channels_, shape_.channels)};
  }

  int64_t examples(int64_t row) const { return least((row + 1) * examples_, shape_.examples) - row * examples_; }

 private:
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  Shape shape_;
  int64_t examples_, along_examples_, channels_, along_channels_;
};

// Visits a block where the channels come last, or one channel of it.
template <class Body>
INLINE void for_each_piece(Shape shape, Block block, int64_t channel, Body body) {
  if (shape.values == 1) {
    for (int64_t i = block.first; i < block.last; i += kBlock) {
      const int64_t left = block.last - i;
      body(Piece{i * shape.channels, left < kBlock ? left : kBlock, shape.channels, 0});
    }
  } else {
    for (int64_t i = block.first; i < block.last; ++i)
      body(Piece{(i * shape.channels + channel) * shape.values, 1, shape.values, channel});
  }
}

// The mean of each channel of a block, and the sum of squared deviations from it: while the block is in the cache, in two
// passes.
template <class T>
struct Measure {
  const T* x;
  Shape shape;
  Block block;
  double *mean, *m2;

  INLINE void run() const {
    const bool planes = shape.values > 1;
    const double count = double(block.last - block.first) * double(shape.values);
    float* buffer = buffer_for<T>(shape, 1);
    const int64_t columns = planes ? kLanes : shape.channels;
    Scratch<double> scratch(columns * 2);
    Scratch<float> means(shape.channels);
    const Sums all{scratch.data(), columns, planes};
    float* rounded = means.data();
    for (int64_t begin = block.first_channel; begin < block.last_channel;) {
      const int64_t end = planes ? begin + 1 : block.last_channel;
      memset(all.of, 0, size_t(columns) * sizeof(double));
      for_each_piece(shape, block, begin, [=](Piece piece) __attribute__((always_inline)) {
        const float* values = loaded(x, piece, buffer);
        add<1>(piece, all, [=](int64_t i, int64_t) __attribute__((always_inline)) {
          return Terms<1>{{values[i]}};
        });
      });
      for (int64_t c = begin; c < end; ++c) rounded[c] = float(all.total(0, c) / divisor(count));
      const float* m = rounded;
      memset(all.of, 0, size_t(columns) * 2 * sizeof(double));
      for_each_piece(shape, block, begin, [=](Piece piece) __attribute__((always_inline)) {
        const float* values = loaded(x, piece, buffer);
        add<2>(piece, all, [=](int64_t i, int64_t c) __attribute__((always_inline)) {
          const float deviation = values[i] - m[c];
          return Terms<2>{{deviation, deviation * deviation}};
        });
      });
      for (int64_t c = begin; c < end; ++c) {
        // What rounding took from the mean.
        const double rest = all.total(0, c) / divisor(count);
        const double centred = all.total(1, c) - divisor(count) * rest * rest;
        mean[c] = rounded[c] + rest;
        m2[c] = centred < 0 ? 0 : centred;
      }
      begin = end;
    }
    free(buffer);
  }
};

template <class T>
struct GradientSums {
  const T *dy, *x;
  const float* mean;
  Shape shape;
  Block block;
  double* sums;

  INLINE void run() const {
    const bool planes = shape.values > 1;
    float* buffer = buffer_for<T>(shape, 2);
    float* second = buffer == nullptr ? nullptr : buffer + buffer_size(shape);
    const float* m = mean;
    const int64_t columns = planes ? kLanes : shape.channels;
    Scratch<double> scratch(columns * 3);
    const Sums all{scratch.data(), columns, planes};
    for (int64_t begin = block.first_channel; begin < block.last_channel;) {
      const int64_t end = planes ? begin + 1 : block.last_channel;
      memset(all.of, 0, size_t(columns) * 3 * sizeof(double));
      for_each_piece(shape, block, begin, [=](Piece piece) __attribute__((always_inline)) {
        const float *values = loaded(x, piece, buffer), *gradients = loaded(dy, piece, second);
        add<3>(piece, all, [=](int64_t i, int64_t c) __attribute__((always_inline)) {
          const float deviation = values[i] - m[c], gradient = gradients[i];
          return Terms<3>{{gradient, deviation, gradient * deviation}};
        });
      });
      for (int n = 0; n < 3; ++n)
        for (int64_t c = begin; c < end; ++c) sums[n * shape.channels + c] = all.total(n, c);
      begin = end;
    }
    free(buffer);
  }
};

}  // namespace
