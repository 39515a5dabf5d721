// The operations NormalizeBatch, NormalizeBatchGrad and Normalize, through TensorFlow's C interface, which is the same
// in all its versions: so no header of it is needed. A test holds what is declared here to the installed headers.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <new>

#include "kernels.h"

// The values that are used.
enum TF_Code { TF_OK = 0, TF_INVALID_ARGUMENT = 3, TF_RESOURCE_EXHAUSTED = 8, TF_UNIMPLEMENTED = 12 };
enum TF_DataType { TF_FLOAT = 1, TF_BFLOAT16 = 14, TF_HALF = 19 };

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
void TF_SetStatus(TF_Status*, TF_Code code, const char* message);
TF_Code TF_GetCode(const TF_Status*);
const char* TF_Message(const TF_Status*);
void TF_DeleteTensor(TF_Tensor*);
int TF_NumDims(const TF_Tensor*);
int64_t TF_Dim(const TF_Tensor*, int);
void* TF_TensorData(const TF_Tensor*);
int64_t TF_TensorElementCount(const TF_Tensor*);
void TF_GetInput(TF_OpKernelContext*, int, TF_Tensor**, TF_Status*);
TF_Tensor* TF_AllocateOutput(TF_OpKernelContext*, int, TF_DataType, const int64_t* sizes, int rank, size_t, TF_Status*);
TF_Tensor* TF_ForwardInputOrAllocateOutput(TF_OpKernelContext*, const int* inputs, int input_count, int output,
                                           const int64_t* sizes, int rank, int* forwarded, TF_Status*);
void TF_OpKernelContext_Failure(TF_OpKernelContext*, TF_Status*);
void TF_OpKernelConstruction_Failure(TF_OpKernelConstruction*, TF_Status*);
void TF_OpKernelConstruction_GetAttrInt64(TF_OpKernelConstruction*, const char*, int64_t*, TF_Status*);
void TF_OpKernelConstruction_GetAttrFloat(TF_OpKernelConstruction*, const char*, float*, TF_Status*);
void TF_OpKernelConstruction_GetAttrBool(TF_OpKernelConstruction*, const char*, unsigned char*, TF_Status*);
void TF_OpKernelConstruction_GetAttrString(TF_OpKernelConstruction*, const char*, char*, size_t, TF_Status*);
TF_KernelBuilder* TF_NewKernelBuilder(const char* operation, const char* device, void* (*)(TF_OpKernelConstruction*),
                                      void (*)(void*, TF_OpKernelContext*), void (*)(void*));
void TF_KernelBuilder_TypeConstraint(TF_KernelBuilder*, const char*, TF_DataType type, TF_Status*);
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
void TF_ShapeInferenceContextGetInput(TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*);
void TF_ShapeInferenceContextSetOutput(TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*);
}

namespace {

constexpr int kMaxRank = 254;

template <class T> constexpr TF_DataType type_of = TF_FLOAT;
template <> constexpr TF_DataType type_of<bfloat16> = TF_BFLOAT16;
template <> constexpr TF_DataType type_of<half> = TF_HALF;

struct Attributes {
  int64_t first_axis, last_axis;
  float epsilon, rate;
  unsigned char unbiased;
  char warning[512];
  std::atomic<bool> warned;
};

template <bool moves>
void* create(TF_OpKernelConstruction* construction) {
  auto* attributes = new (std::nothrow) Attributes{};
  TF_Status* status = TF_NewStatus();
  if (attributes == nullptr) TF_SetStatus(status, TF_RESOURCE_EXHAUSTED, "There is no memory for the attributes.");
  const auto read = [=](auto get, const char* name, auto... value) {
    if (!TF_GetCode(status)) get(construction, name, value..., status);
  };
  read(TF_OpKernelConstruction_GetAttrInt64, "first_axis", &attributes->first_axis);
  read(TF_OpKernelConstruction_GetAttrInt64, "last_axis", &attributes->last_axis);
  read(TF_OpKernelConstruction_GetAttrFloat, "epsilon", &attributes->epsilon);
  if (moves) {
    read(TF_OpKernelConstruction_GetAttrFloat, "rate", &attributes->rate);
    read(TF_OpKernelConstruction_GetAttrBool, "unbiased", &attributes->unbiased);
    read(TF_OpKernelConstruction_GetAttrString, "warning", attributes->warning, sizeof attributes->warning - 1);
  }
  if (TF_GetCode(status)) TF_OpKernelConstruction_Failure(construction, status);
  TF_DeleteStatus(status);
  return attributes;
}

void destroy(void* attributes) { delete static_cast<Attributes*>(attributes); }

// The inputs and outputs of one call, given back at its end. After a failure `ok` is false: no data may be touched.
class Call {
 public:
  Call(TF_OpKernelContext* context, int inputs) : context_(context) {
    for (; count_ < inputs && ok(); ++count_) {
      TF_GetInput(context_, count_, &held_[count_], status_);
      if (ok()) data_[count_] = TF_TensorData(held_[count_]);
    }
  }

  ~Call() {
    if (!ok()) TF_OpKernelContext_Failure(context_, status_);
    for (int i = 0; i < count_; ++i)
      if (held_[i] != nullptr) TF_DeleteTensor(held_[i]);
    TF_DeleteStatus(status_);
  }

  bool ok() const { return TF_GetCode(status_) == TF_OK; }

  void fail(TF_Code code, const char* message) {
    if (ok()) TF_SetStatus(status_, code, message);
  }

  template <class T>
  const T* data(int i) const { return static_cast<const T*>(data_[i]); }

  // The sizes of an input as channels between two axes, of each of which `vectors` must hold one value.
  Shape shape(int i, const Attributes& attributes, std::initializer_list<int> vectors) {
    Shape shape{1, 1, 1};
    if (!ok()) return shape;
    for (int k = 0; k < TF_NumDims(held_[i]); ++k) {
      const bool before = k < attributes.first_axis, within = k <= attributes.last_axis;
      (before ? shape.examples : within ? shape.channels : shape.values) *= TF_Dim(held_[i], k);
    }
    for (int vector : vectors) same_size(vector, shape.channels, "A vector must hold one value for each channel.");
    return shape.size() ? shape : Shape{0, shape.channels, 1};
  }

  void same_size(int i, int64_t size, const char* message) {
    if (ok() && TF_TensorElementCount(held_[i]) != size) fail(TF_INVALID_ARGUMENT, message);
  }

  int64_t size(int i) const { return ok() ? TF_TensorElementCount(held_[i]) : 0; }

  // An output of the shape of an input.
  template <class T>
  T* output(int i, int like) {
    if (!ok()) return nullptr;
    int64_t sizes[kMaxRank], count = 1;
    const int rank = TF_NumDims(held_[like]);
    for (int k = 0; k < rank; ++k) count *= sizes[k] = TF_Dim(held_[like], k);
    return hold<T>(TF_AllocateOutput(context_, i, type_of<T>, sizes, rank, size_t(count) * sizeof(T), status_));
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
    return hold<T>(TF_ForwardInputOrAllocateOutput(context_, &input, 1, i, sizes, rank, &forwarded, status_));
  }

 private:
  template <class T>
  T* hold(TF_Tensor* output) {
    if (!ok()) return nullptr;
    held_[count_++] = output;
    return static_cast<T*>(TF_TensorData(output));
  }

  TF_OpKernelContext* context_;
  TF_Status* status_ = TF_NewStatus();
  TF_Tensor* held_[12] = {};
  const void* data_[12] = {};
  int count_ = 0;
};

float moved(float moving, float batch, float rate) {
  const float way = batch - moving;
  return rate < 0.5f ? moving + rate * way : batch - (1 - rate) * way;
}

template <class T>
void normalize_batch(Call& call, Attributes& attributes) {
  const Shape shape = call.shape(0, attributes, {1, 2, 3, 4});
  auto* y = call.output<T>(0, 0);
  auto* mean = call.output<float>(1, 1);
  auto* m2 = call.output<float>(2, 1);
  auto* rest = call.output<float>(3, 1);
  auto* moved_mean = call.output<float>(4, 3);
  auto* moved_variance = call.output<float>(5, 4);
  if (!call.ok()) return;
  const float count = float(shape.count());
  if (count == 1 && attributes.warning[0] && !attributes.warned.exchange(true))
    fprintf(stderr, "%s\n", attributes.warning);
  normalize_batch(call.data<T>(0), call.data<float>(1), call.data<float>(2), shape, attributes.epsilon, y, mean, m2,
                  rest);
  const float *moving_mean = call.data<float>(3), *moving_variance = call.data<float>(4);
  for (int64_t c = 0; c < shape.channels; ++c) {
    const bool counts = count > 1 && std::isfinite(m2[c]);
    const float variance = m2[c] / (attributes.unbiased ? count - 1 : count);
    moved_mean[c] = counts ? moved(moving_mean[c], mean[c], attributes.rate) : moving_mean[c];
    moved_variance[c] = counts ? moved(moving_variance[c], variance, attributes.rate) : moving_variance[c];
  }
}

template <class T>
void normalize_batch_grad(Call& call, Attributes& attributes) {
  const Shape shape = call.shape(1, attributes, {2, 3, 4, 5});
  call.same_size(0, call.size(1), "The tensors must be of one size.");
  auto* dx = call.output_over<T>(0, 0);
  auto* dgamma = call.output<float>(1, 2);
  auto* dbeta = call.output<float>(2, 2);
  if (!call.ok()) return;
  normalize_batch_grad(call.data<T>(0), call.data<T>(1), call.data<float>(2), call.data<float>(3), call.data<float>(4),
                       call.data<float>(5), shape, attributes.epsilon, dx, dgamma, dbeta);
}

template <class T>
void normalize(Call& call, Attributes& attributes) {
  const Shape shape = call.shape(0, attributes, {1, 2, 3, 4});
  auto* y = call.output_over<T>(0, 0);
  if (!call.ok()) return;
  normalize(call.data<T>(0), call.data<float>(1), call.data<float>(2), call.data<float>(3), call.data<float>(4), shape,
            attributes.epsilon, y);
}

template <int inputs, void (*compute)(Call&, Attributes&)>
void run_kernel(void* attributes, TF_OpKernelContext* context) {
  Call call(context, inputs);
  if (!call.ok()) return;
  try {
    compute(call, *static_cast<Attributes*>(attributes));
  } catch (const std::bad_alloc&) {
    call.fail(TF_RESOURCE_EXHAUSTED, "There is no memory for the sums of the channels.");
  }
}

void* refuse(TF_OpKernelConstruction* construction) {
  TF_Status* status = TF_NewStatus();
  TF_SetStatus(status, TF_UNIMPLEMENTED,
               "XLA cannot compile keras_bn's own operations. A function that is traced by itself and then called "
               "within jit_compile=True needs layers made with kernel=\"plain\".");
  TF_OpKernelConstruction_Failure(construction, status);
  TF_DeleteStatus(status);
  return nullptr;
}

void compute_nothing(void*, TF_OpKernelContext*) {}

// Output number `i` has the shape of the input `like[i]`.
template <int... like>
void infer_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  TF_ShapeHandle* shape = TF_NewShapeHandle();
  int i = 0;
  for (int input : {like...}) {
    if (!TF_GetCode(status)) TF_ShapeInferenceContextGetInput(context, input, shape, status);
    if (!TF_GetCode(status)) TF_ShapeInferenceContextSetOutput(context, i++, shape, status);
  }
  TF_DeleteShapeHandle(shape);
}

using Names = std::initializer_list<const char*>;

void register_operation(const char* name, Names attributes, Names inputs, Names outputs,
                        void (*shapes)(TF_ShapeInferenceContext*, TF_Status*), TF_Status* status) {
  TF_OpDefinitionBuilder* builder = TF_NewOpDefinitionBuilder(name);
  for (const char* attribute : {"T: {float, bfloat16, half}", "first_axis: int", "last_axis: int", "epsilon: float"})
    TF_OpDefinitionBuilderAddAttr(builder, attribute);
  for (const char* attribute : attributes) TF_OpDefinitionBuilderAddAttr(builder, attribute);
  for (const char* input : inputs) TF_OpDefinitionBuilderAddInput(builder, input);
  for (const char* output : outputs) TF_OpDefinitionBuilderAddOutput(builder, output);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(builder, shapes);
  TF_RegisterOpDefinition(builder, status);
}

void register_kernel(const char* name, const char* device, TF_DataType type, void* (*create)(TF_OpKernelConstruction*),
                     void (*compute)(void*, TF_OpKernelContext*), TF_Status* status) {
  if (TF_GetCode(status)) return;
  TF_KernelBuilder* builder = TF_NewKernelBuilder(name, device, create, compute, destroy);
  TF_KernelBuilder_TypeConstraint(builder, "T", type, status);
  if (!TF_GetCode(status)) TF_RegisterKernelBuilder(name, builder, status);
}

template <class T>
void register_kernels(TF_Status* status) {
  constexpr char names[][32] = {"KerasBn>NormalizeBatch", "KerasBn>NormalizeBatchGrad", "KerasBn>Normalize"};
  register_kernel(names[0], "CPU", type_of<T>, create<true>, run_kernel<5, normalize_batch<T>>, status);
  register_kernel(names[1], "CPU", type_of<T>, create<false>, run_kernel<6, normalize_batch_grad<T>>, status);
  register_kernel(names[2], "CPU", type_of<T>, create<false>, run_kernel<5, normalize<T>>, status);
  // So that XLA says what to do.
  for (const char* name : names) register_kernel(name, "XLA_CPU_JIT", type_of<T>, refuse, compute_nothing, status);
}

// TensorFlow collects what is registered while it loads a library of operations.
__attribute__((constructor)) void register_all() {
  TF_Status* status = TF_NewStatus();
  register_operation("KerasBn>NormalizeBatch", {"rate: float = 0", "unbiased: bool = false", "warning: string = ''"},
                     {"x: T", "gamma: float", "beta: float", "moving_mean: float", "moving_variance: float"},
                     {"y: T", "mean: float", "m2: float", "rest: float", "moved_mean: float", "moved_variance: float"},
                     infer_shapes<0, 1, 1, 1, 3, 4>, status);
  register_operation("KerasBn>NormalizeBatchGrad", {},
                     {"dy: T", "x: T", "gamma: float", "mean: float", "m2: float", "rest: float"},
                     {"dx: T", "dgamma: float", "dbeta: float"}, infer_shapes<1, 2, 2>, status);
  register_operation("KerasBn>Normalize", {},
                     {"x: T", "mean: float", "variance: float", "gamma: float", "beta: float"}, {"y: T"},
                     infer_shapes<0>, status);
  register_kernels<float>(status);
  register_kernels<bfloat16>(status);
  register_kernels<half>(status);
  if (TF_GetCode(status)) fprintf(stderr, "keras_bn: the operations are not registered: %s\n", TF_Message(status));
  TF_DeleteStatus(status);
}

}  // namespace

// How many threads may share the work on one tensor.
extern "C" __attribute__((visibility("default"))) void keras_bn_limit_threads(int count) {
  Threads::shared().limit(count);
}
