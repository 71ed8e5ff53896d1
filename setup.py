"""Builds the extension that decodes JPEG files; setup.cfg says everything else."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "data._native",
            [f"data/native/{part}.c" for part in ("decode", "module", "region", "resample")],
            depends=["data/native/native.h"],
            libraries=["jpeg", "m"],
            extra_compile_args=["-std=gnu11", "-O3"],
            optional=True,  # without libjpeg-turbo's headers Pillow does its work
        )
    ]
)
