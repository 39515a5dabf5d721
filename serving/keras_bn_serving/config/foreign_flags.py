"""The flags of tensorflow_model_server that `keras-bn serve` has no use for, and what becomes of them."""

# They change no answer: how files are read, threads, pools, profiling, TPUs and GPUs, what is always on here.
WITHOUT_EFFECT = (
    "enable_grpc_healthcheck_service",
    "enable_profiler",
    "flush_filesystem_caches",
    "grpc_channel_arguments",
    "grpc_max_threads",
    "num_load_threads",
    "num_tflite_interpreters_per_pool",
    "num_tflite_pools",
    "num_unload_threads",
    "per_process_gpu_memory_fraction",
    "remove_unused_fields_from_bundle_metagraph",
    "skip_initialize_tpu",
    "tensorflow_session_config_file",
    "thread_pool_factory_config_file",
    "xla_gpu_compilation_enabled",
)

# What they ask for is not done here. The value that is the default there asks for nothing.
REFUSED = {
    "enable_per_model_batching_parameters": ("false", "use --batching_parameters_file, which is for all models"),
    "enable_serialization_as_tensor_content": (
        "false",
        "gRPC answers stand in the typed fields, as they do by default",
    ),
    "enable_signature_method_name_check": ("false", "the method name of a signature is not looked at"),
    "mixed_precision": ("", "export the model in the precision that it is to have"),
    "platform_config_file": ("", "use --enable_batching, --batching_parameters_file and the parallelism flags"),
    "prefer_tflite_model": ("false", "SavedModels are served, not TensorFlow Lite files"),
    "saved_model_tags": ("serve", "the graph tagged 'serve' is served"),
    "use_alts_credentials": ("false", "use --ssl_config_file"),
}
