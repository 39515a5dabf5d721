// Batch normalization in one operation each way.
//
// What is used of TensorFlow's C interface for kernels, the same in all its versions, is declared here: no header of it
// is needed.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "_native_arithmetic.h"
#include "_native_threads.h"

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
TF_ShapeHandle* TF_ShapeInferenceContextScalar(TF_ShapeInferenceContext*);
void TF_ShapeInferenceContextGetInput(TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*);
void TF_ShapeInferenceContextSetOutput(TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*);
}

namespace {

constexpr int kFloat = 1, kBfloat16 = 14, kHalf = 19, kInvalidArgument = 3, kMaxRank = 254;

using Compute = void (*)(void*, TF_OpKernelContext*);

// What a node of a graph is told when it is made.
struct Attributes {
  int64_t first_axis, last_axis;
  float epsilon, rate;
  unsigned char unbiased, warned;
  char warning[1024];
  Compute compute;
};

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

  void read_all(Attributes* attributes, bool moves) {
    read(TF_OpKernelConstruction_GetAttrInt64, "first_axis", &attributes->first_axis);
    read(TF_OpKernelConstruction_GetAttrInt64, "last_axis", &attributes->last_axis);
    read(TF_OpKernelConstruction_GetAttrFloat, "epsilon", &attributes->epsilon);
    if (!moves) return;
    read(TF_OpKernelConstruction_GetAttrFloat, "rate", &attributes->rate);
    read(TF_OpKernelConstruction_GetAttrBool, "unbiased", &attributes->unbiased);
    read(TF_OpKernelConstruction_GetAttrString, "warning", attributes->warning, sizeof attributes->warning - 1);
  }

  void fail(const char* message) {
    if (!TF_GetCode(status_)) TF_SetStatus(status_, kInvalidArgument, message);
  }

 private:
  TF_OpKernelConstruction* construction_;
  const char* prefix_;
  TF_Status* status_ = TF_NewStatus();
};

Attributes* new_attributes() { return static_cast<Attributes*>(calloc(1, sizeof(Attributes))); }

template <bool moves>
void* create(TF_OpKernelConstruction* construction) {
  Attributes* attributes = new_attributes();
  Reader(construction, "").read_all(attributes, moves);
  return attributes;
}

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

  template <class T>
  T* output(int i, int type, int like) {
    if (!ok()) return nullptr;
    int64_t sizes[kMaxRank];
    const int rank = like < 0 ? 0 : TF_NumDims(held_[like]);
    int64_t count = 1;
    for (int k = 0; k < rank; ++k) count *= sizes[k] = TF_Dim(held_[like], k);
    return made<T>(TF_AllocateOutput(context_, i, type, sizes, rank, size_t(count) * sizeof(T), status_));
  }

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

template <class T>
struct TypeOf;
template <>
struct TypeOf<float> { static constexpr int value = kFloat; };
template <>
struct TypeOf<bfloat16> { static constexpr int value = kBfloat16; };
template <>
struct TypeOf<half> { static constexpr int value = kHalf; };

template <class T>
void normalize_batch(void* kernel, TF_OpKernelContext* context) {
  auto& attributes = *static_cast<Attributes*>(kernel);
  Call call(context, 5);
  if (!call.ok()) return;
  const Shape shape = call.shape(0, attributes, {1, 2, 3, 4});
  auto* y = call.output<T>(0, TypeOf<T>::value, 0);
  auto* mean = call.output<float>(1, kFloat, 1);
  auto* m2 = call.output<float>(2, kFloat, 1);
  auto* count = call.output<float>(3, kFloat, -1);
  auto* moved_mean = call.output<float>(4, kFloat, 3);
  auto* moved_variance = call.output<float>(5, kFloat, 4);
  if (!call.ok()) return;
  *count = float(shape.count());
  if (shape.count() == 1 && attributes.warning[0] && !__atomic_exchange_n(&attributes.warned, 1, __ATOMIC_RELAXED))
    fprintf(stderr, "%s\n", attributes.warning);
  NormalizeBatch<T>{call.data<T>(0), call.data<float>(1), call.data<float>(2), y, mean, m2, shape, attributes.epsilon}
      .run();
  const float *moving_mean = call.data<float>(3), *moving_variance = call.data<float>(4), rate = attributes.rate;
  const float freedom = attributes.unbiased ? *count - 1 : *count;
  for (int64_t c = 0; c < shape.channels; ++c) {
    const bool counts = *count > 1 && std::isfinite(m2[c]);
    const float variance = m2[c] / freedom;
    moved_mean[c] = counts ? moving_mean[c] + rate * (mean[c] - moving_mean[c]) : moving_mean[c];
    moved_variance[c] = counts ? moving_variance[c] + rate * (variance - moving_variance[c]) : moving_variance[c];
  }
}

template <class T>
void normalize_batch_grad(void* kernel, TF_OpKernelContext* context) {
  auto& attributes = *static_cast<Attributes*>(kernel);
  Call call(context, 5);
  if (!call.ok()) return;
  const Shape shape = call.shape(1, attributes, {2, 3, 4});
  call.same_size(0, 1);
  auto* dx = call.output_over<T>(0, 0);
  auto* dgamma = call.output<float>(1, kFloat, 2);
  auto* dbeta = call.output<float>(2, kFloat, 2);
  if (!call.ok()) return;
  NormalizeBatchGrad<T>{call.data<T>(0), call.data<T>(1), call.data<float>(2), call.data<float>(3), call.data<float>(4),
                        dx, dgamma, dbeta, shape, attributes.epsilon}
      .run();
}

template <class T>
void normalize(void* kernel, TF_OpKernelContext* context) {
  auto& attributes = *static_cast<Attributes*>(kernel);
  Call call(context, 5);
  if (!call.ok()) return;
  const Shape shape = call.shape(0, attributes, {1, 2, 3, 4});
  auto* y = call.output_over<T>(0, 0);
  if (!call.ok()) return;
  Normalize<T>{call.data<T>(0), call.data<float>(1), call.data<float>(2), call.data<float>(3), call.data<float>(4),
               y, shape, attributes.epsilon}
      .run();
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

constexpr char kNormalizeBatch[] = "KerasBn>NormalizeBatch", kNormalizeBatchGrad[] = "KerasBn>NormalizeBatchGrad",
               kNormalize[] = "KerasBn>Normalize";

struct Kernel {
  const char* operation;
  int type;
  bool moves;
  Compute compute;
};

const Kernel kKernels[] = {
    {kNormalizeBatch, kFloat, true, normalize_batch<float>},
    {kNormalizeBatch, kBfloat16, true, normalize_batch<bfloat16>},
    {kNormalizeBatch, kHalf, true, normalize_batch<half>},
    {kNormalizeBatchGrad, kFloat, false, normalize_batch_grad<float>},
    {kNormalizeBatchGrad, kBfloat16, false, normalize_batch_grad<bfloat16>},
    {kNormalizeBatchGrad, kHalf, false, normalize_batch_grad<half>},
    {kNormalize, kFloat, false, normalize<float>},
    {kNormalize, kBfloat16, false, normalize<bfloat16>},
    {kNormalize, kHalf, false, normalize<half>},
};

// For a node that calls a function of TensorFlow's operations and says which of ours does the same.
void* create_for_call(TF_OpKernelConstruction* construction) {
  Attributes* attributes = new_attributes();
  Reader reader(construction, "_keras_bn_");
  char operation[64] = {};
  int type = 0;
  reader.read(TF_OpKernelConstruction_GetAttrString, "operation", operation, sizeof operation - 1);
  reader.read(TF_OpKernelConstruction_GetAttrType, "T", &type);
  for (const Kernel& kernel : kKernels) {
    if (type != kernel.type || strcmp(operation, kernel.operation) != 0) continue;
    attributes->compute = kernel.compute;
    reader.read_all(attributes, kernel.moves);
  }
  if (attributes->compute == nullptr) reader.fail("There is no such operation.");
  return attributes;
}

void compute_call(void* kernel, TF_OpKernelContext* context) {
  static_cast<Attributes*>(kernel)->compute(kernel, context);
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

  void kernel(const Kernel& kernel) {
    TF_KernelBuilder* builder =
        TF_NewKernelBuilder(kernel.operation, "CPU", kernel.moves ? create<true> : create<false>, kernel.compute, free);
    TF_KernelBuilder_TypeConstraint(builder, "T", kernel.type, status_);
    check(kernel.operation);
    TF_RegisterKernelBuilder(kernel.operation, builder, status_);
    check(kernel.operation);
  }

  void calls(const char* definition) {
    const char* name = "PartitionedCall";
    TF_KernelBuilder* builder = TF_NewKernelBuilder(name, "CPU", create_for_call, compute_call, free);
    TF_RegisterKernelBuilderWithKernelDef(definition, name, builder, status_);
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
             *epsilon = "epsilon: float";
  with.operation(kNormalizeBatch,
                 {type, first, last, epsilon, "rate: float = 0", "unbiased: bool = false", "warning: string = ''"},
                 {"x: T", "gamma: float", "beta: float", "moving_mean: float", "moving_variance: float"},
                 {"y: T", "mean: float", "m2: float", "count: float", "moved_mean: float", "moved_variance: float"},
                 shapes<0, 1, 1, -1, 3, 4>);
  with.operation(kNormalizeBatchGrad, {type, first, last, epsilon},
                 {"dy: T", "x: T", "gamma: float", "mean: float", "m2: float"},
                 {"dx: T", "dgamma: float", "dbeta: float"}, shapes<1, 2, 2>);
  with.operation(kNormalize, {type, first, last, epsilon},
                 {"x: T", "mean: float", "variance: float", "gamma: float", "beta: float"}, {"y: T"}, shapes<0>);
  for (const Kernel& kernel : kKernels) with.kernel(kernel);
}

}  // namespace

// Takes over the calls that `definition`, a serialized KernelDef, tells from others. Once in a process.
extern "C" __attribute__((visibility("default"))) void keras_bn_take_calls(const char* definition) {
  Registration().calls(definition);
}

// How many threads may share the work on one tensor.
extern "C" __attribute__((visibility("default"))) void keras_bn_limit_threads(int count) { Threads::all().limit(count); }
