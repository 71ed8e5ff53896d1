"""Imports every operator that has a form in Triton, which then offers itself to `choice`.

For models that are built here: exported ones do without.
"""

from . import triton_aggregated as triton_aggregated
from . import triton_attention as triton_attention
from . import triton_conv_glu as triton_conv_glu
from . import triton_dynamic_conv as triton_dynamic_conv
from . import triton_norm_conv as triton_norm_conv
