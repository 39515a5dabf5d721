"""What setup.cfg cannot say: the compiled operations, which an installation without a C++ compiler goes without."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildOrGoWithout(build_ext):
    """Says in one line what an installation goes without where the compiler cannot."""

    def build_extension(self, extension):
        try:
            super().build_extension(extension)
        except Exception as error:  # Each compiler has its own.
            reason = " ".join(str(error).split())
            print(f"keras_bn goes without its compiled operations, only slower on a CPU: {reason}", file=sys.stderr)


setup(
    cmdclass={"build_ext": BuildOrGoWithout},
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
            optional=True,
        )
    ],
    # It knows nothing of Python: one wheel for all versions.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
