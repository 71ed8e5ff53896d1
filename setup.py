"""Builds the extension that decodes JPEG files; setup.cfg says everything else."""

from setuptools import Extension, setup

PARTS = ("decode", "module", "region", "resample", "scan")

setup(
    ext_modules=[
        Extension(
            "data._native",
            [f"data/native/{part}.c" for part in PARTS],
            depends=["data/native/native.h", "data/native/scan.h"],
            libraries=["jpeg", "m"],
            extra_compile_args=["-std=gnu11", "-O3"],
            optional=True,  # without libjpeg-turbo's headers Pillow does its work
        )
    ]
)
