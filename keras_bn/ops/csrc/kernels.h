// The arithmetic of batch normalization on tensors in memory, whose layout is examples of channels of values.
//
// Threads share the work on a large one. Half types are computed in float.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "rows.h"
#include "sums.h"
#include "threads.h"
#include "values.h"

namespace {

template <class T>
struct NormalizeBatch {
  const T* x;
  const float *gamma, *beta;
  T* y;
  float *mean, *m2;
  Shape shape;
  float epsilon;

  void run() const {
    const int64_t channels = shape.channels;
    const Blocks blocks(shape);
    const int64_t rows = blocks.along_examples();
    Scratch<double> scratch(rows * channels * 2);
    double *means = scratch.data(), *squares = means + rows * channels;
    Threads::all().share(blocks.count(), [=](int64_t i) {
      const int64_t row = blocks.row(i) * channels;
      ::run(Measure<T>{x, shape, blocks[i], means + row, squares + row});
    });
    Rows<T> normalize(x, y, shape);
    widely([&]() __attribute__((always_inline)) {
      double merged = double(blocks.examples(0)) * double(shape.values);
      for (int64_t row = 1; row < rows; ++row) {
        // Chan's formula for two parts.
        const double count = double(blocks.examples(row)) * double(shape.values), whole = merged + count;
        const double share = count / whole, weight = merged * share;
        const double *other_means = means + row * channels, *other_squares = squares + row * channels;
        for (int64_t c = 0; c < channels; ++c) {
          const double difference = other_means[c] - means[c];
          means[c] += difference * share;
          squares[c] += other_squares[c] + difference * difference * weight;
        }
        merged = whole;
      }
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) {
        const float rounded = float(means[c]), square = float(squares[c]);
        const float factor = float(gamma[c] / std::sqrt(square / divisor(shape.count()) + epsilon));
        normalize.of(c, rounded, factor, beta[c] + float(rounded - means[c]) * factor);
        mean[c] = rounded;
        m2[c] = square;
      }
    });
    normalize.run();
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

  void run() const {
    const int64_t channels = shape.channels;
    const Blocks blocks(shape);
    const int64_t rows = blocks.along_examples();
    Scratch<double> scratch(rows * channels * 3);
    double* sums = scratch.data();
    Threads::all().share(blocks.count(), [=](int64_t i) {
      ::run(GradientSums<T>{dy, x, mean, shape, blocks[i], sums + blocks.row(i) * channels * 3});
    });
    Rows<T> differentiate(x, dx, shape, dy);
    widely([&]() __attribute__((always_inline)) {
      for (int64_t row = 1; row < rows; ++row)
        for (int64_t c = 0; c < 3 * channels; ++c) sums[c] += sums[row * channels * 3 + c];
      const double share = 1 / divisor(shape.count());
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) {
        const double total = sums[c], products = sums[2 * channels + c];
        // What the rounded mean lacks: the sum of the deviations from the true one is zero.
        const double rest = sums[channels + c] * share;
        const double inverse_std = 1 / std::sqrt(m2[c] * share + epsilon);
        const double product = (products - rest * total) * inverse_std;
        const double per_deviation = product * inverse_std * share;
        differentiate.of(c, mean[c], float(per_deviation), float(total * share - rest * per_deviation),
                         float(inverse_std * gamma[c]));
        dbeta[c] = float(total);
        dgamma[c] = float(product);
      }
    });
    differentiate.run();
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
    Rows<T> normalize(x, y, shape);
    widely([&]() __attribute__((always_inline)) {
#pragma GCC ivdep
      for (int64_t c = 0; c < shape.channels; ++c)
        normalize.of(c, mean[c], gamma[c] / std::sqrt(variance[c] + epsilon), beta[c]);
    });
    normalize.run();
  }
};

}  // namespace
