// Batch normalization in one operation each way.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.h"
#include "interface.h"
#include "threads.h"

namespace {

using Compute = void (*)(void*, TF_OpKernelContext*);

// What a node of a graph is told when it is made.
struct Attributes {
  int64_t first_axis, last_axis;
  float epsilon, rate;
  unsigned char unbiased, warned;
  char warning[1024];
  Compute compute;
};

// The attributes of a node that `reader` finds; `moves` where it moves statistics.
void read(Reader& reader, Attributes* attributes, bool moves) {
  reader.read(TF_OpKernelConstruction_GetAttrInt64, "first_axis", &attributes->first_axis);
  reader.read(TF_OpKernelConstruction_GetAttrInt64, "last_axis", &attributes->last_axis);
  reader.read(TF_OpKernelConstruction_GetAttrFloat, "epsilon", &attributes->epsilon);
  if (!moves) return;
  reader.read(TF_OpKernelConstruction_GetAttrFloat, "rate", &attributes->rate);
  reader.read(TF_OpKernelConstruction_GetAttrBool, "unbiased", &attributes->unbiased);
  reader.read(TF_OpKernelConstruction_GetAttrString, "warning", attributes->warning, sizeof attributes->warning - 1);
}

Attributes* new_attributes() { return static_cast<Attributes*>(calloc(1, sizeof(Attributes))); }

template <bool moves>
void* create(TF_OpKernelConstruction* construction) {
  Attributes* attributes = new_attributes();
  Reader reader(construction, "");
  read(reader, attributes, moves);
  return attributes;
}

template <class T>
void normalize_batch(void* kernel, TF_OpKernelContext* context) {
  auto& attributes = *static_cast<Attributes*>(kernel);
  Call call(context, 5);
  if (!call.ok()) return;
  const Shape shape = call.shape(0, attributes.first_axis, attributes.last_axis, {1, 2, 3, 4});
  auto* y = call.output<T>(0, TypeOf<T>::value, 0);
  auto* mean = call.pair<float>(1, kFloat, 1);
  auto* m2 = mean + shape.channels;
  auto* moved_mean = call.output<float>(2, kFloat, 3);
  auto* moved_variance = call.output<float>(3, kFloat, 4);
  if (!call.ok()) return;
  if (shape.count() == 1 && attributes.warning[0] && !__atomic_exchange_n(&attributes.warned, 1, __ATOMIC_RELAXED))
    fprintf(stderr, "%s\n", attributes.warning);
  NormalizeBatch<T>{call.data<T>(0), call.data<float>(1), call.data<float>(2), y, mean, m2, shape, attributes.epsilon}
      .run();
  const float *moving_mean = call.data<float>(3), *moving_variance = call.data<float>(4), rate = attributes.rate;
  const float count = float(shape.count()), freedom = attributes.unbiased ? count - 1 : count;
  for (int64_t c = 0; c < shape.channels; ++c) {
    const bool counts = count > 1 && std::isfinite(m2[c]);
    const float variance = m2[c] / freedom;
    moved_mean[c] = counts ? moving_mean[c] + rate * (mean[c] - moving_mean[c]) : moving_mean[c];
    moved_variance[c] = counts ? moving_variance[c] + rate * (variance - moving_variance[c]) : moving_variance[c];
  }
}

template <class T>
void normalize_batch_grad(void* kernel, TF_OpKernelContext* context) {
  auto& attributes = *static_cast<Attributes*>(kernel);
  Call call(context, 4);
  if (!call.ok()) return;
  const Shape shape = call.shape(1, attributes.first_axis, attributes.last_axis, {2});
  call.same_size(0, 1);
  call.is_pair(3, 2);
  auto* dx = call.output_over<T>(0, 0);
  auto* dgamma = call.output<float>(1, kFloat, 2);
  auto* dbeta = call.output<float>(2, kFloat, 2);
  if (!call.ok()) return;
  const float* mean = call.data<float>(3);
  NormalizeBatchGrad<T>{call.data<T>(0), call.data<T>(1), call.data<float>(2), mean, mean + shape.channels,
                        dx, dgamma, dbeta, shape, attributes.epsilon}
      .run();
}

template <class T>
void normalize(void* kernel, TF_OpKernelContext* context) {
  auto& attributes = *static_cast<Attributes*>(kernel);
  Call call(context, 5);
  if (!call.ok()) return;
  const Shape shape = call.shape(0, attributes.first_axis, attributes.last_axis, {1, 2, 3, 4});
  auto* y = call.output_over<T>(0, 0);
  if (!call.ok()) return;
  Normalize<T>{call.data<T>(0), call.data<float>(1), call.data<float>(2), call.data<float>(3), call.data<float>(4),
               y, shape, attributes.epsilon}
      .run();
}

// Output number `i` has the shape of the input `like[i]`; where that is negative, it is a pair of the input `-like[i]`.
template <int... like>
void shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  int i = 0;
  for (int input : {like...}) {
    TF_ShapeHandle* shape = TF_NewShapeHandle();
    TF_ShapeInferenceContextGetInput(context, input < 0 ? -input : input, shape, status);
    if (input < 0 && !TF_GetCode(status)) {
      TF_ShapeHandle* two = TF_ShapeInferenceContextVectorFromSize(context, 2);
      TF_ShapeInferenceContextConcatenateShapes(context, two, shape, shape, status);
      TF_DeleteShapeHandle(two);
    }
    if (!TF_GetCode(status)) TF_ShapeInferenceContextSetOutput(context, i++, shape, status);
    TF_DeleteShapeHandle(shape);
  }
}

constexpr char kNormalizeBatch[] = "KerasBn>NormalizeBatch", kNormalizeBatchGrad[] = "KerasBn>NormalizeBatchGrad",
               kNormalize[] = "KerasBn>Normalize";

struct Kernel {
  const char* operation;
  int type, outputs;
  bool moves;
  Compute compute;
};

const Kernel kKernels[] = {
    {kNormalizeBatch, kFloat, 4, true, normalize_batch<float>},
    {kNormalizeBatch, kBfloat16, 4, true, normalize_batch<bfloat16>},
    {kNormalizeBatch, kHalf, 4, true, normalize_batch<half>},
    {kNormalizeBatchGrad, kFloat, 3, false, normalize_batch_grad<float>},
    {kNormalizeBatchGrad, kBfloat16, 3, false, normalize_batch_grad<bfloat16>},
    {kNormalizeBatchGrad, kHalf, 3, false, normalize_batch_grad<half>},
    {kNormalize, kFloat, 1, false, normalize<float>},
    {kNormalize, kBfloat16, 1, false, normalize<bfloat16>},
    {kNormalize, kHalf, 1, false, normalize<half>},
};

// For a node that calls a function of TensorFlow's operations and says which of ours does the same.
void* create_for_call(TF_OpKernelConstruction* construction) {
  Attributes* attributes = new_attributes();
  Reader reader(construction, "_keras_bn_");
  char operation[64] = {};
  int type = 0;
  reader.read(TF_OpKernelConstruction_GetAttrString, "operation", operation, sizeof operation - 1);
  reader.read(TF_OpKernelConstruction_GetAttrType, "T", &type);
  int outputs = 0, total;
  Reader(construction, "").read(TF_OpKernelConstruction_GetAttrSize, "Tout", &outputs, &total);
  for (const Kernel& kernel : kKernels) {
    if (type != kernel.type || strcmp(operation, kernel.operation) != 0) continue;
    attributes->compute = kernel.compute;
    read(reader, attributes, kernel.moves);
    // TensorFlow makes a call return more, to differentiate what it calls.
    if (outputs != kernel.outputs)
      reader.fail(
          "What was loaded with a keras_bn layer in it can be differentiated once, not twice. Differentiate the layer "
          "itself, or do not import keras_bn where it is loaded.");
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
                 {"y: T", "mean_and_m2: float", "moved_mean: float", "moved_variance: float"}, shapes<0, -1, 3, 4>);
  with.operation(kNormalizeBatchGrad, {type, first, last, epsilon},
                 {"dy: T", "x: T", "gamma: float", "mean_and_m2: float"},
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
