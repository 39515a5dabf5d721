"""What setup.cfg cannot say: the compiled operations, which an installation without a C++ compiler goes without."""

from pathlib import Path

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "keras_bn.ops._operations",
            ["keras_bn/ops/csrc/ops.cc"],
            depends=sorted(str(header) for header in Path("keras_bn/ops/csrc").glob("*.h")),
            language="c++",
            # TensorFlow, which is there before it loads them, has the symbols that stay open.
            extra_compile_args=[
                "-std=c++17",
                "-pthread",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-fno-trapping-math",
            ],
            extra_link_args=["-pthread"],
            py_limited_api=True,
            # Where it fails, one line says so, and `keras_bn.compiled()`.
            optional=True,
        )
    ],
    # It knows nothing of Python: one wheel for all versions.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
