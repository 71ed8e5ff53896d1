"""What the extension in data/native offers; its documentation is in module.c."""

import numpy as np
from numpy.typing import NDArray

def decode(
    images: list[bytes | NDArray[np.uint8]],
    indexes: list[bytes | None],
    jobs: NDArray[np.int32],
    out: NDArray[np.uint8],
    /,
) -> list[str | None]: ...
def size(image: bytes, /) -> tuple[int, int]: ...
def check(image: bytes, /) -> None: ...
def build_index(image: bytes, /) -> bytes | None: ...
