// TensorFlow's C interface for kernels: what is used of it, the same in all its versions, so that no header of it is
// needed; and the attributes, inputs and outputs of a node, read through it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "values.h"

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
TF_Tensor* TF_ForwardInputOrAllocateOutput(TF_OpKernelContext*, const int* inputs, int input_count, int output,
                                           const int64_t* sizes, int rank, int* forwarded, TF_Status*);
void TF_OpKernelContext_Failure(TF_OpKernelContext*, TF_Status*);
void TF_OpKernelConstruction_Failure(TF_OpKernelConstruction*, TF_Status*);
void TF_OpKernelConstruction_GetAttrInt64(TF_OpKernelConstruction*, const char*, int64_t*, TF_Status*);
void TF_OpKernelConstruction_GetAttrFloat(TF_OpKernelConstruction*, const char*, float*, TF_Status*);
void TF_OpKernelConstruction_GetAttrBool(TF_OpKernelConstruction*, const char*, unsigned char*, TF_Status*);
void TF_OpKernelConstruction_GetAttrSize(TF_OpKernelConstruction*, const char*, int* count, int* total, TF_Status*);
void TF_OpKernelConstruction_GetAttrString(TF_OpKernelConstruction*, const char*, char*, size_t, TF_Status*);
void TF_OpKernelConstruction_GetAttrType(TF_OpKernelConstruction*, const char*, int*, TF_Status*);
TF_KernelBuilder* TF_NewKernelBuilder(const char* operation, const char* device, void* (*)(TF_OpKernelConstruction*),
                                      void (*)(void*, TF_OpKernelContext*), void (*)(void*));
void TF_KernelBuilder_TypeConstraint(TF_KernelBuilder*, const char*, int type, TF_Status*);
void TF_RegisterKernelBuilder(const char*, TF_KernelBuilder*, TF_Status*);
void TF_RegisterKernelBuilderWithKernelDef(const char* definition, const char*, TF_KernelBuilder*, TF_Status*);
TF_OpDefinitionBuilder* TF_NewOpDefinitionBuilder(const char*);
void TF_OpDefinitionBuilderAddAttr(TF_OpDefinitionBuilder*, const char*);
void TF_OpDefinitionBuilderAddInput(TF_OpDefinitionBuilder*, const char*);
void TF_OpDefinitionBuilderAddOutput(TF_OpDefinitionBuilder*, const char*);
void TF_OpDefinitionBuilderSetShapeInferenceFunction(TF_OpDefinitionBuilder*,
                                                     void (*)(TF_ShapeInferenceContext*, TF_Status*));
void TF_RegisterOpDefinition(TF_OpDefinitionBuilder*, TF_Status*);
TF_ShapeHandle* TF_NewShapeHandle();
void TF_DeleteShapeHandle(TF_ShapeHandle*);
TF_ShapeHandle* TF_ShapeInferenceContextVectorFromSize(TF_ShapeInferenceContext*, size_t);
void TF_ShapeInferenceContextConcatenateShapes(TF_ShapeInferenceContext*, TF_ShapeHandle* first, TF_ShapeHandle* second,
                                               TF_ShapeHandle* result, TF_Status*);
void TF_ShapeInferenceContextGetInput(TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*);
void TF_ShapeInferenceContextSetOutput(TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*);
}

namespace {

constexpr int kFloat = 1, kBfloat16 = 14, kHalf = 19, kInvalidArgument = 3, kMaxRank = 254;

template <class T>
struct TypeOf;
template <>
struct TypeOf<float> { static constexpr int value = kFloat; };
template <>
struct TypeOf<bfloat16> { static constexpr int value = kBfloat16; };
template <>
struct TypeOf<half> { static constexpr int value = kHalf; };

// Reads attributes of a node whose names begin with `prefix`, up to the first that is missing.
class Reader {
 public:
  Reader(TF_OpKernelConstruction* construction, const char* prefix) : construction_(construction), prefix_(prefix) {}

  ~Reader() {
    if (TF_GetCode(status_)) TF_OpKernelConstruction_Failure(construction_, status_);
    TF_DeleteStatus(status_);
  }

  template <class... Arguments, class... Values>
  void read(void (*get)(TF_OpKernelConstruction*, const char*, Arguments...), const char* name, Values... values) {
    char whole[64];
    snprintf(whole, sizeof whole, "%s%s", prefix_, name);
    if (!TF_GetCode(status_)) get(construction_, whole, values..., status_);
  }

  void fail(const char* message) {
    if (!TF_GetCode(status_)) TF_SetStatus(status_, kInvalidArgument, message);
  }

 private:
  TF_OpKernelConstruction* construction_;
  const char* prefix_;
  TF_Status* status_ = TF_NewStatus();
};

// The inputs and outputs of one call, given back at its end. After a failure `ok` is false and data must not be touched.
class Call {
 public:
  Call(TF_OpKernelContext* context, int inputs) : context_(context) {
    for (; count_ < inputs && ok(); ++count_) {
      TF_GetInput(context_, count_, &held_[count_], status_);
      if (ok()) data_[count_] = TF_TensorData(held_[count_]);
    }
    if (!ok()) TF_OpKernelContext_Failure(context_, status_);
  }

  ~Call() {
    for (int i = 0; i < count_; ++i)
      if (held_[i] != nullptr) TF_DeleteTensor(held_[i]);
    TF_DeleteStatus(status_);
  }

  bool ok() const { return TF_GetCode(status_) == 0; }

  template <class T>
  const T* data(int i) const { return static_cast<const T*>(data_[i]); }

  // The sizes of an input as channels between two axes, of each of which `vectors` others must hold one value.
  Shape shape(int i, int64_t first_axis, int64_t last_axis, std::initializer_list<int> vectors) {
    Shape shape{1, 1, 1};
    for (int k = 0; k < TF_NumDims(held_[i]); ++k) {
      int64_t& part = k < first_axis ? shape.examples : k <= last_axis ? shape.channels : shape.values;
      part *= TF_Dim(held_[i], k);
    }
    for (int vector : vectors)
      if (TF_TensorElementCount(held_[vector]) != shape.channels) fail("A vector must hold one value for each channel.");
    return shape;
  }

  void same_size(int a, int b) {
    if (TF_TensorElementCount(held_[a]) != TF_TensorElementCount(held_[b])) fail("The tensors must be of one size.");
  }

  void is_pair(int i, int vector) {
    if (TF_TensorElementCount(held_[i]) != 2 * TF_TensorElementCount(held_[vector]))
      fail("A pair must hold two values for each channel.");
  }

  // An output of the shape of an input.
  template <class T>
  T* output(int i, int type, int like) { return allocated<T>(i, type, like, 0); }

  // One of two rows, each of the shape of an input.
  template <class T>
  T* pair(int i, int type, int like) { return allocated<T>(i, type, like, 1); }

  // An output in the memory of an input of its type and shape, if nothing else needs that any more. Afterwards there is
  // no asking for the input's shape.
  template <class T>
  T* output_over(int i, int input) {
    if (!ok()) return nullptr;
    int64_t sizes[kMaxRank];
    const int rank = TF_NumDims(held_[input]);
    for (int k = 0; k < rank; ++k) sizes[k] = TF_Dim(held_[input], k);
    // Holding it is needing it; its memory stays where it is, since the context holds it too.
    TF_DeleteTensor(held_[input]);
    held_[input] = nullptr;
    int forwarded;
    return made<T>(TF_ForwardInputOrAllocateOutput(context_, &input, 1, i, sizes, rank, &forwarded, status_));
  }

 private:
  void fail(const char* message) {
    if (!ok()) return;
    TF_SetStatus(status_, kInvalidArgument, message);
    TF_OpKernelContext_Failure(context_, status_);
  }

  // Behind `pairs` axes of size 2, the shape of an input.
  template <class T>
  T* allocated(int i, int type, int like, int pairs) {
    if (!ok()) return nullptr;
    int64_t sizes[kMaxRank + 1] = {2};
    const int rank = TF_NumDims(held_[like]);
    int64_t count = pairs ? 2 : 1;
    for (int k = 0; k < rank; ++k) count *= sizes[pairs + k] = TF_Dim(held_[like], k);
    return made<T>(TF_AllocateOutput(context_, i, type, sizes, pairs + rank, size_t(count) * sizeof(T), status_));
  }

  template <class T>
  T* made(TF_Tensor* output) {
    if (!ok()) {
      TF_OpKernelContext_Failure(context_, status_);
      return nullptr;
    }
    held_[count_++] = output;
    return static_cast<T*>(TF_TensorData(output));
  }

  TF_OpKernelContext* context_;
  TF_Status* status_ = TF_NewStatus();
  TF_Tensor* held_[12] = {};
  const void* data_[12] = {};
  int count_ = 0;
};

}  // namespace
